"""Responses of the OpenAI protocol: choices, chunks, log-probabilities, usage."""

from __future__ import annotations

import asyncio
import base64
import struct
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import Any, Protocol

import msgspec

from loramix.errors import LoramixError
from loramix.runtime.answer import ScoredToken
from loramix.server import protocol as m
from loramix.server.guard import error_body
from loramix.server.queued_request import QueuedRequest
from loramix.server.service import CollectedAnswer, Event, Events, Service, report


class Form(Protocol):
    """Response format of an endpoint."""

    def head(self, chunk: bool = False) -> dict[str, Any]:
        """Return the fields common to all objects of a response."""

    def full_choice(self, index: int, answer: CollectedAnswer) -> dict[str, Any]:
        """Return a complete choice."""

    def piece_choice(
        self, index: int, text: str | None, scores: Sequence[ScoredToken], offset: int
    ) -> dict[str, Any]:
        """Return the choice of a chunk; text None marks the first one. ``offset``: characters before it."""

    def last_choice(self, index: int, answer: CollectedAnswer) -> dict[str, Any]:
        """Return the choice of the last chunk."""


class Chat:
    """Response format of chat."""

    def __init__(self, model: str) -> None:
        self.model, self.id, self.created = model, f"chatcmpl-{uuid.uuid4().hex}", int(time.time())

    def head(self, chunk: bool = False) -> dict[str, Any]:
        """See `Form`."""
        kind = "chat.completion.chunk" if chunk else "chat.completion"
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def full_choice(self, index: int, answer: CollectedAnswer) -> dict[str, Any]:
        """See `Form`."""
        message = {"role": "assistant", "content": answer.text, "refusal": None}
        scores = _chat_scores(answer.scores)
        return {"index": index, "message": message, "finish_reason": _finish(answer), "logprobs": scores}

    def piece_choice(
        self, index: int, text: str | None, scores: Sequence[ScoredToken], offset: int
    ) -> dict[str, Any]:
        """See `Form`."""
        delta = {"role": "assistant", "content": ""} if text is None else {"content": text}
        return {"index": index, "delta": delta, "finish_reason": None, "logprobs": _chat_scores(scores)}

    def last_choice(self, index: int, answer: CollectedAnswer) -> dict[str, Any]:
        """See `Form`."""
        return {"index": index, "delta": {}, "finish_reason": _finish(answer), "logprobs": None}


class Completion:
    """Response format of completions."""

    def __init__(self, model: str) -> None:
        self.model, self.id, self.created = model, f"cmpl-{uuid.uuid4().hex}", int(time.time())

    def head(self, chunk: bool = False) -> dict[str, Any]:
        """See `Form`."""
        return {"id": self.id, "object": "text_completion", "created": self.created, "model": self.model}

    def full_choice(self, index: int, answer: CollectedAnswer) -> dict[str, Any]:
        """See `Form`."""
        scores = _completion_scores(answer.scores, 0)
        return {"index": index, "text": answer.text, "finish_reason": _finish(answer), "logprobs": scores}

    def piece_choice(
        self, index: int, text: str | None, scores: Sequence[ScoredToken], offset: int
    ) -> dict[str, Any]:
        """See `Form`."""
        found = _completion_scores(scores, offset)
        return {"index": index, "text": text or "", "finish_reason": None, "logprobs": found}

    def last_choice(self, index: int, answer: CollectedAnswer) -> dict[str, Any]:
        """See `Form`."""
        return {"index": index, "text": "", "finish_reason": _finish(answer), "logprobs": None}


def _chat_scores(scores: Sequence[ScoredToken]) -> dict[str, Any] | None:
    return {"content": score_list(scores), "refusal": None} if scores else None


def score_list(scores: Sequence[ScoredToken]) -> list[dict[str, Any]]:
    """Format log-probabilities for the chat endpoints of both protocols."""
    return [{**_token(t, p), "top_logprobs": [_token(*pair) for pair in top]} for t, p, top in scores]


