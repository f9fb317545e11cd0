"""Partial attention of few rows for Hopper: K and V stream through shared memory, asked for before the queries exist.

Decode and verification read a whole shard for a handful of rows, so all that counts is that memory never rests. What is
cached does not depend on the step, except for the tokens that it appends: a program asks for every tile that its stages
hold before it waits for the kernel that makes its queries (programmatic dependent launch), and for tiles that may hold
new tokens after.

Tokens are the tensor core's 64 rows; the query heads of one KV head, times the rows of a sequence, are its columns:
S^T = K q^T, O^T = V^T P^T. Splits as in ``split_kv``.
"""

from __future__ import annotations

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .rows import Rows

LOG2_E = 1.4426950408889634
TILE = 64  # tokens, of one page; a turn takes two
MAX_COLUMNS = 64
STAGE_BYTES = 196608
_ELEMENTS = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}


@gluon.jit
def _fetch(kv, tiles, bar, stage, token, last, row0, table, v_rows, page_rows, on, BLOCK_SIZE: gl.constexpr):
    """Ask for the two tiles of a turn that begins at ``token``; past the last token its own tile comes again."""
    TILE: gl.constexpr = kv.block_shape[0]
    for half in gl.static_range(2):
        at = gl.minimum(token + half * TILE, last)
        page = gl.load(table + at // BLOCK_SIZE, mask=on, other=0)
        row = page * page_rows + row0 + (at % BLOCK_SIZE) // TILE * TILE
        tma.async_copy_global_to_shared(kv, [row, 0], bar, tiles.index(stage * 4 + half), pred=on)
        tma.async_copy_global_to_shared(kv, [row + v_rows, 0], bar, tiles.index(stage * 4 + 2 + half), pred=on)


@gluon.jit
def keep_seen(tile, token, end, layout: gl.constexpr):
    """Zero the rows of a tile of V that stand past the end: 0 x what lies there might be NaN."""
    t = token + gl.arange(0, tile.shape[0], layout=gl.SliceLayout(1, layout))
    value = tile.load(layout)
    tile.store(gl.where((t < end)[:, None], value, gl.zeros_like(value)))


@gluon.jit
def _stream_kv_kernel(
    kv, q, page_table, row_seq, visible_len, query_start, out, lse,
    q_row_stride, table_stride, scale_log2, num_rows, num_heads, num_kv_heads,
    GROUP: gl.constexpr, BLOCK_SIZE: gl.constexpr, M: gl.constexpr, SPLITS: gl.constexpr,
    STAGES: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_launch_dependents()
    TILE: gl.constexpr = kv.block_shape[0]
    D: gl.constexpr = kv.block_shape[1]
    dtype: gl.constexpr = kv.dtype
    BYTES: gl.constexpr = 4 * TILE * D * dtype.primitive_bitwidth // 8
    run, kv_head, split = gl.program_id(0), gl.program_id(1), gl.program_id(2)
    # the step's sizes were uploaded before its first layer; rows of a run ascend, so the last one sees most
    first, stop = gl.load(query_start + run), gl.load(query_start + run + 1)
    if first >= stop:
        if PDL:
            gdc_wait()  # a kernel that ends without waiting would let the next one pass the one before
        return
    longest = gl.load(visible_len + stop - 1)
    settled = longest - (stop - first)  # tokens before it were cached by earlier steps: a row appends one at most
    share = gl.cdiv(gl.cdiv(longest, SPLITS), TILE) * TILE
    begin = split * share
    end = gl.minimum(begin + share, longest)
    count = gl.cdiv(gl.maximum(end - begin, 0), 2 * TILE)
    table = page_table + gl.load(row_seq + first).to(gl.int64) * table_stride
    page_rows = 2 * num_kv_heads * BLOCK_SIZE
    v_rows = num_kv_heads * BLOCK_SIZE
    row0 = kv_head * BLOCK_SIZE

    tiles_s = gl.allocate_shared_memory(dtype, [STAGES * 4, TILE, D], kv.layout)
    bars = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for s in gl.static_range(STAGES):
        mbarrier.init(bars.index(s), count=1)
    for s in gl.static_range(STAGES):
        at = begin + s * 2 * TILE
        mbarrier.expect(bars.index(s), BYTES, pred=s < count)
        early = (s < count) & (gl.minimum(at + 2 * TILE, end) <= settled)
        _fetch(kv, tiles_s, bars.index(s), s, at, end - 1, row0, table, v_rows, page_rows, early, BLOCK_SIZE)
    if PDL:
        gdc_wait()
    for s in gl.static_range(STAGES):
        at = begin + s * 2 * TILE
        late = (s < count) & (gl.minimum(at + 2 * TILE, end) > settled)
        _fetch(kv, tiles_s, bars.index(s), s, at, end - 1, row0, table, v_rows, page_rows, late, BLOCK_SIZE)

    lines: gl.constexpr = gl.BlockedLayout([1, 8], [32 * 8 // D, D // 8], [4, 1], [1, 0])
    wgmma: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, M, 16])
    columns: gl.constexpr = gl.SliceLayout(0, wgmma)
    q_s = gl.allocate_shared_memory(dtype, [M, D], kv.layout)
    c = gl.arange(0, M, layout=gl.SliceLayout(1, lines))
    d = gl.arange(0, D, layout=gl.SliceLayout(0, lines))
    q_row = (first + c // GROUP).to(gl.int64)
    from_q = q + (q_row * q_row_stride + (kv_head * GROUP + c % GROUP) * D)[:, None] + d[None, :]
    q_s.store(gl.load(from_q, mask=(q_row < stop)[:, None], other=0.0))
    fence_async_shared()
    q_t = q_s.permute((1, 0))

    m = gl.arange(0, M, layout=columns)
    row = (first + m // GROUP).to(gl.int64)
    real = row < stop
    limit = gl.minimum(gl.load(visible_len + row, mask=real, other=0), end)
    token = gl.arange(0, TILE, layout=gl.SliceLayout(1, wgmma))
    p_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([M, TILE], dtype)
    p_s = gl.allocate_shared_memory(dtype, [2, M, TILE], p_layout)
    top = gl.full([M], float("-inf"), gl.float32, layout=columns)
    total = gl.zeros([TILE, M], gl.float32, layout=wgmma)
    acc = gl.zeros([D, M], gl.float32, layout=wgmma)
    nothing = gl.zeros([TILE, M], gl.float32, layout=wgmma)
    for i in range(count):
        stage = i % STAGES
        at = begin + i * 2 * TILE
        k0, k1 = tiles_s.index(stage * 4), tiles_s.index(stage * 4 + 1)
        v0, v1 = tiles_s.index(stage * 4 + 2), tiles_s.index(stage * 4 + 3)
        mbarrier.wait(bars.index(stage), (i // STAGES) & 1)
        s0 = warpgroup_mma(k0, q_t, nothing, use_acc=False, is_async=True)
        s1 = warpgroup_mma(k1, q_t, nothing, use_acc=False, is_async=True)
        s0, s1 = warpgroup_mma_wait(num_outstanding=0, deps=[s0, s1])
        s0 = gl.where((at + token)[:, None] < limit[None, :], s0 * scale_log2, float("-inf"))
        s1 = gl.where((at + TILE + token)[:, None] < limit[None, :], s1 * scale_log2, float("-inf"))
        new_top = gl.maximum(top, gl.max(gl.maximum(s0, s1), 0))
        shift = gl.where(new_top == float("-inf"), 0.0, new_top)
        decay = gl.exp2(top - shift)
        p0, p1 = gl.exp2(s0 - shift[None, :]), gl.exp2(s1 - shift[None, :])
        total = total * decay[None, :] + (p0 + p1)
        p_s.index(0).permute((1, 0)).store(p0.to(dtype))
        p_s.index(1).permute((1, 0)).store(p1.to(dtype))
        if at + 2 * TILE > end:
            keep_seen(v0, at, end, lines)
            keep_seen(v1, at + TILE, end, lines)
        fence_async_shared()
        acc = acc * decay[None, :]
        acc = warpgroup_mma(v0.permute((1, 0)), p_s.index(0).permute((1, 0)), acc, is_async=True)
        acc = warpgroup_mma(v1.permute((1, 0)), p_s.index(1).permute((1, 0)), acc, is_async=True)
        acc = warpgroup_mma_wait(num_outstanding=0, deps=[acc])
        top = new_top
        then = i + STAGES
        mbarrier.expect(bars.index(stage), BYTES, pred=then < count)
        _fetch(kv, tiles_s, bars.index(stage), stage, begin + then * 2 * TILE, end - 1, row0, table, v_rows, page_rows,
               then < count, BLOCK_SIZE)  # fmt: skip

    sums = gl.sum(total, 0)
    empty = sums == 0.0
    sums = gl.where(empty, 1.0, sums)
    cell = (split * num_rows + row) * num_heads + kv_head * GROUP + m % GROUP
    natural = gl.where(empty, float("-inf"), (top + gl.log2(sums)) / 1.4426950408889634)
    gl.store(lse + cell, natural, mask=real)
    if (SPLITS == 1) | (count > 0):  # whoever merges splits does not read those with lse = -inf
        o_d = gl.arange(0, D, layout=gl.SliceLayout(1, wgmma))
        value = acc / sums[None, :]
        to = out + cell[None, :] * D + o_d[:, None]
        gl.store(to, value.to(out.dtype.element_ty), mask=real[None, :])


def fits(pages: torch.Tensor) -> bool:
    """Return whether these pages can be read in tiles by the tensor memory engine of a Hopper GPU."""
    block_size, head_dim = pages.shape[3:]
    return (
        pages.is_cuda
        and torch.cuda.get_device_capability(pages.device)[0] == 9
        and pages.dtype in _ELEMENTS
        and pages.is_contiguous()
        and block_size % TILE == 0
        and head_dim in (64, 128, 256)
    )


def page_tiles(pages: torch.Tensor) -> TensorDescriptor:
    """Describe pages [P, 2, K, block_size, D] as rows of D, in tiles of TILE tokens."""
    flat = pages.view(-1, pages.shape[-1])
    block = [TILE, pages.shape[-1]]
    layout = gl.NVMMASharedLayout.get_default_for(block, _ELEMENTS[pages.dtype])
    return TensorDescriptor(flat, list(flat.shape), list(flat.stride()), block, layout)


def supports(pages: torch.Tensor, columns: int) -> bool:
    """Return whether the kernel can read these pages, for so many rows x heads that read one KV head together."""
    return fits(pages) and columns <= MAX_COLUMNS


def stream_attention(
    q_RQD: torch.Tensor, pages: torch.Tensor, rows: Rows, scale: float, *, processors: int, pdl: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend the few rows of each sequence to the local shard; see ``PartialAttention``.

    The number of splits depends on sizes alone, so that a captured launch is right for every length.
    """
    num_rows, num_heads, head_dim = q_RQD.shape
    num_kv_heads, block_size = pages.shape[2], pages.shape[3]
    group, runs = num_heads // num_kv_heads, rows.query_start.shape[0] - 1
    splits = max(1, min(processors // (runs * num_kv_heads), -(-rows.max_visible_len // TILE)))
    dtype = torch.float32 if splits > 1 else q_RQD.dtype
    part = torch.empty((splits, num_rows, num_heads, head_dim), dtype=dtype, device=q_RQD.device)
    lse = torch.empty((splits, num_rows, num_heads), dtype=torch.float32, device=q_RQD.device)
    _stream_kv_kernel[(runs, num_kv_heads, splits)](
        page_tiles(pages), q_RQD, rows.page_table, rows.row_seq, rows.visible_len, rows.query_start, part, lse,
        q_RQD.stride(0), rows.page_table.stride(0), scale * LOG2_E, num_rows, num_heads, num_kv_heads,
        GROUP=group, BLOCK_SIZE=block_size, M=max(8, triton.next_power_of_2(rows.max_rows * group)),
        SPLITS=splits, STAGES=STAGE_BYTES // (4 * TILE * head_dim * pages.element_size()), PDL=pdl,
        num_warps=4, **({"launch_pdl": True} if pdl else {}),
    )  # fmt: skip
    return part, lse
