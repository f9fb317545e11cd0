"""Which blocks of the prefix tree have a checkpoint: what state layers keep of a sequence, as it is behind the block.

A model with state layers cannot go on from any block: keys and values of its full layers are there for every token, but
of the others there is one state, of the last. So some positions of a prompt keep a copy of it, in slots that are alike
on all ranks: the last multiple of ``unit`` below the prompt's end, where the same prompt comes again or a later turn
goes on, every ``every`` tokens, and the last multiple of ``unit`` in what it shares with the tree, where others may
leave it as well; a match ends at the last one. A chunk that begins at a multiple of ``unit`` passes
them, and its step keeps the states on the way; another chunk ends there, and they are copied behind it. A sequence that
decodes keeps one at the last multiple of ``unit`` that it passed, where its next turn goes on: it is copied by the step
whose row begins there. All that is kept of one chunk is a ``Kept``, whose checkpoints are the blocks' once its step is
committed.

A block that leaves the tree has no parent any more; its slot is found free when one is needed. Else the checkpoint that
was used least recently gives its slot up, whoever needs the block: a sequence that begins with it has copied it. It
goes to a slot of the host, if there are any and the block's priority allows it, and sequences begin with it from there.
"""

from __future__ import annotations

from typing import NamedTuple

from .movements import EVERY_RANK, CopyState, Movement, MoveState
from .pool import BlockTable
from .tree import Block, match

UNIT = 64
MOST_ON_THE_WAY = 16
"""Checkpoints that a step keeps of one chunk, at most."""


class Kept(NamedTuple):
    """What is kept of positions [start, stop) of the sequence in a batch slot: a step's chunk, and its checkpoints.

    They are its own from when the step is made until it is committed, or the sequence leaves its slot.

    length: tokens of the sequence. before: takes the states as they are before the chunk's step. on_the_way: behind how
    many rows that step itself keeps them, and in which checkpoints, in order. behind: takes them once it is committed.
    """

    batch_slot: int
    start: int
    stop: int
    length: int
    before: int | None = None
    on_the_way: tuple[tuple[int, int], ...] = ()
    behind: int | None = None


def unit_of(block_size: int) -> int:
    """Return the tokens whose multiples may have checkpoints, for blocks of so many, a power of two."""
    return max(UNIT, block_size)