def _completion_scores(scores: Sequence[ScoredToken], offset: int) -> dict[str, Any] | None:
    if not scores:
        return None
    tokens = [token.decode("utf-8", "replace") for token, _, _ in scores]
    offsets = [offset + sum(map(len, tokens[:i])) for i in range(len(tokens))]
    top = [{t.decode("utf-8", "replace"): p for t, p in best} for _, _, best in scores]
    values = [p for _, p, _ in scores]
    return {"tokens": tokens, "token_logprobs": values, "top_logprobs": top, "text_offset": offsets}


async def stream(
    service: Service,
    jobs: Sequence[QueuedRequest],
    event_streams: Sequence[Events],
    form: Form,
    n: int,
    with_usage: bool,
) -> AsyncIterator[bytes]:
    """Write one or more answers as server-sent events; ``[DONE]`` comes last, also after an error.

    Args:
        service: service that runs the jobs.
        jobs: one job per choice, ``n`` per prompt.
        event_streams: the events of each job.
        form: format of the chunks.
        n: number of choices per prompt.
        with_usage: add a chunk with the token usage.
    """
    answers, head = [CollectedAnswer() for _ in jobs], form.head(True)
    try:
        async for index, event in _merged(event_streams):
            answer, before = answers[index], len(answers[index].text)
            answer.add(event)
            if isinstance(event, m.Started):
                yield _event(
                    {**head, "choices": [form.piece_choice(index, None, [], 0)], "loramix": event.route}
                )
            elif isinstance(event, m.Piece):
                yield _event(
                    {**head, "choices": [form.piece_choice(index, event.text, event.scores, before)]}
                )
            else:
                route = report(answer, jobs[index].waited)
                yield _event({**head, "choices": [form.last_choice(index, answer)], "loramix": route})
        if with_usage:
            yield _event({**head, "choices": [], "usage": usage_of(answers, n)})
    except LoramixError as error:
        yield _event(error_body("/v1", str(error), error.http_status))
    finally:
        for job in jobs:
            service.supervisor.cancel(job)
    yield b"data: [DONE]\n\n"


async def _merged(event_streams: Sequence[Events]) -> AsyncIterator[tuple[int, Event]]:
    """Yield the events of several answers in order of arrival, with the index of the answer."""
    if len(event_streams) == 1:
        async for event in event_streams[0]:
            yield 0, event
        return
    merged: asyncio.Queue[tuple[int, Event | LoramixError | None]] = asyncio.Queue()

    async def follow(index: int, events: Events) -> None:
        try:
            async for event in events:
                merged.put_nowait((index, event))
            merged.put_nowait((index, None))
        except LoramixError as error:
            merged.put_nowait((index, error))

    tasks = [asyncio.create_task(follow(i, events)) for i, events in enumerate(event_streams)]
    try:
        running = len(tasks)
        while running:
            index, found = await merged.get()
            if isinstance(found, LoramixError):
                raise found
            if found is None:
                running -= 1
            else:
                yield index, found
    finally:
        for task in tasks:
            task.cancel()


def _event(content: dict[str, Any]) -> bytes:
    return b"data: " + msgspec.json.encode(content) + b"\n\n"


def usage_of(answers: Sequence[CollectedAnswer], n: int) -> dict[str, Any]:
    """Return the token usage of all choices; a prompt with ``n`` choices counts once."""
    rows = [answer.ended.usage for answer in answers if answer.ended]
    prompt, cached = (sum(row[name] for row in rows[::n]) for name in ("prompt_tokens", "cached_tokens"))
    completion = sum(row["completion_tokens"] for row in rows)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def encoded(row: list[float]) -> str:
    """Encode a vector as base64 of little-endian float32, the default of OpenAI's client."""
    return base64.b64encode(struct.pack(f"<{len(row)}f", *row)).decode()


def _finish(answer: CollectedAnswer) -> str | None:
    return answer.ended.finish_reason if answer.ended else None


def _token(token: bytes, p: float) -> dict[str, Any]:
    return {"token": token.decode("utf-8", "replace"), "logprob": p, "bytes": list(token)}
