"""The page by keyboard, on a phone, in light and dark, without motion, with a key, and when things fail."""

from __future__ import annotations

import os
import signal
from typing import Any

import pytest
from browsing import KEY, Visitor
from serving import Served, wait_until


def test_all_of_it_by_keyboard(visit: Any, page_server: Served) -> None:
    visitor = visit(holding=True)
    page, keys = visitor.page, visitor.page.keyboard

    def tab_to(name: str) -> None:
        for _ in range(60):
            keys.press("Tab")
            focused = page.evaluate(
                "(() => { const n = document.activeElement; return [n.innerText || n.name || '', "
                "n.matches(':focus-visible') && getComputedStyle(n).outlineStyle !== 'none' || n.type === 'radio'] })()"
            )
            assert focused[1] or page.evaluate("document.activeElement === document.body"), focused
            if focused[0] == name:
                return
        raise AssertionError(f"no way to {name!r}")

    def policy(*arrows: str) -> None:
        tab_to("policy")
        for arrow in arrows:
            keys.press(arrow)
        keys.press("Shift+Tab")
        keys.press("Shift+Tab")
        assert page.evaluate("document.activeElement.id") == "prompt"

    assert page.evaluate("document.activeElement.id") == "prompt"
    policy("ArrowLeft")  # from the first to the last: base, whose answers are long
    keys.type("a dog")
    keys.press("Shift+Enter")
    keys.type("and a cat")
    assert page.input_value("#prompt") == "a dog\nand a cat" and page.locator(".turn").count() == 0
    keys.press("Enter")
    visitor.speaking()
    keys.press("Escape")
    visitor.idle()
    assert visitor.bodies[-1]["loramix"] == {"policy": "base"}
    assert "Stopped." in page.locator(".note").inner_text()
    visitor.release()
    wait_until(lambda: not page_server.http.get("/health").json()["active"])
    policy("ArrowRight", "ArrowRight")
    keys.type("a hen")
    keys.press("Enter")
    page.wait_for_selector(".turn >> nth=1")
    visitor.idle()
    assert visitor.bodies[-1]["loramix"] == {"policy": "top1"}
    page.evaluate("document.querySelector('#new').focus()")
    tab_to("Change the mix")
    keys.press("Enter")
    assert page.evaluate("document.activeElement.type") == "range"
    keys.press("ArrowRight")
    tab_to("Answer with this mix")
    keys.press("Enter")
    page.wait_for_selector(".answer >> nth=2")
    visitor.idle()
    assert "mix" in visitor.bodies[-1]["loramix"]


def test_a_small_phone_scrolls_no_way_but_down(visit: Any) -> None:
    visitor = visit(viewport={"width": 360, "height": 740}, has_touch=True, is_mobile=True)
    page = visitor.page
    assert visitor.overflow == 0
    page.get_by_role("button", name="Skills").tap()
    assert page.locator("#skills").is_visible() and visitor.overflow == 0
    page.get_by_role("button", name="Example of sentiment").tap()
    assert not page.locator("#skills").is_visible()
    turn = visitor.send("word" * 60, "top1")
    turn.get_by_role("button", name="Change the mix").tap()
    turn.get_by_role("slider", name="sentiment").fill("1")
    turn.get_by_role("button", name="Answer with this mix").tap()
    visitor.idle()
    turn.locator(".answer").nth(1).get_by_role("button", name="Show contributions").tap()
    visitor.idle()
    assert turn.locator("canvas").count() >= 1 and visitor.overflow == 0
    first, second = (turn.locator(".answer").nth(i).bounding_box() for i in range(2))
    assert second["y"] >= first["y"] + first["height"]


