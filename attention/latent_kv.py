"""Split-KV partial attention over latents in Triton: all query heads read one cached vector a token, as K and as V.

A latent's first elements are the value and the unrotated part of the key, the rest is the rotated part of the key
(DeepSeek-V2, arXiv 2405.04434, with the up-projections of keys and values absorbed into queries and output). A program
takes a tile of rows x heads of one sequence and one of ``splits`` ranges of its tokens, and reads each latent once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .online_softmax import finish, fold, split_range
from .rows import Rows
from .shared_memory import fit_turn, shared_bytes

LOG2_E = 1.4426950408889634
TILE = 64  # rows x heads of a tile at most
MIN_SPLIT_TOKENS = 64


@triton.jit
def _latent_kernel(
    q, pages, page_table, row_seq, visible_len, query_start, out, lse,
    q_row_stride, page_stride, table_stride, scale_log2, num_rows, num_heads, tiles,
    TILE_ROWS: tl.constexpr, TILE_HEADS: tl.constexpr, BLOCK_SIZE: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    D: tl.constexpr, VALUE: tl.constexpr, VALUE_PAD: tl.constexpr, TURNED_PAD: tl.constexpr, SPLITS: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    run, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    split = tl.program_id(2)
    first = tl.load(query_start + run) + tile * TILE_ROWS
    stop = tl.load(query_start + run + 1)
    if first >= stop:
        return
    m = tl.arange(0, M)
    v, t = tl.arange(0, VALUE_PAD), tl.arange(0, TURNED_PAD)
    row = (first + m // TILE_HEADS).to(tl.int64)
    head = tl.program_id(1) * TILE_HEADS + m % TILE_HEADS
    real = (m < TILE_ROWS * TILE_HEADS) & (row < stop) & (head < num_heads)
    visible = tl.load(visible_len + row, mask=real, other=0)
    of_value, of_turned = (v < VALUE)[None, :], (t < D - VALUE)[None, :]
    at_q = q + row[:, None] * q_row_stride + head[:, None] * D
    q_mv = tl.load(at_q + v[None, :], mask=real[:, None] & of_value, other=0.0)
    q_mt = tl.load(at_q + VALUE + t[None, :], mask=real[:, None] & of_turned, other=0.0)
    # this split's share of the tile's tokens, in whole blocks of N
    longest = tl.max(visible, 0)
    begin, end = split_range(longest, split, SPLITS, N)
    table = page_table + tl.load(row_seq + first).to(tl.int64) * table_stride
    offsets = tl.arange(0, N)

    top = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    acc = tl.zeros([M, VALUE_PAD], tl.float32)
    # pages of the next turn are asked for a turn early: an address that waits for a load would stall the pipeline
    page = tl.load(table + (begin + offsets) // BLOCK_SIZE, mask=begin + offsets < end, other=0)
    for at in range(begin, end, N):
        n = at + offsets
        base = pages + page.to(tl.int64) * page_stride + (n % BLOCK_SIZE) * D
        page = tl.load(table + (n + N) // BLOCK_SIZE, mask=n + N < end, other=0)
        there = (n < end)[:, None]
        k_nv = tl.load(base[:, None] + v[None, :], mask=there & of_value, other=0.0)
        k_nt = tl.load(base[:, None] + VALUE + t[None, :], mask=there & of_turned, other=0.0)
        scores = tl.dot(q_mv, tl.trans(k_nv), input_precision="ieee")
        scores = tl.dot(q_mt, tl.trans(k_nt), acc=scores, input_precision="ieee") * scale_log2
        scores = tl.where((n[None, :] < visible[:, None]) & (n < end)[None, :], scores, float("-inf"))
        weight, decay, top, total = fold(scores, top, total)
        acc = acc * decay[:, None] + tl.dot(weight.to(k_nv.dtype), k_nv, input_precision="ieee")

    acc, natural = finish(acc, top, total)
    cell = (split * num_rows + row) * num_heads + head
    tl.store(lse + cell, natural, mask=real)
    if SPLITS == 1 or begin < end:  # whoever merges splits does not read those with lse = -inf
        tl.store(out + cell[:, None] * VALUE + v[None, :], acc.to(out.dtype.element_ty), mask=real[:, None] & of_value)


def latent_attention(
    q_RQD: torch.Tensor,
    pages: torch.Tensor,
    rows: Rows,
    scale: float,
    *,
    value_dim: int,
    processors: int,
    pdl: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend rows to the latents of the local shard; see ``PartialAttention``.

    How a launch is cut depends on sizes alone, so that a captured one is right for every length.

    Args:
        q_RQD: [R, Q, D].
        pages: [P, 1, 1, block_size, D].
        rows: the step's rows.
        scale: what scores are multiplied by.
        value_dim: W, below D.
        processors: of the GPU.
        pdl: launch programmatically dependent.
    """
    num_rows, num_heads, head_dim = q_RQD.shape
    wide = q_RQD.element_size() > 2
    heads = min(TILE // 4 if wide else TILE, triton.next_power_of_2(num_heads))
    tile_rows = max(1, min(rows.max_rows, (TILE // 4 if wide else TILE) // heads))
    m = max(16, triton.next_power_of_2(tile_rows * heads))
    tiles, runs, groups = -(-rows.max_rows // tile_rows), rows.query_start.shape[0] - 1, -(-num_heads // heads)
    splits = max(1, min(processors // max(1, runs * tiles * groups), -(-rows.max_visible_len // MIN_SPLIT_TOKENS)))
    value_pad, turned_pad = (triton.next_power_of_2(max(n, 16)) for n in (value_dim, head_dim - value_dim))
    row_bytes = (value_pad + turned_pad) * q_RQD.element_size()
    _, turn, stages = fit_turn(
        m, 16 if wide else 32, 1 if wide else 2, least_m=m, row_bytes=row_bytes, token_bytes=row_bytes,
        weight_bytes=q_RQD.element_size(), limit=shared_bytes(q_RQD.device),
    )  # fmt: skip
    dtype = torch.float32 if splits > 1 else q_RQD.dtype
    part = torch.empty((splits, num_rows, num_heads, value_dim), dtype=dtype, device=q_RQD.device)
    lse = torch.empty((splits, num_rows, num_heads), dtype=torch.float32, device=q_RQD.device)
    _latent_kernel[(runs * tiles, groups, splits)](
        q_RQD, pages, rows.page_table, rows.row_seq, rows.visible_len, rows.query_start, part, lse,
        q_RQD.stride(0), pages.stride(0), rows.page_table.stride(0), scale * LOG2_E, num_rows, num_heads, tiles,
        TILE_ROWS=tile_rows, TILE_HEADS=heads, BLOCK_SIZE=pages.shape[3], M=m, N=turn,
        D=head_dim, VALUE=value_dim, VALUE_PAD=value_pad, TURNED_PAD=turned_pad, SPLITS=splits,
        PDL=pdl, num_warps=8 if m > 16 else 4, num_stages=stages, **({"launch_pdl": True} if pdl else {}),
    )  # fmt: skip
    return part, lse
