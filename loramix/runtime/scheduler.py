"""Several answers at once: those that share a mix decode together in one batch, mixes take turns.

An answer that is the only one of its mix stays in the engine's context of that mix, whose graph is there. When
another of the mix comes, their KV moves into the batch context, where adapters belong to the call and not to a
sequence: so a mix keeps its turn for some tokens, and the next turn is the mix's that most answers share. Where
room is short the youngest answer gives its KV up and is read anew later. Long prompts are read in pieces, with
the others' tokens in between. One thread calls all of this.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

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
    """Runs answers side by side on an engine.

    Args:
        engine: nobody else may use it meanwhile.
        listener: hears of pieces and ends.
        parallel: most answers in one batch.
        n_cells: tokens of all answers in the batch context together.
    """

    def __init__(
        self, engine: Engine, listener: AnswerListener, *, parallel: int, n_cells: int = 4096
    ) -> None:
        self._engine, self._listener = engine, listener
        self._decoder, self._interrupt = engine.decoder, engine.model.interrupt
        self._parallel, self._n_cells = parallel, max(n_cells, engine.n_ctx)
        self._opening: dict[int, PendingAnswer] = {}
        self._opened = False  # whether the last step read for routing
        self._jobs: dict[int, ScheduledAnswer] = {}
        self._batch: BatchContext | None = None
        self._turns = Turns()

    def __len__(self) -> int:
        return len(self._jobs) + len(self._opening)

    def add(
        self,
        number: int,
        open_stream: Callable[[], Stream],
        before: Callable[[], DecodeRequest | None] = lambda: None,
    ) -> None:
        """Begin an answer.

        Args:
            number: how the listener hears of it.
            open_stream: makes it, which routes the prompt.
            before: what that will read, see `Engine.routing_request`.
        """
        try:
            self._opening[number] = opening = PendingAnswer(open_stream, before())
        except Exception as error:
            self._listener.failed(number, as_loramix_error(error))
            return
        if not opening.is_long:
            self._open(number)

    def _open(self, number: int) -> None:
        """Route a prompt, or read a piece of a long one for that."""
        self._make_way(Mix.EMPTY)  # the bare base's context is needed
        opening = self._opening[number]
        try:
            with self._interrupt.during(number):
                if opening.wanted is not None and self._engine.read(opening.wanted):
                    return
                stream = opening.open_stream()
        except Interrupted:
            return  # who stopped it cancels it
        except Exception as error:
            del self._opening[number]
            self._listener.failed(number, as_loramix_error(error))
            return
        del self._opening[number]
        self._listener.started(number, stream)
        wanted = self._listen(number, stream, stream.advance())
        if wanted is not None:
            self._jobs[number] = ScheduledAnswer(number, stream, wanted)

    def cancel(self, number: int) -> None:
        """End an answer here; one that has ended already is no error."""
        self._interrupt.forget(number)
        self._opening.pop(number, None)
        if (job := self._jobs.get(number)) is not None:
            job.stream.close()
            self._forget(job)

    def reload(self) -> bool:
        """Take up the pack as it is on disk; see `Engine.reload`. Answers under way are read anew."""
        for job in self._jobs.values():
            self._give_up(job)
        if self._batch is not None:
            self._batch.become(None)  # its adapters may be freed
        return self._engine.reload()

    def close(self) -> None:
        """End what is under way, and free the batch context, which holds the last mix's adapters."""
        for number in [*self._jobs, *self._opening]:
            self.cancel(number)
        if self._batch is not None:
            self._batch.close()
            self._batch = None

    def step(self) -> None:
        """Read a piece of one prompt, if there is room, and one token more of the answers whose turn it is."""
        # one piece a step, since others wait for their tokens: to route prompts and to read routed ones in turn
        waiting = self._read_one() if self._opened or not self._opening else None
        self._opened = waiting is None and bool(self._opening)
        if self._opened:
            self._open(next(iter(self._opening)))
        for job in [job for job in self._jobs.values() if job.held and job is not waiting]:
            self._alone(job)
        group = self._turn()
        if len(group) == 1 and self._may_return(group[0]):
            self._return(group[0])
        else:
            self._together(group)

    def _read_one(self) -> ScheduledAnswer | None:
        """Read a prompt that waits, or a piece of it; which, if any."""
        running = not all(job.waits for job in self._jobs.values())
        ready = (job for job in self._jobs.values() if job.waits and (not running or self._fits(job)))
        if (waiting := next(ready, None)) is not None:
            self._make_way(waiting.wanted.mix, all_of_it=waiting.stream.moves)
            if not self._reads_on(waiting):
                self._alone(waiting)
            if waiting.held and not waiting.stream.moves and self._shared(waiting) and self._fits(waiting):
                self._settle(waiting)
        return waiting

    def _fits(self, job: ScheduledAnswer) -> bool:
        if self._batch is None:
            return True
        margin = SLICE * len(self._jobs)
        return self._batch.free > 0 and self._batch.used + len(job.wanted.tokens) + margin <= self._n_cells

    def _alone(self, job: ScheduledAnswer) -> None:
        """Decode in the engine's own context."""
        try:
            with self._interrupt.during(job.number):
                decoded = self._engine.decode(job.wanted)
            job.held = True
            self._feed(job, decoded._replace(cached=max(0, decoded.cached - job.read)))
        except Interrupted:
            job.held = False
        except Exception as error:
            self._fail(job, error)

    def _reads_on(self, job: ScheduledAnswer) -> bool:
        """Whether there was more than a batch to read, and there is more still."""
        try:
            with self._interrupt.during(job.number):
                read = self._engine.read(job.wanted)
        except Interrupted:
            return True
        except Exception as error:
            self._fail(job, error)
            return True
        job.read += read
        return read > 0

    def _shared(self, job: ScheduledAnswer) -> bool:
        """Whether others of the same mix are in the batch context."""
        others = (other for other in self._jobs.values() if other.sequence is not None)
        return any(other.wanted.mix == job.wanted.mix for other in others)

    def _make_way(self, mix: Mix, *, all_of_it: bool = False) -> None:
        """Move out of the engine's contexts what an answer of a mix would displace there.

        Args:
            mix: of an answer that needs a context now.
            all_of_it: it needs several.
        """
        held = [job for job in self._jobs.values() if job.held]
        staying = [job for job in held if not job.stream.moves]
        all_of_it = all_of_it or len(staying) < len(held)
        room = self._decoder.pool.size - 1 - bool(mix)  # beside the bare base's
        for job in staying:
            skilled = sum(bool(other.wanted.mix) for other in staying if other.held)
            if all_of_it or job.wanted.mix == mix or (job.wanted.mix and skilled > room):
                self._settle(job)

    def _settle(self, job: ScheduledAnswer) -> None:
        """Move an answer's KV from the engine's context into the batch's."""
        job.held = False
        context = self._decoder.holding(job.wanted)
        try:
            if self._batch is None:
                self._batch = self._decoder.batch_context(self._parallel, self._n_cells)
            if context is not None and self._fits(job):
                job.sequence = self._batch.take(context, job.wanted.mix)
        except Exception as error:
            self._fail(job, error)

    def _may_return(self, job: ScheduledAnswer) -> bool:
        """Whether an answer in the batch context is the only one of its mix, and the engine has a context for it."""
        others = [other for other in self._jobs.values() if other is not job]
        if not job.wanted.mix or any(other.wanted.mix == job.wanted.mix for other in others):
            return False
        held = [other for other in others if other.held and other.wanted.mix]
        return len(held) < self._decoder.pool.size - 1 and not any(other.stream.moves for other in held)

    def _return(self, job: ScheduledAnswer) -> None:
        """Go on in the engine's own context, where a token alone costs less."""
        assert self._batch is not None and job.sequence is not None
        try:
            self._decoder.hold(job.wanted, self._batch.copy(job.sequence))
        except Exception as error:
            self._fail(job, error)
            return
        self._batch.release(job.sequence)
        job.sequence = None
        self._alone(job)

    def _turn(self) -> list[ScheduledAnswer]:
        """Answers of the mix that decodes now."""
        batched = [job for job in self._jobs.values() if job.sequence is not None]
        if not batched or self._batch is None:
            return []
        mix = self._turns.next(Counter(job.wanted.mix for job in batched), self._batch.mix)
        group = [job for job in batched if job.wanted.mix == mix]
        while self._batch.used + len(group) > self._n_cells:
            youngest = max(batched, key=lambda job: job.number)
            self._give_up(youngest)
            batched.remove(youngest)
            group = [job for job in group if job is not youngest]
        return group

    def _together(self, group: list[ScheduledAnswer]) -> None:
        """Decode one token for each of some answers of one mix."""
        if not group or self._batch is None:
            return
        mix = group[0].wanted.mix
        try:
            if self._batch.mix != mix:
                self._batch.become(mix, self._decoder.adapters.get(mix))
            tokens = {job.sequence: job.wanted.tokens[-1] for job in group if job.sequence is not None}
            logits = self._batch.decode(tokens)
        except Exception as error:
            for job in group:
                self._fail(job, error)
            return
        for job in group:
            assert job.sequence is not None
            try:
                self._feed(job, DecodeResult(logits[job.sequence], len(job.wanted.tokens) - 1))
            except Exception as error:
                self._fail(job, error)

    def _feed(self, job: ScheduledAnswer, decoded: DecodeResult) -> None:
        before = job.wanted
        wanted = self._listen(job.number, job.stream, job.stream.advance(decoded))
        if wanted is None:
            self._forget(job)
            return
        job.wanted = wanted
        goes_on = wanted.mix == before.mix and len(wanted.tokens) == len(before.tokens) + 1
        if not goes_on and not job.stream.moves:  # another mix answers now, from the prompt on
            self._give_up(job)

    def _listen(self, number: int, stream: Stream, item: str | DecodeRequest | None) -> DecodeRequest | None:
        """Hand on what an answer says until it wants tokens, or ends."""
        while isinstance(item, str):
            self._listener.said(number, stream, item)
            item = stream.advance()
        if item is None:
            self._listener.ended(number, stream)
        return item

    def _give_up(self, job: ScheduledAnswer) -> None:
        """Forget an answer's KV; its tokens are read anew."""
        if job.sequence is not None and self._batch is not None:
            self._batch.release(job.sequence)
        job.sequence, job.held = None, False

    def _forget(self, job: ScheduledAnswer) -> None:
        self._give_up(job)
        self._jobs.pop(job.number, None)

    def _fail(self, job: ScheduledAnswer, error: Exception) -> None:
        job.stream.close()
        self._forget(job)
        self._listener.failed(job.number, as_loramix_error(error))
