"""Split-KV partial attention in Triton: decode, verification and prefill rows over a paged shard.

A program takes a tile of neighbouring rows of one sequence with all query heads of one KV head (the GQA group is packed
into the tile, so each K and V is read once), and one of ``splits`` ranges of the tile's tokens (Flash-Decoding, arXiv
2311.01282). Splits are partials like those of ranks: the exchange merges both.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from . import latent_kv, many_rows, stream_kv
from .online_softmax import finish, fold, split_range
from .rows import Rows
from .shared_memory import fit_turn, shared_bytes

LOG2_E = 1.4426950408889634
MIN_SPLIT_TOKENS = 64
LONG_SPLIT_TOKENS = 256  # from here on a split gains more from wide turns than from many in flight
TILE_ROWS_BY_HEADS = 128  # rows x heads of a tile when rows are many


def can_run(device: torch.device) -> bool:
    """Return whether Triton kernels run on this device: CUDA, or anywhere under Triton's interpreter."""
    return device.type == "cuda" or bool(triton.knobs.runtime.interpret)


@triton.jit
def _page_of(table, first, token, end, BLOCK_SIZE: tl.constexpr, N: tl.constexpr):
    """Return the pages of neighbouring tokens from ``first`` on, one for all where they share it; 0 past the end."""
    if BLOCK_SIZE % N == 0:
        return tl.load(table + first // BLOCK_SIZE, mask=first < end, other=0)
    else:
        return tl.load(table + token // BLOCK_SIZE, mask=token < end, other=0)


@triton.jit
def _split_kernel(
    q, pages, page_table, row_seq, visible_len, query_start, out, lse,
    q_row_stride, page_stride, kv_stride, head_stride, table_stride, scale_log2, num_rows, num_heads, tiles,
    GROUP: tl.constexpr, TILE_ROWS: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, SPLITS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    run, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    kv_head, split = tl.program_id(1), tl.program_id(2)
    first = tl.load(query_start + run) + tile * TILE_ROWS
    stop = tl.load(query_start + run + 1)
    if first >= stop:
        return
    m = tl.arange(0, M)
    d = tl.arange(0, D_PAD)
    row = (first + m // GROUP).to(tl.int64)
    head = kv_head * GROUP + m % GROUP
    real = (m < TILE_ROWS * GROUP) & (row < stop)
    visible = tl.load(visible_len + row, mask=real, other=0)
    q_md = tl.load(q + row[:, None] * q_row_stride + (head[:, None] * D + d[None, :]),
                   mask=real[:, None] & (d < D)[None, :], other=0.0)  # fmt: skip
    # this split's share of the tile's tokens, in whole blocks of N
    longest = tl.max(visible, 0)
    begin, end = split_range(longest, split, SPLITS, N)
    table = page_table + tl.load(row_seq + first).to(tl.int64) * table_stride
    offsets = tl.arange(0, N)

    top = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    acc = tl.zeros([M, D_PAD], tl.float32)
    # the page of the next turn is asked for a turn early: an address that waits for a load would stall the pipeline
    page = _page_of(table, begin, begin + offsets, end, BLOCK_SIZE, N)
    for at in range(begin, end, N):
        n = at + offsets
        next_page = _page_of(table, at + N, n + N, end, BLOCK_SIZE, N)
        base = pages + page.to(tl.int64) * page_stride + kv_head * head_stride + (n % BLOCK_SIZE) * D
        page = next_page
        k_nd = tl.load(base[:, None] + d[None, :], mask=(n < end)[:, None] & (d < D)[None, :], other=0.0)
        scores = tl.dot(q_md, tl.trans(k_nd), input_precision="ieee") * scale_log2
        scores = tl.where((n[None, :] < visible[:, None]) & (n < end)[None, :], scores, float("-inf"))
        weight, decay, top, total = fold(scores, top, total)
        v_nd = tl.load(base[:, None] + kv_stride + d[None, :], mask=(n < end)[:, None] & (d < D)[None, :], other=0.0)
        acc = acc * decay[:, None] + tl.dot(weight.to(v_nd.dtype), v_nd, input_precision="ieee")

    acc, natural = finish(acc, top, total)
    cell = (split * num_rows + row) * num_heads + head
    tl.store(lse + cell, natural, mask=real)
    if SPLITS == 1 or begin < end:  # whoever merges splits does not read those with lse = -inf
        tl.store(out + cell[:, None] * D + d[None, :], acc.to(out.dtype.element_ty),
                 mask=real[:, None] & (d < D)[None, :])  # fmt: skip


@dataclass(frozen=True)
class Tile:
    """How a launch is cut: rows of a tile, its padded rows x heads (M), tokens a turn (N), warps, stages, and how many
    ranges the tokens are split into.
    """

    rows: int
    m: int
    n: int
    warps: int
    stages: int
    splits: int


def choose_tile(
    rows: Rows, group: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype, *, processors: int, limit: int
) -> Tile:
    """Return the tile for a step's rows, ``group`` query heads a KV head, on a GPU of so many processors, where a
    program may take ``limit`` bytes of shared memory.

    It depends on sizes alone, not on the lengths of a step, so that a captured launch is right for every length.
    """
    wide = head_dim > 128 or dtype.itemsize > 2
    tile_rows = min(rows.max_rows, max(1, TILE_ROWS_BY_HEADS // triton.next_power_of_2(group)))
    m = max(16, triton.next_power_of_2(tile_rows * group))
    programs = (rows.query_start.shape[0] - 1) * -(-rows.max_rows // tile_rows) * num_kv_heads
    splits = max(1, min(processors // max(programs, 1), -(-rows.max_visible_len // MIN_SPLIT_TOKENS)))
    if m > 32 or wide:
        n, warps, stages = 32 if wide else 64, 8 if m > 64 else 4, 2
    elif rows.max_visible_len >= LONG_SPLIT_TOKENS * splits:
        n, warps, stages = 128, 8, 3
    else:
        n, warps, stages = 64, 4, 4
    row_bytes = triton.next_power_of_2(head_dim) * dtype.itemsize
    m, n, stages = fit_turn(
        m, n, stages, least_m=max(16, triton.next_power_of_2(group)),
        row_bytes=row_bytes, token_bytes=2 * row_bytes, weight_bytes=dtype.itemsize, limit=limit,
    )  # fmt: skip
    return Tile(max(1, min(tile_rows, m // group)), m, n=n, warps=warps, stages=stages, splits=splits)


class SplitKV:
    """The Triton back end; see ``PartialAttention`` for what a call takes and returns.

    Q and the pages share one dtype: float32 (products in full precision), float16 or bfloat16.

    Args:
        device: where it runs.
        pdl: launch programmatically dependent; every kernel before and after it on the stream must allow it.
    """

    def __init__(self, device: torch.device, *, pdl: bool = False) -> None:
        self._pdl, self._shared_bytes = pdl, shared_bytes(device)
        self._processors = (
            torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 8
        )

    def __call__(
        self, q_RQD: torch.Tensor, pages: torch.Tensor, rows: Rows, scale: float, *, value_dim: int | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Attend rows to the local shard."""
        if value_dim is not None:
            return latent_kv.latent_attention(
                q_RQD, pages, rows, scale, value_dim=value_dim, processors=self._processors, pdl=self._pdl
            )
        num_rows, num_heads, head_dim = q_RQD.shape
        num_kv_heads, block_size = pages.shape[2], pages.shape[3]
        group = num_heads // num_kv_heads
        if stream_kv.supports(pages, rows.max_rows * group):
            return stream_kv.stream_attention(q_RQD, pages, rows, scale, processors=self._processors, pdl=self._pdl)
        if many_rows.supports(pages, group):
            return many_rows.many_rows_attention(q_RQD, pages, rows, scale, processors=self._processors, pdl=self._pdl)
        tile = choose_tile(
            rows, group, num_kv_heads, head_dim, q_RQD.dtype, processors=self._processors, limit=self._shared_bytes
        )
        tiles = -(-rows.max_rows // tile.rows)
        runs = rows.query_start.shape[0] - 1
        dtype = torch.float32 if tile.splits > 1 else q_RQD.dtype
        part = torch.empty((tile.splits, num_rows, num_heads, head_dim), dtype=dtype, device=q_RQD.device)
        lse = torch.empty((tile.splits, num_rows, num_heads), dtype=torch.float32, device=q_RQD.device)
        _split_kernel[(runs * tiles, num_kv_heads, tile.splits)](
            q_RQD, pages, rows.page_table, rows.row_seq, rows.visible_len, rows.query_start, part, lse,
            q_RQD.stride(0), pages.stride(0), pages.stride(1), pages.stride(2), rows.page_table.stride(0),
            scale * LOG2_E, num_rows, num_heads, tiles,
            GROUP=group, TILE_ROWS=tile.rows, BLOCK_SIZE=block_size,
            M=tile.m, N=tile.n, D=head_dim, D_PAD=triton.next_power_of_2(max(head_dim, 16)), SPLITS=tile.splits,
            PDL=self._pdl, num_warps=tile.warps, num_stages=tile.stages,
            **({"launch_pdl": True} if self._pdl else {}),
        )  # fmt: skip
        return part, lse
