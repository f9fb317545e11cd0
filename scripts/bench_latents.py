"""Time attention over latents of one shard, in 16 and in 8 bits: alone, and beside the kernel for any GPU.

    python -m scripts.bench_latents
    python -m scripts.bench_latents rows=4 shapes='[[8,32768,16]]'      verification: the last 4 tokens of a sequence

The floor is the bytes of the latents of 16 bits at the rate of a streaming read, or the products at ``peak_tflops``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from attention import latent_kv
from attention.backends import select_backend
from attention.merge import merge_parts
from attention.pages import PageLayout, Pages, QuantizedPages
from attention.partial import PartialAttention, Partials
from attention.rows import Rows
from attention.work import Cutting
from helix.config import check_at_least
from scripts import cli
from scripts.timing import graph_us, read_bytes_per_us, report, start_on_gpu

RANK, WIDTH = 512, 576
SCALE = 192**-0.5


@dataclass(kw_only=True, slots=True)
class BenchLatentsConfig:
    """What to measure.

    Attributes:
        shapes: [sequences, local tokens, query heads] of each case.
        rows: query rows of each sequence: its last tokens.
        block_size: tokens a page; lengths are multiples of it.
        rotated_bytes: latents are copied until they fill so much, so that none is still in the L2 cache.
        peak_tflops: of dense products in 16 bits.
        repeats: replays to take the median of.
    """

    shapes: list[list[int]] = field(
        default_factory=lambda: [
            [1, 8192, 16], [1, 131072, 16], [8, 32768, 16], [8, 131072, 16], [64, 4096, 16], [1, 131072, 32],
            [1, 131072, 64], [8, 32768, 64], [1, 131072, 128], [8, 32768, 128],
        ]
    )  # fmt: skip
    rows: int = 1
    block_size: int = 64
    rotated_bytes: int = 1 << 30
    peak_tflops: float = 989.0
    repeats: int = 20

    def __post_init__(self) -> None:
        check_at_least("rows", self.rows, 1)
        check_at_least("repeats", self.repeats, 2)
        for shape in self.shapes:
            if len(shape) != 3 or min(shape) < 1 or shape[1] % self.block_size:
                raise ValueError(
                    f"shapes: {shape} must be sequences, tokens (multiples of block_size = {self.block_size}) and heads"
                )


class AnyGpu:
    """The back end that takes the kernel for any GPU."""

    def __init__(self, backend: PartialAttention, processors: int) -> None:
        self._backend, self._processors = backend, processors

    def cutting(self, pages: Pages, num_heads: int, max_rows: int, *, value_dim: int | None = None) -> Cutting:
        """Cut as that kernel asks for."""
        return latent_kv.cutting(num_heads, max_rows, self._processors, wide=False)

    def __call__(
        self, q: torch.Tensor, pages: Pages, rows: Rows, scale: float, *, value_dim: int | None = None
    ) -> Partials:
        """Attend."""
        return self._backend(q, pages, rows, scale, value_dim=value_dim)


def make_rows(config: BenchLatentsConfig, sequences: int, tokens: int, device: torch.device) -> Rows:
    """Return the last rows of sequences whose pages are shuffled."""
    index = torch.arange(sequences + 1, dtype=torch.int32, device=device)
    positions = torch.arange(tokens - config.rows, tokens, device=device).repeat(sequences)
    num_pages = sequences * tokens // config.block_size
    return Rows(
        positions=positions,
        row_seq=index[:-1].repeat_interleave(config.rows),
        visible_len=(positions + 1).int(),
        slot=torch.full_like(positions, -1),
        page_table=torch.randperm(num_pages, device=device, dtype=torch.int32).view(sequences, -1),
        query_start=index * config.rows,
    )


def in_8_bits(pages: torch.Tensor) -> list[QuantizedPages]:
    """Return copies of pages, [copies, P, 1, 1, block_size, WIDTH], in 8 bits with scales of 1."""
    layout = PageLayout(1, pages.shape[4], WIDTH, pages.dtype, RANK, in_8_bits=True)
    pools = torch.empty((*pages.shape[:2], layout.page_bytes), dtype=torch.uint8, device=pages.device)
    values, turned, scales = layout.views(pools)
    scales.fill_(1.0)
    made = []
    for copy, (wide, *planes) in enumerate(zip(pages, values, turned, scales, strict=True)):
        values[copy].copy_(wide[..., :RANK])
        turned[copy].copy_(wide[..., RANK:])
        made.append(QuantizedPages(planes[0], planes[2], planes[1], pages.dtype))
    return made


def time_backends(
    config: BenchLatentsConfig, q: torch.Tensor, pages: Sequence[Pages], rows: Rows, copies: int
) -> tuple[float, float]:
    """Return the microseconds of the kernel that is chosen, and of that for any GPU; their results must agree."""
    backend, heads = select_backend("triton", q.device, pdl=True), q.shape[1]
    processors = torch.cuda.get_device_properties(q.device).multi_processor_count
    times, results = [], []
    for each in (backend, AnyGpu(backend, processors)):
        cutting = each.cutting(pages[0], heads, config.rows, value_dim=RANK)
        its_rows = rows.cut_for(cutting, config.block_size)
        calls = [partial(each, q, copy, its_rows, SCALE, value_dim=RANK) for copy in pages]
        results.append(merge_parts(calls[0](), q.dtype)[0])
        times.append(graph_us(calls, repeats=config.repeats, iterations=max(copies, 8))[0])
    torch.testing.assert_close(results[0], results[1], rtol=2e-2, atol=2e-3)
    return times[0], times[1]


def measure(config: BenchLatentsConfig, shape: list[int], bytes_per_us: float) -> list[Any]:
    """Return one row of the table."""
    (sequences, tokens, heads), device = shape, torch.device("cuda")
    num_bytes = sequences * tokens * WIDTH * 2
    copies = max(2, config.rotated_bytes // num_bytes)
    page_shape = (copies, sequences * tokens // config.block_size, 1, 1, config.block_size, WIDTH)
    pages = torch.empty(page_shape, dtype=torch.bfloat16, device=device).normal_()
    rows = make_rows(config, sequences, tokens, device)
    q = torch.randn(sequences * config.rows, heads, WIDTH, dtype=torch.bfloat16, device=device)
    ours, other = time_backends(config, q, list(pages), rows, copies)
    ours_in_8, other_in_8 = time_backends(config, q, in_8_bits(pages), rows, copies)
    flops = 2 * heads * config.rows * sequences * tokens * (WIDTH + RANK)
    floor = max(num_bytes / bytes_per_us, flops / config.peak_tflops / 1e6)
    return [
        sequences, tokens, heads, floor, ours, ours / floor, flops / ours / 1e6, ours_in_8, ours_in_8 / ours, other,
        other_in_8,
    ]  # fmt: skip


def run(config: BenchLatentsConfig) -> None:
    """Measure every shape on this GPU."""
    start_on_gpu()
    rate = read_bytes_per_us()
    columns = [
        "B",
        "S",
        "Q",
        "floor us",
        "ours us",
        "x floor",
        "TFLOP/s",
        "8 bits us",
        "8 / 16 bits",
        "any GPU us",
        "any GPU, 8 bits us",
    ]
    table = [measure(config, shape, rate) for shape in config.shapes]
    report("attention over latents", columns, table, rows_each=config.rows, read_bytes_per_us=rate)


if __name__ == "__main__":
    cli.main("bench_latents", BenchLatentsConfig, run)
