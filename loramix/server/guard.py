"""ASGI middleware in front of all endpoints: access checks and limits on the body.

It checks, before anything is parsed: Host (DNS rebinding), Origin (pages of other sites), the API key, the content
type (browsers send text/plain across origins without a preflight), and the size, depth and validity of the JSON.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any

import msgspec

from loramix.errors import UsageError
from loramix.formats.textfile import decode_text
from loramix.server.access import AccessPolicy, preflight, same_origin

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

MAX_BODY = 2**20
MAX_DEPTH = 32
MAX_VALUES = 100_000
BODY_S = 20.0
"""Seconds within which the complete body must arrive."""
SEND_S = 30.0
"""Seconds within which a client must accept a piece of a response."""
KEYED = ("/v1", "/api", "/metrics", "/openapi.json")


class Refusal(Exception):
    """A rejected request, with the status of the response."""

    def __init__(self, status: int, message: str, headers: Iterable[tuple[str, str]] = ()) -> None:
        super().__init__(message)
        self.status, self.headers = status, list(headers)


class Guard:
    """ASGI middleware that rejects a request, or passes it on with its body read and validated.

    Args:
        app: the wrapped application.
        policy: access policy.
    """

    def __init__(self, app: App, policy: AccessPolicy) -> None:
        self._app, self._policy = app, policy

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Check the request's headers and body, then reject it or pass it on."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close"})
            return
        headers = {
            name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]
        }
        origin = headers.get("origin")
        cors = [(b"vary", b"Origin"), (b"x-content-type-options", b"nosniff")]
        if origin is not None and self._policy.origin_allowed(origin):
            cors.append((b"access-control-allow-origin", origin.encode("latin-1")))

        slow = False

        async def guarded(message: Message) -> None:
            nonlocal slow
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", []), *cors]}
            elif scope["method"] == "HEAD":
                message = {**message, "body": b""}
            try:
                async with asyncio.timeout(SEND_S):
                    await send(message)
            except TimeoutError:
                slow = True
                raise

        try:
            self._check(scope, headers, origin)
            if scope["method"] == "OPTIONS":
                await _reply(guarded, 204, None, preflight(headers))
                return
            body = await _body(scope, headers, receive)
        except Refusal as refusal:
            await _reply(
                guarded,
                refusal.status,
                error_body(scope["path"], str(refusal), refusal.status),
                refusal.headers,
            )
            return
        sent = False

        async def replay() -> Message:
            nonlocal sent
            if not sent:
                sent = True
                return {"type": "http.request", "body": body, "more_body": False}
            return await receive()

        try:
            await self._app(_as_json(scope), replay, guarded)
        except Exception:
            if not slow:  # a client that stopped reading is disconnected; that is not a server error
                raise

    def _check(self, scope: MutableMapping[str, Any], headers: dict[str, str], origin: str | None) -> None:
        policy, path = self._policy, scope["path"]
        hosts = sum(name.lower() == b"host" for name, _ in scope["headers"])
        if hosts > 1 or not policy.host_allowed(headers.get("host", "")):
            raise Refusal(
                403,
                "the Host header names another server; start the server with --allow-host NAME to allow it.",
            )
        own = origin is not None and same_origin(origin, headers.get("host", ""))  # the built-in page
        if origin is not None and not own and not policy.origin_allowed(origin):
            raise Refusal(
                403, "this origin is not allowed; start the server with --allow-origin ORIGIN to allow it."
            )
        keyed = any(path == part or path.startswith(f"{part}/") for part in KEYED)
        if (
            scope["method"] != "OPTIONS"
            and keyed
            and not policy.key_allowed(headers.get("authorization", ""))
        ):
            raise Refusal(
                401,
                "the API key is missing or wrong; send 'Authorization: Bearer KEY'.",
                [("WWW-Authenticate", "Bearer")],
            )


async def _body(scope: MutableMapping[str, Any], headers: dict[str, str], receive: Receive) -> bytes:
    """Read the complete body within the limits and validate it as JSON."""
    if scope["method"] in ("GET", "HEAD"):
        return b""
    length = headers.get("content-length", "0")
    if not length.isdigit() or int(length) > MAX_BODY:
        raise Refusal(413, f"the body may have at most {MAX_BODY} bytes.")
    pieces, size = [], 0
    try:
        async with asyncio.timeout(BODY_S):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise Refusal(400, "the body did not arrive.")
                pieces.append(message.get("body", b""))
                if (size := size + len(pieces[-1])) > MAX_BODY:
                    raise Refusal(413, f"the body may have at most {MAX_BODY} bytes.")
                if not message.get("more_body"):
                    break
    except TimeoutError:
        raise Refusal(408, f"the body did not arrive within {BODY_S:g} s.") from None
    body = b"".join(pieces)
    if headers.get("content-encoding", "identity").lower() != "identity":
        raise Refusal(415, "the body is compressed; send it without Content-Encoding.")
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    # curl and some clients send JSON with these types; for pages, browsers send Origin or Sec-Fetch-Site
    loose = kind in ("", "application/x-www-form-urlencoded") and not _from_a_page(headers)
    if kind != "application/json" and (body or kind) and not loose:
        raise Refusal(415, "the body must be JSON: send 'Content-Type: application/json'.")
    if body[:1] in (b"\xef", b"\xfe", b"\xff"):  # a byte-order mark; no JSON begins so
        try:
            body = decode_text(body, "the body", UsageError).encode()
        except UsageError as error:
            raise Refusal(400, str(error)) from None
    if body:
        check_json(body)
    return body


def _from_a_page(headers: dict[str, str]) -> bool:
    return "origin" in headers or headers.get("sec-fetch-site", "none") != "none"


def _as_json(scope: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Return the scope with the JSON content type, and with GET instead of HEAD."""
    headers = [(name, value) for name, value in scope["headers"] if name.lower() != b"content-type"]
    method = "GET" if scope["method"] == "HEAD" else scope["method"]
    return {**scope, "method": method, "headers": [*headers, (b"content-type", b"application/json")]}


