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

import numpy as np

from attention.pages import PageLayout
from parallel.layout import Layout, Range
from parallel.placement import IntArray


@dataclass(frozen=True)
class Side:
    """One end of a transfer: a group's layout, and where a sequence begins in it.

    Attributes:
        layout: kvp and tpa of the group.
        block_size: of both ends.
        first_owner: the KVP rank that holds the sequence's block 0.
    """

    layout: Layout
    block_size: int
    first_owner: int = 0


@dataclass(frozen=True, eq=False)
class CacheMap:
    """Where one rank's pages lie in its memory; all sizes and addresses in bytes.

    Attributes:
        layers: [L] int64, the address of page 0 of each layer.
        page_bytes: from one page to the next of a layer.
        block_size: tokens a page.
        heads: the KV heads that the rank holds.
        arrays: [A, 2] int64, the bytes of a page before each of its arrays, and those of one token of one head there.
    """

    layers: IntArray
    page_bytes: int
    block_size: int
    heads: Range
    arrays: IntArray

    @staticmethod
    def of(pages: PageLayout, layers: IntArray, heads: Range) -> CacheMap:
        """Return the map of a pool whose pages have some layout."""
        arrays = [
            (plane.offset + part * plane.num_bytes // plane.shape[0], plane.token_bytes)
            for plane in pages.planes
            for part in range(plane.shape[0])
        ]
        return CacheMap(layers, pages.page_bytes, pages.block_size, heads, np.array(arrays, np.int64))


def shared_blocks(source: Side, source_rank: int, target: Side, target_rank: int, tokens: Range) -> IntArray:
    """Return the global blocks that hold some of ``tokens``, live on the source rank and belong on the target rank.

    Args:
        tokens: the half-open range of positions to transfer; what the receiver has cached already is left out of it.

    Raises:
        ValueError: when the two ends have different block sizes.
    """
    size, other = source.block_size, target.block_size
    if size != other:
        raise ValueError(f"block sizes {size} and {other}: both ends of a transfer must agree")
    start, stop = tokens
    block = np.arange(start // size, -(-stop // size) if stop > start else start // size, dtype=np.int64)
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
    ours, theirs = ((each.block_size, each.arrays[:, 1].tolist(), len(each.layers)) for each in (source, target))
    for name, here, there in zip(("block_size", "bytes of a token by array", "layers"), ours, theirs, strict=True):
        if here != there:
            raise ValueError(f"{name} = {here} here and {there} there must be equal")
    heads = max(source.heads[0], target.heads[0]), min(source.heads[1], target.heads[1])
    size, token_bytes = source.block_size, source.arrays[:, 1]
    first = np.clip(tokens[0] - blocks * size, 0, size)
    last = np.clip(tokens[1] - blocks * size, 0, size)
    whole = last - first == size
    parts = [np.empty((0, 3), np.int64)]
    if whole.any() and heads[0] < heads[1]:
        parts.append(_whole_blocks(source, target, heads, source_pages[whole], target_pages[whole]))
    for at in np.flatnonzero(~whole & (last > first)).tolist():  # the first and the last block at most
        pages = source_pages[at : at + 1], target_pages[at : at + 1]
        cut_bytes = (last[at] - first[at]) * token_bytes  # of a head: they are not neighbours any more
        parts += [_expand(source, target, head, pages, first[at], cut_bytes) for head in range(*heads)]
    return parts[-1] if len(parts) == 2 else np.concatenate(parts)


def _whole_blocks(
    source: CacheMap, target: CacheMap, heads: Range, source_pages: IntArray, target_pages: IntArray
) -> IntArray:
    head_bytes = (heads[1] - heads[0]) * source.block_size * source.arrays[:, 1]
    if source.heads != target.heads:
        return _expand(source, target, heads[0], (source_pages, target_pages), 0, head_bytes)
    size = np.full(len(source_pages), source.arrays[-1, 0] + head_bytes[-1])  # without padding at a page's end
    if size[0] == source.page_bytes == target.page_bytes:
        starts = np.flatnonzero(np.r_[True, (np.diff(source_pages) != 1) | (np.diff(target_pages) != 1)])
        size = np.add.reduceat(size, starts)
        source_pages, target_pages = source_pages[starts], target_pages[starts]
    return _expand(source, target, heads[0], (source_pages, target_pages), 0, size[:, None])


def _expand(
    source: CacheMap, target: CacheMap, head: int, pages: tuple[IntArray, IntArray], first: int, size: IntArray
) -> IntArray:
    """Return the regions of pages [n] of ``size`` [A] or [n, 1] bytes in every layer, from a head and a token on.

    There is one for each of the first arrays of a page that there are sizes for: [L n A, 3].
    """
    regions = np.empty((len(source.layers), len(pages[0]), size.shape[-1], 3), np.int64)
    for column, (side, page) in enumerate(zip((source, target), pages, strict=True)):
        offset, token_bytes = side.arrays[: size.shape[-1]].T
        within = (
            page[:, None] * side.page_bytes + offset + ((head - side.heads[0]) * side.block_size + first) * token_bytes
        )
        np.add(side.layers[:, None, None], within, out=regions[..., column])
    regions[..., 2] = size
    return regions.reshape(-1, 3)
