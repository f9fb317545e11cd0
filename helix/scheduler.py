"""What the next step computes: continuous batching, chunked prefill, admission and preemption.

Every rank runs its own copy on the same inputs. A decision depends on nothing that one rank alone can see, so all
copies agree without a message.
"""

from __future__ import annotations

import heapq
from collections import deque

from .cache.pool import PagePools
from .config import SchedulerConfig
from .request import Chunk, Sequence


class Scheduler:
    """Keeps waiting and running sequences, and their pages.

    A sequence is admitted, first come first served, when a batch slot and pages for all its tokens are free. Decode
    takes pages as it grows; where none is left the latest sequence is preempted and computed again later.
    """

    def __init__(self, config: SchedulerConfig, pools: PagePools) -> None:
        self.pools = pools
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.num_preemptions = 0
        self._prefill_chunk = config.prefill_chunk
        self._free_slots = list(range(config.max_batch))

    @property
    def has_work(self) -> bool:
        """True while any sequence waits or runs."""
        return bool(self.waiting or self.running)

    def add(self, seq: Sequence) -> None:
        """Queue a sequence; the pools must be able to hold ``seq.max_len`` tokens."""
        self.waiting.append(seq)

    def schedule(self) -> list[Chunk]:
        """Choose the next step: one decode row of each sequence that is past its prompt, and prefill chunks.

        Prefill takes at most ``prefill_chunk`` tokens over all sequences. Pages of every chunk are allocated.
        """
        chunks: list[Chunk] = []
        budget = self._prefill_chunk
        preempted = False
        position = 0
        while position < len(self.running):
            seq = self.running[position]
            todo = len(seq.token_ids) - seq.num_computed
            while not self.pools.grow(seq.blocks, len(seq.token_ids)):
                preempted = True
                self._preempt(self.running[-1])
                if position == len(self.running):  # it was this one
                    break
            else:
                count = 1 if todo == 1 else min(todo, budget)
                budget -= count if todo > 1 else 0
                if count:
                    chunks.append(Chunk(seq, seq.num_computed, seq.num_computed + count))
                position += 1
        while self.waiting and self._free_slots and budget and not preempted:
            seq = self.waiting[0]
            table = self.pools.new_table()
            if not self.pools.grow(table, len(seq.token_ids)):
                break
            self.waiting.popleft()
            seq.blocks, seq.batch_slot = table, heapq.heappop(self._free_slots)
            self.running.append(seq)
            count = min(len(seq.token_ids), budget)
            budget -= count
            chunks.append(Chunk(seq, 0, count))
        return chunks

    def finish(self, seq: Sequence) -> None:
        """Take a sequence out and free what it held."""
        self.running.remove(seq)
        self._free(seq)

    def _preempt(self, seq: Sequence) -> None:
        self.num_preemptions += 1
        self.finish(seq)
        seq.num_computed = 0
        self.waiting.appendleft(seq)

    def _free(self, seq: Sequence) -> None:
        self.pools.release(seq.blocks)
        heapq.heappush(self._free_slots, seq.batch_slot)
        seq.batch_slot = -1