@pytest.mark.parametrize(
    "scheme, motion, animation", [("light", "no-preference", "blink"), ("dark", "reduce", "none")]
)
def test_light_and_dark_can_be_read_without_motion(
    visit: Any, scheme: str, motion: str, animation: str
) -> None:
    visitor = visit(color_scheme=scheme, reduced_motion=motion)
    page = visitor.page
    visitor.send("a dog")
    page.route("**/v1/chat/completions", lambda asked: None)  # never answered
    page.fill("#prompt", "a cat")
    page.press("#prompt", "Enter")
    caret = "getComputedStyle(document.querySelector('.waiting .text'), '::after').animationName"
    assert page.evaluate(caret) == animation
    seen = page.evaluate(
        """() => {
          const draw = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
          const parts = (colour) => {
            draw.clearRect(0, 0, 1, 1); draw.fillStyle = colour; draw.fillRect(0, 0, 1, 1);
            return [...draw.getImageData(0, 0, 1, 1).data];
          };
          const light = (rgb) => {
            const linear = (v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
            const [r, g, b] = rgb.map((v) => linear(v / 255));
            return 0.2126 * r + 0.7152 * g + 0.0722 * b;
          };
          const below = (node) => {
            for (let at = node; at; at = at.parentElement) {
              const colour = parts(getComputedStyle(at).backgroundColor);
              if (colour[3] === 255) return light(colour.slice(0, 3));
            }
          };
          const nodes = [...document.querySelectorAll("body *")].filter((node) =>
            node.checkVisibility() && [...node.childNodes].some((child) => child.nodeType === 3 && child.data.trim()));
          const ratio = (node) => {
            const [a, b] = [light(parts(getComputedStyle(node).color).slice(0, 3)), below(node)].sort((x, y) => y - x);
            return (a + 0.05) / (b + 0.05);
          };
          const pale = nodes.filter((node) => ratio(node) < 4.5).map((node) => `${node.tagName} ${node.textContent}`);
          return { pale, ground: below(document.body), count: nodes.length };
        }"""
    )
    assert seen["pale"] == [] and seen["count"] > 20
    assert seen["ground"] > 0.8 if scheme == "light" else seen["ground"] < 0.05


def test_a_busy_server_is_asked_again(visit: Any) -> None:
    visitor = visit()
    refusals = [{"error": {"message": "the server is busy; try again in a moment.", "code": 429}}]

    def answer(asked: Any) -> None:
        if refusals:
            asked.fulfill(status=429, headers={"Retry-After": "2"}, json=refusals.pop())
        else:
            asked.continue_()

    visitor.page.route("**/v1/chat/completions", answer)
    visitor.page.fill("#prompt", "a dog")
    visitor.page.press("#prompt", "Enter")
    visitor.page.get_by_text("The server is busy; asking again in 2 s.").wait_for()
    visitor.idle()
    assert visitor.page.locator(".text").text_content()
    assert "busy" not in visitor.page.locator(".note").text_content()
    assert len(visitor.complaints) == 1 and "429" in visitor.complaints.pop()


def test_what_fails_is_a_sentence_and_can_be_tried_again(visit: Any, page_server: Served) -> None:
    visitor = visit(holding=True)
    page = visitor.page
    page.get_by_role("radio", name="base").check()
    page.fill("#prompt", "the quick brown fox")
    page.press("#prompt", "Enter")
    visitor.speaking()
    visitor.context.set_offline(True)
    page.keyboard.press("Escape")
    visitor.idle()
    page.get_by_role("button", name="Try again").click()
    page.get_by_text("The server cannot be reached; is 'loramix serve' still running?").wait_for()
    visitor.context.set_offline(False)
    page.get_by_role("button", name="Try again").click()
    visitor.speaking()
    visitor.complaints.clear()  # the browser's own line on what it could not reach
    page.keyboard.press("Escape")
    visitor.idle()
    wait_until(lambda: not page_server.http.get("/health").json()["active"])  # the stopped one has left
    os.kill(page_server.workers()[0], signal.SIGSTOP)  # so that it dies with the request in flight
    page.get_by_role("button", name="Try again").click()
    page.wait_for_selector(".busy .waiting")
    wait_until(lambda: page_server.http.get("/health").json()["active"] > 0)
    os.kill(page_server.workers()[0], signal.SIGKILL)
    page.get_by_text("The worker ended (signal SIGKILL) while it had this request").wait_for()
    assert all("503" in text for text in visitor.complaints)
    visitor.complaints.clear()
    page.get_by_role("button", name="Try again").click()
    visitor.speaking()
    page.keyboard.press("Escape")
    visitor.idle()
    page.wait_for_selector("#state[data-state=ready]")
    visitor.complaints[:] = [text for text in visitor.complaints if "503" not in text]


def test_a_key_is_asked_for_and_kept_in_this_tab(browser: Any, page_server: Served) -> None:
    visitor = Visitor(browser, page_server.url)
    page = visitor.page
    for key in ("wrong", KEY):
        page.get_by_label("Key", exact=True).fill(key)
        page.keyboard.press("Enter")
        if key == "wrong":
            page.get_by_text("That key was not accepted.").wait_for()
    page.wait_for_selector(".opener")
    assert visitor.send("a dog", "top1").locator(".text").text_content()
    kept = "[Object.values(sessionStorage), Object.values(localStorage), document.cookie]"
    assert page.evaluate(kept) == [[KEY], [], ""] and KEY not in page.url
    assert len(visitor.complaints) == 2 and all("401" in text for text in visitor.complaints)
    visitor.context.close()
