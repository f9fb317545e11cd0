"""The step loop: schedule, run, sample, commit. Every rank runs it in lockstep on the same sequences."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable

import numpy as np
import torch

from parallel.launch import from_rank0, gather_values

from .cache.movements import as_ints
from .cache.mover import PageMover
from .metrics import RunMetrics
from .request import Sequence, StreamEvent, TokenLogprobs
from .runner import Runner
from .sampling import SampledTokens, SamplingBatch, sample
from .scheduler import Scheduler, Step

SHARE_TIME_EVERY = 64  # steps between two readings of the shared clock, while some priority ends at a time


class RankMismatch(RuntimeError):
    """Two ranks took different decisions."""


class Engine:
    """Runs sequences to their end.

    Every method is collective over the world: all ranks call it with the same sequences, in the same order.

    Args:
        scheduler: what to compute next.
        runner: how to compute it on this rank.
        mover: how to move this rank's pages.
        eos_token_ids: ids that end a sequence, unless it ignores them.
        check_ranks: compare the decision state over ranks at every step.
        clock: seconds, for the metrics; rank 0's also tells when retention ends.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        runner: Runner,
        mover: PageMover,
        *,
        eos_token_ids: tuple[int, ...],
        check_ranks: bool = False,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.scheduler, self.runner, self.mover = scheduler, runner, mover
        self._eos = frozenset(eos_token_ids)
        self._check_ranks = check_ranks
        self._clock = clock
        self._started: dict[Sequence, float] = {}
        self._last_token: dict[Sequence, float] = {}
        self._steps_since_time = 0
        self._share_time_now = False
        self._in_step = False
        self.metrics = self.reset_metrics()

    def reset_metrics(self) -> RunMetrics:
        """Start a new set of counters and return it."""
        cache = self.scheduler.cache
        self._share_time_now = cache.needs_time
        self.metrics = RunMetrics([0] * self.runner.placement.kvp, cache.reset_counters(), cache.occupancy)
        return self.metrics

    def add(self, seq: Sequence) -> None:
        """Queue a sequence."""
        self._started[seq] = self._clock()
        self.metrics.num_requests += 1
        self.metrics.prefill_total += seq.prompt_len
        self.scheduler.add(seq)
        if seq.retention:
            self._share_time_now = True

    def abort_all(self) -> None:
        """Drop every sequence; its pages are free or cached. After a step that failed, nothing stays cached."""
        for seq in list(self.scheduler.running):
            self.scheduler.finish(seq, keep=not self._in_step)
        self.scheduler.waiting.clear()
        self._started.clear()
        self._last_token.clear()
        if self._in_step:  # pages that it should have written or moved may hold anything
            self.scheduler.cache.clear()
            self._in_step = False

    def step(self) -> list[StreamEvent]:
        """Compute one step and return what is new of the sequences that got a token.

        Raises:
            RankMismatch: with check_ranks, when ranks disagree.
        """
        self._share_time()
        self._in_step = True
        step = self.scheduler.schedule()
        if not step.chunks:
            raise RuntimeError(f"{len(self.scheduler.waiting)} sequences wait and none can run")
        self._note_reuse(step)
        if self._check_ranks:  # before any collective whose shape the step decides
            self._compare_ranks(step, None)
        self.mover.execute(step.movements)
        seqs = [chunk.seq for chunk in step.chunks if chunk.samples]
        if self.runner.can_launch(step.chunks) and all(seq.sampling.is_plain for seq in seqs):
            ids, fault = self.runner.launch(step.chunks).wait()
            tokens: SampledTokens | None = SampledTokens.plain(ids)
            self.runner.check_faults(fault)
        else:
            logits = self.runner.run(step.chunks)
            tokens = self._sample(logits, seqs) if seqs else None
            self.runner.check_faults()
        self.scheduler.commit(step.chunks)
        if self._check_ranks:
            self._compare_ranks(step, tokens)
        metrics = self.metrics
        for chunk in step.chunks:
            metrics.prefill_tokens += chunk.stop - chunk.start if chunk.start < chunk.seq.prompt_len else 0
        metrics.prefill_total = max(metrics.prefill_total, metrics.prefill_tokens)
        metrics.num_steps += 1
        events = [] if tokens is None else self._commit(seqs, tokens)
        self._in_step = False
        return events

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

    def _sample(self, logits: torch.Tensor, seqs: list[Sequence]) -> SampledTokens:
        batch = SamplingBatch.from_requests(
            [seq.sampling for seq in seqs],
            [seq.seed for seq in seqs],
            [len(seq.token_ids) for seq in seqs],
            prompt_token_ids=[seq.distinct_prompt_ids for seq in seqs],
            output_token_ids=[seq.output_ids if seq.sampling.has_penalties else None for seq in seqs],
            device=logits.device,
        )
        return sample(logits, batch)

    def _commit(self, seqs: list[Sequence], tokens: SampledTokens) -> list[StreamEvent]:
        now = self._clock()
        events = []
        logprobs = None if tokens.logprobs is None else _host_logprobs(tokens, seqs)
        for row, (seq, token) in enumerate(zip(seqs, tokens.token_ids.tolist(), strict=True)):
            if seq.output.logprobs is not None and logprobs is not None:
                seq.output.logprobs.append(logprobs[row])
            events.append(self._append(seq, token))
            self._record_time(seq, now)
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
        self.scheduler.finish(seq)
        del self._started[seq], self._last_token[seq]

    def _record_time(self, seq: Sequence, now: float) -> None:
        self.metrics.decode_tokens += 1
        if seq in self._last_token:
            self.metrics.ttl_s.append(now - self._last_token[seq])
        else:
            self.metrics.ttft_s.append(now - self._started[seq])
        self._last_token[seq] = now

    def _compare_ranks(self, step: Step, tokens: SampledTokens | None) -> None:
        """Compare a digest of what this step decided over all ranks."""
        digest = hashlib.blake2b(digest_size=7)
        for movement in step.movements:
            digest.update(np.array(as_ints(movement), np.int64).tobytes())
        for chunk in step.chunks:
            seq = chunk.seq
            state = [seq.index, chunk.start, chunk.stop, seq.batch_slot, seq.blocks.first_owner, *seq.blocks.pages]
            digest.update(np.array(state, np.int64).tobytes())
        if tokens is not None:
            digest.update(tokens.token_ids.cpu().numpy().tobytes())
        values = gather_values(int.from_bytes(digest.digest(), "little"))
        different = [rank for rank, value in enumerate(values) if value != values[0]]
        if different:
            raise RankMismatch(
                f"step {self.metrics.num_steps}: rank {different[0]} decided otherwise than rank 0 "
                f"({len(different)} of {len(values)} ranks differ from it)"
            )


def _host_logprobs(tokens: SampledTokens, seqs: list[Sequence]) -> list[TokenLogprobs]:
    """Return each row's log-probabilities on the host, with as many alternatives as its request asked for."""
    assert tokens.logprobs is not None
    tops: list[dict[int, float]] = [{} for _ in seqs]
    if tokens.top_ids is not None and tokens.top_logprobs is not None:
        pairs = zip(seqs, tokens.top_ids.tolist(), tokens.top_logprobs.tolist(), strict=True)
        tops = [dict(list(zip(ids, values, strict=True))[: seq.sampling.logprobs]) for seq, ids, values in pairs]
    rows = zip(tokens.token_ids.tolist(), tokens.logprobs.tolist(), tops, strict=True)
    return [TokenLogprobs(*row) for row in rows]
