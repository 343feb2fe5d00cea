"""Access control: allowed Host headers, allowed origins, the API key, and CORS preflight responses.

Command-line values are normalized to the form that clients send; a value that can never match is an error at start-up.
"""

from __future__ import annotations

import hmac
import ipaddress
import re
from collections.abc import Mapping
from typing import NamedTuple
from urllib.parse import urlsplit

from loramix.errors import UsageError

LOOPBACK = ("localhost", "127.0.0.1", "::1")
_PORTS = {"http": 80, "https": 443}
_SCHEME = re.compile(r"[a-z][a-z0-9+.-]*")
_LABEL = re.compile(r"(?!-)[a-z0-9_-]{1,63}(?<!-)")
_FIELDS = re.compile(r"[\w!#$%&'*+.^`|~ ,-]{1,2000}", re.ASCII)
"""A list of header names in Access-Control-Request-Headers."""
METHODS = "GET, HEAD, POST, OPTIONS"


class AccessPolicy(NamedTuple):
    """Which requests the server accepts.

    Args:
        hosts: names allowed in the Host header in addition to loopback names; normalized by `host_of`.
        origins: web origins allowed in addition to loopback origins; normalized by `origin_of`.
        api_key: key that every API request must send; None disables the check.
        any_address: allow any IP address in the Host header; used when the server listens on all interfaces.
    """

    hosts: frozenset[str] = frozenset()
    origins: frozenset[str] = frozenset()
    api_key: str | None = None
    any_address: bool = False

    def host_allowed(self, header: str) -> bool:
        """Return whether a Host header names this server."""
        name = _host_name(header)
        if name is None:
            return False
        if name in LOOPBACK or name in self.hosts:
            return True
        try:  # DNS rebinding needs a name; an IP address cannot be rebound
            address = ipaddress.ip_address(name)
        except ValueError:
            return False
        return self.any_address or str(address) in self.hosts

    def origin_allowed(self, origin: str) -> bool:
        """Return whether pages of this origin may send requests."""
        if origin in self.origins:
            return True
        try:
            parts = urlsplit(origin)
            rest = parts.path or parts.query or parts.fragment or parts.username
            return parts.scheme in ("http", "https") and not rest and _host_name(parts.netloc) in LOOPBACK
        except ValueError:
            return False

    def key_allowed(self, header: str) -> bool:
        """Return whether an Authorization header holds the key; the comparison takes constant time."""
        if self.api_key is None:
            return True
        scheme, _, given = header.partition(" ")
        right = hmac.compare_digest(given.strip().encode("latin-1", "replace"), self.api_key.encode())
        return right and scheme.lower() == "bearer"


def _host_name(header: str) -> str | None:
    """Return the lower-case name in ``name:port``, or None if the header is malformed."""
    name, port = header.strip().lower(), ""
    if name.startswith("["):
        name, closed, port = name[1:].partition("]")
        if not closed or (port and not port.startswith(":")):
            return None
        port = port[1:]
    elif name.count(":") == 1:
        name, _, port = name.partition(":")
    if not name or (port and not (port.isascii() and port.isdigit())):
        return None
    return name


def same_origin(origin: str, host: str) -> bool:
    """Return whether an Origin header and a Host header name the same server."""
    scheme, _, place = origin.lower().partition("://")
    return scheme in ("http", "https") and place == host.strip().lower()


def preflight(headers: Mapping[str, str]) -> list[tuple[str, str]]:
    """Return the headers of a preflight response; every requested header is allowed.

    Args:
        headers: headers of the OPTIONS request, names in lower case.
    """
    asked = headers.get("access-control-request-headers", "")
    fields = asked if _FIELDS.fullmatch(asked) else "Authorization, Content-Type"
    found = [
        ("Allow", METHODS),
        ("Access-Control-Allow-Methods", METHODS),
        ("Access-Control-Allow-Headers", fields),
        ("Access-Control-Max-Age", "600"),
        ("Vary", "Access-Control-Request-Headers"),
    ]
    if headers.get("access-control-request-private-network") == "true":
        found.append(("Access-Control-Allow-Private-Network", "true"))
    return found


def host_of(text: str, option: str = "--allow-host") -> str:
    """Normalize a host name or address for `AccessPolicy`: lower case, no port, no brackets, no trailing dot.

    Args:
        text: value of the option.
        option: name of the option, for error messages.

    Raises:
        UsageError: the text is not exactly one host.
    """
    given = text.strip()
    use = "can match no Host header" if option == "--allow-host" else "is not an address to listen on"
    advice = f"{option} {text!r} {use}: give one name or address, as 'box.lan'"
    if "://" in given or "/" in given:
        raise UsageError(f"{advice}, without a scheme or a path.")
    if "*" in given:
        raise UsageError(f"{advice}; wildcards are not supported, so repeat the option for each name.")
    name, port = _split_port(given)
    if name is None or (port and not 0 < int(port) < 65_536):
        raise UsageError(f"{advice}.")
    if port and option == "--host":
        raise UsageError(f"{option} {text!r} contains a port; give it as --port {int(port)}.")
    found = _normalize_host(name)
    if found is None:
        raise UsageError(f"{advice}.")
    return found


def origin_of(text: str) -> str:
    """Normalize an origin to the form that browsers send: scheme, host, and the port unless it is the default.

    Args:
        text: value of ``--allow-origin``.

    Raises:
        UsageError: the text is not an origin.
    """
    given = text.strip()
    advice = f"--allow-origin {text!r} can match no page: give its scheme and host, as 'https://chat.example'"
    if "*" in given:
        raise UsageError(f"{advice}; wildcards are not supported, so repeat the option for each origin.")
    scheme, found, rest = given.partition("://")
    scheme = scheme.lower()
    if not found or not _SCHEME.fullmatch(scheme) or scheme == "file":
        raise UsageError(f"{advice}.")
    place = rest.removesuffix("/")
    name, port = _split_port(place)
    bare = ":" in (name or "") and not place.startswith("[")
    if name is None or bare or (port and not 0 < int(port) < 65_536):
        raise UsageError(f"{advice}, without a path, a user or a query.")
    host = _normalize_host(name)
    if host is None:
        raise UsageError(f"{advice}.")
    if ":" in host:
        host = f"[{host}]"
    return f"{scheme}://{host}" + (f":{int(port)}" if port and int(port) != _PORTS.get(scheme) else "")


def _split_port(place: str) -> tuple[str | None, str]:
    """Split ``name:port``, ``[address]:port`` or a bare address; the name is None if the text is malformed."""
    if place.startswith("["):
        name, closed, port = place[1:].partition("]")
        if not closed or ":" not in name or (port and not port.startswith(":")):
            return None, ""
        port = port[1:]
    elif place.count(":") == 1:
        name, _, port = place.partition(":")
    else:
        name, port = place, ""
    return (None, "") if port and not re.fullmatch("[0-9]{1,5}", port) else (name, port)


def _normalize_host(name: str) -> str | None:
    """Return a name or address in the form that clients send; None if it is neither."""
    name = name.removesuffix(".")
    if ":" in name or re.fullmatch(r"[0-9.]+", name):
        try:
            return None if "%" in name else str(ipaddress.ip_address(name))
        except ValueError:
            return None
    try:
        name = name.encode("idna").decode().lower()
    except UnicodeError:
        return None
    labels = name.split(".")
    return name if all(_LABEL.fullmatch(label) for label in labels) and len(name) < 254 else None
