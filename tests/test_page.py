"""The page of ``loramix serve`` in a real browser: chat, routes, mixes, maps, errors, keyboard, small and dark."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
from browsing import Visitor, chromium
from serving import Served, served

from loramix.explain import COLOURS
from loramix.manifest import read_manifest, write_manifest
from loramix.runtime.guard import Guard, Policy

HTML = '<img src=x onerror="alert(1)"> <b>dog</b> & co.'
KEY = "a-key-of-sixteen-or-more"
WEB = Path(__file__).parent.parent / "loramix" / "runtime" / "web"


@pytest.fixture(scope="module")
def shown_pack(tiny_pack: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny pack with an example and a card."""
    pack = Path(shutil.copytree(tiny_pack, tmp_path_factory.mktemp("shown") / "tiny"))
    manifest = read_manifest(pack)
    (pack / "card.md").write_text(f"# Skill\n\n{HTML}\n\n- **Data**: `none`\n", encoding="utf-8")
    first = msgspec.structs.replace(manifest.skills[0], example="Is it good? <i>a dog</i>", card="card.md")
    write_manifest(pack, msgspec.structs.replace(manifest, skills=[first, *manifest.skills[1:]]))
    return pack


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return {"LORAMIX_CACHE": str(tmp_path_factory.getbasetemp() / "cache")}


@pytest.fixture(scope="module")
def server(shown_pack: Path, own: dict[str, str]) -> Iterator[Served]:
    with served(shown_pack, "--ctx", "512", "--threads", "1", LORAMIX_API_KEY=KEY, **own) as server:
        server.http.headers["Authorization"] = f"Bearer {KEY}"
        yield server


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as browser:
        yield browser


@pytest.fixture
def visit(browser: Any, server: Served) -> Iterator[Callable[..., Visitor]]:
    """Opens the page; at the end nobody may have complained, nor asked another host."""
    visitors = []

    def open_page(**options: Any) -> Visitor:
        visitors.append(Visitor(browser, server.url, key=KEY, **options))
        visitors[-1].page.wait_for_selector(".opener")
        return visitors[-1]

    yield open_page
    for visitor in visitors:
        visitor.context.close()
        assert visitor.complaints == [] and visitor.foreign == []


def wait_until(what: Callable[[], bool], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.05)


def stream_of(*events: dict[str, Any]) -> str:
    return "".join(f"data: {json.dumps(event)}\n\n" for event in events) + "data: [DONE]\n\n"


def test_an_answer_streams_with_its_route(visit: Any, server: Served) -> None:
    visitor = visit(slowly=True)
    page = visitor.page
    page.fill("#prompt", "the quick brown fox")
    page.get_by_role("radio", name="base").check()
    page.click("#send")
    page.wait_for_selector(".busy .answer .token >> nth=3")  # some are here while others come
    assert page.locator("#send").inner_text() == "Stop"
    page.keyboard.press("Escape")
    visitor.idle()
    assert "Stopped." in page.locator(".answer .note").inner_text()
    visitor.context.close()

    visitor = visit()
    turn = visitor.send("the quick brown fox")
    said = server.chat(messages=[{"role": "user", "content": "the quick brown fox"}]).json()
    assert turn.locator(".text").text_content() == said["choices"][0]["message"]["content"]
    route = said["loramix"]
    assert turn.locator(".why").inner_text().lower().startswith(route["reason"].lower()[:40])
    chips = turn.locator(".chip").all_inner_texts()
    assert [chip.split()[0] for chip in chips] == [
        *(route["mix"] or ["base"]),
        *(n for m in route["then"] for n in m),
    ]
    best = max(route["probabilities"], key=route["probabilities"].get)
    assert best in turn.locator(".bar .name").all_inner_texts()
    told = turn.locator(".timings").inner_text()
    assert "route" in told and "first token" in told and re.search(r"\d tokens/s", told)
    assert visitor.page.locator("#live").inner_text().endswith(turn.locator(".text").inner_text().strip())


def test_a_slider_moved_gives_another_answer_beside_the_first(visit: Any) -> None:
    visitor = visit()
    turn = visitor.send("a dog", "top1")
    turn.get_by_role("button", name="Change the mix").click()
    slider = turn.get_by_role("slider", name="summarize")
    slider.focus()
    slider.fill("0")
    for _ in range(5):
        visitor.page.keyboard.press("ArrowRight")
    turn.get_by_role("slider", name="sentiment").fill("2")
    turn.get_by_role("button", name="Answer with this mix").click()
    visitor.idle()
    assert visitor.bodies[-1]["loramix"] == {"mix": {"sentiment": 2, "summarize": 0.25}}
    answers = turn.locator(".answer")
    assert answers.count() == 2
    left, right = answers.nth(0).bounding_box(), answers.nth(1).bounding_box()
    assert left["y"] == right["y"] and left["x"] + left["width"] <= right["x"]
    assert "sentiment×2" in answers.nth(1).locator(".chips").inner_text().replace("\n", "").replace(" ", "")
    turn.get_by_role("button", name="Back to the gate's mix").click()
    turn.get_by_role("slider", name="sentiment").fill("0")
    turn.get_by_role("slider", name="summarize").fill("0")
    turn.get_by_role("button", name="Answer with this mix").click()
    visitor.idle()
    assert answers.count() == 2 and answers.nth(1).locator(".chip").inner_text().strip() == "base"


