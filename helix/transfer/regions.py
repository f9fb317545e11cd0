"""Which bytes of a sender's cache go where in a receiver's, for any two layouts.

Ownership on both sides is a function of the global position, so the copies between one sender rank and one receiver
rank follow from two placements, two head splits and two page tables; no rank has to tell another. They are built by
NumPy over whole requests: the Python work does not grow with blocks, layers or heads.

A page holds arrays [KV heads, block_size] of a token's bytes: of one layer K and V, or latents, and behind them what
else 8 bits need (``attention.pages``). Pages of one layer are ``page_bytes`` apart.

Shape letters: L layers, n pages, A arrays of a page, I items of a page's lists.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from attention.pages import PageLayout
from parallel.layout import Layout, Range
from parallel.placement import BlockCyclic, IntArray


@dataclass(frozen=True)
class Side:
    """One end of a transfer: a group's layout, and where a sequence begins in it.

    Attributes:
        layout: kvp and tpa of the group.
        placement: the rule of ownership; both ends have one block size.
        first_owner: the KVP rank that holds the sequence's block 0.
        num_kv_heads: of the model, alike on both ends.
    """

    layout: Layout
    placement: BlockCyclic
    first_owner: int
    num_kv_heads: int

    def heads(self, rank: int) -> Range:
        """Return the KV heads that a rank of the group holds."""
        return self.layout.kv_heads(self.num_kv_heads, rank // self.layout.kvp)

    def sends(self, rank: int) -> bool:
        """Return whether a rank sends its heads: of ranks that hold duplicates, the first does."""
        copies = max(1, self.layout.tpa // self.num_kv_heads)
        return rank // self.layout.kvp % copies == 0


@dataclass(frozen=True)
class CacheMap:
    """Where one rank's pages lie in its memory; all sizes and addresses in bytes.

    Attributes:
        layers: [L] int64, the address of page 0 of each layer.
        page_bytes: from one page to the next of a layer.
        token_bytes: one token of one head, D elements.
        block_size: tokens a page.
        heads: the KV heads that the rank holds.
        planes: of a page: 2 for K and V, 1 for latents.
        more: arrays behind these, each the bytes of the page before it and those of one token of one head.
    """

    layers: IntArray
    page_bytes: int
    token_bytes: int
    block_size: int
    heads: Range
    planes: int = 2
    more: tuple[tuple[int, int], ...] = ()

    @staticmethod
    def of(pages: PageLayout, layers: IntArray, heads: Range) -> CacheMap:
        """Return the map of a pool whose pages have some layout."""
        first, *others = pages.planes
        more = tuple(
            (plane.offset + part * plane.num_bytes // plane.shape[0], plane.token_bytes)
            for plane in others
            for part in range(plane.shape[0])
        )
        return CacheMap(layers, pages.page_bytes, first.token_bytes, pages.block_size, heads, first.shape[0], more)

    @cached_property
    def arrays(self) -> IntArray:
        """Every array of a page: [A, 2], the bytes of the page before it and those of one token of one head."""
        first = [(plane * self.kv_bytes, self.token_bytes) for plane in range(self.planes)]
        return np.array([*first, *self.more], np.int64)

    @property
    def held_bytes(self) -> int:
        """The bytes of a page, padding at its end left out."""
        offset, token_bytes = self.arrays[-1].tolist()
        return int(offset + (self.heads[1] - self.heads[0]) * self.block_size * token_bytes)

    @property
    def head_bytes(self) -> int:
        """One head of a page's K or V."""
        return self.block_size * self.token_bytes

    @property
    def kv_bytes(self) -> int:
        """All heads of a page's K or V."""
        return (self.heads[1] - self.heads[0]) * self.head_bytes


