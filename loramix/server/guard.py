"""What stands before the server's endpoints: who may ask, from where, and how large a body may be.

Pure ASGI, so that nothing is parsed before it has passed: Host (DNS rebinding), Origin (other sites' pages), the
API key, the content type (pages can send text/plain anywhere without asking), size, depth and form of the JSON.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any

import msgspec

from loramix.server.access import AccessPolicy, preflight, same_origin

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

MAX_BODY = 2**20
MAX_DEPTH = 32
MAX_VALUES = 100_000
BODY_S = 20.0
"""For a whole body to arrive."""
SEND_S = 30.0
"""For a client to take a piece of an answer."""
KEYED = ("/v1", "/api", "/metrics", "/openapi.json")


class Refusal(Exception):
    """A request that goes no further."""

    def __init__(self, status: int, message: str, headers: Iterable[tuple[str, str]] = ()) -> None:
        super().__init__(message)
        self.status, self.headers = status, list(headers)


class Guard:
    """ASGI middleware that refuses, or hands on with the body read and checked.

    Args:
        app: what is guarded.
        policy: who may ask.
    """

    def __init__(self, app: App, policy: AccessPolicy) -> None:
        self._app, self._policy = app, policy

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Check the request's headers and body, then refuse it or pass it on."""
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
            if not slow:  # a client that takes nothing any more is cut off, which is no fault of ours
                raise

    def _check(self, scope: MutableMapping[str, Any], headers: dict[str, str], origin: str | None) -> None:
        policy, path = self._policy, scope["path"]
        hosts = sum(name.lower() == b"host" for name, _ in scope["headers"])
        if hosts > 1 or not policy.host_allowed(headers.get("host", "")):
            raise Refusal(
                403, "the Host header names another server; start with --allow-host NAME to allow it."
            )
        own = origin is not None and same_origin(origin, headers.get("host", ""))  # our page's
        if origin is not None and not own and not policy.origin_allowed(origin):
            raise Refusal(
                403, "pages of this origin may not ask; start with --allow-origin ORIGIN to allow them."
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
    """The whole body of a request, within bounds; of what has one, JSON that can be handed on."""
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
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    # curl and some clients send JSON under these; a browser tells of another site's page by its Origin
    loose = kind in ("", "application/x-www-form-urlencoded") and not _of_a_page(headers)
    if kind != "application/json" and (body or kind) and not loose:
        raise Refusal(415, "the body must be JSON: send 'Content-Type: application/json'.")
    if body:
        check_json(body)
    return body


def _of_a_page(headers: dict[str, str]) -> bool:
    return "origin" in headers or headers.get("sec-fetch-site", "none") != "none"


def _as_json(scope: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """A request whose body was checked, under the type that it is and the method that answers HEAD too."""
    headers = [(name, value) for name, value in scope["headers"] if name.lower() != b"content-type"]
    method = "GET" if scope["method"] == "HEAD" else scope["method"]
    return {**scope, "method": method, "headers": [*headers, (b"content-type", b"application/json")]}


def check_json(body: bytes) -> None:
    """Refuse what is no JSON of a sane form, before a slower parser sees it.

    Raises:
        Refusal: not UTF-8, no JSON, NaN, nested deeper than `MAX_DEPTH`, or of too many values.
    """
    try:
        value = msgspec.json.decode(body)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        why = "is not valid JSON"
        if isinstance(error, RecursionError):
            why = "is nested too deep"
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
            raise Refusal(400, f"the body may have {MAX_DEPTH} levels and {MAX_VALUES} values at most.")


def error_body(path: str, message: str, status: int, field: str | None = None) -> dict[str, Any]:
    """An error as the clients of a path expect it: Ollama's, or OpenAI's for all others.

    Args:
        path: that was asked.
        message: one sentence or two.
        status: as HTTP counts.
        field: of the body that is wrong.
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
