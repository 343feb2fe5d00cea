"""Runs several answers concurrently: answers of one mix decode in one batch, and mixes take turns.

The only answer of a mix stays in the engine's context of that mix, whose graph already exists. When a second
answer of the mix arrives, both move into the batch context, where a mix keeps its turn for some tokens, because
adapters apply to a whole call. When the batch context is full, the youngest answer drops its KV. Long prompts are
prefilled in chunks, with tokens of other answers in between.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from loramix.defaults import N_CELLS
from loramix.errors import Interrupted
from loramix.models.mixing import Mix
from loramix.runtime.decoder import DecodeRequest, DecodeResult
from loramix.runtime.engine import Engine
from loramix.runtime.listener import AnswerListener, as_loramix_error
from loramix.runtime.llama.batch_context import BatchContext
from loramix.runtime.mix_turns import SLICE, Turns
from loramix.runtime.scheduled_answer import PendingAnswer, ScheduledAnswer
from loramix.runtime.stream import Stream


class Scheduler:
    """Runs concurrent answers on an engine; not thread-safe.

    Args:
        engine: used by this scheduler alone.
        listener: receives callbacks for routes, text, ends and errors.
        parallel: maximum answers in one batch.
        n_cells: maximum tokens of all answers in the batch context.
    """

    def __init__(
        self, engine: Engine, listener: AnswerListener, *, parallel: int, n_cells: int = N_CELLS
    ) -> None:
        self._engine, self._listener = engine, listener
        self._decoder, self._interrupt = engine.decoder, engine.model.interrupt
        self._parallel, self._n_cells = parallel, max(n_cells, engine.n_ctx)
        self._pending: dict[int, PendingAnswer] = {}
        self._read_for_routing = False  # whether the last step read for routing
        self._jobs: dict[int, ScheduledAnswer] = {}
        self._batch: BatchContext | None = None
        self._turns = Turns()

    def __len__(self) -> int:
        return len(self._jobs) + len(self._pending)

    def add(
        self,
        number: int,
        open_stream: Callable[[], Stream],
        before: Callable[[], DecodeRequest | None] = lambda: None,
    ) -> None:
        """Start an answer.

        Args:
            number: identifies the answer in callbacks.
            open_stream: routes the prompt and creates the stream.
            before: returns the prefill that routing needs, see `Engine.routing_request`.
        """
        try:
            self._pending[number] = pending = PendingAnswer(open_stream, before())
        except Exception as error:
            self._listener.failed(number, as_loramix_error(error))
            return
        if not pending.is_long:
            self._route(number)

    def _route(self, number: int) -> None:
        """Route a prompt, or prefill one chunk of a long prompt for routing."""
        if self._engine.routing.uses_base_context:
            self._vacate_contexts(Mix.EMPTY)
        pending = self._pending[number]
        try:
            with self._interrupt.running(number):
                if pending.request is not None and self._engine.read(pending.request):
                    return
                stream = pending.open_stream()
        except Interrupted:
            return  # the caller that interrupted it also calls `cancel`
        except Exception as error:
            del self._pending[number]
            self._listener.failed(number, as_loramix_error(error))
            return
        del self._pending[number]
        self._listener.started(number, stream)
        if (request := self._deliver(number, stream, stream.advance())) is not None:
            self._jobs[number] = ScheduledAnswer(number, stream, request)

    def cancel(self, number: int) -> None:
        """Cancel an answer; does nothing if it has already ended."""
        self._interrupt.clear(number)
        self._pending.pop(number, None)
        if (job := self._jobs.get(number)) is not None:
            job.stream.close()
            self._remove(job)

    def reload(self) -> bool:
        """Reload the pack from disk, see `Engine.reload`; running answers are prefilled again."""
        for job in self._jobs.values():
            self._release_kv(job)
        if self._batch is not None:
            self._batch.set_mix(None)  # its adapters may be freed
        return self._engine.reload()

    def close(self) -> None:
        """Cancel all answers and free the batch context, which holds the last mix's adapters."""
        for number in [*self._jobs, *self._pending]:
            self.cancel(number)
        if self._batch is not None:
            self._batch.close()
            self._batch = None

    def step(self) -> None:
        """Prefill one chunk of one prompt, if it fits, and decode one token of each answer whose turn it is."""
        # one chunk a step, so that other answers get their tokens; routing and prefill alternate
        waiting = self._prefill_one() if self._read_for_routing or not self._pending else None
        self._read_for_routing = waiting is None and bool(self._pending)
        if self._read_for_routing:
            self._route(next(iter(self._pending)))
        for job in [job for job in self._jobs.values() if job.in_context and job is not waiting]:
            self._decode_in_context(job)
        group = self._next_group()
        if len(group) == 1 and self._can_leave_batch(group[0]):
            self._move_to_context(group[0])
        else:
            self._decode_batch(group)

    def _prefill_one(self) -> ScheduledAnswer | None:
        """Prefill one waiting prompt, or a chunk of it, and return its answer; None if none waits."""
        jobs = sorted(self._jobs.values(), key=lambda job: not job.is_between_branches)
        running = not all(job.needs_prefill for job in jobs)
        ready = (job for job in jobs if job.needs_prefill and (not running or self._fits(job)))
        if (waiting := next(ready, None)) is not None:
            self._vacate_contexts(waiting.request.mix, all_contexts=waiting.stream.token_wise)
            if not self._prefill_chunk(waiting):
                self._decode_in_context(waiting)
            stays = waiting.stream.token_wise or not waiting.in_context
            if not stays and self._shares_mix(waiting) and self._fits(waiting):
                self._move_to_batch(waiting)
        return waiting

    def _fits(self, job: ScheduledAnswer) -> bool:
        if self._batch is None or job.stream.choosing_label:  # it stays in the engine's context
            return True
        margin = SLICE * len(self._jobs)
        return self._batch.free > 0 and self._batch.used + len(job.request.tokens) + margin <= self._n_cells

    def _decode_in_context(self, job: ScheduledAnswer) -> None:
        """Decode one token of an answer in the engine's own context."""
        try:
            with self._interrupt.running(job.number):
                decoded = self._engine.decode(job.request)
            job.in_context = True
            self._advance(job, decoded._replace(cached=max(0, decoded.cached - job.prefilled)))
        except Interrupted:
            job.in_context = False
        except Exception as error:
            self._fail(job, error)

    def _prefill_chunk(self, job: ScheduledAnswer) -> bool:
        """Prefill a chunk of a long prompt and return True; return False if at most one chunk is left."""
        try:
            with self._interrupt.running(job.number):
                read = self._engine.read(job.request)
        except Interrupted:
            return True
        except Exception as error:
            self._fail(job, error)
            return True
        job.prefilled += read
        return read > 0

    def _shares_mix(self, job: ScheduledAnswer) -> bool:
        """Whether the batch context holds other answers of the same mix."""
        others = (other for other in self._jobs.values() if other.sequence is not None)
        return any(other.request.mix == job.request.mix for other in others)

    def _vacate_contexts(self, mix: Mix, *, all_contexts: bool = False) -> None:
        """Move answers whose context another answer needs from the engine into the batch context.

        Args:
            mix: the mix whose context is needed.
            all_contexts: the answer needs several contexts.
        """
        held = [job for job in self._jobs.values() if job.in_context]
        staying = [job for job in held if not job.stream.token_wise]
        all_contexts = all_contexts or len(staying) < len(held)
        available = self._decoder.pool.size - 1 - bool(mix)  # without the bare base's context
        for job in staying:
            n_skilled = sum(bool(other.request.mix) for other in staying if other.in_context)
            if all_contexts or job.request.mix == mix or (job.request.mix and n_skilled > available):
                self._move_to_batch(job)

    def _move_to_batch(self, job: ScheduledAnswer) -> None:
        """Move an answer's KV from the engine's context into the batch context."""
        job.in_context = False
        context = self._decoder.find_exact(job.request)
        try:
            if self._batch is None:
                self._batch = self._decoder.batch_context(self._parallel, self._n_cells)
            if context is not None and self._fits(job):
                job.sequence = self._batch.add(context, job.request.mix)
        except Exception as error:
            self._fail(job, error)

    def _can_leave_batch(self, job: ScheduledAnswer) -> bool:
        """Whether an answer in the batch is the only one of its mix and the engine has a context for it."""
        others = [other for other in self._jobs.values() if other is not job]
        if any(other.request.mix == job.request.mix or other.is_between_branches for other in others):
            return False
        held = [other for other in others if other.in_context and other.request.mix]
        full = len(held) >= self._decoder.pool.size - 1 or any(other.stream.token_wise for other in held)
        return bool(job.request.mix) and not full

    def _move_to_context(self, job: ScheduledAnswer) -> None:
        """Continue in the engine's own context, where decoding a single token is cheaper."""
        assert self._batch is not None and job.sequence is not None
        try:
            self._decoder.load(job.request, self._batch.copy(job.sequence))
        except Exception as error:
            self._fail(job, error)
            return
        self._release_kv(job)
        self._decode_in_context(job)

    def _next_group(self) -> list[ScheduledAnswer]:
        """Return the answers of the mix whose turn it is."""
        batched = [job for job in self._jobs.values() if job.sequence is not None]
        if not batched or self._batch is None:
            return []
        mix = self._turns.next(Counter(job.request.mix for job in batched), self._batch.mix)
        group = [job for job in batched if job.request.mix == mix]
        while self._batch.used + len(group) > self._n_cells:
            youngest = max(batched, key=lambda job: job.number)
            self._release_kv(youngest)
            batched.remove(youngest)
            group = [job for job in group if job is not youngest]
        return group

    def _decode_batch(self, group: list[ScheduledAnswer]) -> None:
        """Decode one token for each answer of a group that shares a mix."""
        if not group or self._batch is None:
            return
        mix = group[0].request.mix
        try:
            if self._batch.mix != mix:
                self._batch.set_mix(mix, self._decoder.adapters.get(mix))
            tokens = {job.sequence: job.request.tokens[-1] for job in group if job.sequence is not None}
            logits = self._batch.decode(tokens)
        except Exception as error:
            for job in group:
                self._fail(job, error)
            return
        for job in group:
            assert job.sequence is not None
            try:
                self._advance(job, DecodeResult(logits[job.sequence], len(job.request.tokens) - 1))
            except Exception as error:
                self._fail(job, error)

    def _advance(self, job: ScheduledAnswer, decoded: DecodeResult) -> None:
        before = job.request
        request = self._deliver(job.number, job.stream, job.stream.advance(decoded))
        if request is None:
            self._remove(job)
            return
        job.request = request
        continues = request.mix == before.mix and len(request.tokens) == len(before.tokens) + 1
        if job.stream.choosing_label or not (continues or job.stream.token_wise):  # it may go back
            self._release_kv(job)
        if len(request.tokens) == request.n_prompt:
            job.prefilled = 0  # the next step's prompt

    def _deliver(self, number: int, stream: Stream, item: str | DecodeRequest | None) -> DecodeRequest | None:
        """Deliver an answer's text until it requests a decode or ends."""
        while isinstance(item, str):
            self._listener.text_added(number, stream, item)
            item = stream.advance()
        if item is None:
            self._listener.ended(number, stream)
        return item

    def _release_kv(self, job: ScheduledAnswer) -> None:
        """Discard an answer's KV; its tokens are prefilled again."""
        if job.sequence is not None and self._batch is not None:
            self._batch.release(job.sequence)
        job.sequence, job.in_context = None, False

    def _remove(self, job: ScheduledAnswer) -> None:
        self._release_kv(job)
        self._jobs.pop(job.number, None)

    def _fail(self, job: ScheduledAnswer, error: Exception) -> None:
        job.stream.close()
        self._remove(job)
        self._listener.failed(job.number, as_loramix_error(error))
