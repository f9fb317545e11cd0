"""Which rank computes a sequence's first block now, so that a sequence with the same one begins there and can share.

Blocks enter the tree when they are computed, so of equal prompts that start together none finds another's cached. On
one rank they share all blocks from then on; on two, only one of them could be kept.
"""

from __future__ import annotations

from .keys import BlockKeys
from .pool import BlockTable

Name = tuple[str, bytes]  # salt and first block


class Beginnings:
    """The first blocks that are being computed: the rank of each, and how many sequences there compute it."""

    def __init__(self) -> None:
        self._ranks: dict[Name, int] = {}
        self._counts: dict[Name, int] = {}

    def rank_of(self, keys: BlockKeys) -> int | None:
        """Return the rank that computes the first block of a sequence with these keys, if any does."""
        return self._ranks.get((keys.salt, keys.full[0])) if keys.full else None

    def add(self, table: BlockTable) -> None:
        """Note that a sequence begins to compute its first block; nothing where another rank computes the same one."""
        keys = table.keys
        if keys is None or not keys.full or table.num_cached:
            return
        name = keys.salt, keys.full[0]
        if self._ranks.setdefault(name, table.first_owner) == table.first_owner:
            self._counts[name] = self._counts.get(name, 0) + 1
            table.beginning = name

    def remove(self, table: BlockTable) -> None:
        """Note that a sequence has computed its first block, or will not."""
        if table.beginning is None:
            return
        self._counts[table.beginning] -= 1
        if not self._counts[table.beginning]:
            del self._counts[table.beginning], self._ranks[table.beginning]
        table.beginning = None
