"""The web page at ``/``: static files with a strict content security policy."""

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
    # Trusted Types forbid innerHTML and the like, so prompts and answers are always shown as text
    "Content-Security-Policy": "default-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'; object-src 'none'; require-trusted-types-for 'script'; trusted-types 'none'",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",  # revalidated on each load, mostly with 304
}


class Page(StaticFiles):
    """Static files of the page."""

    def __init__(self) -> None:
        super().__init__(directory=WEB, html=True)

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Serve a file; at ``/``, clients other than browsers get Ollama's greeting, which its clients look for."""
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


class PageMount(Mount):
    """Mount of the page that skips the API paths and other methods than GET, so that their errors are the API's."""

    def __init__(self) -> None:
        super().__init__("/", Page(), name="page")

    def matches(self, scope: MutableMapping[str, Any]) -> tuple[Match, MutableMapping[str, Any]]:
        """See `Mount`."""
        if scope["path"].startswith(("/v1/", "/api/")) or scope.get("method") not in ("GET", "HEAD"):
            return Match.NONE, {}
        return super().matches(scope)