def check_json(body: bytes) -> None:
    """Validate a JSON body before a slower parser reads it.

    Raises:
        Refusal: not UTF-8, not JSON, NaN, nested deeper than `MAX_DEPTH`, or more than `MAX_VALUES` values.
    """
    try:
        value = msgspec.json.decode(body)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        why = "is not valid JSON"
        if isinstance(error, RecursionError):
            why = "is nested too deeply"
        elif isinstance(error, msgspec.ValidationError):
            why = "holds a number that is too large"
        raise Refusal(400, f"the body {why}.") from None
    level, depth, count = [value], 0, 1
    while level:
        inner: list[Any] = []
        for item in level:
            inner += item.values() if isinstance(item, dict) else item if isinstance(item, list) else ()
        depth, count, level = depth + 1, count + len(inner), inner
        if depth > MAX_DEPTH or count > MAX_VALUES:
            raise Refusal(400, f"the body may have at most {MAX_DEPTH} levels and {MAX_VALUES} values.")


def error_body(path: str, message: str, status: int, field: str | None = None) -> dict[str, Any]:
    """Build an error body in the path's protocol: Ollama's under ``/api/``, otherwise OpenAI's.

    Args:
        path: path of the request.
        message: one or two sentences.
        status: HTTP status.
        field: path of the invalid field in the body, if any.
    """
    if path.startswith("/api/"):
        return {"error": message}
    kinds = {
        401: "authentication_error",
        403: "permission_error",
        404: "not_found_error",
        429: "rate_limit_error",
    }
    kind = kinds.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": field, "code": status}}


async def _reply(
    send: Send, status: int, content: dict[str, Any] | None, headers: Iterable[tuple[str, str]]
) -> None:
    body = json.dumps(content).encode() if content is not None else b""
    fields = [("Content-Type", "application/json"), ("Content-Length", str(len(body))), *headers]
    raw = [(name.lower().encode(), value.encode("latin-1")) for name, value in fields]
    await send({"type": "http.response.start", "status": status, "headers": raw})
    await send({"type": "http.response.body", "body": body})
