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
 5. Only decode rows of plain greedy sequences are launched ahead. Where anything else is due the step in flight is read
    first. That a sequence stopped is known when the next step is already launched: one that waits for its place starts
    a step later than it would, and a page for the dropped row may have cost a cached block. No token depends on either.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from parallel.launch import from_rank0, gather_values

from .cache.movements import as_ints
from .cache.mover import PageMover
from .graphs import PendingTokens
from .metrics import RunMetrics
from .request import Chunk, Sequence, StreamEvent, TokenLogprobs
from .runner import Runner
from .sampling import SampledTokens, sample
from .scheduler import Scheduler, Step
from .speculative.counters import SpeculativeCounters
from .speculative.speculator import Speculator
from .speculative.verify import num_accepted, sampling_batch

SHARE_TIME_EVERY = 64  # steps between two readings of the shared clock, while some priority ends at a time


class RankMismatch(RuntimeError):
    """Two ranks took different decisions."""


@dataclass(frozen=True, slots=True)
class Flight:
    """A step that was given to the device.

    Attributes:
        choice: the tokens that the device chose, on their way here, or the logits of the rows that sample.
    """

    step: Step
    choice: PendingTokens | torch.Tensor

    def holds(self, seq: Sequence) -> bool:
        """Return whether the step computes rows of a sequence."""
        return any(chunk.seq is seq for chunk in self.step.chunks)


