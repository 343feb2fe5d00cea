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
from loramix.runtime.sampling import Sampling
from loramix.runtime.schema import schema_to_grammar
from loramix.runtime.schema_sampler import SchemaSampler, vocabulary

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

    def pick(self, logits: np.ndarray, recent: list[int]) -> int:
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
                "a dog", max_tokens=120, json_schema=schema, temperature=1, seed=seed, **how
            )
            if answer.finish_reason == "stop":
                ended += 1
                assert judge.is_valid(value_of(answer.text)), (name, answer.text)
    assert ended >= 15
