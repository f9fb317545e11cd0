"""What the next step computes: continuous batching, chunked prefill, admission and preemption.

Every rank runs its own copy on the same inputs. A decision depends on nothing that one rank alone can see, so all
copies agree without a message.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from .cache.control import CacheControl, Claim
from .cache.keys import BlockKeys
from .cache.movements import Movement
from .cache.pool import BlockTable
from .config import SchedulerConfig
from .request import Chunk, Sequence


@dataclass(slots=True)
class Step:
    """What one step does.

    Attributes:
        chunks: what is computed.
        movements: page movements of all KVP ranks, to be executed before.
        admitted: the sequences that begin with it, new or resumed; ``num_computed`` is what they reuse.
    """

    chunks: list[Chunk] = field(default_factory=list)
    movements: list[Movement] = field(default_factory=list)
    admitted: list[Sequence] = field(default_factory=list)


class Scheduler:
    """Keeps waiting and running sequences.

    A sequence is admitted, first come first served, when a batch slot and pages for all its tokens are free. Decode
    takes pages as it grows; where none is left the latest sequence is preempted, its blocks stay cached as long as
    they can, and it is resumed later.
    """

    def __init__(self, config: SchedulerConfig, cache: CacheControl) -> None:
        self.cache = cache
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self._prefill_chunk = config.prefill_chunk
        self._free_slots = list(range(config.max_batch))
        self._blocked: tuple[Sequence, int] | None = None  # the first of a queue, and when it was found not to fit
        self.on_leave: Callable[[Sequence], None] = _ignore  # told of every sequence that ends or is preempted

    @property
    def has_work(self) -> bool:
        """True while any sequence waits or runs."""
        return bool(self.waiting or self.running)

    def add(self, seq: Sequence) -> None:
        """Queue a sequence; the pools must be able to hold ``seq.max_len`` tokens."""
        self.waiting.append(seq)

    def schedule(self) -> Step:
        """Choose the next step: one decode row of each sequence that is past its prompt, and prefill chunks.

        Prefill takes at most ``prefill_chunk`` tokens over all sequences. Pages of every chunk are allocated. After the
        step is computed, ``commit`` is called with its chunks.
        """
        step = Step()
        budget, preempted = self._continue_running(step)
        if not (preempted and step.chunks):
            self._admit_waiting(step, budget)
        self.cache.offload_ahead()
        step.movements = self.cache.take_movements()
        return step

    def look_ahead(self, launched: Step) -> Step | None:
        """Choose the step after one of decode rows alone that is launched and whose tokens are not known yet.

        It has a row of every sequence that may go on, at the position after its launched one; who stopped before is
        known later. None where the launched step has to be committed first, since ``schedule`` may do something else
        then: a running sequence has no row in it, one waits that may fit now or soon, or a page is missing. Waiting
        sequences that did not fit hold nothing up before something is freed.
        """
        if len(launched.chunks) < len(self.running):
            return None
        chunks = [
            Chunk(chunk.seq, chunk.stop, chunk.stop + 1)
            for chunk in launched.chunks
            if chunk.stop + 1 < chunk.seq.max_len and not chunk.seq.has_ended
        ]
        something_ends = len(chunks) < len(launched.chunks)
        if not chunks or (self.waiting and (something_ends or not self._is_blocked(self.waiting))):
            return None
        if not all(self.cache.extend(chunk.seq.blocks, chunk.stop) for chunk in chunks):
            return None
        self.cache.offload_ahead()
        return Step(chunks, self.cache.take_movements())

    def commit(self, chunks: list[Chunk]) -> None:
        """Note that chunks are computed, and cache the blocks that they filled."""
        for chunk in chunks:
            if chunk.start < chunk.seq.prompt_len:  # one that waits may begin with the same tokens
                self._blocked = None
            chunk.seq.num_computed = chunk.stop
            self.cache.commit(chunk.seq.blocks, chunk.stop)

    def extend_for_drafts(self, seq: Sequence, num_drafts: int) -> int:
        """Give a running sequence the pages of drafts after its last token; return how many drafts have them.

        Drafts take pages after everything else in a step, and preempt nobody: where pages are short they are fewer.
        """
        while num_drafts and not self.cache.extend(seq.blocks, len(seq.token_ids) + num_drafts):
            num_drafts -= 1
        return num_drafts

    def commit_accepted(self, seq: Sequence) -> None:
        """Note that all but a sequence's last token are computed, accepted drafts among them, and cache their blocks.

        What was computed of rejected drafts needs no undoing: the rows that come next overwrite it.
        """
        seq.num_computed = len(seq.token_ids) - 1
        self.cache.commit(seq.blocks, seq.num_computed)

    def remove(self, seq: Sequence, *, keep: bool = True) -> None:
        """Take out a sequence that waits or runs; what it computed stays cached, unless ``keep`` is False.

        One that does neither is another's to take care of: nothing happens.
        """
        if seq in self.running:
            self._stop(seq, keep)
        elif seq in self.waiting:
            self.waiting.remove(seq)

    # --- sequences that another group prefills ------------------------------------------------------------------------

    @property
    def num_free_slots(self) -> int:
        """Sequences that could be held or admitted beside those that run."""
        return len(self._free_slots)

    def hold(self, seq: Sequence, table: BlockTable) -> None:
        """Give a sequence its pages and a batch slot; it does not run before ``run_held``."""
        seq.blocks, seq.batch_slot, seq.num_computed = table, heapq.heappop(self._free_slots), table.num_reused

    def run_held(self, seq: Sequence) -> None:
        """Let a sequence run whose tokens are all computed, and cache its blocks."""
        seq.num_computed = len(seq.token_ids)
        self.cache.commit(seq.blocks, seq.num_computed)
        self.running.append(seq)

    def free_slot(self, seq: Sequence) -> None:
        """Take back the batch slot of a held sequence; what becomes of its pages is the caller's to say."""
        heapq.heappush(self._free_slots, seq.batch_slot)
        seq.batch_slot = -1
        self._blocked = None

    # --- admission ----------------------------------------------------------------------------------------------------

    def admit(self, queue: deque[Sequence], budget: int) -> list[tuple[Sequence, BlockTable]]:
        """Take sequences from the front of a queue, with their pages, while batch slots and a budget of tokens last.

        In two phases: pin what every candidate finds cached, then allocate, in order. Admitting one by one would let
        the first evict what the second was counted to reuse. What an admission reports is what the budget is charged,
        whatever was expected. Where one does not fit, those behind it give up their claims and it tries again; if it
        still does not fit it waits, and they wait behind it; it costs nothing then before something may let it fit.
        """
        admitted: list[tuple[Sequence, BlockTable]] = []
        if not queue or self._is_blocked(queue):
            return admitted
        claims = self._claim(queue, budget)
        while claims and budget > 0:
            seq, claim = claims.popleft()
            table = self.cache.admit(claim, len(seq.token_ids))
            if table is None and claims:
                while claims:
                    self.cache.drop(claims.pop()[1])
                table = self.cache.admit(claim, len(seq.token_ids))
            if table is None:
                self.cache.drop(claim)
            else:
                queue.popleft()
                admitted.append((seq, table))
                budget -= len(seq.token_ids) - table.num_reused
        for _, claim in claims:
            self.cache.drop(claim)
        self._blocked = (queue[0], self.cache.num_returns) if queue and budget > 0 else None
        return admitted

    def _is_blocked(self, queue: deque[Sequence]) -> bool:
        """Return whether the first of a queue did not fit, and no slot or page came back and no prompt block since."""
        return self._blocked == (queue[0], self.cache.num_returns)

    def _claim(self, queue: deque[Sequence], budget: int) -> deque[tuple[Sequence, Claim]]:
        """Claim for those that the batch slots and the budget can take, the first in the queue first."""
        claims: deque[tuple[Sequence, Claim]] = deque()
        for seq in queue:
            if budget <= 0 or len(claims) == len(self._free_slots):
                break
            if seq.keys is None:
                seq.keys = BlockKeys(seq.token_ids, self.cache.placement.block_size, seq.cache_salt)
            claim = self.cache.claim(seq.keys, seq.retention)
            claims.append((seq, claim))
            budget -= len(seq.token_ids) - claim.num_tokens
        return claims

    # --- the running sequences ----------------------------------------------------------------------------------------

    def _continue_running(self, step: Step) -> tuple[int, bool]:
        """Give running sequences their chunks; return what is left of the budget, and whether any was preempted."""
        budget, preempted, position = self._prefill_chunk, False, 0
        while position < len(self.running):
            seq = self.running[position]
            todo = len(seq.token_ids) - seq.num_computed
            while not self.cache.extend(seq.blocks, len(seq.token_ids)):
                preempted = True
                self._preempt(self.running[-1])
                if position == len(self.running):  # it was this one
                    break
            else:
                count = 1 if todo == 1 else min(todo, budget)
                budget -= count if todo > 1 else 0
                if count:
                    step.chunks.append(Chunk(seq, seq.num_computed, seq.num_computed + count))
                position += 1
        return budget, preempted

    def _admit_waiting(self, step: Step, budget: int) -> None:
        for seq, table in self.admit(self.waiting, budget):
            seq.blocks, seq.batch_slot, seq.num_computed = table, heapq.heappop(self._free_slots), table.num_reused
            self.running.append(seq)
            step.admitted.append(seq)
            count = min(len(seq.token_ids) - seq.num_computed, budget)
            step.chunks.append(Chunk(seq, seq.num_computed, seq.num_computed + count))
            budget -= count

    def _preempt(self, seq: Sequence) -> None:
        self.cache.counters.preemptions += 1
        self._stop(seq, keep=True)
        seq.num_computed = 0
        self.waiting.appendleft(seq)

    def _stop(self, seq: Sequence, keep: bool) -> None:
        self.running.remove(seq)
        if not seq.keeps_pages:
            self.cache.release(seq.blocks, seq.num_computed if keep else 0)
        self.free_slot(seq)
        self.on_leave(seq)


def _ignore(seq: Sequence) -> None:
    pass