def test_contributions_are_drawn_and_told(visit: Any) -> None:
    visitor = visit()
    page = visitor.page
    turn = visitor.send("a dog", "blend")
    turn.get_by_role("button", name="Change the mix").click()
    for name, value in (("sentiment", "1"), ("summarize", "0.5")):
        turn.get_by_role("slider", name=name).fill(value)
    turn.get_by_role("button", name="Answer with this mix").click()
    visitor.idle()
    second = turn.locator(".answer").nth(1)
    with page.expect_response("**/v1/explain") as asked:
        second.get_by_role("button", name="Show contributions").click()
    visitor.idle()
    found = asked.value.json()["contributions"]
    maps = turn.locator("canvas")
    assert maps.count() == 2 and maps.first.get_attribute("aria-label").startswith(
        "Contribution of sentiment in 3"
    )
    drawn = "(c) => { const d = c.getContext('2d').getImageData(0, 0, c.width, c.height).data; return new Set(d).size }"
    assert all(maps.nth(i).evaluate(drawn) > 20 for i in range(2))
    maps.first.focus()
    for _ in range(len(found["tokens"])):
        page.keyboard.press("ArrowLeft")
    for _ in range(3):
        page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowUp")
    readout = turn.locator(".readout").first.inner_text()
    assert readout.startswith(f"{found['values']['sentiment'][1][1]:.3f}: layer 1 at")
    hues = {"sentiment": "0", "summarize": "1"}
    tokens = second.locator(".token")
    assert [tokens.nth(i).get_attribute("data-hue") for i in range(tokens.count())] == [
        hues[name] for name in found["strongest"]
    ]
    turn.locator("summary").click()
    rows = turn.locator("table").nth(0).locator("tbody tr")
    assert (
        rows.count() == len(found["tokens"]) and turn.locator("table").nth(1).locator("tbody tr").count() == 3
    )


def test_tokens_have_the_hue_of_the_skill_that_said_them(visit: Any) -> None:
    visitor = visit()
    route = {
        "mix": {"summarize": 1},
        "then": [{"sentiment": 1}],
        "reason": "both <b>fit</b>",
        "policy": "each",
    }
    route["probabilities"] = {"summarize": 0.6, "sentiment": 0.39, "base": 0.01}

    def piece(text: str, *tokens: bytes) -> dict[str, Any]:
        content = [{"token": "", "logprob": -0.5, "bytes": list(token)} for token in tokens]
        return {
            "choices": [{"delta": {"content": text}, "finish_reason": None, "logprobs": {"content": content}}]
        }

    ended = {
        **route,
        "timings": {"features": 0.01, "gate": 0.001, "first_token": 0.1, "total": 1.1, "queue": 0.0},
    }
    events = [
        {
            "choices": [{"delta": {"role": "assistant", "content": ""}, "finish_reason": None}],
            "loramix": route,
        },
        piece(HTML, HTML.encode()),
        piece(" é", " é".encode()[:2], " é".encode()[2:]),
        piece("\ngood", b"good"),
        {"choices": [{"delta": {}, "finish_reason": "stop"}], "loramix": ended},
        {"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": 4}},
    ]
    visitor.page.route(
        "**/v1/chat/completions",
        lambda asked: asked.fulfill(content_type="text/event-stream", body=stream_of(*events)),
    )
    turn = visitor.send(HTML)
    assert turn.locator(".text").text_content() == f"{HTML} é\ngood"
    assert turn.locator(".prompt").text_content() == f"You: {HTML}"
    assert visitor.page.locator("#log img, #log b, #log .why b").count() == 0
    tokens = turn.locator(".token")
    assert [tokens.nth(i).get_attribute("data-hue") for i in range(4)] == ["1", "1", "1", "0"]
    assert turn.locator(".chips").inner_text().split() == ["summarize", "×1", "then", "sentiment", "×1"]
    assert "3 tokens/s" in turn.locator(".timings").inner_text()


def test_earlier_turns_are_sent_or_not(visit: Any) -> None:
    visitor = visit()
    first = visitor.send("a dog", "top1").locator(".text").text_content()
    visitor.send("a cat")
    assert visitor.bodies[-1]["messages"] == [
        {"role": "user", "content": "a dog"},
        {"role": "assistant", "content": first},
        {"role": "user", "content": "a cat"},
    ]
    visitor.page.uncheck("#remember")
    visitor.send("a cow")
    assert len(visitor.bodies[-1]["messages"]) == 1
    visitor.page.click("#new")
    assert visitor.page.locator(".turn").count() == 0 and visitor.page.locator("#nothing").is_visible()
    visitor.page.check("#remember")
    visitor.send("a hen")
    assert len(visitor.bodies[-1]["messages"]) == 1


