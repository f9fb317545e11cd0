"""The step loop: schedule, run, sample, commit. Every rank runs it in lockstep on the same sequences.

A decode step is launched before the host has read the tokens of the one before it, so that the device goes on while the
host appends tokens, makes text and decides who stops. One step of look-ahead is enough for that. What keeps the results
what they would be without it:

 1. A launched row takes its token from the device, where the step before left it, and its position is the scheduler's
    count: the one after its row in that step. Rows that would pass a sequence's ``max_len`` are never launched.
 2. Tokens are read, and blocks enter the prefix tree under them, one step after the other, in order. What a launched
    step computes for a sequence that turns out to have stopped before is dropped unread.
 3. Such a sequence keeps its batch slot and pages until that step has ended as well. So a page that is free, or cached
    for others, is never one that a launched step may still write, whoever takes it next: a later step, the page mover,
    or a copy that other machines make.
 4. Page movements of a step are started before it is launched and after the one before it was: the mover's streams wait
    for everything launched so far, and the next launch for them.
 5. Prompts' chunks are launched ahead as decode rows are, so a step's host work is hidden behind the chunk before it.
    With a drafter, whose drafts follow known tokens, decode rows alone are; behind a prompt that is scored nothing is.
    That a sequence stopped is known when the next step is already launched: one that waits for its place starts a step
    later than it would, and a page for the dropped row may have cost a cached block. No token depends on either.
 6. What a structured sequence may choose is found on rank 0 behind its known tokens, and brought to all ranks before a
    step that it has a row in. Such a row is launched no sooner; others are.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from .cache.mover import PageMover
from .check import compare_ranks
from .flight import Flight
from .grammar.masks import Masks
from .logprobs import SampledTokens
from .metrics import RunMetrics
from .outcome import dealt, take_choices, take_token
from .request import ABORT, ERROR, Chunk, Sequence, StreamEvent, TokenLogprobs
from .runner import Runner
from .scheduler import Scheduler, Step
from .speculative.counters import SpeculativeCounters
from .speculative.speculator import Speculator


class Engine:
    """Runs sequences to their end.

    Every method is collective over the world: all ranks call it with the same sequences, in the same order.

    Args:
        scheduler: what to compute next.
        runner: how to compute it on this rank.
        mover: how to move this rank's pages.
        speculator: what drafts; None decodes one token a sequence and step.
        masks: which tokens structured sequences may choose.
        eos_token_ids: ids that end a sequence, unless it ignores them.
        look_ahead: launch a step before the tokens of the one before it are read; not with check_ranks.
        check_ranks: compare the decision state over ranks at every step.
        clock: seconds, for the metrics alone.

    Attributes:
        in_step: True inside ``step``, and after one that failed.
        num_departed, num_landed: steps given to the device, and those of them that it has ended.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        runner: Runner,
        mover: PageMover,
        *,
        speculator: Speculator | None = None,
        masks: Masks,
        eos_token_ids: tuple[int, ...],
        look_ahead: bool = True,
        check_ranks: bool = False,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.scheduler, self.runner, self.mover, self.speculator = scheduler, runner, mover, speculator
        scheduler.on_leave = self._forget
        self._masks = masks
        self._eos = frozenset(eos_token_ids)
        self._looks_ahead = look_ahead and not check_ranks
        self._flight: Flight | None = None  # launched, not read yet
        self._check_ranks = check_ranks
        self._clock = clock
        self._live: dict[int, Sequence] = {}  # by index: what has arrived and not ended
        self.in_step = False
        self.num_departed = self.num_landed = 0
        self.metrics = self.reset_metrics()

    def reset_metrics(self) -> RunMetrics:
        """Start a new set of counters and return it."""
        cache = self.scheduler.cache
        self.metrics = RunMetrics([0] * self.runner.placement.kvp, cache.reset_counters(), cache.occupancy)
        if self.speculator is not None:
            self.metrics.speculative = self.speculator.counters = SpeculativeCounters()
        return self.metrics

    @property
    def has_work(self) -> bool:
        """True while any sequence waits or runs."""
        return self.scheduler.has_work

    @property
    def trouble(self) -> str:
        """Nothing: an engine is alone."""
        return ""

    @property
    def num_live(self) -> int:
        """Sequences that have arrived and not ended."""
        return len(self._live)

    def add(self, seq: Sequence) -> None:
        """Queue a sequence."""
        self.note_arrival(seq)
        self.compute(seq)

    def note_arrival(self, seq: Sequence) -> None:
        """Know a sequence, which ``compute`` queues or ``go_on`` continues, until it ends."""
        self._live[seq.index] = seq
        self.scheduler.line_up(seq)
        self.metrics.note_arrival(seq, self._clock())

    def find(self, index: int) -> Sequence | None:
        """Return the sequence of an index; None where it has ended, or never was."""
        return self._live.get(index)

    def compute(self, seq: Sequence) -> None:
        """Queue a sequence that has arrived, its prompt to be computed here."""
        self.metrics.prefill_total += seq.prompt_len
        self.scheduler.add(seq)

    def go_on(self, seq: Sequence, token: int, logprobs: TokenLogprobs | None) -> list[StreamEvent]:
        """Continue a held sequence whose prompt and first token another group computed; return what is new of it.

        A structured one chooses its first token here, where its grammar is: its prompt's last row is computed again.
        """
        seq.was_admitted = True
        seq.output.cached_tokens = seq.blocks.num_reused
        self.scheduler.run_held(seq, len(seq.token_ids) - seq.is_structured)
        if seq.is_structured:
            return []
        if seq.output.logprobs is not None and logprobs is not None:
            seq.output.logprobs.append(logprobs)
        event = take_token(seq, token, self._eos)
        self.metrics.note_tokens(seq, self._clock(), 1)
        if event.output is not None:
            self.end(seq, seq.output.finish_reason)
        return [event]

    def abort(self, index: int) -> list[StreamEvent]:
        """End a request at once, wherever it is; one that has ended meanwhile is left alone. Return its last event."""
        seq = self.find(index)
        return [] if seq is None else [self.end(seq, ABORT)]

    def fail(self, seq: Sequence, reason: str) -> StreamEvent:
        """End a sequence with an error, alone."""
        seq.output.error = reason
        return self.end(seq, ERROR)

    def end(self, seq: Sequence, reason: str) -> StreamEvent:
        """End a sequence, whether it waits, runs or is held elsewhere: the one way out. Return its last event.

        What it computed stays cached. A step in flight that has a row of it keeps its slot and pages until it lands.
        """
        seq.output.finish_reason = reason
        del self._live[seq.index]
        self._masks.drop(seq)
        place = self.runner.placement
        held = [place.local_len(seq.num_computed, rank, seq.blocks.first_owner) for rank in range(place.kvp)]
        self.metrics.note_end(seq, self._clock(), held)
        if self._flight is None or not self._flight.holds(seq):
            self.scheduler.remove(seq)
        return StreamEvent(seq.index, [], "", seq.output)

    def abort_all(self) -> None:
        """Drop every sequence; its pages are free or cached. After a step that failed, nothing stays cached.

        Raises:
            RankLost: when the step in flight finds that.
        """
        flight, self._flight = self._flight, None
        try:
            if flight is not None:
                flight.read(self.runner)
        finally:
            self.num_landed = self.num_departed
            self._drop_all()

    def synchronize(self) -> None:
        """Wait on the host until this rank's device has done all that it was given."""
        self.mover.synchronize()
        if self.runner.cache.pages.is_cuda:
            torch.cuda.synchronize(self.runner.cache.pages.device)

    def close(self) -> None:
        """Leave nobody: an engine is alone."""

    def _drop_all(self) -> None:
        for seq in list(self.scheduler.running):
            self.scheduler.remove(seq, keep=not self.in_step)
        self.scheduler.clear_waiting()
        for seq in self._live.values():
            self._masks.drop(seq)
        self._live.clear()
        if self.speculator is not None:
            self.speculator.reset()
        if self.runner.sampler is not None:
            self.runner.sampler.scorer.clear()
        if self.in_step:  # pages that it should have written or moved may hold anything
            self.scheduler.cache.clear()
            self.in_step = False

    def listen(self) -> bytes:
        """Return nothing: an engine hears of nobody."""
        return b""

    def advance(self, now: float) -> None:
        """Tell the time, in seconds of one clock for all ranks: it ends the retention of cached blocks."""
        self.scheduler.cache.advance(now)

    def hear(self, news: bytes) -> list[StreamEvent]:
        """Do nothing: there are no news."""
        return []

    def step(self, *, may_wait: bool = False) -> list[StreamEvent]:
        """Compute one step and return what is new of the sequences that got a token.

        ``may_wait``: pages are held for others, so that it may have to wait for them; it then computes nothing.

        Raises:
            RankMismatch: with check_ranks, when ranks disagree.
        """
        self.in_step = True
        flight = self._flight = self._flight or self._depart(may_wait)
        if flight is None:
            self.in_step = False
            return []
        self._flight = self._depart_ahead(flight)
        events = self._land(flight)
        if self._flight is not None and all(chunk.seq.has_ended for chunk in self._flight.step.chunks):  # for nobody
            self._land(self._flight)
            self._flight = None
        self.in_step = False
        return events

    def _depart(self, may_wait: bool) -> Flight | None:
        """Give the device whatever is due; None where nothing is and that may be."""
        step = self.scheduler.schedule()
        if not step.chunks and may_wait:
            self.mover.execute(step.movements)
            return None
        if not step.chunks:
            raise RuntimeError(f"{len(self.scheduler.waiting)} sequences wait and none can run")
        self._note_reuse(step)
        if self.speculator is not None:
            self._compare(step)  # a drafter's steps have collectives too
            self.speculator.propose(step, self.scheduler, self.mover.execute)
        self._compare(step)
        step.chunks = self._masks.masked(step.chunks)
        self.mover.execute(step.movements)
        return self._launched(step)

    def _compare(self, step: Step) -> None:
        """Compare a step over ranks where that is asked for: before any collective whose shape the step decides."""
        if self._check_ranks:
            compare_ranks(self.metrics.num_steps, step)

    def _forget(self, seq: Sequence) -> None:
        """Hold nothing of a sequence that ended or was preempted."""
        if self.speculator is not None:
            self.speculator.drop(seq)
        if self.runner.sampler is not None:
            self.runner.sampler.forget(seq)

    def _launched(self, step: Step) -> Flight:
        waits = any(chunk.seq.scores_prompt for chunk in step.chunks)
        flight = Flight.launch(self.runner, step, waits=waits)
        self.num_departed += 1
        self.metrics.padding_rows += self.runner.num_padding
        return flight

    def _depart_ahead(self, flight: Flight) -> Flight | None:
        """Give the device the step after one that is not read yet, where that is known already."""
        if not (self._looks_ahead and flight.is_pending):
            return None
        if self.speculator is not None and self.speculator.is_due(flight.step):
            return None  # drafts follow known tokens
        step = self.scheduler.look_ahead(flight.step, decodes_alone=self.speculator is not None)
        if step is None:
            return None
        self._note_reuse(step)
        self.mover.execute(step.movements)
        if self.speculator is not None and not self.speculator.skip(step):
            return None
        step.chunks = self._masks.masked(step.chunks)
        return self._launched(step)

    def _land(self, flight: Flight) -> list[StreamEvent]:
        """Wait for a step and return what is new; what it computed for sequences that ended before is dropped."""
        tokens = flight.read(self.runner)
        if self.speculator is not None:
            self.speculator.settle(flight.step)
        chunks = flight.step.chunks
        self.num_landed += 1
        self._note_scores()
        going_on = []
        for chunk in chunks:
            if chunk.seq.has_ended:
                self.scheduler.remove(chunk.seq)
            else:
                going_on.append(chunk)
        if not going_on:
            return []
        self.scheduler.commit(going_on)
        if self._check_ranks:
            compare_ranks(self.metrics.num_steps, flight.step, tokens)
        self.metrics.note_step(going_on)
        return [] if tokens is None else self._commit([chunk for chunk in chunks if chunk.samples], tokens)

    def _note_scores(self) -> None:
        """Give prompts the log-probabilities that the step has made of their tokens."""
        for seq, found in [] if self.runner.sampler is None else self.runner.sampler.scorer.take():
            assert seq.output.prompt_logprobs is not None
            seq.output.prompt_logprobs.append(found)

    def _note_reuse(self, step: Step) -> None:
        """Note what each sequence found cached when it was admitted first."""
        for seq in step.admitted:
            if not seq.was_admitted:
                seq.was_admitted = True
                seq.output.cached_tokens = seq.num_computed
                self.metrics.note_admission(seq, self._clock())

    def _commit(self, chunks: list[Chunk], tokens: SampledTokens) -> list[StreamEvent]:
        """Add to each sequence what its rows chose, up to its end; return what is new."""
        now, events = self._clock(), list[StreamEvent]()
        for chunk, ids, logprobs in dealt(tokens, chunks):
            seq, is_decode = chunk.seq, chunk.is_decode
            if seq.has_ended:
                continue
            taken = take_choices(chunk, ids, logprobs, self._eos)
            events += taken.events
            made = len(taken.events)
            if made:
                if chunk.drafts:
                    self.scheduler.commit_accepted(seq)
                if is_decode and self.metrics.speculative is not None:
                    self.metrics.speculative.note(len(chunk.drafts), taken.accepted, made)
                self.metrics.note_tokens(seq, now, made)
            if taken.is_stuck:
                events.append(self.fail(seq, self._masks.problem(seq)))
            elif seq.has_ended:
                self.end(seq, seq.output.finish_reason)
        return events
