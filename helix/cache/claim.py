"""What a request found cached, and holds until it is admitted."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass

from .keys import BlockKeys
from .retention import Retention
from .tree import Block


@dataclass(slots=True)
class Claim:
    """A cached prefix that is pinned for a request.

    Attributes:
        chain: the whole blocks found.
        pages: their device pages, negative from the first one that is on the host.
        num_matched: tokens of all blocks that match, where a sequence may begin behind some of them only; else 0.
        partial: the block whose first ``partial_tokens`` tokens come next, if any.
    """

    keys: BlockKeys
    retention: tuple[Retention, ...]
    root: Block
    chain: list[Block]
    pages: list[int]
    num_matched: int = 0
    partial: Block | None = None
    partial_tokens: int = 0

    @property
    def num_tokens(self) -> int:
        """Tokens whose K and V need not be computed."""
        return len(self.chain) * self.keys.block_size + self.partial_tokens

    @property
    def tail(self) -> Block:
        """The last whole block, or the root."""
        return self.chain[-1] if self.chain else self.root

    def find_on_device(self) -> int:
        """Bring ``pages`` up to date and return how many are on the device: another claim may have onboarded some."""
        hosted = bisect_left(self.pages, True, key=_is_missing)
        self.pages[hosted:] = [block.page for block in self.chain[hosted:]]
        return bisect_left(self.pages, True, hosted, key=_is_missing)


def _is_missing(page: int) -> bool:
    return page < 0
