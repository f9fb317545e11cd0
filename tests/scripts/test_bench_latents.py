"""The benchmark of attention over latents, as far as a CPU goes: its rows are a step's, and bad shapes are refused."""

import pytest
import torch

from attention.reference import partial_attention
from scripts.bench_latents import BenchLatentsConfig, make_rows


def test_its_rows_are_the_last_of_each_sequence():
    config = BenchLatentsConfig(shapes=[[2, 32, 4]], rows=3, block_size=16)
    rows = make_rows(config, 2, 32, torch.device("cpu"))
    assert rows.visible_len.tolist() == [30, 31, 32] * 2 and rows.query_start.tolist() == [0, 3, 6]
    assert sorted(rows.page_table.flatten().tolist()) == [0, 1, 2, 3]
    out, lse = partial_attention(torch.randn(6, 4, 24), torch.randn(4, 1, 1, 16, 24), rows, 0.2, value_dim=16)
    assert out.shape == (6, 4, 16) and lse.isfinite().all()


def test_tokens_that_fill_no_page_are_refused():
    with pytest.raises(ValueError, match=r"\[1, 100, 16\] must be .* block_size = 64"):
        BenchLatentsConfig(shapes=[[1, 100, 16]])
