"""What the next step computes: continuous batching, chunked prefill, admission and preemption.

Every rank runs its own copy on the same inputs. A decision depends on nothing that one rank alone can see, so all
copies agree without a message: counts of steps, and the order of what came through the door.

One order rules who begins, whose prompt is computed and who is preempted: the step of arrival, less ``AGING`` steps for
each class of priority. So a class overtakes what came a while before, and nothing starves. Beside the first in order
the shortest prompts have a share of every chunk (``fair_share.py``).
"""

from __future__ import annotations

import heapq
import math
from bisect import insort
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from .ahead import Ahead
from .cache.control import CacheControl
from .cache.movements import Movement
from .cache.pool import BlockTable
from .cache.windows import WindowPages
from .config import SchedulerConfig
from .fair_share import Due, divide
from .request import Chunk, Sequence, order_of
from .waiting import WaitingLine

AGING = 1_000
"""Steps of waiting that a class of priority is worth."""


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
    """Keeps waiting and running sequences, both in order.

    A sequence begins when a batch slot and pages for all its tokens are free and its share of the chunk is not empty.
    One that shares blocks with a prompt that is being computed waits for them first, and that prompt is as urgent and
    as short meanwhile as who waits for it. Decode takes pages as it grows; where none is left the last in order is
    preempted, its blocks stay cached as long as they can, and it is resumed later.

    Args:
        config: its settings.
        cache: the cache's control plane.
        recomputed: so many of the last tokens of a reused prefix are computed again, for their hidden states.
        windows: the pages of layers with a window; None where there are none.

    Attributes:
        running: who has one, but for those that are held for another group.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        cache: CacheControl,
        *,
        recomputed: int = 0,
        windows: WindowPages | None = None,
    ) -> None:
        self.cache, self.windows = cache, windows
        self._line = WaitingLine(cache, self._divided, recomputed=recomputed)
        self.running: list[Sequence] = []
        self._prefill_chunk = config.prefill_chunk
        self._share = min(math.ceil(config.short_prompt_share * self._prefill_chunk), self._prefill_chunk - 1)
        self._steps_between = config.decode_steps_per_chunk - 1
        self._quiet = 0  # steps of decode rows alone that come before the next chunk
        self._free_slots = list(range(config.max_batch))
        self._num_steps = self._num_arrived = 0
        self.on_leave: Callable[[Sequence], None] = _ignore  # told of every sequence that ends or is preempted

    @property
    def waiting(self) -> list[Sequence]:
        """Who has no batch slot, in order."""
        return self._line.seqs

    @property
    def has_work(self) -> bool:
        """True while any sequence waits or runs."""
        return bool(self.waiting or self.running)

    def line_up(self, seq: Sequence) -> None:
        """Give a sequence that arrives its place in line; one that has one keeps it."""
        if seq.order is None:
            seq.order = (self._num_steps - seq.priority * AGING, self._num_arrived)
            self._num_arrived += 1

    def add(self, seq: Sequence) -> None:
        """Queue a sequence; the pools must be able to hold ``seq.max_len`` tokens."""
        self.line_up(seq)
        self._line.add(seq)

    def schedule(self) -> Step:
        """Choose the next step: one decode row of each sequence that is past its prompt, and prefill chunks.

        Prefill takes at most ``prefill_chunk`` tokens over all sequences. Pages of every chunk are allocated. After the
        step is computed, ``commit`` is called with its chunks.
        """
        preempted = self._give_pages()
        step = self._choose_chunks(Ahead(), may_admit=not (preempted and self.running))
        return self._with_movements(step)

    def look_ahead(self, launched: Step, *, decodes_alone: bool = False) -> Step | None:
        """Choose the step after one that is launched and whose tokens are not known yet.

        It is what ``schedule`` would choose if no sequence stopped before its longest: one that chose a token has a row
        at the position after its launched one; who stopped is known later. None where the launched step has to be
        committed first, since ``schedule`` may do something else then: a page is missing, somebody waits for what a
        sequence gives back that ends, or states are copied before a later chunk changes them. ``decodes_alone``: None,
        too, where either step has more than decode rows.

        Structured sequences whose tokens are not known sit this step out: what may follow is found on rank 0. Beside
        others, which lose nothing by it, they have a row in every other step.
        """
        if any(chunk.kept is not None and chunk.kept.behind is not None for chunk in launched.chunks):
            return None
        ahead = Ahead(launched.chunks)
        if ahead.something_ends and self.waiting and (self._line.has_blocked or not self._free_slots):
            return None
        going_on = [seq for seq in self.running if ahead.todo(seq)]
        admits = bool(self.waiting) and self._line.may_begin([], len(self._free_slots))
        if not (admits or any(seq in ahead or seq.num_todo > 1 or not seq.is_structured for seq in going_on)):
            return None
        if decodes_alone and (admits or any(ahead.todo(seq) > 1 for seq in going_on) or not ahead.decodes_alone):
            return None
        if not all(self.cache.extend(seq.blocks, ahead.start(seq) + ahead.todo(seq)) for seq in going_on):
            return None
        step = self._choose_chunks(ahead, may_admit=True)
        return self._with_movements(step) if step.chunks else None

    def _choose_chunks(self, ahead: Ahead, *, may_admit: bool) -> Step:
        """Choose chunks behind those that are launched, once all that run have their pages."""
        self._num_steps += 1
        step = Step()
        decodes = any(ahead.todo(seq) == 1 for seq in self.running)
        counts: dict[Sequence, int] = {}
        if self._quiet and decodes:
            self._quiet -= 1
        else:
            if may_admit:
                self._admit_waiting(step, ahead)
            dues = self._dues(step.admitted, ahead)
            counts = dict(zip(dues, self._divided(list(dues.values())), strict=True))
            self._quiet = self._steps_between if any(counts.values()) and decodes else 0
        for seq in self.running:
            count = counts.get(seq, 1 if ahead.todo(seq) == 1 else 0)
            if count:
                start = ahead.start(seq)
                step.chunks.append(Chunk(seq, start, self._end_of(seq, start, start + count)))
        return step

    def _end_of(self, seq: Sequence, start: int, stop: int) -> int:
        """Return where a chunk of a sequence ends that may reach ``stop``: at a checkpoint that is due before."""
        checkpoints = self.cache.checkpoints
        if checkpoints is None:
            return stop
        return checkpoints.end(start, stop, len(seq.token_ids), seq.blocks.num_matched)

    def _with_movements(self, step: Step) -> Step:
        self._give_windows(step.chunks)
        step.chunks = list(map(self._keeping, step.chunks))
        self.cache.offload_ahead()
        step.movements = self.cache.take_movements()
        return step

    def _keeping(self, chunk: Chunk) -> Chunk:
        """Return a chunk with the checkpoints that take what is kept of it."""
        checkpoints = self.cache.checkpoints
        if checkpoints is None:
            return chunk
        seq = chunk.seq
        kept, moved = checkpoints.plan(
            chunk.start, chunk.stop, len(seq.token_ids), seq.batch_slot, seq.blocks.num_matched
        )
        self.cache.blocks.movements += moved
        return replace(chunk, kept=kept)

    def commit(self, chunks: list[Chunk]) -> None:
        """Note that chunks are computed, and cache the blocks that they filled."""
        for chunk in chunks:
            seq = chunk.seq
            seq.num_computed = chunk.stop
            self.cache.commit(seq.blocks, seq.num_computed)
            if self.cache.checkpoints is not None and chunk.kept is not None:
                self.cache.blocks.movements += self.cache.checkpoints.commit(seq.blocks, chunk.kept)
            self._trim(seq)

    def extend_for_drafts(self, seq: Sequence, num_drafts: int) -> int:
        """Give a running sequence the pages of drafts after its last token; return how many drafts have them.

        Drafts take pages after everything else in a step, and preempt nobody: where pages are short they are fewer.
        """
        while num_drafts and not self.cache.extend(seq.blocks, len(seq.token_ids) + num_drafts):
            num_drafts -= 1
        if self.windows is not None:
            self.windows.extend(seq.blocks.window, len(seq.token_ids) + num_drafts)
        return num_drafts

    def commit_accepted(self, seq: Sequence) -> None:
        """Note that all but a sequence's last token are computed, accepted drafts among them, and cache their blocks.

        What was computed of rejected drafts needs no undoing: the rows that come next overwrite it.
        """
        seq.num_computed = len(seq.token_ids) - 1
        self.cache.commit(seq.blocks, seq.num_computed)
        self._trim(seq)

    def _trim(self, seq: Sequence) -> None:
        if self.windows is not None:
            # of a sequence that others read, they may compute the last row again
            self.windows.trim(seq.blocks.window, seq.num_computed - seq.keeps_pages)

    def remove(self, seq: Sequence, *, keep: bool = True) -> None:
        """Take out a sequence that waits or runs; what it computed stays cached, unless ``keep`` is False.

        One that does neither is another's to take care of: nothing happens.
        """
        if seq in self.running:
            self._stop(seq, keep)
        elif seq in self.waiting:
            self._line.remove(seq)

    def clear_waiting(self) -> None:
        """Take out every sequence that waits."""
        for seq in list(self.waiting):
            self._line.remove(seq)

    def num_missing(self, seq: Sequence) -> int:
        """Return how many tokens of a sequence that arrives are not cached now."""
        claim = self._line.claim(seq)
        missing = len(seq.token_ids) - claim.num_tokens
        self.cache.drop(claim)
        return missing

    # --- sequences that another group prefills ------------------------------------------------------------------------

    def admit(self, queue: list[Sequence], most: int) -> list[tuple[Sequence, BlockTable]]:
        """Take the first sequences of a queue, with their pages, while batch slots last; see ``WaitingLine.admit``.

        ``most``: how many at most.
        """
        if not queue or self._line.is_blocked(queue[0]):
            return []
        claims = [(seq, self._line.claim(seq, arrives=True)) for seq in queue[: min(most, len(self._free_slots))]]
        admitted = self._line.admit(claims)
        del queue[: len(admitted)]
        return admitted

    def hold(self, seq: Sequence, table: BlockTable, *, arrives: bool = False) -> None:
        """Give a sequence its pages and a batch slot; it does not run before ``run_held``.

        ``arrives``: its states or window are brought by others.
        """
        seq.blocks, seq.batch_slot = table, heapq.heappop(self._free_slots)
        seq.num_computed = self._line.skipped(table.num_reused)
        checkpoints = self.cache.checkpoints
        if arrives and self.windows is not None:
            self.windows.arrive(table.window, len(seq.token_ids))
        elif checkpoints is not None and table.num_reused and not arrives:
            self.cache.blocks.movements += checkpoints.restore(table, seq.batch_slot)

    def run_held(self, seq: Sequence, num_computed: int) -> None:
        """Let a sequence run of which so many tokens are computed, and cache its blocks."""
        seq.num_computed = num_computed
        self.cache.commit(seq.blocks, seq.num_computed)
        insort(self.running, seq, key=order_of)

    def let_go(self, seq: Sequence, num_computed: int) -> None:
        """Take back all that a held sequence has; its first ``num_computed`` tokens stay cached."""
        self.cache.release(seq.blocks, num_computed)
        if self.windows is not None:
            self.windows.release(seq.blocks.window)
        if seq.batch_slot >= 0:
            self.free_slot(seq)

    def detach(self, seq: Sequence) -> tuple[list[tuple[int, int]], list[int]]:
        """Take back a held sequence's batch slot; return its pages and those of its window, which stay out of use."""
        self.free_slot(seq)
        return self.cache.detach(seq.blocks), [] if self.windows is None else self.windows.detach(seq.blocks.window)

    def reattach(self, pages: list[tuple[int, int]], windows: list[int]) -> None:
        """Make pages free that ``detach`` took out of use."""
        self.cache.reattach(pages)
        if self.windows is not None:
            self.windows.drop(windows)

    def free_slot(self, seq: Sequence) -> None:
        """Take back the batch slot of a sequence."""
        heapq.heappush(self._free_slots, seq.batch_slot)
        seq.batch_slot = -1

    # --- who begins ---------------------------------------------------------------------------------------------------

    def _admit_waiting(self, step: Step, ahead: Ahead) -> None:
        dues = list(self._dues([], ahead).values())
        num_slots = len(self._free_slots)
        if not self._line.may_begin(dues, num_slots):
            return
        for seq, table in self._line.admit(self._line.choose(dues, self.running, num_slots)):
            self._line.remove(seq)
            self.hold(seq, table)
            insort(self.running, seq, key=order_of)
            step.admitted.append(seq)
            self._line.let_look_again(seq)

    # --- the running sequences ----------------------------------------------------------------------------------------

    def _give_pages(self) -> bool:
        """Give running sequences the pages of their tokens; return whether any was preempted for that."""
        preempted, position = False, 0
        while position < len(self.running):
            seq = self.running[position]
            while not self.cache.extend(seq.blocks, len(seq.token_ids)):
                preempted = True
                self._preempt(self.running[-1])
                if position == len(self.running):  # it was this one
                    break
            position += 1
        return preempted

    def _give_windows(self, chunks: list[Chunk]) -> None:
        """Give chunks the pages of their rows in layers with a window."""
        if self.windows is not None:
            for chunk in chunks:
                self.windows.extend(chunk.seq.blocks.window, chunk.stop)

    def _divided(self, dues: list[Due]) -> list[int]:
        """Return how many of a step's prompt tokens each prompt gets."""
        return divide(dues, self._prefill_chunk, self._share)

    def _dues(self, admitted: list[Sequence], ahead: Ahead) -> dict[Sequence, Due]:
        """Return what is due of the prompts that run; those that were just admitted count whatever they miss."""
        todo = {seq: ahead.todo(seq) for seq in self.running}
        dues = {seq: Due(order_of(seq), n, n) for seq, n in todo.items() if n > 1 or seq in admitted}
        self._line.hurry(dues)
        return dues

    def _preempt(self, seq: Sequence) -> None:
        self.cache.counters.preemptions += 1
        self._stop(seq, keep=True)
        seq.num_computed = 0
        self.add(seq)

    def _stop(self, seq: Sequence, keep: bool) -> None:
        self.running.remove(seq)
        if self.windows is not None:
            if keep and self.cache.checkpoints is not None:
                self.cache.commit(seq.blocks, seq.num_computed)
                self.cache.checkpoints.keep_end(seq.blocks, seq.num_computed)
            if not seq.keeps_pages:
                self.windows.release(seq.blocks.window)
        if not seq.keeps_pages:
            self.cache.release(seq.blocks, seq.num_computed if keep else 0)
        if self.cache.checkpoints is not None:
            self.cache.checkpoints.leave(seq.batch_slot)
        if not seq.keeps_slot:
            self.free_slot(seq)
        self.on_leave(seq)


def _ignore(seq: Sequence) -> None:
    pass