def shared_blocks(source: Side, source_rank: int, target: Side, target_rank: int, tokens: Range) -> IntArray:
    """Return the global blocks that hold some of ``tokens``, live on the source rank and belong on the target rank.

    Args:
        tokens: the half-open range of positions to transfer; what the receiver has cached already is left out of it.

    Raises:
        ValueError: when the two ends have different block sizes or heads.
    """
    sizes = source.placement.block_size, target.placement.block_size
    if sizes[0] != sizes[1] or source.num_kv_heads != target.num_kv_heads:
        raise ValueError(
            f"block sizes {sizes[0]} and {sizes[1]}, KV heads {source.num_kv_heads} and {target.num_kv_heads}: "
            "both ends of a transfer must agree"
        )
    start, stop = tokens
    block = np.arange(start // sizes[0], -(-stop // sizes[0]) if stop > start else start // sizes[0], dtype=np.int64)
    at_source = (block + source.first_owner) % source.layout.kvp == source_rank % source.layout.kvp
    at_target = (block + target.first_owner) % target.layout.kvp == target_rank % target.layout.kvp
    return block[at_source & at_target]


def build_regions(
    source: CacheMap,
    target: CacheMap,
    blocks: IntArray,
    source_pages: IntArray,
    target_pages: IntArray,
    tokens: Range,
) -> IntArray:
    """Return the copies of some blocks between two ranks: [N, 3] int64, source address, target address, bytes.

    Neighbouring regions are joined where both sides are contiguous: heads of a page, K and V, pages.

    Args:
        source, target: the two ranks' caches, of the same layers, block size and token bytes.
        blocks: [n] int64, ascending: what ``shared_blocks`` returns for the two ranks.
        source_pages, target_pages: [n] int64, the page of each block on its rank.
        tokens: the half-open range of positions to transfer; it cuts the first and the last block.

    Raises:
        ValueError: when the arrays or the two caches do not fit each other.
    """
    if not len(blocks) == len(source_pages) == len(target_pages):
        raise ValueError(
            f"blocks, source_pages, target_pages = {len(blocks)}, {len(source_pages)}, {len(target_pages)} entries "
            "must be equally many"
        )
    for name in ("block_size", "token_bytes"):
        if getattr(source, name) != getattr(target, name):
            raise ValueError(f"{name} = {getattr(source, name)} here and {getattr(target, name)} there must be equal")
    ours, theirs = source.arrays[:, 1].tolist(), target.arrays[:, 1].tolist()
    if ours != theirs:
        raise ValueError(f"bytes of a token by array = {ours} here and {theirs} there must be equal")
    if len(source.layers) != len(target.layers):
        raise ValueError(f"layers = {len(source.layers)} here and {len(target.layers)} there must be equal")
    heads = max(source.heads[0], target.heads[0]), min(source.heads[1], target.heads[1])
    if heads[0] >= heads[1] or not len(blocks):
        return np.empty((0, 3), np.int64)
    size = source.block_size
    first = np.clip(tokens[0] - blocks * size, 0, size)
    last = np.clip(tokens[1] - blocks * size, 0, size)
    whole = (first == 0) & (last == size)
    parts = [_whole_blocks(source, target, heads, source_pages[whole], target_pages[whole])]
    for index in np.flatnonzero(~whole & (last > first)).tolist():  # the first and the last block at most
        pages = int(source_pages[index]), int(target_pages[index])
        parts.append(_part_of_block(source, target, heads, pages, (int(first[index]), int(last[index]))))
    return np.concatenate(parts) if len(parts) > 1 else parts[0]


def _whole_blocks(
    source: CacheMap, target: CacheMap, heads: Range, source_pages: IntArray, target_pages: IntArray
) -> IntArray:
    if not len(source_pages):
        return np.empty((0, 3), np.int64)
    if not source.heads == target.heads == heads:
        size = (heads[1] - heads[0]) * source.block_size * source.arrays[:, 1]
        return _expand(source, target, heads, (source_pages, target_pages), 0, size)
    size = np.full(len(source_pages), source.held_bytes, np.int64)
    if size[0] == source.page_bytes == target.page_bytes:
        starts = np.flatnonzero(np.r_[True, (np.diff(source_pages) != 1) | (np.diff(target_pages) != 1)])
        size = np.add.reduceat(size, starts)
        source_pages, target_pages = source_pages[starts], target_pages[starts]
    return _expand(source, target, heads, (source_pages, target_pages), 0, size[:, None])


def _part_of_block(source: CacheMap, target: CacheMap, heads: Range, pages: Range, tokens: Range) -> IntArray:
    """One block that is cut: a region a head, since its heads are not neighbours any more."""
    parts = [
        _expand(
            source,
            target,
            (head, head + 1),
            (np.array([pages[0]], np.int64), np.array([pages[1]], np.int64)),
            tokens[0],
            (tokens[1] - tokens[0]) * source.arrays[:, 1],
        )
        for head in range(*heads)
    ]
    return np.concatenate(parts)


def _expand(
    source: CacheMap,
    target: CacheMap,
    heads: Range,
    pages: tuple[IntArray, IntArray],
    first: int,
    size: IntArray,
) -> IntArray:
    """Return the regions of pages [n] of ``size`` [A] or [n, 1] bytes in every layer, from token ``first`` on.

    There is one for each of the first arrays of a page that there are sizes for: [L n A, 3].
    """
    regions = np.empty((len(source.layers), len(pages[0]), size.shape[-1], 3), np.int64)
    for column, (side, page) in enumerate(zip((source, target), pages, strict=True)):
        offset, token_bytes = side.arrays[: size.shape[-1]].T
        within = page[:, None] * side.page_bytes + offset
        within += ((heads[0] - side.heads[0]) * side.block_size + first) * token_bytes
        np.add(side.layers[:, None, None], within, out=regions[..., column])
    regions[..., 2] = size
    return regions.reshape(-1, 3)
