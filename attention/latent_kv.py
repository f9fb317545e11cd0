"""Partial attention over latents in Triton: all query heads read one cached vector a token, as K and as V.

A latent's first elements are the value and the unrotated part of the key, the rest is the rotated part of the key
(DeepSeek-V2, arXiv 2405.04434, with the up-projections of keys and values absorbed into queries and output). A program
takes pieces of the step's work list (``work``): a tile of rows x heads of one sequence and a range of its tokens, and
reads each latent once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from parallel.device import early

from .eight_bits import as_float, scaled
from .online_softmax import LOG2_E, finish, fold
from .pages import Pages, QuantizedPages, planes_of
from .partial import Partials
from .rows import Rows, Work
from .shared_memory import fit_turn, shared_bytes
from .work import PIECE_FIELDS, Cutting

TILE = 64  # rows x heads of a tile at most, a quarter of it for 4-byte elements
UNIT = 32  # tokens
PIECE = tl.constexpr(len(PIECE_FIELDS))


@triton.jit
def _latent_kernel(
    q, pages, turned, scales, page_table, visible_len, pieces, span_start, part_start, out, lse,
    q_row_stride, page_stride, turned_stride, scale_stride, token_len, turned_len, table_stride, scale_log2, num_heads,
    TILE_HEADS: tl.constexpr, BLOCK_SIZE: tl.constexpr, M: tl.constexpr, N: tl.constexpr, D: tl.constexpr,
    VALUE: tl.constexpr, VALUE_PAD: tl.constexpr, TURNED_PAD: tl.constexpr, IN_8_BITS: tl.constexpr,
    SPLIT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    m = tl.arange(0, M)
    v, t = tl.arange(0, VALUE_PAD), tl.arange(0, TURNED_PAD)
    offsets = tl.arange(0, N)
    of_value, of_turned = (v < VALUE)[None, :], (t < D - VALUE)[None, :]
    for piece in range(tl.load(span_start + tl.program_id(0)), tl.load(span_start + tl.program_id(0) + 1)):
        its = pieces + piece * PIECE
        first, stop, begin, end = tl.load(its), tl.load(its + 1), tl.load(its + 2), tl.load(its + 3)
        row = (first + m // TILE_HEADS).to(tl.int64)
        head = tl.program_id(1) * TILE_HEADS + m % TILE_HEADS
        real = (row < stop) & (head < num_heads)
        visible = tl.load(visible_len + row, mask=real, other=0)
        at_q = q + row[:, None] * q_row_stride + head[:, None] * D
        q_mv = tl.load(at_q + v[None, :], mask=real[:, None] & of_value, other=0.0)
        q_mt = tl.load(at_q + VALUE + t[None, :], mask=real[:, None] & of_turned, other=0.0)
        table = page_table + tl.load(its + 6).to(tl.int64) * table_stride
        top = tl.full([M], float("-inf"), tl.float32)
        total = tl.zeros([M], tl.float32)
        acc = tl.zeros([M, VALUE_PAD], tl.float32)
        # pages of the next turn are asked for a turn early: an address that waits for a load would stall the pipeline
        page = tl.load(table + (begin + offsets) // BLOCK_SIZE, mask=begin + offsets < end, other=0)
        for at in range(begin, end, N):
            n = at + offsets
            base = pages + page.to(tl.int64) * page_stride + (n % BLOCK_SIZE) * token_len
            of_turned_at = turned + page.to(tl.int64) * turned_stride + (n % BLOCK_SIZE) * turned_len
            its_scale = scales + page.to(tl.int64) * scale_stride + n % BLOCK_SIZE
            page = tl.load(table + (n + N) // BLOCK_SIZE, mask=n + N < end, other=0)
            there = (n < end)[:, None]
            k_nv = tl.load(base[:, None] + v[None, :], mask=there & of_value, other=0.0)
            k_nt = tl.load(of_turned_at[:, None] + t[None, :], mask=there & of_turned, other=0.0)
            if IN_8_BITS:
                token_scale = tl.load(its_scale, mask=n < end, other=0.0)
                wide = as_float(k_nv)
                scores = tl.dot(q_mv, tl.trans(wide.to(q_mv.dtype)), input_precision="ieee") * token_scale[None, :]
                k_nt = k_nt.to(q_mt.dtype)
            else:
                scores = tl.dot(q_mv, tl.trans(k_nv), input_precision="ieee")
            scores = tl.dot(q_mt, tl.trans(k_nt), acc=scores, input_precision="ieee") * scale_log2
            scores = tl.where((n[None, :] < visible[:, None]) & (n < end)[None, :], scores, float("-inf"))
            weight, decay, top, total = fold(scores, top, total)
            if IN_8_BITS:
                weight, k_nv = scaled(weight, wide, token_scale, q_mv.dtype)
            acc = acc * decay[:, None] + tl.dot(weight.to(k_nv.dtype), k_nv, input_precision="ieee")

        acc, natural = finish(acc, top, total)
        cell = row
        if SPLIT:
            cell = (tl.load(part_start + row, mask=real, other=0) + tl.load(its + 4)).to(tl.int64)
        cell = cell * num_heads + head
        tl.store(lse + cell, natural, mask=real)
        tl.store(out + cell[:, None] * VALUE + v[None, :], acc.to(out.dtype.element_ty),
                 mask=real[:, None] & of_value)  # fmt: skip


def _tile_heads(num_heads: int, *, wide: bool) -> int:
    """Return the heads of a tile; ``wide`` elements have 4 bytes."""
    return min(TILE // 4 if wide else TILE, triton.next_power_of_2(num_heads))


def cutting(num_heads: int, max_rows: int, processors: int, *, wide: bool) -> Cutting:
    """Return how steps of runs of so many rows are cut; ``wide`` elements have 4 bytes."""
    heads = _tile_heads(num_heads, wide=wide)
    most = max(1, (TILE // 4 if wide else TILE) // heads)
    programs = max(1, processors // -(-num_heads // heads))
    return Cutting("latent_kv", min(max_rows, most), UNIT, programs, persistent=max_rows <= most)


def attend(
    q_RQD: torch.Tensor, pages: Pages, rows: Rows, work: Work, partials: Partials, scale: float, *, pdl: bool
) -> None:
    """Attend rows to the latents of the local shard; see ``PartialAttention``. Partials are written."""
    _, num_heads, head_dim = q_RQD.shape
    value_dim, wide = partials.out.shape[-1], q_RQD.element_size() > 2
    heads = _tile_heads(num_heads, wide=wide)
    m = max(16, triton.next_power_of_2(work.cutting.tile_rows * heads))
    value_pad, turned_pad = (triton.next_power_of_2(max(n, 16)) for n in (value_dim, head_dim - value_dim))
    row_bytes = (value_pad + turned_pad) * q_RQD.element_size()
    values, scales, in_8_bits = planes_of(pages)
    turned = pages.turned if isinstance(pages, QuantizedPages) else pages[..., value_dim:]
    assert turned is not None
    _, turn, stages = fit_turn(
        m, 16 if wide else 32, 1 if wide else 2, least_m=m, row_bytes=row_bytes, token_bytes=row_bytes,
        weight_bytes=q_RQD.element_size(), limit=shared_bytes(q_RQD.device),
    )  # fmt: skip
    _latent_kernel[(work.programs, -(-num_heads // heads))](
        q_RQD, values, turned, scales, rows.page_table, rows.visible_len, work.pieces, work.span_start,
        work.span_start if work.part_start is None else work.part_start, partials.out, partials.lse,
        q_RQD.stride(0), values.stride(0), turned.stride(0), scales.stride(0), values.stride(3), turned.stride(3),
        rows.page_table.stride(0), scale * LOG2_E, num_heads,
        TILE_HEADS=heads, BLOCK_SIZE=pages.shape[3], M=m, N=turn,
        D=head_dim, VALUE=value_dim, VALUE_PAD=value_pad, TURNED_PAD=turned_pad, IN_8_BITS=in_8_bits,
        SPLIT=work.part_start is not None, num_warps=8 if m > 16 else 4, num_stages=stages, **early(pdl),
    )  # fmt: skip
