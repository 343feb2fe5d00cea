"""Answers under a JSON schema: those that end conform, by another implementation's judgement; the rest is refused."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from schemas import REFUSED, SCHEMAS, validator

from loramix import Engine
from loramix.errors import UsageError
from loramix.runtime.batch import run_batch
from loramix.runtime.constraints.schema import MAX_SCHEMA_BYTES, schema_to_grammar
from loramix.runtime.constraints.schema_sampler import SchemaSampler, vocabulary
from loramix.runtime.sampling import Sampling

KEPT = {name: schema for name, schema in SCHEMAS.items() if name not in REFUSED}
PIECES = [
    *(bytes([byte]) for byte in range(256)),
    *(
        '{"',
        '":',
        '": ',
        '", "',
        "true",
        '"}',
        '\\"',
        "th",
        "\n  ",
        '"]',
        "\\\\",
        "12",
        '"\n',
        "0.",
        "e9",
        "é",
        "😀",
    ),
]
CLOSING = {b'"', b"}", b"]", b'"}', b'"]', b'\\"'}


class _Words:
    """A vocabulary without a model: bytes, some longer pieces, two tokens that end an answer, one that is a word."""

    n_vocab = len(PIECES) + 3
    eot = len(PIECES)

    def piece(self, token: int) -> bytes:
        piece = PIECES[token] if token < len(PIECES) else b"ends" if token == self.n_vocab - 1 else b""
        return piece if isinstance(piece, bytes) else piece.encode()

    def is_end(self, token: int) -> bool:
        return token >= self.eot


class _Walk:
    """Draws any allowed token alike, and one that closes something more often, so that answers end."""

    settings = Sampling()

    def __init__(self, words: _Words, seed: int) -> None:
        self._words, self._random = words, random.Random(seed)

    def pick(self, logits: np.ndarray, recent: list[int], n_prompt: int = 0) -> int:
        tokens = np.flatnonzero(np.isfinite(logits)).tolist()
        ends = [token for token in tokens if self._words.is_end(token)]
        closing = [token for token in tokens if self._words.piece(token) in CLOSING]
        for some, odds in ((ends, 0.5), (closing, 0.15)):
            if some and self._random.random() < odds:
                return int(self._random.choice(some))
        return int(self._random.choice(tokens))


@pytest.fixture(scope="module")
def words() -> tuple[_Words, Any]:
    found = _Words()
    return found, vocabulary(found)  # type: ignore[arg-type]


def walk(words: tuple[_Words, Any], schema: Any, seed: int, limit: int = 1500) -> str | None:
    """An answer drawn at random; None where it does not end."""
    kind, tokens = words
    sampler = SchemaSampler(tokens, schema_to_grammar(schema), _Walk(kind, seed))  # type: ignore[arg-type]
    text = b""
    for _ in range(limit):
        token = sampler.pick(np.zeros(kind.n_vocab, np.float32), [])
        if kind.is_end(token):
            return text.decode()
        text += kind.piece(token)
    return None


def value_of(text: str) -> Any:
    """What JSON says, read strictly; numbers that a float cannot hold as its largest."""
    return json.loads(text, parse_float=lambda digits: max(-1e308, min(1e308, float(digits))))


def allows(words: tuple[_Words, Any], schema: Any, text: str) -> bool:
    """Whether an answer may be this text, byte by byte."""
    from llguidance import LLMatcher

    matcher = LLMatcher(words[1], schema_to_grammar(schema), log_level=0)
    return matcher.consume_tokens(list(text.encode())) and matcher.is_accepting()


def test_there_are_forty() -> None:
    assert len(SCHEMAS) == 40 and len(KEPT) == 38


@pytest.mark.parametrize("name", KEPT)
def test_what_is_drawn_at_random_conforms(name: str, words: tuple[_Words, Any]) -> None:
    judge = validator(SCHEMAS[name])
    texts = [walk(words, SCHEMAS[name], seed) for seed in range(8)]
    whole = [text for text in texts if text is not None]
    assert len(whole) >= 2
    for text in whole:
        assert judge.is_valid(value_of(text)), (
            text,
            [str(error) for error in judge.iter_errors(value_of(text))],
        )


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_enforced_is_named(name: str) -> None:
    with pytest.raises(UsageError) as caught:
        schema_to_grammar(SCHEMAS[name])
    assert REFUSED[name] in str(caught.value)


@pytest.fixture(scope="module")
def engine(tiny_pack: Path) -> Iterator[Engine]:
    with Engine.open(tiny_pack, n_ctx=512, n_threads=1) as engine:
        yield engine


def test_a_model_of_random_numbers_conforms(engine: Engine) -> None:
    ended = 0
    for name, schema in KEPT.items():
        judge = validator(schema)
        for seed in range(2):
            how = {"mix": "sentiment"} if seed else {"policy": "base"}
            answer = engine.generate(
                "a dog", max_tokens=80, json_schema=schema, temperature=1, seed=seed, **how
            )
            if answer.finish_reason == "stop":
                ended += 1
                assert judge.is_valid(value_of(answer.text)), (name, answer.text)
    assert ended >= 15


MOOD = {
    "type": "object",
    "properties": {"mood": {"enum": ["good", "bad"]}, "n": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["mood", "n"],
}


def test_sampling_works_as_without_a_schema(engine: Engine) -> None:
    how: dict[str, Any] = {"mix": "sentiment", "json_schema": MOOD, "max_tokens": 200, "temperature": 1}
    first, again = (engine.generate("a dog", **how, seed=5, top_k=3) for _ in range(2))
    assert first.text == again.text and validator(MOOD).is_valid(json.loads(first.text))
    texts = {engine.generate("a dog", **how, seed=seed).text for seed in range(6)}
    assert len(texts) > 2 and all(validator(MOOD).is_valid(json.loads(text)) for text in texts)
    scored = engine.generate("a dog", **how, seed=5, top_logprobs=3)
    assert len(scored.scores) == len(scored.tokens)
    # what the model gave, not what the schema left of it: a forced token may be an unlikely one
    assert any(score.log_probability < score.top[-1][1] for score in scored.scores)
    assert json.loads(engine.generate("a dog", json_schema=MOOD, repeat_penalty=1.3, max_tokens=200).text)


def test_a_mix_that_moves_and_answers_side_by_side_conform(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(
        type(engine.router.gate), "probabilities", lambda self, features: np.array([0.5, 0.45, 0.05])
    )
    moved = engine.generate("a dog", policy="token", json_schema=MOOD, max_tokens=200, temperature=1, seed=2)
    assert moved.route.policy == "token" and validator(MOOD).is_valid(json.loads(moved.text))
    source = tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps({"prompt": f"day {n}"}) + "\n" for n in range(6)))
    counts = run_batch(
        engine, source, tmp_path / "out.jsonl", json_schema=MOOD, max_tokens=200, policy="each"
    )
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert counts["answered"] == 6 and all(validator(MOOD).is_valid(json.loads(row["text"])) for row in rows)


def test_whitespace_has_an_end(words: tuple[_Words, Any]) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "array", "items": {"const": 1}, "maxItems": 2}}}
    sampler = SchemaSampler(words[1], schema_to_grammar(schema), Spaces())  # type: ignore[arg-type]
    text = b""
    while not words[0].is_end(token := sampler.pick(np.zeros(_Words.n_vocab, np.float32), [])):
        text += words[0].piece(token)
        assert len(text) < 300
    assert validator(schema).is_valid(json.loads(text)) and len(text) > 40


class Spaces:
    """Draws white space wherever it may."""

    settings = Sampling()

    def pick(self, logits: np.ndarray, recent: list[int], n_prompt: int = 0) -> int:
        tokens = np.flatnonzero(np.isfinite(logits)).tolist()
        spaces = [token for token in tokens if token < 256 and not bytes([token]).strip()]
        return int((spaces or tokens)[0])


def test_a_grammar_and_a_schema_exclude_each_other(engine: Engine) -> None:
    with pytest.raises(UsageError, match="exclude each other"):
        engine.stream("a dog", grammar='root ::= "a"', json_schema=True)


def test_a_schema_is_bounded_in_size(engine: Engine) -> None:
    with pytest.raises(UsageError, match=str(MAX_SCHEMA_BYTES)):
        engine.stream("a dog", json_schema={"enum": ["x" * MAX_SCHEMA_BYTES]})
