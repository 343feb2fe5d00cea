"""What the worker says to the server: pieces that come fast go together, and nothing of an answer is lost."""

from __future__ import annotations

import os
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from loramix.errors import RequestFailed
from loramix.server import protocol as m
from loramix.server.pipe import Pipe

PROMPT = "the quick brown fox"


class Said:
    """A file in the pipe's place."""

    def __init__(self, path: Path, pace_s: float = 1e6) -> None:
        self._file = path.open("w+b", buffering=0)
        weakref.finalize(self, self._file.close)
        self.pipe = Pipe(os.dup(self._file.fileno()), pace_s)

    def replies(self) -> list[Any]:
        """All that was said since the last call."""
        self._file.seek(0)
        data, found = self._file.read(), []
        self._file.truncate(0)
        self._file.seek(0)
        while data:
            (size,) = m.LENGTH.unpack_from(data)
            found.append(m.read_reply(data[m.LENGTH.size : m.LENGTH.size + size]))
            data = data[m.LENGTH.size + size :]
        return found


@pytest.fixture
def said(tmp_path: Path) -> Said:
    return Said(tmp_path / "pipe")


def tell(said: Said, stream: Any) -> list[str]:
    """Say an answer whole; its pieces."""
    said.pipe.started(7, stream)
    pieces = []
    for piece in stream:
        pieces.append(piece)
        said.pipe.text_added(7, stream, piece)
    said.pipe.ended(7, stream)
    return pieces


def test_the_first_piece_goes_at_once_and_the_others_together(said: Said, tiny_engine: Any) -> None:
    stream = tiny_engine.stream(PROMPT, mix="sentiment", max_tokens=9, top_logprobs=2)
    pieces = tell(said, stream)
    started, first, rest, *more, ended = said.replies()
    assert isinstance(started, m.Started) and isinstance(ended, m.Ended) and len(pieces) > 2
    assert (first.text, rest.text) == (pieces[0], "".join(pieces[1:]))
    assert all(reply.text == "" for reply in more), "tokens that gave no text"
    scores = [score for reply in (first, rest, *more) for score in reply.scores]
    assert [token for token, *_ in scores] == [
        stream._engine.model.piece(token) for token in stream.answer.tokens
    ]


def test_slow_pieces_go_one_by_one(tiny_engine: Any, tmp_path: Path) -> None:
    said = Said(tmp_path / "pipe", 0.0)
    pieces = tell(said, tiny_engine.stream(PROMPT, mix="sentiment", max_tokens=9))
    assert [reply.text for reply in said.replies()[1:-1]] == pieces


def test_who_wants_the_whole_answer_gets_it_at_its_end(tiny_engine: Any, tmp_path: Path) -> None:
    said = Said(tmp_path / "pipe", 0.0)
    said.pipe.buffer_until_end(7)
    stream = tiny_engine.stream(PROMPT, mix="sentiment", max_tokens=9)
    said.pipe.started(7, stream)
    first = next(stream)
    said.pipe.text_added(7, stream, first)
    rest = [piece for piece in stream if said.pipe.text_added(7, stream, piece) is None]
    said.pipe.flush()
    assert [reply.text for reply in said.replies()[1:]] == [first]
    said.pipe.ended(7, stream)
    last, ended = said.replies()
    assert last.text == "".join(rest) and isinstance(ended, m.Ended)
    pieces = tell(said, tiny_engine.stream(PROMPT, mix="sentiment", max_tokens=9))
    assert [reply.text for reply in said.replies()[1:-1]] == pieces, "the next of that number is another"


def test_what_has_waited_long_enough_goes_without_another_piece(said: Said, tiny_engine: Any) -> None:
    stream = tiny_engine.stream(PROMPT, mix="sentiment", max_tokens=9)
    for _ in range(3):
        said.pipe.text_added(7, stream, next(stream))
    assert len(said.replies()) == 1
    said.pipe.flush()
    assert said.replies() == []
    said.pipe._pace_s = 0.0
    said.pipe.flush()
    (late,) = said.replies()
    assert late.text and stream._text.endswith(late.text)


def test_an_answer_that_fails_keeps_what_it_said(said: Said, tiny_engine: Any) -> None:
    stream = tiny_engine.stream(PROMPT, mix="sentiment", max_tokens=9)
    pieces = [next(stream) for _ in range(3)]
    for piece in pieces:
        said.pipe.text_added(7, stream, piece)
    said.pipe.failed(7, RequestFailed("no more.", 499))
    first, rest, failed = said.replies()
    assert first.text + rest.text == "".join(pieces) and failed.status == 499
    said.pipe._pace_s = 0.0
    said.pipe.flush()
    assert said.replies() == []


def test_skills_that_answer_in_turn_stay_apart(said: Said, tiny_engine: Any) -> None:
    route = tiny_engine.route(PROMPT, mix="sentiment")
    two = replace(route, then=(tiny_engine.route(PROMPT, mix="summarize").mix,))
    stream = tiny_engine.stream(PROMPT, route=two)
    pieces = tell(said, stream)
    assert len(set(stream.answer.mixes)) == 2
    assert [reply.text for reply in said.replies()[1:-1]] == pieces
