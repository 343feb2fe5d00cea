"""A plan's steps are answered as requests of their own would be, alone and side by side with others."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from planning import CHAIN, INSTRUCTIONS, ONE, TEXT, TWO, write_plan_pack
from test_labels import set_labels
from test_scheduler import Heard, run

from loramix import Engine
from loramix.errors import InvalidArtifact
from loramix.pack.edit import add_skill, put_pack
from loramix.pack.manifest import usable_instruction, write_manifest
from loramix.pack.pack import Pack
from loramix.runtime.contributions import contributions
from loramix.runtime.scheduler import Scheduler


@pytest.fixture(scope="module")
def engine(plan_pack: Path) -> Iterator[Engine]:
    with Engine.open(plan_pack, n_ctx=512, n_threads=1) as opened:
        yield opened


def asked(skill: str, text: str) -> str:
    return INSTRUCTIONS[skill].replace("{input}", text)


def by_hand(engine: Engine, *steps: tuple[str, str], **options: Any) -> list[Any]:
    """Answers to requests of their own; the text None is the answer before."""
    found: list[Any] = []
    for skill, text in steps:
        found.append(engine.generate(asked(skill, text or found[-1].text), mix=skill, **options))
    return found


def test_a_route_shows_its_steps(engine: Engine) -> None:
    route = engine.route(CHAIN)
    start = CHAIN.index(TEXT)
    assert route.to_json()["steps"] == [
        {"skill": "summarize", "on": "text", "text": [start, start + len(TEXT)]},
        {"skill": "sentiment", "on": "answer"},
    ]
    assert route.named == "summarize=1, then sentiment=1" and route.policy == "each"
    assert (
        route.reason == "the request asks for 2 things: summarize on the text, then sentiment on that answer"
    )
    assert engine.route(ONE).plan == () and engine.route(ONE).to_json()["steps"] == []


@pytest.mark.parametrize(("prompt", "second"), [(TWO, TEXT), (CHAIN, "")])
def test_each_step_is_answered_as_a_request_of_its_own(engine: Engine, prompt: str, second: str) -> None:
    first, then = by_hand(engine, ("summarize", TEXT), ("sentiment", second))
    answer = engine.generate(prompt)
    assert answer.parts == [first.text, then.text] and answer.text == f"{first.text}\n{then.text}"
    assert answer.tokens == first.tokens + then.tokens
    assert answer.prompts == first.prompts + then.prompts
    assert answer.usage["prompt_tokens"] == sum(len(prompt) for prompt in answer.prompts)
    assert answer.usage["completion_tokens"] == len(answer.tokens)
    assert "".join(engine.stream(prompt)) == answer.text


def test_a_step_on_an_empty_answer_works_on_the_text(engine: Engine) -> None:
    stream = engine.stream(CHAIN)
    assert stream._prompts.of(1, " \n") == engine.prepare(asked("sentiment", TEXT)).tokens
    assert stream._prompts.of(1, "good") == engine.prepare(asked("sentiment", "good")).tokens


def test_a_step_keeps_the_system_message_and_no_earlier_turn(engine: Engine) -> None:
    system = {"role": "system", "content": "be brief"}
    earlier = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "good day"}]
    last = {"role": "user", "content": TWO}
    answer = engine.generate([system, *earlier, last])
    wanted = engine.generate([system, {"role": "user", "content": asked("summarize", TEXT)}], mix="summarize")
    assert answer.parts[0] == wanted.text and answer.prompts[0] == wanted.prompts[0]
    assert engine.route([{"role": "user", "content": TWO}, earlier[1], earlier[0]]).plan == ()


@pytest.mark.parametrize("n_cells", [4096, 256])
def test_side_by_side_with_others_the_steps_stay_the_same(engine: Engine, n_cells: int) -> None:
    options = [{"max_tokens": n} for n in (40, 15, 3, 40, 20, 30)]
    prompts = [TWO, CHAIN, TWO + " " + TEXT, "SSS OO MMM: " + TEXT[:20], ONE, "hello"]
    asks = [(prompt, {**how, "top_logprobs": 1}) for prompt, how in zip(prompts, options, strict=True)] * 2
    alone = [engine.generate(prompt, **how) for prompt, how in asks]
    assert sum(len(answer.parts) > 1 for answer in alone) >= 6
    heard = run(engine, asks, parallel=5, n_cells=n_cells)
    for number, answer in enumerate(alone):
        found = heard.answers[number]
        assert (found.text, found.tokens, found.mixes) == (answer.text, answer.tokens, answer.mixes)
        assert found.parts == answer.parts and found.prompts == answer.prompts
        assert heard.texts[number] == answer.text
        assert found.usage["prompt_tokens"] == answer.usage["prompt_tokens"]
        assert 0 <= found.usage["cached_tokens"] <= found.usage["prompt_tokens"]


def test_a_request_is_routed_once(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    reads, read = list[Any](), engine.routing.reader.read  # type: ignore[union-attr]
    monkeypatch.setattr(engine.routing.reader, "read", lambda prompt: (reads.append(prompt), read(prompt))[1])
    engine.generate(CHAIN)
    assert len(reads) == 1


def test_one_limit_holds_for_all_steps(engine: Engine) -> None:
    whole = engine.generate(TWO)
    n = len(engine.generate(asked("summarize", TEXT), mix="summarize").tokens)
    for limit in (1, n, n + 1, n + 4):
        answer = engine.generate(TWO, max_tokens=limit)
        assert answer.tokens == whole.tokens[:limit] and answer.finish_reason == "length"
        assert len(answer.parts) == len(answer.prompts) == (1 if limit <= n else 2)


def test_a_stop_string_ends_the_whole_answer(engine: Engine) -> None:
    whole = engine.generate(TWO)
    word = next(char for char in whole.parts[0][2:] if char.strip())
    answer = engine.generate(TWO, stop=word)
    assert answer.text == whole.text[: whole.text.index(word)] and answer.finish_reason == "stop"
    assert answer.parts == [answer.text] and len(answer.prompts) == 1


def test_scores_and_contributions_are_those_of_each_step(engine: Engine) -> None:
    answer = engine.generate(CHAIN, top_logprobs=2)
    parts = by_hand(engine, ("summarize", TEXT), ("sentiment", ""), top_logprobs=2)
    assert answer.scores == parts[0].scores + parts[1].scores
    found = contributions(engine, answer)
    assert found.skills == ["sentiment", "summarize"] and "".join(found.pieces) == answer.text
    first, then = (contributions(engine, part) for part in parts)
    n = len(parts[0].tokens)
    np.testing.assert_array_equal(found.values[1, :, :n], first.values[0])
    np.testing.assert_array_equal(found.values[0, :, n:], then.values[0])


def test_drawn_tokens_depend_on_the_seed_alone(engine: Engine) -> None:
    options = {"temperature": 1.0, "seed": 5, "presence_penalty": 0.5}
    assert engine.generate(TWO, **options).tokens == engine.generate(TWO, **options).tokens


def test_the_prompts_of_steps_are_found_in_the_cache(engine: Engine) -> None:
    engine.generate(TWO)
    assert engine.generate(TWO).usage["cached_tokens"] > 0


@pytest.mark.parametrize(
    "options",
    [
        {"policy": "top1"},
        {"policy": "blend"},
        {"policy": "token"},
        {"policy": "base"},
        {"mix": "summarize"},
        {"grammar": 'root ::= "a"'},
        {"json_schema": True},
    ],
)
def test_only_the_policy_each_plans(engine: Engine, options: dict[str, Any]) -> None:
    stream = engine.stream(TWO, **options)
    assert stream.route.plan == () and stream.route.then == ()


def test_a_route_with_a_plan_and_a_grammar_make_one_answer(engine: Engine) -> None:
    answer = engine.stream(TWO, route=engine.route(TWO), grammar='root ::= "a"')
    assert "".join(answer) == "a" and answer.answer is not None
    assert answer.answer.prompts == [engine.prepare(TWO).tokens]


def test_what_cannot_be_split_is_answered_as_one(engine: Engine) -> None:
    both = engine.router.decide(np.asarray([0.5, 0.45, 0.05], np.float32), "each")
    assert both.then, "two such probable skills answer in turn where the gate knows no plans"
    for prompt in ("MMM OO SSS", "MMM SSS.", f"MMM {TEXT} SSS: another text that is not the same at all"):
        route = engine.route(prompt)
        assert (route.plan, route.then, route.policy) == ((), (), "each") and len(route.mix) == 1


def test_a_skill_without_an_instruction_is_no_step(tiny_pack: Path, tmp_path: Path) -> None:
    pack = write_plan_pack(tiny_pack, tmp_path / "old", instruction=None)
    with Engine.open(pack, n_ctx=256, n_threads=1) as old:
        assert old.route(TWO).plan == ()


def test_steps_that_would_not_fit_the_context_are_not_planned(tiny_pack: Path, tmp_path: Path) -> None:
    pack = write_plan_pack(tiny_pack, tmp_path / "long", instruction="please " * 20 + "{input}")
    with Engine.open(pack, n_ctx=128, n_threads=1) as small:
        assert small.route(TWO).plan == ()
    with Engine.open(pack, n_ctx=512, n_threads=1) as large:
        assert len(large.route(TWO).plan) == 2


def test_a_step_whose_prompt_does_not_fit_ends_the_answer(tiny_pack: Path, tmp_path: Path) -> None:
    pack = write_plan_pack(tiny_pack, tmp_path / "tight")
    with Engine.open(pack, n_ctx=80, n_threads=1) as small:
        found = small.generate(CHAIN, max_tokens=40)
        room = small.n_ctx - len(small.prepare(asked("sentiment", found.parts[0])).tokens)
        assert found.parts and (len(found.parts) == 2) == (room > 0)
        assert found.finish_reason == "length"


def test_a_label_skill_answers_its_step_with_a_label(tiny_pack: Path, tmp_path: Path) -> None:
    pack = set_labels(write_plan_pack(tiny_pack, tmp_path / "labels"), ["good", "bad"])
    with Engine.open(pack, n_ctx=512, n_threads=1) as engine:
        answer = engine.generate(CHAIN)
        (first, then) = by_hand(engine, ("summarize", TEXT), ("sentiment", ""))
        assert answer.parts == [first.text, then.text] and answer.parts[1] in ("good", "bad")
        assert answer.step_labels == [{}, then.labels] and answer.labels == then.labels
        # a label is no text to work on
        assert [step.on_answer for step in engine.route(f"SSS OO MMM AA: {TEXT}").plan] == [False, False]
        heard = run(engine, [(CHAIN, {}), (TWO, {}), (ONE, {}), (CHAIN, {})], parallel=4)
        assert heard.answers[0].text == heard.answers[3].text == answer.text


def test_a_label_skill_is_asked_about_the_last_text_alone(tiny_pack: Path, tmp_path: Path) -> None:
    pack = set_labels(write_plan_pack(tiny_pack, tmp_path / "labels"), ["good", "bad"])
    system = {"role": "system", "content": "be brief"}
    before = [
        {"role": "user", "content": "SSS: a lovely evening"},
        {"role": "assistant", "content": "good"},
    ]

    def follows(message: str) -> list[Any]:
        return [system, *before, {"role": "user", "content": message}]

    with Engine.open(pack, n_ctx=512, n_threads=1) as engine:
        message = f"SSS: {TEXT}"
        answer = engine.generate(follows(message))
        alone = engine.generate(
            [system, {"role": "user", "content": asked("sentiment", message)}], mix="sentiment"
        )
        assert answer.prompts == alone.prompts and answer.labels == alone.labels and answer.text == alone.text
        step = {"skill": "sentiment", "on": "text", "text": [0, len(message)]}
        assert engine.route(follows(message)).to_json()["steps"] == [step]
        # no earlier answer, no text of its own, a skill without labels, the skill named: the whole conversation
        assert engine.route(message).plan == () and engine.route([system, *follows(message)[-1:]]).plan == ()
        assert (
            engine.route(follows("SSSSSS")).mix == {"sentiment": 1}
            and engine.route(follows("SSSSSS")).plan == ()
        )
        assert engine.route(follows(ONE)).mix == {"summarize": 1} and engine.route(follows(ONE)).plan == ()
        assert engine.route(follows(message), mix="sentiment").plan == ()
        heard = run(engine, [(follows(message), {}), (message, {}), (follows(message), {})], parallel=3)
        assert heard.answers[0].labels == heard.answers[2].labels == alone.labels


def test_cancelled_in_the_second_step_others_go_on(engine: Engine) -> None:
    heard = Heard()
    scheduler = Scheduler(engine, heard, parallel=3)
    scheduler.add(1, lambda: engine.stream(TWO))
    scheduler.add(2, lambda: engine.stream(CHAIN))
    while "\n" not in heard.texts.get(1, ""):
        scheduler.step()
    scheduler.cancel(1)
    while len(scheduler):
        scheduler.step()
    scheduler.close()
    assert 1 not in heard.answers and heard.answers[2].text == engine.generate(CHAIN).text


def test_a_long_text_is_read_at_its_ends_and_answered_whole(engine: Engine) -> None:
    text = " ".join(["abcdefgh"] * 30)
    prompt = f"MMM OO SSS: {text}"
    assert [step.text for step in engine.route(prompt).plan] == [text, text]


def test_a_pack_without_gate_tags_answers_as_before(tiny_engine: Any) -> None:
    assert tiny_engine.route(TWO).plan == ()


def test_instructions_are_checked_and_survive_copies(plan_pack: Path, tmp_path: Path) -> None:
    pack = Pack.load(plan_pack)
    copied = put_pack(tmp_path / "copy", pack)
    assert copied.skills == pack.skills and copied.skill("sentiment").instruction == "Rate: {input}"
    for wrong in ("no input", "{input} and {input}", "{input}\x07", "{input}" + "x" * 2000):
        skills = (msgspec.structs.replace(pack.skills[0], instruction=wrong), *pack.skills[1:])
        with pytest.raises(InvalidArtifact, match="instruction"):
            write_manifest(tmp_path / "copy", msgspec.structs.replace(pack.manifest, skills=skills))
        assert usable_instruction(wrong) is None
    assert Pack.load(tmp_path / "copy").skills == pack.skills


def test_a_skill_may_be_asked_in_its_own_words(tiny_pack: Path, tmp_path: Path) -> None:
    pack = write_plan_pack(tiny_pack, tmp_path / "own", own_words=True)
    with Engine.open(pack, n_ctx=512, n_threads=1) as own:
        start = ONE.index(TEXT)
        route = own.route(ONE)
        assert route.to_json()["steps"] == [
            {"skill": "summarize", "on": "text", "text": [start, start + len(TEXT)]}
        ]
        [alone] = by_hand(own, ("summarize", TEXT))
        answer = own.generate(ONE)
        assert answer.text == alone.text and answer.prompts == alone.prompts
        assert len(own.route(TWO).plan) == 2  # several skills, no text, earlier turns, the skill named
        turns = [{"role": "user", "content": ONE}, {"role": "assistant", "content": "x"}]
        assert own.route([*turns, {"role": "user", "content": ONE}]).plan == ()
        assert own.route("MMM").plan == () and own.route(ONE, mix="summarize").plan == ()
        assert own.route(ONE, policy="top1").plan == ()


def test_own_words_stay_when_a_skill_is_replaced(tiny_pack: Path, tmp_path: Path) -> None:
    pack = write_plan_pack(tiny_pack, tmp_path / "own", own_words=True)
    skill = Pack.load(pack).skills[0]
    add_skill(
        pack,
        skill.name,
        Pack.load(pack).adapter_bytes(skill.name),
        description="",
        max_tokens=8,
        instruction=skill.instruction,
        replace_existing=True,
        keep_gate=True,
    )
    assert [entry.own_words for entry in Pack.load(pack).skills] == [True] * len(Pack.load(pack).skills)
