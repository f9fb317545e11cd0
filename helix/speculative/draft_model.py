"""Drafts by a smaller model: the same vocabulary, a layout and a paged cache of its own.

Every rank runs all of it (kvp = tpa = 1, no collective inside), so that a draft step costs no message however the
target is spread: a model small enough to draft is bound by latency, which splitting it does not improve. The drafts of
rank 0 are everyone's: they decide how many rows the next step accepts, so a single bit that a library computes
otherwise on one rank would otherwise part the ranks and hang them. One small message a step is the price.

It takes the most likely token at every step, so its proposals are certain (see ``verify.py``). Its cache needs no
undoing either: what it computed beyond the accepted tokens is overwritten. Where it has fallen behind, because no
drafts were asked for or the sequence is new, it catches up by chunks of the prompt's size, one a step, and drafts for
the sequence once it has; the token that follows fully accepted drafts it has not seen is a row more in its first step.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence as Many
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

from parallel.collectives import all_gather

from ..cache.pool import PagePool
from ..graphs import PendingTokens, buckets_up_to
from ..request import Chunk, Sequence
from ..runner import Runner
from ..sampling import SamplingParams
from .verify import num_accepted

FIRST_STEP_ROWS = 2
"""The most rows that a sequence has in a draft's first step: after fully accepted drafts, the last of them and what
followed."""
_IN_FLIGHT = 3  # launched steps that wait for the host
_PLAIN = SamplingParams()


@dataclass(slots=True)
class _Twin:
    """A sequence as the draft model sees it.

    Attributes:
        seq: its own tokens, pages and progress; ``num_computed`` tokens have K and V in the draft model's cache.
        num_known: its leading tokens that are the target's; guesses follow.
    """

    seq: Sequence
    num_known: int

    def update(self, token_ids: list[int]) -> None:
        """Take over the target's tokens; what was computed of guesses that came true stays.

        The last token is computed again even so: its logits choose the first guess. Where pages were short, all guesses
        may have come true, those too that the target was not shown.
        """
        new = token_ids[self.num_known :]
        same = num_accepted(self.seq.token_ids[self.num_known :], new)
        self.seq.num_computed = min(self.seq.num_computed, self.num_known + same, len(token_ids) - 1)
        self.seq.token_ids[self.num_known :] = new
        self.num_known = len(token_ids)

    @property
    def num_missing(self) -> int:
        """Tokens that are not computed, the last one included."""
        return len(self.seq.token_ids) - self.seq.num_computed


@dataclass(slots=True)
class _Draft:
    """What one sequence drafts in this step: where its guesses go in ``seq``, and how many are wanted."""

    seq: Sequence
    start: int
    limit: int


class DraftModel:
    """A model that drafts; see ``Drafter``.

    Args:
        runner: runs the draft model on this rank.
        num_pages: pages of the runner's cache.
        prefill_chunk: tokens that it catches up in a step, over all sequences.
        max_draft_len: the most tokens of a draft.
        group: the world's ranks; None is a world of one.
    """

    def __init__(
        self,
        runner: Runner,
        *,
        num_pages: int,
        prefill_chunk: int,
        max_draft_len: int,
        group: dist.ProcessGroup | None,
    ) -> None:
        self._runner, self._group = runner, group
        self._pool = PagePool(1, num_pages)
        self._prefill_chunk = prefill_chunk
        self._shape = (runner.max_batch, max_draft_len)
        self._twins: dict[Sequence, _Twin] = {}

    def capture(self) -> None:
        """Capture the draft model's steps, whose cache must not be replaced afterwards; the runner needs its faults."""
        buckets = buckets_up_to(self._runner.max_batch)
        self._runner.capture([(bucket, FIRST_STEP_ROWS - 1) for bucket in buckets])

    def draft(self, seqs: Many[Sequence], limits: Many[int]) -> list[list[int]]:
        """Draft for all sequences at once. Collective over the world: rank 0's drafts are returned on every rank."""
        limits = [self._limit(seq, limit) for seq, limit in zip(seqs, limits, strict=True)]
        twins = [self._twin(seq) if limit else None for seq, limit in zip(seqs, limits, strict=True)]
        self._catch_up([twin for twin in twins if twin is not None])
        drafts = [
            _Draft(twin.seq, twin.num_known, limit)
            for twin, limit in zip(twins, limits, strict=True)
            if twin is not None and twin.num_missing <= FIRST_STEP_ROWS
        ]
        self._guess(drafts)
        made = {draft.seq.batch_slot: draft.seq.token_ids[draft.start :] for draft in drafts}
        return self._from_rank0([made.get(seq.batch_slot, []) for seq in seqs])

    def drop(self, seq: Sequence) -> None:
        """Forget a sequence and free its pages."""
        twin = self._twins.pop(seq, None)
        if twin is not None:
            for page in twin.seq.blocks.pages:
                self._pool.give(0, page)

    def _limit(self, seq: Sequence, limit: int) -> int:
        """Return how many tokens the draft model's own context, and its pages, let it draft."""
        length = len(seq.token_ids)
        limit = min(limit, self._runner.decoder.spec.max_position + 1 - length)
        return limit if limit > 0 and self._extend(self._twin(seq).seq, length + limit - 1) else 0

    def _twin(self, seq: Sequence) -> _Twin:
        twin = self._twins.get(seq)
        if twin is None:
            own = Sequence(
                index=seq.index, token_ids=list(seq.token_ids), prompt_len=seq.prompt_len, sampling=_PLAIN, seed=0,
                max_len=seq.max_len, output=seq.output, batch_slot=seq.batch_slot,
            )  # fmt: skip
            twin = self._twins[seq] = _Twin(own, len(seq.token_ids))
        elif len(seq.token_ids) > twin.num_known:
            twin.update(seq.token_ids)
        return twin

    def _extend(self, own: Sequence, length: int) -> bool:
        """Give a sequence the pages of so many tokens; where they are short it keeps what it has and waits."""
        pages = own.blocks.pages
        for _ in range(self._runner.placement.num_blocks(length) - len(pages)):
            if not self._pool.num_free(0):
                return False
            pages.append(self._pool.take(0))
        return True

    def _catch_up(self, twins: list[_Twin]) -> None:
        """Compute what is missing before the last token of sequences that are far behind, as far as the budget goes."""
        budget, chunks = self._prefill_chunk, []
        for twin in twins:
            own = twin.seq
            count = min(twin.num_missing - 1, budget) if twin.num_missing > FIRST_STEP_ROWS else 0
            if count:
                chunks.append(Chunk(own, own.num_computed, own.num_computed + count))
                budget -= count
        if chunks:
            self._runner.run(chunks)
        for chunk in chunks:
            chunk.seq.num_computed = chunk.stop

    def _guess(self, drafts: list[_Draft]) -> None:
        """Take the most likely next token of every sequence, again and again, up to its limit.

        The device keeps the tokens for the next step, which is launched before the host reads them.
        """
        waiting: deque[tuple[list[_Draft], int, PendingTokens]] = deque()
        for turn in range(max((draft.limit for draft in drafts), default=0)):
            live = [draft for draft in drafts if draft.limit > turn]
            pending = self._runner.launch([Chunk(e.seq, e.seq.num_computed, len(e.seq.token_ids)) for e in live])
            for draft in live:
                draft.seq.num_computed = len(draft.seq.token_ids)
                draft.seq.token_ids.append(-1)  # the token that the device chose last
            waiting.append((live, turn, pending))
            if len(waiting) == _IN_FLIGHT:
                _read(*waiting.popleft())
        for each in waiting:
            _read(*each)

    def _from_rank0(self, drafts: list[list[int]]) -> list[list[int]]:
        """Return rank 0's drafts on every rank; the message has one shape, whatever a rank believes."""
        if self._group is None:
            return drafts
        padded = np.full(self._shape, -1, np.int64)
        for row, tokens in enumerate(drafts):
            padded[row, : len(tokens)] = tokens
        device = self._runner.decoder.device
        rows: list[list[int]] = all_gather(torch.from_numpy(padded).to(device), self._group)[0].tolist()
        return [[token for token in row if token >= 0] for row in rows[: len(drafts)]]


def _read(live: list[_Draft], turn: int, pending: PendingTokens) -> None:
    tokens, _ = pending.wait()
    for draft, token in zip(live, tokens, strict=True):
        draft.seq.token_ids[draft.start + turn] = token
