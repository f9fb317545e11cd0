"""Split-KV partial attention in Triton, for any GPU: decode, verification and prefill rows over a paged shard.

A program takes pieces of the step's work list (``work``): a tile of neighbouring rows of one sequence with all query
heads of one KV head (the GQA group is packed into the tile, so each K and V is read once), and a range of the tile's
tokens (Flash-Decoding, arXiv 2311.01282).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from parallel.device import early

from .eight_bits import as_float, scaled
from .online_softmax import LOG2_E, finish, fold
from .pages import Pages, QuantizedPages, planes_of
from .partial import Partials, Workspace
from .rows import Rows, Work
from .shared_memory import fit_turn, shared_bytes
from .work import PIECE_FIELDS, Cutting

UNIT = 128  # tokens: the longest turn, so that one which begins a piece begins a page or stands in one
FEW_COLUMNS = 32  # rows x heads up to which a step reads more than it multiplies
COLUMNS = 128  # rows x heads of a tile where rows are many
PIECE = tl.constexpr(len(PIECE_FIELDS))


@triton.jit
def _page_of(table, first, token, end, BLOCK_SIZE: tl.constexpr, N: tl.constexpr):
    """Return the pages of neighbouring tokens from ``first`` on, one for all where they share it; 0 past the end."""
    if BLOCK_SIZE % N == 0:
        return tl.load(table + first // BLOCK_SIZE, mask=first < end, other=0)
    else:
        return tl.load(table + token // BLOCK_SIZE, mask=token < end, other=0)


@triton.jit
def _split_kernel(
    q, k, v, turned, scales, page_table, visible_len, visible_from, pieces, span_start, part_start, out, lse,
    q_row_stride, k_page_stride, k_head_stride, k_stride, v_page_stride, v_head_stride, v_stride, turned_stride,
    scale_stride, table_stride, scale_log2, num_heads,
    GROUP: tl.constexpr, BLOCK_SIZE: tl.constexpr, M: tl.constexpr, N: tl.constexpr, D: tl.constexpr,
    D_PAD: tl.constexpr, W: tl.constexpr, W_PAD: tl.constexpr, T: tl.constexpr, T_PAD: tl.constexpr,
    IN_8_BITS: tl.constexpr, WINDOW: tl.constexpr, SPLIT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    kv_head = tl.program_id(1)
    m = tl.arange(0, M)
    d, w, t = tl.arange(0, D_PAD), tl.arange(0, W_PAD), tl.arange(0, T_PAD)
    offsets = tl.arange(0, N)
    for piece in range(tl.load(span_start + tl.program_id(0)), tl.load(span_start + tl.program_id(0) + 1)):
        its = pieces + piece * PIECE
        first, stop, begin, end = tl.load(its), tl.load(its + 1), tl.load(its + 2), tl.load(its + 3)
        row = (first + m // GROUP).to(tl.int64)
        head = kv_head * GROUP + m % GROUP
        real = row < stop
        visible = tl.load(visible_len + row, mask=real, other=0)
        if WINDOW:
            least = tl.load(visible_from + row, mask=real, other=0)
        at_q = q + row[:, None] * q_row_stride + head[:, None] * (D + T)
        q_md = tl.load(at_q + d[None, :], mask=real[:, None] & (d < D)[None, :], other=0.0)
        if T:
            q_mt = tl.load(at_q + D + t[None, :], mask=real[:, None] & (t < T)[None, :], other=0.0)
        table = page_table + tl.load(its + 6).to(tl.int64) * table_stride
        top = tl.full([M], float("-inf"), tl.float32)
        total = tl.zeros([M], tl.float32)
        acc = tl.zeros([M, W_PAD], tl.float32)
        # the page of the next turn is asked for a turn early: an address that waits for a load would stall the pipeline
        page = _page_of(table, begin, begin + offsets, end, BLOCK_SIZE, N)
        for at in range(begin, end, N):
            n = at + offsets
            next_page = _page_of(table, at + N, n + N, end, BLOCK_SIZE, N)
            this_page, offset = page.to(tl.int64), n % BLOCK_SIZE
            page = next_page
            there = (n < end)[:, None]
            from_k = k + this_page * k_page_stride + kv_head * k_head_stride + offset * k_stride
            k_nd = tl.load(from_k[:, None] + d[None, :], mask=there & (d < D)[None, :], other=0.0)
            if IN_8_BITS:
                from_scales = scales + this_page * scale_stride + kv_head * BLOCK_SIZE + offset
                k_scale = tl.load(from_scales, mask=n < end, other=0.0)
                scores = (
                    tl.dot(q_md, tl.trans(as_float(k_nd).to(q_md.dtype)), input_precision="ieee") * k_scale[None, :]
                )
            else:
                scores = tl.dot(q_md, tl.trans(k_nd), input_precision="ieee")
            if T:
                from_t = turned + (this_page * BLOCK_SIZE + offset) * turned_stride
                k_nt = tl.load(from_t[:, None] + t[None, :], mask=there & (t < T)[None, :], other=0.0)
                scores = tl.dot(q_mt, tl.trans(k_nt), acc=scores, input_precision="ieee")
            scores = tl.where((n[None, :] < visible[:, None]) & (n < end)[None, :], scores * scale_log2, float("-inf"))
            if WINDOW:
                scores = tl.where(n[None, :] >= least[:, None], scores, float("-inf"))
            weight, decay, top, total = fold(scores, top, total)
            from_v = v + this_page * v_page_stride + kv_head * v_head_stride + offset * v_stride
            v_nw = tl.load(from_v[:, None] + w[None, :], mask=there & (w < W)[None, :], other=0.0)
            if IN_8_BITS:
                v_scale = tl.load(from_scales + tl.num_programs(1) * BLOCK_SIZE, mask=n < end, other=0.0)
                weight, v_nw = scaled(weight, as_float(v_nw), v_scale, q_md.dtype)
            acc = acc * decay[:, None] + tl.dot(weight.to(v_nw.dtype), v_nw, input_precision="ieee")

        acc, natural = finish(acc, top, total)
        cell = row
        if SPLIT:
            cell = (tl.load(part_start + row, mask=real, other=0) + tl.load(its + 4)).to(tl.int64)
        cell = cell * num_heads + head
        tl.store(lse + cell, natural, mask=real)
        tl.store(out + cell[:, None] * W + w[None, :], acc.to(out.dtype.element_ty),
                 mask=real[:, None] & (w < W)[None, :])  # fmt: skip


def _turn(columns: int, pages: Pages | Workspace, *, least: int, limit: int) -> tuple[int, int, int, int]:
    """Return M, N, warps and stages for tiles of so many rows x heads, of at least ``least``, that fit the limit."""
    head_dim, element_bytes = _head_dim(pages), (pages.k if isinstance(pages, Workspace) else pages).dtype.itemsize
    turn_rows = 3 if isinstance(pages, QuantizedPages) else 2  # widened ones beside bytes
    wide = head_dim > 128 or element_bytes > 2
    m = max(16, triton.next_power_of_2(columns))
    if m > FEW_COLUMNS or wide:
        n, warps, stages = 32 if wide else 64, 8 if m > 64 else 4, 2
    else:
        n, warps, stages = 128, 8, 3
    row_bytes = triton.next_power_of_2(max(head_dim, 16)) * element_bytes
    m, n, stages = fit_turn(
        m, n, stages, least_m=max(16, triton.next_power_of_2(least)), row_bytes=row_bytes,
        token_bytes=turn_rows * row_bytes, weight_bytes=element_bytes, limit=limit,
    )  # fmt: skip
    return m, n, warps, stages


def _head_dim(pages: Pages | Workspace) -> int:
    """Return about how many elements of a key and of a value a program holds, padding included, as one number."""
    if isinstance(pages, Workspace):
        widths = (pages.k.shape[2], pages.turned.shape[1], pages.v.shape[2])
        return sum(triton.next_power_of_2(max(each, 16)) for each in widths) // 2
    return pages.shape[4]


def cutting(pages: Pages | Workspace, group: int, max_rows: int, programs: int) -> Cutting:
    """Return how steps of runs of so many rows are cut, for ``group`` query heads a KV head."""
    persistent = max_rows * group <= FEW_COLUMNS
    tile_rows = max_rows if persistent else max(1, COLUMNS // triton.next_power_of_2(group))
    k = pages.k if isinstance(pages, Workspace) else pages
    limit = shared_bytes(k.device)
    m, *_ = _turn(tile_rows * group, pages, least=group, limit=limit)
    return Cutting("split_kv", max(1, min(tile_rows, m // group)), UNIT, programs, persistent)


def attend(
    q_RQD: torch.Tensor,
    pages: Pages | Workspace,
    rows: Rows,
    work: Work,
    partials: Partials,
    scale: float,
    *,
    pdl: bool,
) -> None:
    """Attend rows to the local shard; see ``PartialAttention``. Partials are written."""
    num_heads = q_RQD.shape[1]
    scales, in_8_bits = q_RQD, isinstance(pages, QuantizedPages)
    if isinstance(pages, Workspace):
        k, v, turned, block_size = pages.k, pages.v, pages.turned, pages.block_size
        k_strides, v_strides = ((block_size * each.stride(0), each.stride(1), each.stride(0)) for each in (k, v))
        (num_kv_heads, head_dim), turned_dim = k.shape[1:], turned.shape[1]
    else:
        values, scales, _ = planes_of(pages)
        k, v, turned, block_size = values[:, 0], values[:, 1], values, pages.shape[3]
        k_strides = v_strides = values.stride(0), values.stride(2), values.stride(3)
        num_kv_heads, head_dim, turned_dim = pages.shape[2], pages.shape[4], 0
    group, value_dim = num_heads // num_kv_heads, partials.out.shape[-1]
    columns = work.cutting.tile_rows * group
    m, n, warps, stages = _turn(columns, pages, least=columns, limit=shared_bytes(q_RQD.device))
    _split_kernel[(work.programs, num_kv_heads)](
        q_RQD, k, v, turned, scales, rows.page_table, rows.visible_len, rows.seen_from, work.pieces, work.span_start,
        work.span_start if work.part_start is None else work.part_start, partials.out, partials.lse,
        q_RQD.stride(0), *k_strides, *v_strides, turned.stride(0), scales.stride(0), rows.page_table.stride(0),
        scale * LOG2_E, num_heads,
        GROUP=group, BLOCK_SIZE=block_size, M=m, N=n, D=head_dim, D_PAD=triton.next_power_of_2(max(head_dim, 16)),
        W=value_dim, W_PAD=triton.next_power_of_2(max(value_dim, 16)), T=turned_dim,
        T_PAD=triton.next_power_of_2(max(turned_dim, 16)),
        IN_8_BITS=in_8_bits, WINDOW=rows.visible_from is not None, SPLIT=work.part_start is not None,
        num_warps=warps, num_stages=stages, **early(pdl),
    )  # fmt: skip
