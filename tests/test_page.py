"""The page of ``loramix serve`` in a real browser: chat, routes, mixes, maps, skills."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from browsing import HTML, Visitor
from serving import Served, served

TWO_SKILLS = "Name the emotion and the sentiment of this review: I am so happy with this kettle, it is quick and quiet."


def stream_of(*events: dict[str, Any]) -> str:
    return "".join(f"data: {json.dumps(event)}\n\n" for event in events) + "data: [DONE]\n\n"


def test_an_answer_streams_with_its_route(visit: Any, page_server: Served) -> None:
    visitor = visit(holding=True)
    page = visitor.page
    page.fill("#prompt", "the quick brown fox")
    page.get_by_role("radio", name="base").check()
    page.click("#send")
    visitor.speaking()
    assert page.locator("#send").inner_text() == "Stop"
    page.keyboard.press("Escape")
    visitor.idle()
    assert "Stopped." in page.locator(".answer .note").inner_text()
    visitor.context.close()

    visitor = visit()
    turn = visitor.send("the quick brown fox")
    said = page_server.chat(messages=[{"role": "user", "content": "the quick brown fox"}]).json()
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
    for said_word in route["words"]:
        assert said_word["word"] in turn.locator(".bars").nth(1).inner_text()
    told = turn.locator(".timings").inner_text()
    assert route["words"] and "route" in told and "first token" in told and re.search(r"\d tokens/s", told)
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
    route["words"] = [{"word": "<b>sum</b>", "weight": 0.7}, {"word": "up", "weight": 0.1}]

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
    names = turn.locator(".bars").nth(1).locator(".name").all_inner_texts()
    assert names == ["<b>sum</b>", "up"] and "70" in turn.locator(".bars").nth(1).inner_text()
    tokens = turn.locator(".token")
    assert [tokens.nth(i).get_attribute("data-hue") for i in range(4)] == ["1", "1", "1", "0"]
    assert turn.locator(".chips").inner_text().split() == ["summarize", "×1", "then", "sentiment", "×1"]
    assert "3 tokens/s" in turn.locator(".timings").inner_text()


def test_the_probabilities_of_labels_are_shown_as_bars(visit: Any) -> None:
    visitor = visit()
    route = {"mix": {"sentiment": 1}, "then": [], "reason": "it fits", "policy": "each", "probabilities": {}}
    labels = {
        HTML: 0.7,
        "joy": 0.2,
        "fear": 0.05,
        "anger": 0.03,
        "other": 0.012,
        "rare": 0.005,
        "last": 0.003,
    }
    ended = {**route, "labels": labels, "timings": {"first_token": 1.0, "total": 1.0, "queue": 0.0}}
    events = [
        {
            "choices": [{"delta": {"role": "assistant", "content": ""}, "finish_reason": None}],
            "loramix": route,
        },
        {"choices": [{"delta": {"content": HTML}, "finish_reason": None}]},
        {"choices": [{"delta": {}, "finish_reason": "stop"}], "loramix": ended},
        {"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": 3}},
    ]
    visitor.page.route(
        "**/v1/chat/completions",
        lambda asked: asked.fulfill(content_type="text/event-stream", body=stream_of(*events)),
    )
    turn = visitor.send("which?")
    bars = turn.locator(".bars", has_text="Probability of each label")
    assert bars.locator(".name").all_text_contents() == [HTML, "joy", "fear", "anger", "other"]
    assert bars.locator(".bar.chosen .name").text_content() == HTML
    assert bars.locator(".bar.chosen .number").inner_text().startswith("70 %")
    assert "2 more, each 0.5 % or less" in bars.inner_text()
    assert "tokens/s" not in turn.locator(".timings").inner_text()


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


@pytest.mark.base
def test_the_default_pack_answers_and_shows_why(default_base: Any, browser: Any) -> None:
    with served("smollm2-135m", "--parallel", "2") as server:
        visitor = Visitor(browser, server.url)
        page = visitor.page
        page.wait_for_selector(".opener")
        assert page.locator(".skills li").count() == 12
        turn = visitor.send(TWO_SKILLS)
        assert turn.locator(".chips").inner_text().split() == ["emotion", "×1", "then", "sentiment", "×1"]
        assert turn.locator(".text").text_content().split("\n") == ["joy", "positive"]
        hues = [token.get_attribute("data-hue") for token in turn.locator(".token").all()]
        assert len(hues) > 1 and hues == ["3"] * (len(hues) - 1) + ["0"]
        turn.get_by_role("button", name="Show contributions").click()
        visitor.idle()
        assert turn.locator("canvas").count() == 2
        assert [token.get_attribute("data-hue") for token in turn.locator(".token").all()] == hues
        maximum = re.search(r"layer (\d+) at ‘(?:joy|positive)’", turn.locator(".readout").first.inner_text())
        assert (
            maximum is not None and 10 <= int(maximum[1]) <= 29
        )  # the adapters leave the layers below alone
        assert visitor.complaints == [] and visitor.foreign == []
        visitor.context.close()
