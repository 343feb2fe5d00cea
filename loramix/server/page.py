"""The page at ``/``: files of our own, which may load nothing from elsewhere and build no HTML from text."""

from __future__ import annotations

from collections.abc import MutableMapping
from pathlib import Path
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse
from starlette.routing import Match, Mount
from starlette.staticfiles import StaticFiles

from loramix.server.guard import Message, Receive, Send

WEB = Path(__file__).with_name("web")
HEADERS = {
    # script may not set innerHTML and the like: whatever a prompt or an answer holds is text
    "Content-Security-Policy": "default-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'; object-src 'none'; require-trusted-types-for 'script'; trusted-types 'none'",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",  # asked for again, and mostly answered with 304
}


class Page(StaticFiles):
    """The page's files."""

    def __init__(self) -> None:
        super().__init__(directory=WEB, html=True)

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Serve one; at ``/`` what is no browser gets what Ollama says there, which its clients look for."""
        if scope["path"] == "/" and "text/html" not in Headers(scope=scope).get("accept", ""):
            await PlainTextResponse("Ollama is running", headers={"Vary": "Accept"})(scope, receive, send)
            return

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers.update(HEADERS)
                headers.add_vary_header("Accept")
            await send(message)

        await super().__call__(scope, receive, with_headers)


class Place(Mount):
    """The page at ``/``, which leaves the endpoints' paths alone: a wrong method there is told as such."""

    def __init__(self) -> None:
        super().__init__("/", Page(), name="page")

    def matches(self, scope: MutableMapping[str, Any]) -> tuple[Match, MutableMapping[str, Any]]:
        """See `Mount`."""
        if scope["path"].startswith(("/v1/", "/api/")):
            return Match.NONE, {}
        return super().matches(scope)