class Engine:
    """Runs sequences to their end.

    Every method is collective over the world: all ranks call it with the same sequences, in the same order.

    Args:
        scheduler: what to compute next.
        runner: how to compute it on this rank.
        mover: how to move this rank's pages.
        speculator: what drafts; None decodes one token a sequence and step.
        eos_token_ids: ids that end a sequence, unless it ignores them.
        look_ahead: launch decode steps before the tokens of the step before are read; not with check_ranks.
        check_ranks: compare the decision state over ranks at every step.
        clock: seconds, for the metrics; rank 0's also tells when retention ends.

    Attributes:
        in_step: True inside ``step``, and after one that failed.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        runner: Runner,
        mover: PageMover,
        *,
        speculator: Speculator | None = None,
        eos_token_ids: tuple[int, ...],
        look_ahead: bool = True,
        check_ranks: bool = False,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.scheduler, self.runner, self.mover, self.speculator = scheduler, runner, mover, speculator
        if speculator is not None:
            scheduler.on_leave = speculator.drop
        self._eos = frozenset(eos_token_ids)
        self._looks_ahead = look_ahead and not check_ranks
        self._flight: Flight | None = None  # launched, not read yet
        self._check_ranks = check_ranks
        self._clock = clock
        self._started: dict[Sequence, float] = {}
        self._last_token: dict[Sequence, float] = {}
        self._steps_since_time = 0
        self._share_time_now = False
        self.in_step = False
        self.metrics = self.reset_metrics()

    def reset_metrics(self) -> RunMetrics:
        """Start a new set of counters and return it."""
        cache = self.scheduler.cache
        self._share_time_now = cache.needs_time
        self.metrics = RunMetrics([0] * self.runner.placement.kvp, cache.reset_counters(), cache.occupancy)
        if self.speculator is not None:
            self.metrics.speculative = self.speculator.counters = SpeculativeCounters()
        return self.metrics

    @property
    def has_work(self) -> bool:
        """True while any sequence waits or runs."""
        return self.scheduler.has_work

    def add(self, seq: Sequence) -> None:
        """Queue a sequence."""
        self.note_arrival(seq)
        self.compute(seq)

    def note_arrival(self, seq: Sequence) -> None:
        """Start the clock of a sequence, which ``compute`` queues or ``go_on`` continues."""
        self._started[seq] = self._clock()
        self.metrics.num_requests += 1
        if seq.retention:
            self._share_time_now = True

    def compute(self, seq: Sequence) -> None:
        """Queue a sequence that has arrived, its prompt to be computed here."""
        self.metrics.prefill_total += seq.prompt_len
        self.scheduler.add(seq)

    def go_on(self, seq: Sequence, token: int, logprobs: TokenLogprobs | None) -> StreamEvent:
        """Continue a held sequence whose prompt and first token another group computed; return what is new of it."""
        seq.was_admitted = True
        seq.output.cached_tokens = seq.blocks.num_reused
        self.scheduler.run_held(seq)
        if seq.output.logprobs is not None and logprobs is not None:
            seq.output.logprobs.append(logprobs)
        event = self._append(seq, token)
        self._record_time(seq, self._clock(), 1)
        if event.output is not None:
            self._finish(seq)
        return event

    def fail(self, seq: Sequence, reason: str) -> StreamEvent:
        """End a sequence that neither waits nor runs with an error, alone."""
        self._forget(seq)
        self.metrics.num_errors += 1
        seq.output.finish_reason, seq.output.error = "error", reason
        return StreamEvent(seq.index, [], "", seq.output)

    def drop(self, seq: Sequence) -> None:
        """Take out a sequence that waits or runs, without a word; a step in flight still holds its pages."""
        seq.output.finish_reason = "error"
        if seq in self.scheduler.waiting:
            self.scheduler.waiting.remove(seq)
            self._forget(seq)
        else:
            self._leave(seq)

    def abort_all(self) -> None:
        """Drop every sequence; its pages are free or cached. After a step that failed, nothing stays cached.

        Raises:
            RankLost: when the step in flight finds that.
        """
        flight, self._flight = self._flight, None
        try:
            if flight is not None:
                self._read(flight)
        finally:
            self._drop_all()

    def _drop_all(self) -> None:
        for seq in list(self.scheduler.running):
            self.scheduler.finish(seq, keep=not self.in_step)
        self.scheduler.waiting.clear()
        self._started.clear()
        self._last_token.clear()
        if self.in_step:  # pages that it should have written or moved may hold anything
            self.scheduler.cache.clear()
            self.in_step = False

    def step(self, *, may_wait: bool = False) -> list[StreamEvent]:
        """Compute one step and return what is new of the sequences that got a token.

        ``may_wait``: pages are held for others, so that it may have to wait for them; it then computes nothing.

        Raises:
            RankMismatch: with check_ranks, when ranks disagree.
        """
        self._share_time()
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
            self.speculator.propose(step, self.scheduler)
        if self._check_ranks:  # before any collective whose shape the step decides
            self._compare_ranks(step, None)
        self.mover.execute(step.movements)
        if self.runner.can_launch(step.chunks) and all(chunk.seq.sampling.is_plain for chunk in step.chunks):
            return self._launched(step)
        flight = Flight(step, self.runner.run(step.chunks))
        self.metrics.padding_rows += self.runner.num_padding
        return flight

    def _launched(self, step: Step) -> Flight:
        flight = Flight(step, self.runner.launch(step.chunks))
        self.metrics.padding_rows += self.runner.num_padding
        return flight

    def _depart_ahead(self, flight: Flight) -> Flight | None:
        """Give the device the step after one that is not read yet, where that is known already."""
        if not (self._looks_ahead and isinstance(flight.choice, PendingTokens)):
            return None
        if self.speculator is not None and self.speculator.is_due(len(flight.step.chunks)):
            return None  # drafts follow known tokens
        step = self.scheduler.look_ahead(flight.step)
        if step is None:
            return None
        self.mover.execute(step.movements)
        if self.speculator is not None and not self.speculator.skip(step):
            return None
        return self._launched(step)

    def _land(self, flight: Flight) -> list[StreamEvent]:
        """Wait for a step and return what is new; what it computed for sequences that ended before is dropped."""
        tokens, chunks = self._read(flight), flight.step.chunks
        going_on = []
        for chunk in chunks:
            if chunk.seq.has_ended:
                self.scheduler.finish(chunk.seq)
            else:
                going_on.append(chunk)
        if not going_on:
            return []
        self.scheduler.commit(going_on)
        if self._check_ranks:
            self._compare_ranks(flight.step, tokens)
        metrics = self.metrics
        for chunk in going_on:
            metrics.prefill_tokens += chunk.stop - chunk.start if chunk.start < chunk.seq.prompt_len else 0
        metrics.prefill_total = max(metrics.prefill_total, metrics.prefill_tokens)
        metrics.num_steps += 1
        return [] if tokens is None else self._commit([chunk for chunk in chunks if chunk.samples], tokens)

    def _read(self, flight: Flight) -> SampledTokens | None:
        """Wait for a step and return the tokens of its rows that choose; None where none does."""
        if isinstance(flight.choice, PendingTokens):
            ids, fault = flight.choice.wait()
            self.runner.check_faults(fault)
            return SampledTokens.plain(ids)
        choosing = [chunk for chunk in flight.step.chunks if chunk.samples]
        tokens = sample(flight.choice, sampling_batch(choosing, flight.choice.device)) if choosing else None
        self.runner.check_faults()
        return tokens

    def _share_time(self) -> None:
        """Tell the cache rank 0's time: when a request brings retention, and now and then while a priority may end."""
        self._steps_since_time += 1
        due = self._steps_since_time >= SHARE_TIME_EVERY and self.scheduler.cache.needs_time
        if due or self._share_time_now:
            self.scheduler.cache.advance(from_rank0(self._clock))
            self._steps_since_time, self._share_time_now = 0, False

    def _note_reuse(self, step: Step) -> None:
        """Note what each sequence found cached when it was admitted first."""
        for seq in step.admitted:
            if not seq.was_admitted:
                seq.was_admitted = True
                seq.output.cached_tokens = seq.num_computed
                self.metrics.prefill_total -= seq.num_computed

    def _commit(self, chunks: list[Chunk], tokens: SampledTokens) -> list[StreamEvent]:
        """Add to each sequence the drafts that its rows confirm and the token that follows them, up to its end."""
        now = self._clock()
        events: list[StreamEvent] = []
        logprobs = None if tokens.logprobs is None else _host_logprobs(tokens, chunks)
        ids, row = tokens.token_ids.tolist(), 0
        for chunk in chunks:
            seq, drafts, first_row = chunk.seq, chunk.drafts, row
            row += 1 + len(drafts)
            if seq.has_ended:
                continue
            is_decode, first = chunk.is_decode, len(events)
            accepted = num_accepted(drafts, ids[first_row : first_row + len(drafts)])
            for at in range(first_row, first_row + 1 + accepted):
                if seq.output.logprobs is not None and logprobs is not None:
                    seq.output.logprobs.append(logprobs[at])
                events.append(self._append(seq, ids[at]))
                if events[-1].output is not None:
                    break
            made = len(events) - first
            if drafts:
                self.scheduler.commit_accepted(seq)
            if is_decode and self.metrics.speculative is not None:
                self.metrics.speculative.note(len(drafts), accepted, made)
            self._record_time(seq, now, made)
            if events[-1].output is not None:
                self._finish(seq)
        return events

    def _append(self, seq: Sequence, token: int) -> StreamEvent:
        """Add a token to its sequence, decide whether that ends it, and return what is new."""
        params, output = seq.sampling, seq.output
        seq.token_ids.append(token)
        output.token_ids.append(token)
        is_eos = token in self._eos and not params.ignore_eos
        text = ""
        if is_eos or token in params.stop_token_ids:
            output.finish_reason = "stop"
        else:
            text = seq.detokenizer.push(token)
            if seq.detokenizer.stopped is not None:
                output.finish_reason = "stop"
            elif len(seq.token_ids) >= seq.max_len:
                output.finish_reason = "length"
        if output.finish_reason:
            text += seq.detokenizer.finish()
            output.text = seq.detokenizer.text
        return StreamEvent(seq.index, [token], text, output if output.finish_reason else None)

    def _finish(self, seq: Sequence) -> None:
        place = self.runner.placement
        for rank in range(place.kvp):
            self.metrics.tokens_per_rank[rank] += place.local_len(seq.num_computed, rank, seq.blocks.first_owner)
        self._leave(seq)

    def _leave(self, seq: Sequence) -> None:
        if self._flight is None or not self._flight.holds(seq):  # else when that has landed
            self.scheduler.finish(seq)
        self._forget(seq)

    def _forget(self, seq: Sequence) -> None:
        self._started.pop(seq, None)
        self._last_token.pop(seq, None)

    def _record_time(self, seq: Sequence, now: float, num_tokens: int) -> None:
        """Note when tokens came; those of one step share the time that it took."""
        self.metrics.decode_tokens += num_tokens
        if seq in self._last_token:
            self.metrics.ttl_s += [(now - self._last_token[seq]) / num_tokens] * num_tokens
        else:
            self.metrics.ttft_s.append(now - self._started[seq])
            self.metrics.ttl_s += [0.0] * (num_tokens - 1)
        self._last_token[seq] = now

    def _compare_ranks(self, step: Step, tokens: SampledTokens | None) -> None:
        """Compare a digest of what this step decided over all ranks."""
        digest = hashlib.blake2b(digest_size=7)
        for movement in step.movements:
            digest.update(np.array(as_ints(movement), np.int64).tobytes())
        for chunk in step.chunks:
            seq = chunk.seq
            state = [seq.index, chunk.start, chunk.stop, seq.batch_slot, seq.blocks.first_owner, *seq.blocks.pages]
            digest.update(np.array([*state, -1, *chunk.drafts], np.int64).tobytes())
        if tokens is not None:
            digest.update(tokens.token_ids.cpu().numpy().tobytes())
        values = gather_values(int.from_bytes(digest.digest(), "little"))
        different = [rank for rank, value in enumerate(values) if value != values[0]]
        if different:
            raise RankMismatch(
                f"step {self.metrics.num_steps}: rank {different[0]} decided otherwise than rank 0 "
                f"({len(different)} of {len(values)} ranks differ from it)"
            )


def _host_logprobs(tokens: SampledTokens, chunks: list[Chunk]) -> list[TokenLogprobs]:
    """Return each row's log-probabilities on the host, with as many alternatives as its request asked for."""
    assert tokens.logprobs is not None
    seqs = [chunk.seq for chunk in chunks for _ in range(1 + len(chunk.drafts))]
    tops: list[dict[int, float]] = [{} for _ in seqs]
    if tokens.top_ids is not None and tokens.top_logprobs is not None:
        pairs = zip(seqs, tokens.top_ids.tolist(), tokens.top_logprobs.tolist(), strict=True)
        tops = [dict(list(zip(ids, values, strict=True))[: seq.sampling.logprobs]) for seq, ids, values in pairs]
    rows = zip(tokens.token_ids.tolist(), tokens.logprobs.tolist(), tops, strict=True)
    return [TokenLogprobs(*row) for row in rows]
