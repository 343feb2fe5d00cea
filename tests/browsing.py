"""Chromium for the page's tests: Debian's or whichever is installed, driven by Playwright; nothing is fetched."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

import pytest

KEY = "a-key-of-sixteen-or-more"
HTML = '<img src=x onerror="alert(1)"> <b>dog</b> & co.'
PATIENCE_S = 180
"""Longest wait for what the page does; it ends with what it waits for, and a busy machine takes its time."""
NAMES = ("chromium", "chromium-browser", "google-chrome")
HOLDING = """
window.holding = true;
const quick = window.fetch;
window.fetch = async (...asked) => {
  const response = await quick(...asked);
  if (!response.headers.get("content-type")?.startsWith("text/event-stream")) return response;
  const text = new TextDecoder();
  const bytes = new TextEncoder();
  const signal = asked[1]?.signal;
  let tokens = 0;
  const held = new TransformStream({
    async transform(piece, out) {
      for (const event of text.decode(piece, { stream: true }).split(/(?<=\\n\\n)/)) {
        while (tokens > 3 && window.holding && !signal?.aborted) await new Promise((done) => setTimeout(done, 20));
        signal?.throwIfAborted(); // the browser does not abort a complete answer
        out.enqueue(bytes.encode(event));
        tokens += event.match(/"token":/g)?.length ?? 0;
      }
    },
  });
  return new Response(response.body.pipeThrough(held), { status: response.status, headers: response.headers });
};
"""


@contextmanager
def chromium() -> Iterator[Any]:
    """A headless browser, or a skip that says what is missing."""
    sync_api = pytest.importorskip(
        "playwright.sync_api", reason="Playwright is not installed: pip install playwright"
    )
    found = next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        pytest.skip("no Chromium is installed (Debian: apt-get install chromium)")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield browser
        browser.close()


class Visitor:
    """A page that is looked at, and what it asked for and complained of.

    Args:
        browser: from `chromium`.
        url: of the server.
        key: the server's, as if it had been given already.
        holding: stop each answer after four tokens or a few more, until it is aborted or `release` is called.
        **options: of Playwright's ``new_context``.
    """

    def __init__(
        self, browser: Any, url: str, *, key: str = "", holding: bool = False, **options: Any
    ) -> None:
        self.context = browser.new_context(**{"viewport": {"width": 1280, "height": 860}, **options})
        self.page = self.context.new_page()
        self.page.set_default_timeout(PATIENCE_S * 1000)
        self.host = urlsplit(url).netloc
        self.complaints: list[str] = []
        self.asked: list[str] = []
        self.bodies: list[Any] = []
        self.page.on("console", lambda message: self._heard(message.type, message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("dialog", lambda dialog: self.complaints.append(f"dialog {dialog.message}"))
        self.page.on("request", self._saw)
        if key:
            self.page.add_init_script(f"sessionStorage.setItem('loramix-key', {json.dumps(key)})")
        if holding:
            self.page.add_init_script(HOLDING)
        self.page.goto(url)

    def _heard(self, kind: str, text: str) -> None:
        if kind in ("error", "warning"):
            self.complaints.append(text)

    def _saw(self, request: Any) -> None:
        self.asked.append(request.url)
        if request.method == "POST":
            self.bodies.append(request.post_data_json)

    @property
    def foreign(self) -> list[str]:
        """Requests to another host."""
        return [url for url in self.asked if urlsplit(url).netloc != self.host]

    def idle(self) -> None:
        """Wait until nothing goes on."""
        self.page.wait_for_selector("body:not(.busy)")

    def speaking(self) -> None:
        """Wait until some of an answer is there, and more to come."""
        self.page.wait_for_selector(".busy .token >> nth=3", state="attached")

    def release(self) -> None:
        """Let answers come as they do."""
        self.page.evaluate("window.holding = false")

    def send(self, text: str, policy: str | None = None) -> Any:
        """Type a prompt and send it; the turn, once it is answered."""
        if policy:
            self.page.get_by_role("radio", name=policy).check()
        self.page.fill("#prompt", text)
        self.page.press("#prompt", "Enter")
        self.idle()
        return self.page.locator(".turn").last

    @property
    def overflow(self) -> int:
        """Pixels by which the page is wider than the window."""
        root = "document.documentElement"
        return int(self.page.evaluate(f"{root}.scrollWidth - {root}.clientWidth"))
