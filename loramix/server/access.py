"""Who may ask: names in the Host header, web pages' origins, the API key, and what a page's browser asks first.

Options are put into the form in which clients send them, or refused at the start: one that never matches helps nobody.
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
"""Names of headers, as a browser lists them."""
METHODS = "GET, HEAD, POST, OPTIONS"


class AccessPolicy(NamedTuple):
    """Who may ask.

    Args:
        hosts: names that the Host header may give, beside those of this machine; as `host_of` gives them.
        origins: web pages' origins that may ask, beside those of this machine; as `origin_of` gives them.
        api_key: what every request must bring; None for none.
        any_address: any IP address may stand in the Host header, as where the server listens on all of them.
    """

    hosts: frozenset[str] = frozenset()
    origins: frozenset[str] = frozenset()
    api_key: str | None = None
    any_address: bool = False

    def host_allowed(self, header: str) -> bool:
        """Whether a Host header names this server."""
        name = _named(header)
        if name is None:
            return False
        if name in LOOPBACK or name in self.hosts:
            return True
        try:  # only a name can be pointed at somebody else's machine
            address = ipaddress.ip_address(name)
        except ValueError:
            return False
        return self.any_address or str(address) in self.hosts

    def origin_allowed(self, origin: str) -> bool:
        """Whether a page of that origin may ask."""
        if origin in self.origins:
            return True
        try:
            parts = urlsplit(origin)
            rest = parts.path or parts.query or parts.fragment or parts.username
            return parts.scheme in ("http", "https") and not rest and _named(parts.netloc) in LOOPBACK
        except ValueError:
            return False

    def key_allowed(self, header: str) -> bool:
        """Whether an Authorization header brings the key; compared in constant time."""
        if self.api_key is None:
            return True
        scheme, _, given = header.partition(" ")
        right = hmac.compare_digest(given.strip().encode("latin-1", "replace"), self.api_key.encode())
        return right and scheme.lower() == "bearer"


def _named(header: str) -> str | None:
    """The name in ``name:port``, lower case, or None where there is none."""
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
    """Whether an Origin header names the server that a Host header names."""
    scheme, _, place = origin.lower().partition("://")
    return scheme in ("http", "https") and place == host.strip().lower()


def preflight(headers: Mapping[str, str]) -> list[tuple[str, str]]:
    """Headers of the answer to OPTIONS, for an origin that may ask: whatever its page wants to send.

    Args:
        headers: of the request, names in lower case.
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
    """A host's name or address as `AccessPolicy` compares it: lower case, without port, brackets or last dot.

    Args:
        text: as a user gives it.
        option: named in messages.

    Raises:
        UsageError: no host, or more than one.
    """
    given = text.strip()
    use = "can match no Host header" if option == "--allow-host" else "is no address to listen on"
    advice = f"{option} {text!r} {use}: give one name or address, as 'box.lan'"
    if "://" in given or "/" in given:
        raise UsageError(f"{advice}, without a scheme or a path.")
    if "*" in given:
        raise UsageError(f"{advice}; wildcards are not known, so give the option again for each name.")
    name, port = _split(given)
    if name is None or (port and not 0 < int(port) < 65_536):
        raise UsageError(f"{advice}.")
    if port and option == "--host":
        raise UsageError(f"{option} {text!r} holds a port; give it as --port {int(port)}.")
    found = _normal(name)
    if found is None:
        raise UsageError(f"{advice}.")
    return found


def origin_of(text: str) -> str:
    """An origin as browsers send it: scheme, host and port where it is not the usual one; no path.

    Args:
        text: as a user gives it.

    Raises:
        UsageError: no origin.
    """
    given = text.strip()
    advice = f"--allow-origin {text!r} can match no page: give its scheme and host, as 'https://chat.example'"
    if "*" in given:
        raise UsageError(f"{advice}; wildcards are not known, so give the option again for each origin.")
    scheme, found, rest = given.partition("://")
    scheme = scheme.lower()
    if not found or not _SCHEME.fullmatch(scheme) or scheme == "file":
        raise UsageError(f"{advice}.")
    place = rest.removesuffix("/")
    name, port = _split(place)
    bare = ":" in (name or "") and not place.startswith("[")
    if name is None or bare or (port and not 0 < int(port) < 65_536):
        raise UsageError(f"{advice}, without a path, a user or a query.")
    host = _normal(name)
    if host is None:
        raise UsageError(f"{advice}.")
    if ":" in host:
        host = f"[{host}]"
    return f"{scheme}://{host}" + (f":{int(port)}" if port and int(port) != _PORTS.get(scheme) else "")


def _split(place: str) -> tuple[str | None, str]:
    """Name and port of ``name:port``, ``[address]:port``, or an address alone; None where it is neither."""
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


def _normal(name: str) -> str | None:
    """A name or address in the one form that clients send; None where it is neither."""
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
