"""Split-KV partial attention in Triton: decode, verification and prefill rows over a paged shard.

A program takes a tile of neighbouring rows of one sequence with all query heads of one KV head (the GQA group is packed
into the tile, so each K and V is read once), and one of ``splits`` ranges of the tile's tokens. With one split it
writes the result; otherwise a second launch merges the splits by log-sum-exp (Flash-Decoding, arXiv 2311.01282).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .rows import Rows

LOG2_E = 1.4426950408889634
MIN_SPLIT_TOKENS = 256
MAX_SPLITS = 128
TILE_ROWS_BY_HEADS = 128  # rows x heads of a tile when rows are many


def can_run(device: torch.device) -> bool:
    """Return whether Triton kernels run on this device: CUDA, or anywhere under Triton's interpreter."""
    return device.type == "cuda" or bool(triton.knobs.runtime.interpret)


@triton.jit
def _split_kernel(
    q, pages, page_table, row_seq, visible_len, query_start, out, lse,
    q_row_stride, page_stride, kv_stride, head_stride, table_stride, scale_log2, num_rows, num_heads, tiles,
    GROUP: tl.constexpr, TILE_ROWS: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
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
    share = tl.cdiv(tl.cdiv(longest, SPLITS), N) * N
    begin = split * share
    end = tl.minimum(begin + share, longest)
    table = page_table + tl.load(row_seq + first).to(tl.int64) * table_stride

    top = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    acc = tl.zeros([M, D_PAD], tl.float32)
    for at in range(begin, end, N):
        n = at + tl.arange(0, N)
        page = tl.load(table + n // BLOCK_SIZE, mask=n < end, other=0).to(tl.int64)
        base = pages + page * page_stride + kv_head * head_stride + (n % BLOCK_SIZE) * D
        k_nd = tl.load(base[:, None] + d[None, :], mask=(n < end)[:, None] & (d < D)[None, :], other=0.0)
        scores = tl.dot(q_md, tl.trans(k_nd), input_precision="ieee") * scale_log2
        scores = tl.where((n[None, :] < visible[:, None]) & (n < end)[None, :], scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)
        weight = tl.exp2(scores - shift[:, None])
        decay = tl.exp2(top - shift)
        total = total * decay + tl.sum(weight, 1)
        v_nd = tl.load(base[:, None] + kv_stride + d[None, :], mask=(n < end)[:, None] & (d < D)[None, :], other=0.0)
        acc = acc * decay[:, None] + tl.dot(weight.to(v_nd.dtype), v_nd, input_precision="ieee")
        top = new_top

    empty = total == 0.0
    acc = acc / tl.where(empty, 1.0, total)[:, None]
    natural = tl.where(empty, float("-inf"), (top + tl.log2(tl.where(empty, 1.0, total))) / 1.4426950408889634)
    cell = (split * num_rows + row) * num_heads + head
    tl.store(lse + cell, natural, mask=real)
    tl.store(out + cell[:, None] * D + d[None, :], acc.to(out.dtype.element_ty),
             mask=real[:, None] & (d < D)[None, :])  # fmt: skip


@triton.jit
def _merge_splits_kernel(
    part, part_lse, out, lse, num_rows, num_heads, D: tl.constexpr, D_PAD: tl.constexpr, SPLITS: tl.constexpr,
    SPLITS_PAD: tl.constexpr,
):  # fmt: skip
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    s = tl.arange(0, SPLITS_PAD)
    d = tl.arange(0, D_PAD)
    cell = (s * num_rows + row) * num_heads + head
    each = tl.load(part_lse + cell, mask=s < SPLITS, other=float("-inf"))
    top = tl.max(each, 0)
    shift = tl.where(top == float("-inf"), 0.0, top)
    weight = tl.exp(each - shift)
    total = tl.sum(weight, 0)
    o = tl.load(part + cell[:, None] * D + d[None, :], mask=(s < SPLITS)[:, None] & (d < D)[None, :], other=0.0)
    merged = tl.sum(o * weight[:, None], 0) / tl.where(total == 0.0, 1.0, total)
    here = row * num_heads + head
    tl.store(out + here * D + d, merged.to(out.dtype.element_ty), mask=d < D)
    tl.store(lse + here, tl.where(total == 0.0, float("-inf"), shift + tl.log(tl.where(total == 0.0, 1.0, total))))


class SplitKV:
    """The Triton back end; see ``PartialAttention`` for what a call takes and returns.

    Q and the pages share one dtype: float32 (products in full precision), float16 or bfloat16.
    """

    def __init__(self, device: torch.device) -> None:
        self._processors = (
            torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 8
        )

    def num_splits(self, programs: int, max_visible_len: int) -> int:
        """Return how many ranges to cut the tokens into, so that the launch fills the GPU about twice."""
        wanted = 2 * self._processors // max(programs, 1)
        return max(1, min(wanted, -(-max_visible_len // MIN_SPLIT_TOKENS), MAX_SPLITS))

    def __call__(
        self, q_RQD: torch.Tensor, pages: torch.Tensor, rows: Rows, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Attend rows to the local shard."""
        num_rows, num_heads, head_dim = q_RQD.shape
        num_kv_heads, block_size = pages.shape[2], pages.shape[3]
        group = num_heads // num_kv_heads
        tile_rows = min(rows.max_rows, max(1, TILE_ROWS_BY_HEADS // triton.next_power_of_2(group)))
        tiles = -(-rows.max_rows // tile_rows)
        runs = rows.query_start.shape[0] - 1
        splits = self.num_splits(runs * tiles * num_kv_heads, rows.max_visible_len)
        out = torch.empty((num_rows, num_heads, head_dim), dtype=q_RQD.dtype, device=q_RQD.device)
        lse = torch.empty((num_rows, num_heads), dtype=torch.float32, device=q_RQD.device)
        part, part_lse = out, lse
        if splits > 1:
            part = torch.empty((splits, *out.shape), dtype=torch.float32, device=out.device)
            part_lse = torch.empty((splits, *lse.shape), dtype=torch.float32, device=out.device)
        m = max(16, triton.next_power_of_2(tile_rows * group))
        wide = head_dim > 128 or q_RQD.dtype == torch.float32
        d_pad = triton.next_power_of_2(max(head_dim, 16))
        _split_kernel[(runs * tiles, num_kv_heads, splits)](
            q_RQD, pages, rows.page_table, rows.row_seq, rows.visible_len, rows.query_start, part, part_lse,
            q_RQD.stride(0), pages.stride(0), pages.stride(1), pages.stride(2), rows.page_table.stride(0),
            scale * LOG2_E, num_rows, num_heads, tiles,
            GROUP=group, TILE_ROWS=tile_rows, BLOCK_SIZE=block_size,
            M=m, N=32 if wide else 64, D=head_dim, D_PAD=d_pad, SPLITS=splits,
            num_warps=8 if m > 64 else 4, num_stages=2,
        )  # fmt: skip
        if splits > 1:
            _merge_splits_kernel[(num_rows, num_heads)](
                part, part_lse, out, lse, num_rows, num_heads,
                D=head_dim, D_PAD=d_pad, SPLITS=splits, SPLITS_PAD=triton.next_power_of_2(splits), num_warps=4,
            )  # fmt: skip
        return out, lse
