"""One shard's inputs in the forms that each library wants, and each library's attention over them.

All of them read the same bytes: pages [P, 2, K, block_size, D] are FlashInfer's HND layout as they are, and the same
memory seen as [2, B, K, S, D] is SDPA's dense cache (of other tokens, which does not matter to the clock).
``agree_on`` compares the results where it does matter.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

from attention.pages import PageLayout, Pages, QuantizedPages, quantize
from attention.rows import Rows
from helix.config import check_at_least
from parallel.launch import minimum

Attend = Callable[[], Any]
WORKSPACE_BYTES = 256 << 20
PREFILL_WORKSPACE_BYTES = 3 << 30  # inside a graph it keeps partials of all rows
CUDA_CORE_GROUPS = (1, 2, 3, 4, 6, 8)
"""The GQA groups that FlashInfer's decode kernel without tensor cores is compiled for."""
MAX_COPIES = 1024
PAGES_AT_ONCE = 1024  # are quantised


@dataclass(frozen=True)
class Shape:
    """The sizes of one step on one shard: sequences, their local tokens, query and KV heads, elements a head, tokens a
    page, and rows of each sequence: its last ones.
    """

    batch: int
    tokens: int
    heads: int
    kv_heads: int
    head_dim: int
    block_size: int
    rows: int = 1

    def __post_init__(self) -> None:
        for name in ("batch", "tokens", "heads", "kv_heads", "head_dim", "block_size", "rows"):
            check_at_least(name, getattr(self, name), 1)
        if self.heads % self.kv_heads:
            raise ValueError(f"heads = {self.heads} of a shape must be a multiple of its kv_heads = {self.kv_heads}")
        if self.tokens % self.block_size:
            raise ValueError(f"tokens = {self.tokens} of a shape must be a multiple of block_size = {self.block_size}")
        if self.rows > self.tokens:
            raise ValueError(f"rows = {self.rows} must be at most the tokens of a shape = {self.tokens}")

    def kv_bytes(self, dtype: torch.dtype) -> int:
        """Return the bytes of K and V."""
        return 2 * self.batch * self.tokens * self.kv_heads * self.head_dim * dtype.itemsize

    def flops(self) -> int:
        """Return the floating-point operations of both products, for the tokens that each row sees."""
        seen = self.rows * self.tokens - self.rows * (self.rows - 1) // 2
        return 4 * self.batch * self.heads * self.head_dim * seen

    def num_copies(self, dtype: torch.dtype, total_bytes: int) -> int:
        """Return how many copies of K and V make up ``total_bytes``: 2 to MAX_COPIES."""
        return max(2, min(MAX_COPIES, -(-total_bytes // self.kv_bytes(dtype))))


@dataclass(frozen=True)
class Case:
    """Random inputs of a shape: q [R, Q, D], pages [C, P, 2, K, block_size, D] in C copies, and a step's R rows.

    ``in_8_bits`` are the same copies quantised, where a run's cache is; ``pages`` are what these mean then.
    """

    shape: Shape
    q: torch.Tensor
    pages: torch.Tensor
    rows: Rows
    in_8_bits: Sequence[QuantizedPages] = ()

    def held(self, copy: int) -> Pages:
        """Return the pages of one copy as the cache of a run holds them."""
        return self.in_8_bits[copy] if self.in_8_bits else self.pages[copy]

    @property
    def scale(self) -> float:
        """What scores are multiplied by."""
        return self.shape.head_dim**-0.5

    def dense(self, copy: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the memory of one copy as dense K and V [B, K, S, D]."""
        s = self.shape
        k, v = self.pages[copy].view(2, s.batch, s.kv_heads, s.tokens, s.head_dim)
        return k, v

    def gathered(self, copy: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return K and V [B, K, S, D] of the tokens that one copy's pages hold."""
        s = self.shape
        pages = self.pages[copy][self.rows.page_table.long()]  # [B, P / B, 2, K, block_size, D]
        k, v = (pages[:, :, i].transpose(1, 2).reshape(s.batch, s.kv_heads, s.tokens, s.head_dim) for i in (0, 1))
        return k, v


def make_case(shape: Shape, copies: int, dtype: torch.dtype, device: torch.device) -> Case:
    """Return random inputs; the pages of the sequences are shuffled, alike in all copies."""
    pages_per_seq = shape.tokens // shape.block_size
    num_pages = shape.batch * pages_per_seq
    page_shape = (copies, num_pages, 2, shape.kv_heads, shape.block_size, shape.head_dim)
    table = torch.randperm(num_pages, device=device, dtype=torch.int32).view(shape.batch, pages_per_seq)
    index = torch.arange(shape.batch + 1, dtype=torch.int32, device=device)
    positions = torch.arange(shape.tokens - shape.rows, shape.tokens, device=device).repeat(shape.batch)
    rows = Rows(
        positions=positions,
        row_seq=index[:-1].repeat_interleave(shape.rows),
        visible_len=(positions + 1).to(torch.int32),
        slot=torch.full_like(positions, -1),
        page_table=table,
        query_start=index * shape.rows,
    )
    q = torch.randn(shape.batch * shape.rows, shape.heads, shape.head_dim, dtype=dtype, device=device)
    return Case(shape, q, torch.empty(page_shape, dtype=dtype, device=device).normal_(), rows)


def quantized(case: Case) -> Case:
    """Return a case whose copies are in 8 bits as well; its ``pages`` become what these mean."""
    shape, made = case.shape, list[QuantizedPages]()
    layout = PageLayout(shape.kv_heads, shape.block_size, shape.head_dim, case.pages.dtype, in_8_bits=True)
    for pages in case.pages:
        pool = torch.empty(len(pages), layout.page_bytes, dtype=torch.uint8, device=pages.device)
        held = layout.pages_of(layout.views(pool))
        assert isinstance(held, QuantizedPages)
        for index in torch.arange(len(pages), device=pages.device).split(PAGES_AT_ONCE):
            held.values[index[0] : index[-1] + 1], held.scales[index[0] : index[-1] + 1] = quantize(pages[index])
            pages[index] = held.widen(index, torch.float32).to(pages.dtype)
        made.append(held)
    return replace(case, in_8_bits=made)


def mixed_rows(lengths: Sequence[int], block_size: int, device: torch.device) -> Rows:
    """Return one decode row for each sequence of these lengths, whose pages are shuffled over all."""
    counts = [-(-length // block_size) for length in lengths]
    pages = torch.randperm(sum(counts), dtype=torch.int32)
    table = torch.zeros(len(lengths), max(counts), dtype=torch.int32)
    for row, its in zip(table, pages.split(counts), strict=True):
        row[: len(its)] = its
    index = torch.arange(len(lengths) + 1, dtype=torch.int32, device=device)
    visible = torch.tensor(lengths, device=device)
    slot = torch.full_like(visible, -1)
    return Rows(visible - 1, index[:-1], visible.to(torch.int32), slot, table.to(device), index)


def agree_on(case: Case, out_RQD: torch.Tensor) -> None:
    """Raise AssertionError unless a result over copy 0 is that of float32 attention, within the dtype's rounding.

    Of many rows, the first and the last few of each sequence are compared.
    """
    shape, (k, v) = case.shape, case.gathered(0)
    group = shape.heads // shape.kv_heads
    some = sorted({*range(min(4, shape.rows)), *range(max(0, shape.rows - 4), shape.rows)})
    q, out = (each.unflatten(0, (shape.batch, shape.rows))[:, some].float() for each in (case.q, out_RQD))
    unseen = torch.arange(shape.tokens, device=q.device) > case.rows.positions[some].view(-1, 1, 1)
    expected = torch.empty_like(out)
    for head in range(shape.kv_heads):  # a KV head at a time: float32 copies of all would not fit everywhere
        heads = slice(head * group, (head + 1) * group)
        scores = q[:, :, heads] @ k[:, head].float().mT.unsqueeze(1) * case.scale
        scores.masked_fill_(unseen, -torch.inf)
        expected[:, :, heads] = scores.softmax(-1) @ v[:, head].float().unsqueeze(1)
    torch.testing.assert_close(out, expected, rtol=0.02, atol=0.1 * float(expected.std()))


def sdpa(case: Case, copy: int) -> Attend:
    """Return a call of torch's attention over one dense copy: [B, Q, rows, D], without lse."""
    shape, (k, v) = case.shape, case.dense(copy)
    q = case.q.unflatten(0, (shape.batch, shape.rows)).transpose(1, 2)
    if shape.rows == 1:
        return partial(scaled_dot_product_attention, q, k, v, scale=case.scale, enable_gqa=True)
    # with a mask it takes as many KV heads as query heads; one that all share needs no copy
    k, v = (each.unsqueeze(2).expand(-1, -1, shape.heads // shape.kv_heads, -1, -1).flatten(1, 2) for each in (k, v))
    mask = causal_lower_right(shape.rows, shape.tokens)
    return partial(scaled_dot_product_attention, q, k, v, attn_mask=mask, scale=case.scale)


def flashinfer_runs(flashinfer: Any, case: Case) -> list[Callable[..., tuple[torch.Tensor, torch.Tensor]]]:
    """Return FlashInfer's ways, planned for CUDA graphs: out [R, Q, D] and lse [R, Q] (base 2) of a copy's pages.

    Decode with tensor cores, and without where the GQA group allows it; of several rows its two prefill kernels.
    """
    return _flashinfer_decode(flashinfer, case) if case.shape.rows == 1 else _flashinfer_prefill(flashinfer, case)


def _flashinfer_prefill(flashinfer: Any, case: Case) -> list[Callable[..., tuple[torch.Tensor, torch.Tensor]]]:
    shape, table, device = case.shape, case.rows.page_table, case.q.device
    last_page_len = torch.full((shape.batch,), shape.block_size, dtype=torch.int32, device=device)
    indptr = case.rows.query_start // shape.rows * table.shape[1]
    runs = []
    for backend in ("fa2", "fa3"):
        wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(
            torch.zeros(PREFILL_WORKSPACE_BYTES, dtype=torch.uint8, device=device),
            "HND",
            use_cuda_graph=True,
            qo_indptr_buf=torch.empty_like(indptr),
            paged_kv_indptr_buf=torch.empty_like(indptr),
            paged_kv_indices_buf=torch.empty(table.numel(), dtype=torch.int32, device=device),
            paged_kv_last_page_len_buf=torch.empty_like(last_page_len),
            backend=backend,
        )
        wrapper.plan(
            case.rows.query_start,
            indptr,
            table.flatten(),
            last_page_len,
            shape.heads,
            shape.kv_heads,
            shape.head_dim,
            shape.block_size,
            causal=True,
            sm_scale=case.scale,
            q_data_type=case.q.dtype,
            kv_data_type=case.q.dtype,
        )
        runs.append(partial(wrapper.run, case.q, return_lse=True))
    return runs


def _flashinfer_decode(flashinfer: Any, case: Case) -> list[Callable[..., tuple[torch.Tensor, torch.Tensor]]]:
    shape, table, device = case.shape, case.rows.page_table, case.q.device
    last_page_len = torch.full((shape.batch,), shape.block_size, dtype=torch.int32, device=device)
    indptr = case.rows.query_start * table.shape[1]
    runs = []
    for tensor_cores in (True, False):
        if not tensor_cores and shape.heads // shape.kv_heads not in CUDA_CORE_GROUPS:
            continue
        wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
            torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=device),
            "HND",
            use_cuda_graph=True,
            use_tensor_cores=tensor_cores,
            paged_kv_indptr_buffer=torch.empty_like(indptr),
            paged_kv_indices_buffer=torch.empty(table.numel(), dtype=torch.int32, device=device),
            paged_kv_last_page_len_buffer=torch.empty_like(last_page_len),
        )
        wrapper.plan(
            indptr,
            table.flatten(),
            last_page_len,
            shape.heads,
            shape.kv_heads,
            shape.head_dim,
            shape.block_size,
            q_data_type=case.q.dtype,
            kv_data_type=case.q.dtype,
            sm_scale=case.scale,
        )
        runs.append(partial(wrapper.run, case.q, return_lse=True))
    return runs


def load_flashinfer(head_dim: int, rows: int, dtype: torch.dtype, device: torch.device) -> tuple[Any, str]:
    """Return FlashInfer, or None and why it cannot run here; it compiles its kernels on the way, which takes minutes.

    Collective over the world: all ranks have it, or none.
    """
    module, reason = None, "it is missing on another rank"
    try:
        module = importlib.import_module("flashinfer")
        case = make_case(Shape(1, 64, 8, 1, head_dim, 64, min(rows, 64)), 1, dtype, device)
        for run in flashinfer_runs(module, case):
            agree_on(case, run(case.pages[0])[0])
    except Exception as error:  # whatever it is, it is told, and must not stop the other columns
        module, reason = None, f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return (module, "") if minimum(int(module is not None)) == 1 else (None, reason)
