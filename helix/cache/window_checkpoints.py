"""Which blocks of the prefix tree a sequence may begin behind where layers see a window: those whose window is there.

A checkpoint holds on to the window's pages before the end of its block; there is nothing to copy, neither when it is
left nor when a sequence begins with it. Prompts leave them where ``Checkpoints`` says, in passing: no chunk ends for
them. Every sequence leaves one behind the last block that it filled, where its next turn goes on.
"""

from __future__ import annotations

from .checkpoints import Checkpoints, Kept
from .movements import Movement
from .pool import BlockTable
from .tree import Block
from .windows import WindowPages

EVERY = 16384
"""Tokens of a prompt between two checkpoints, unless a setting says otherwise."""


class WindowCheckpoints(Checkpoints):
    """The checkpoints of a pool of pages, as many as it has room for.

    Args:
        windows: the pool, whose pages they give up when a sequence needs them.
        every: tokens between two of a prompt, a multiple of ``unit``.
        block_size: tokens a block, a power of two.
    """

    def __init__(self, windows: WindowPages, every: int, block_size: int) -> None:
        self._windows = windows
        self._pages: dict[Block, list[int]] = {}  # the least recently used first
        super().__init__(0, every, block_size)
        windows.give_up = self._give_up

    def clear(self) -> None:
        """Forget all of them."""
        while self._give_up():
            pass

    def end(self, start: int, stop: int, length: int, num_matched: int = 0) -> int:
        """Return ``stop``: a chunk passes where checkpoints are due, and its commit finds their pages."""
        return stop

    def has(self, block: Block) -> bool:
        """Return whether a sequence may begin behind a block."""
        return block in self._pages

    def restore(self, table: BlockTable, batch_slot: int) -> list[Movement]:
        """Give a sequence that begins behind a block the window's pages; nothing moves."""
        assert table.tail is not None
        pages = self._pages[table.tail] = self._pages.pop(table.tail)  # used last
        self._windows.begin(table.window, (table.tail.depth + 1) * self._block_size, pages)
        return []

    def plan(
        self, start: int, stop: int, length: int, batch_slot: int, num_matched: int = 0
    ) -> tuple[Kept, list[Movement]]:
        """Return which chunk it is: its pages are there when it is committed."""
        return Kept(batch_slot, start, stop, length), []

    def commit(self, table: BlockTable, kept: Kept) -> list[Movement]:
        """Hold on to a sequence's pages before each checkpoint that a chunk passed; nothing moves.

        The chunk's pages are there until it is trimmed, which comes after. A decode row passes none.
        """
        for due in self._due(kept.start, kept.stop, kept.length, table.num_matched):
            block = self._block_to(table, due) if self._windows.has_before(table.window, due) else None
            if block is not None and not self.has(block):
                self._hold(table, block, due)
        return []

    def keep_end(self, table: BlockTable, num_computed: int) -> None:
        """Hold on to the window's pages before the last whole block of a sequence that ends, once it is in the tree."""
        position = num_computed // self._block_size * self._block_size
        tail = table.tail
        if position and tail is not None and (tail.depth + 1) * self._block_size == position and not self.has(tail):
            self._hold(table, tail, position)

    def _hold(self, table: BlockTable, block: Block, position: int) -> None:
        pages = self._windows.before(table.window, position)
        self._windows.share(pages)
        self._pages[block] = pages

    def _give_up(self) -> bool:
        """Give up the checkpoints of blocks that left the tree, else the one that was used least recently."""
        gone = [block for block in self._pages if block.parent is None] or list(self._pages)[:1]
        for block in gone:
            self._windows.drop(self._pages.pop(block))
        return bool(gone)