def interval_of(tokens: int, block_size: int) -> int:
    """Return the tokens between two checkpoints of a prompt where ``tokens`` are asked for: whole units of them."""
    unit = unit_of(block_size)
    return -(-tokens // unit) * unit


class Checkpoints:
    """The slots of all checkpoints.

    Args:
        num_slots: how many there are.
        every: tokens between two of a prompt, a multiple of ``unit``.
        block_size: tokens a block, a power of two.
        host_slots: how many more there are on the host, with numbers from ``num_slots`` on.
        offload_min_priority: checkpoints of blocks below this priority are dropped, not moved to the host.
        passes: chunks may pass places where one is due.
    """

    def __init__(
        self, num_slots: int, every: int, block_size: int, *, host_slots: int = 0, offload_min_priority: int = 0,
        passes: bool = False,
    ) -> None:  # fmt: skip
        self.num_slots, self.every, self.unit = num_slots, every, unit_of(block_size)
        self.host_slots, self._offload_min_priority = host_slots, offload_min_priority
        self._block_size, self._may_pass = block_size, passes
        self._kept: dict[int, dict[int, Kept]] = {}  # by batch slot and start: of chunks that are not committed
        self._passed: dict[int, Block] = {}  # by batch slot: the last block that decoding left a checkpoint behind
        self.clear()

    def clear(self) -> None:
        """Forget all of them."""
        self._free = list(range(self.num_slots - 1, -1, -1))
        self._slots: dict[Block, int] = {}  # the least recently used first, here and on the host
        self._host_free = list(range(self.num_slots + self.host_slots - 1, self.num_slots - 1, -1))
        self._host_slots: dict[Block, int] = {}
        self._kept.clear()
        self._passed.clear()

    def end(self, start: int, stop: int, length: int, num_matched: int = 0) -> int:
        """Return where a chunk that may reach from ``start`` to ``stop`` ends, of a sequence of ``length`` tokens.

        ``num_matched``: of these the first, that were in the tree when it was admitted.
        """
        if not self._passes(start):
            due = self._due(start, stop, length, num_matched)
            return min((position for position in due if position < stop), default=stop)
        whole = stop // self.unit * self.unit
        stop = whole if start < whole and stop < length else stop  # so that the next one may pass as well
        due = self._due(start, stop, length, num_matched)
        return stop if len(due) <= MOST_ON_THE_WAY else due[MOST_ON_THE_WAY - 1]

    def _passes(self, start: int) -> bool:
        """Return whether a chunk from a position on may pass places where checkpoints are due."""
        return self._may_pass and start % self.unit == 0

    def _due(self, start: int, stop: int, length: int, num_matched: int) -> list[int]:
        """Return where checkpoints are due in (start, stop] of a sequence of so many tokens, in order."""
        places = {*range((start // self.every + 1) * self.every, min(stop + 1, length), self.every)}
        return sorted(places | {last for last in self._lasts(length, num_matched) if start < last <= stop})

    def last_below(self, position: int, length: int, num_matched: int = 0) -> int:
        """Return the last position up to one where a sequence leaves a checkpoint, see ``end``; 0 for none."""
        lasts = [last for last in self._lasts(length, num_matched) if last <= position]
        return max(position // self.every * self.every, *lasts, 0)

    def match(self, root: Block, keys: list[bytes], limit: int) -> tuple[list[Block], int]:
        """Return the longest chain of matching blocks that ends at a checkpoint, and how many blocks match at all; see
        ``tree.match``.
        """
        chain = match(root, keys, limit)
        num_matched = len(chain)
        while chain and not self.has(chain[-1]):
            chain.pop()
        return chain, num_matched

    def has(self, block: Block) -> bool:
        """Return whether a sequence may begin behind a block."""
        return block in self._slots or block in self._host_slots

    def restore(self, table: BlockTable, batch_slot: int) -> list[Movement]:
        """Return the copy that begins a sequence behind the block that it shares, which has a checkpoint."""
        assert table.tail is not None
        slots = self._slots if table.tail in self._slots else self._host_slots
        slot = slots[table.tail] = slots.pop(table.tail)  # used last
        return [CopyState(EVERY_RANK, batch_slot, slot, keeps=False)]

    def plan(
        self, start: int, stop: int, length: int, batch_slot: int, num_matched: int = 0
    ) -> tuple[Kept, list[Movement]]:
        """Return what is kept of a chunk that ends where ``end`` says, or before, and what moves before its step.

        Where checkpoints are short the last places have them.
        """
        kept, slots, moved = Kept(batch_slot, start, stop, length), dict[int, int](), list[Movement]()
        self._free_all(self._kept.setdefault(batch_slot, {}).pop(start, kept))  # of a step that was made and not taken
        one_row = stop - start == 1 and start % self.unit == 0  # it decodes, or ends a prompt
        for position in [start] * (start > 0) if one_row else reversed(self._due(start, stop, length, num_matched)):
            slot, moves = self._take()
            moved += moves
            if slot is not None:
                slots[position] = slot
        if one_row and slots:
            kept = kept._replace(before=slots[start])
            moved.append(CopyState(EVERY_RANK, batch_slot, slots[start], keeps=True))
        elif self._passes(start):
            kept = kept._replace(on_the_way=tuple((position - start, slots[position]) for position in sorted(slots)))
        else:
            kept = kept._replace(behind=slots.get(stop))
        self._kept[batch_slot][start] = kept
        return kept, moved

    def commit(self, table: BlockTable, kept: Kept) -> list[Movement]:
        """Give the checkpoints of a chunk that is computed to its blocks; return the copy of what is behind it, if any.

        Of those before rows that decode a sequence leaves one, the last.
        """
        if self._kept.get(kept.batch_slot, {}).pop(kept.start, None) is None:
            return []
        for rows, slot in kept.on_the_way:
            self._bind(table, kept.start + rows, slot)
        if kept.before is not None:
            block = self._bind(table, kept.start, kept.before)
            if block is not None:
                if kept.batch_slot in self._passed:
                    self._drop(self._passed[kept.batch_slot])
                self._passed[kept.batch_slot] = block
        if kept.behind is None or self._bind(table, kept.stop, kept.behind) is None:
            return []
        return [CopyState(EVERY_RANK, kept.batch_slot, kept.behind, keeps=True)]

    def keep_end(self, table: BlockTable, num_computed: int) -> None:
        """Leave one where a sequence ends, if that is free; a state's is copied in passing, or not at all."""

    def leave(self, batch_slot: int) -> None:
        """Forget what is kept of chunks that are not committed, and which checkpoint the next one would replace."""
        for kept in self._kept.pop(batch_slot, {}).values():
            self._free_all(kept)
        self._passed.pop(batch_slot, None)

    def _free_all(self, kept: Kept) -> None:
        """Free the checkpoints of a chunk that is not committed."""
        self._free += [slot for _, slot in kept.on_the_way]
        self._free += [slot for slot in (kept.before, kept.behind) if slot is not None]

    def _bind(self, table: BlockTable, position: int, slot: int) -> Block | None:
        """Give a checkpoint to the block that ends at a position and return it; None where that is not to be had."""
        block = self._block_to(table, position)
        if block is None or self.has(block):
            self._free.append(slot)
            return None
        self._slots[block] = slot
        return block

    def _block_to(self, table: BlockTable, position: int) -> Block | None:
        """Return the block of a sequence that ends at a position; None where none does."""
        block = table.tail
        while block is not None and (block.depth + 1) * self._block_size > position:
            block = block.parent
        return block if block is not None and (block.depth + 1) * self._block_size == position else None

    def _lasts(self, length: int, num_matched: int) -> tuple[int, int]:
        """Return the last multiples of a unit below a sequence's end and in what was in the tree of it."""
        return (length - 1) // self.unit * self.unit, num_matched // self.unit * self.unit

    def _drop(self, block: Block) -> None:
        """Free the slot of a block's checkpoint, if it has one."""
        if block in self._slots:
            self._free.append(self._slots.pop(block))
        elif block in self._host_slots:
            self._host_free.append(self._host_slots.pop(block))

    def _drop_gone(self) -> None:
        """Free the slots of blocks that left the tree."""
        for block in [block for block in (*self._slots, *self._host_slots) if block.parent is None]:
            self._drop(block)

    def _take(self) -> tuple[int | None, list[Movement]]:
        """Return a slot that is free, or was used least recently, and what moves out of it before.

        The slot is None where others are copying into all of them.
        """
        if not self._free:
            self._drop_gone()
        moved: list[Movement] = []
        if not self._free and self._slots:
            block = next(iter(self._slots))
            slot, target = self._slots[block], self._take_host(block)
            self._drop(block)
            if target is not None:
                self._host_slots[block] = target
                moved.append(MoveState(EVERY_RANK, slot, target))
        return (self._free.pop() if self._free else None), moved

    def _take_host(self, block: Block) -> int | None:
        """Return a slot of the host for a block's checkpoint, None where it is dropped."""
        if not self.host_slots or block.priority < self._offload_min_priority:
            return None
        if not self._host_free:
            self._drop(next(iter(self._host_slots)))
        return self._host_free.pop()