def test_skills_have_examples_and_cards(visit: Any) -> None:
    visitor = visit()
    page = visitor.page
    page.get_by_role("button", name="Example of sentiment").click()
    assert page.input_value("#prompt") == "Is it good? <i>a dog</i>"
    assert page.evaluate("document.activeElement.id") == "prompt"
    page.get_by_role("button", name="Card of sentiment").click()
    page.wait_for_selector("#card li")
    assert HTML in page.locator("#card .body").inner_text() and page.locator("#card img").count() == 0
    assert page.locator("#card li code").inner_text() == "none"
    page.keyboard.press("Escape")
    assert not page.locator("#card").is_visible()


def test_all_of_it_by_keyboard(visit: Any, server: Served) -> None:
    visitor = visit(slowly=True)
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
    page.wait_for_selector(".busy .answer .token")
    keys.press("Escape")
    visitor.idle()
    assert visitor.bodies[-1]["loramix"] == {"policy": "base"}
    assert "Stopped." in page.locator(".note").inner_text()
    wait_until(lambda: not server.http.get("/health").json()["active"])
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


def test_what_fails_is_a_sentence_and_can_be_tried_again(visit: Any, server: Served) -> None:
    visitor = visit(slowly=True)
    page = visitor.page
    page.get_by_role("radio", name="base").check()
    page.fill("#prompt", "the quick brown fox")
    page.press("#prompt", "Enter")
    page.wait_for_selector(".busy .token")
    visitor.context.set_offline(True)
    page.keyboard.press("Escape")
    visitor.idle()
    page.get_by_role("button", name="Try again").click()
    page.get_by_text("The server cannot be reached; is 'loramix serve' still running?").wait_for()
    visitor.context.set_offline(False)
    page.get_by_role("button", name="Try again").click()
    page.wait_for_selector(".busy .token")
    visitor.complaints.clear()  # the browser's own line on what it could not reach
    page.keyboard.press("Escape")
    visitor.idle()
    os.kill(server.workers()[0], signal.SIGSTOP)  # so that it dies with the request in flight
    page.get_by_role("button", name="Try again").click()
    page.wait_for_selector(".busy .waiting")
    wait_until(lambda: server.http.get("/health").json()["active"] > 0)
    os.kill(server.workers()[0], signal.SIGKILL)
    page.get_by_text("The worker ended (signal SIGKILL) while it had this request").wait_for()
    page.get_by_role("button", name="Try again").click()
    page.wait_for_selector(".busy .token")
    page.keyboard.press("Escape")
    visitor.idle()


def test_a_key_is_asked_for_and_kept_in_this_tab(browser: Any, server: Served) -> None:
    visitor = Visitor(browser, server.url)
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


def test_the_page_may_load_nothing_from_elsewhere(server: Served) -> None:
    answer = server.http.get("/")
    policy = answer.headers["content-security-policy"]
    assert answer.status_code == 200 and policy.startswith("default-src 'self';")
    assert "unsafe" not in policy and "require-trusted-types-for 'script'" in policy
    for file in WEB.iterdir():
        text = file.read_text(encoding="utf-8")
        assert server.http.get(f"/{file.name}").headers["content-security-policy"] == policy
        outside = re.findall(r"https?://[^\s\"']+", text)
        assert outside in ([], ["http://www.w3.org/2000/svg"]), file.name
        assert not re.search(
            r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\bstyle=|\son\w+=", text
        ), file.name
        assert text.count("\n") <= 300, file.name
    assert server.http.get("/%2e%2e/server.py").status_code == 404


def test_a_page_of_this_server_may_ask_under_any_of_its_names() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    async def status(host: str, origin: str) -> int:
        guard: Any = Guard(app, Policy(hosts=frozenset({"box.example"})))
        async with httpx.AsyncClient(transport=httpx.ASGITransport(guard)) as client:
            headers = {"Host": host, "Origin": origin}
            return (await client.post("http://box.example/v1/route", json={}, headers=headers)).status_code

    for host, origin, wanted in (
        ("box.example:1", "http://box.example:1", 200),
        ("box.example", "https://box.example", 200),
        ("box.example:1", "http://box.example:2", 403),
        ("box.example:1", "http://other.example:1", 403),
        ("other.example:1", "http://other.example:1", 403),
        ("box.example:1", "null", 403),
    ):
        assert asyncio.run(status(host, origin)) == wanted, (host, origin)


def test_its_colours_are_those_of_explain() -> None:
    style = (WEB / "style.css").read_text(encoding="utf-8")
    assert tuple(re.findall(r"--skill-\d: (#\w+);", style)) == COLOURS
