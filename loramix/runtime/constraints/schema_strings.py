"""String formats of JSON Schema as regular expressions for llguidance.

Each is a subset of its RFC, so that every validator accepts the answer: no 29 February in a common year, no leap
second, no quoted local part of an address.
"""

from __future__ import annotations

from loramix.runtime.constraints.schema_patterns import rewritten

_YEAR, _LEAP = (
    r"[1-9]\d{3}",
    r"(?:[1-9]\d(?:0[48]|[2468][048]|[13579][26])|(?:[2468][048]|[13579][26])00)",
)
_DATE = (
    rf"(?:{_YEAR}-(?:(?:0[13578]|1[02])-(?:0[1-9]|[12]\d|3[01])|(?:0[469]|11)-(?:0[1-9]|[12]\d|30)"
    rf"|02-(?:0[1-9]|1\d|2[0-8]))|{_LEAP}-02-29)"
)
_HOURS = r"(?:[01]\d|2[0-3]):[0-5]\d"
_TIME = rf"{_HOURS}:[0-5]\d(?:\.\d{{1,6}})?(?:Z|[+-]{_HOURS})"
_DAY_TIME = r"T(?:\d{1,4}H(?:\d{1,4}M(?:\d{1,4}S)?)?|\d{1,4}M(?:\d{1,4}S)?|\d{1,4}S)"
_DURATION = (
    r"P(?:\d{1,4}W|(?:\d{1,4}Y(?:\d{1,4}M(?:\d{1,4}D)?)?|\d{1,4}M(?:\d{1,4}D)?|\d{1,4}D)"
    rf"(?:{_DAY_TIME})?|{_DAY_TIME})"
)
_WORD = r"[a-zA-Z0-9]{1,20}(?:-[a-zA-Z0-9]{1,20})?"
_HOST = rf"(?:{_WORD}\.){{0,3}}[a-zA-Z]{{2,20}}"
_EMAIL = rf"[a-zA-Z0-9_+-]{{1,30}}(?:\.[a-zA-Z0-9_+-]{{1,15}}){{0,2}}@(?:{_WORD}\.){{1,3}}[a-zA-Z]{{2,20}}"
_OCTET = r"(?:25[0-5]|2[0-4]\d|1\d\d|[1-9]?\d)"
_GROUP = r"[0-9a-fA-F]{1,4}"
_CHARACTER = r"(?:[a-zA-Z0-9._~!$&'()*+,;=:@-]|%[0-9a-fA-F]{2})"
_PATH = rf"(?:/{_CHARACTER}*)*"
_REST = rf"(?:\?(?:{_CHARACTER}|[/?])*)?(?:#(?:{_CHARACTER}|[/?])*)?"
_URI = (
    rf"(?:[a-z][a-z0-9+.-]{{1,15}}://(?:{_HOST}|{_OCTET}(?:\.{_OCTET}){{3}})(?::[1-9]\d{{0,3}})?{_PATH}{_REST}"
    rf"|(?:mailto|tel|urn|data):{_CHARACTER}+{_REST})"
)
_POINTER = r"(?:/(?:[^/~]|~[01])*)*"

FORMATS = {
    "date": _DATE,
    "time": _TIME,
    "date-time": rf"{_DATE}T{_TIME}",
    "duration": _DURATION,
    "email": _EMAIL,
    "idn-email": _EMAIL,
    "hostname": _HOST,
    "idn-hostname": _HOST,
    "ipv4": rf"{_OCTET}(?:\.{_OCTET}){{3}}",
    "ipv6": rf"(?:(?:{_GROUP}:){{7}}{_GROUP}|(?:{_GROUP}:){{1,3}}(?::{_GROUP}){{1,3}}|::(?:{_GROUP})?)",
    "uuid": r"[0-9a-fA-F]{8}-[0-9a-fA-F]{4}-[1-8][0-9a-fA-F]{3}-[89abAB][0-9a-fA-F]{3}-[0-9a-fA-F]{12}",
    "uri": _URI,
    "iri": _URI,
    "uri-template": _URI,
    "uri-reference": rf"(?:{_URI}|/{_CHARACTER}+{_PATH}{_REST})",
    "iri-reference": rf"(?:{_URI}|/{_CHARACTER}+{_PATH}{_REST})",
    "json-pointer": _POINTER,
    "relative-json-pointer": rf"(?:0|[1-9]\d{{0,5}})(?:#|{_POINTER})",
}
"""All formats of JSON Schema except ``regex``; others, such as ``password``, are annotations."""

# replacements of Zod's and Pydantic's patterns with look-around for addresses, durations and decimals
_KNOWN = {
    r"^(?!\.)(?!.*\.\.)([A-Za-z0-9_'+\-\.]*)[A-Za-z0-9_+-]@([A-Za-z0-9][A-Za-z0-9\-]*\.)+[A-Za-z]{2,}$": _EMAIL,
    r"^P(?:(\d+W)|(?!.*W)(?=\d|T\d)(\d+Y)?(\d+M)?(\d+D)?(T(?=\d)(\d+H)?(\d+M)?(\d+([.,]\d+)?S)?)?)$": _DURATION,
    r"^(?!^[-+.]*$)[+-]?0*\d*\.?\d*$": r"[+-]?(?:\d{1,20}(?:\.\d{0,20})?|\.\d{1,20})",
}


def as_patterns(pattern: str | None, format_: str | None) -> list[str]:
    """Return patterns that together enforce a pattern and a format.

    Args:
        pattern: a regular expression, matched anywhere in the string, or None.
        format_: a name of `FORMATS`; other names are ignored.

    Raises:
        ValueError: the pattern cannot be rewritten for llguidance.
    """
    found: list[str] = []
    # "time" has an offset in RFC 3339; with a pattern, as Zod writes it, the pattern defines the time
    if format_ in FORMATS and not (format_ == "time" and pattern is not None):
        found.append(rf"^(?:{FORMATS[format_]})$")
    if pattern in _KNOWN:
        found.append(rf"^(?:{_KNOWN[pattern]})$")
    elif pattern is not None:
        found += rewritten(pattern)
    return list(dict.fromkeys(found))
