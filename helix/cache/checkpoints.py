"""Which blocks of the prefix tree have a checkpoint: what state layers keep of a sequence, as it is behind the block.

A model with state layers cannot go on from any block: keys and values of its full layers are there for every token, but
of the others there is one state, of the last. So some positions of a prompt keep a copy of it, in slots that are alike
on all ranks: the last multiple of ``unit`` below the prompt's end, where the same prompt comes again or a later turn
goes on, and every ``every`` tokens. Chunks end there, and a match ends at the last one.

A block that leaves the tree has no parent any more; its slot is found free when one is needed. Else the checkpoint that
was used least recently gives its slot up, whoever needs the block: a sequence that begins with it has copied it.
"""

from __future__ import annotations

from .movements import EVERY_RANK, CopyState, Movement
from .pool import BlockTable
from .tree import Block, match

UNIT = 64


class Checkpoints:
    """The slots of all checkpoints.

    Args:
        num_slots: how many there are.
        every: tokens between two of a prompt, a multiple of ``unit``.
        block_size: tokens a block, a power of two.

    Attributes:
        copies: leaving one, and beginning with one, are movements; no chunk may be launched over them.
    """

    copies = True

    def __init__(self, num_slots: int, every: int, block_size: int) -> None:
        self.num_slots, self.every, self.unit = num_slots, every, max(UNIT, block_size)
        self._block_size = block_size
        self.clear()

    def clear(self) -> None:
        """Forget all of them."""
        self._free = list(range(self.num_slots - 1, -1, -1))
        self._slots: dict[Block, int] = {}  # the least recently used first

    def end(self, start: int, stop: int, length: int) -> int:
        """Return where a chunk that may reach from ``start`` to ``stop`` ends, of a sequence of ``length`` tokens."""
        due = ((start // self.every + 1) * self.every, self._last(length))
        return min((position for position in due if start < position < stop), default=stop)

    def last_below(self, position: int, length: int) -> int:
        """Return the last position up to one where a sequence of ``length`` tokens leaves a checkpoint; 0 for none."""
        last = self._last(length)
        return max(position // self.every * self.every, last if last <= position else 0)

    def match(self, root: Block, keys: list[bytes], limit: int) -> list[Block]:
        """Return the longest chain of matching blocks that ends at a checkpoint; see ``tree.match``."""
        chain = match(root, keys, limit)
        while chain and not self.has(chain[-1]):
            chain.pop()
        return chain

    def has(self, block: Block) -> bool:
        """Return whether a sequence may begin behind a block."""
        return block in self._slots

    def restore(self, table: BlockTable, batch_slot: int) -> list[Movement]:
        """Return the copy that begins a sequence behind the block that it shares, which has a checkpoint."""
        assert table.tail is not None
        slot = self._slots[table.tail] = self._slots.pop(table.tail)  # used last
        return [CopyState(EVERY_RANK, batch_slot, slot, keeps=False)]

    def keep(self, table: BlockTable, position: int, length: int, batch_slot: int) -> list[Movement]:
        """Return the copy that keeps the state of a sequence of which ``position`` tokens are computed, if due."""
        block = table.tail
        if block is None or not self.num_slots or not self.is_due(block, position, length):
            return []
        slot = self._slots[block] = self._take()
        return [CopyState(EVERY_RANK, batch_slot, slot, keeps=True)]

    def is_due(self, block: Block | None, position: int, length: int) -> bool:
        """Return whether a sequence of which ``position`` tokens are computed leaves a checkpoint behind a block.

        It does not where none is due, one is there already, or ``block`` is not the one that ends at the position.
        """
        if block is None or (block.depth + 1) * self._block_size != position or position >= length:
            return False
        return (position % self.every == 0 or position == self._last(length)) and not self.has(block)

    def _last(self, length: int) -> int:
        return (length - 1) // self.unit * self.unit

    def _take(self) -> int:
        if not self._free:
            gone = [block for block in self._slots if block.parent is None] or [next(iter(self._slots))]
            self._free += [self._slots.pop(block) for block in gone]
        return self._free.pop()
