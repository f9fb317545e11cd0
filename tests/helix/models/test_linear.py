from functools import partial

import pytest
import torch

from helix.models import linear as models_linear
from helix.models.linear import gated_linear, linear, split_linear

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [1, 2, 8, 17, 64, 65])
@pytest.mark.parametrize(("columns", "depth"), [(2304, 4096), (100, 256), (48, 3424), (16, 64)])
def test_projections_equal_float64(dtype, rows, columns, depth):
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, depth, generator=generator).to(dtype)
    w = (torch.randn(2 * columns, depth, generator=generator) * depth**-0.5).to(dtype)
    bias = torch.randn(2 * columns, generator=generator).to(dtype)
    wide = x.double() @ w.double().T
    gate, up = wide.chunk(2, -1)
    x, w, bias = x.to(DEVICE), w.to(DEVICE), bias.to(DEVICE)
    plain = torch.nn.functional.linear(x, w)
    plain_gate, plain_up = plain.chunk(2, -1)
    gelu = partial(torch.nn.functional.gelu, approximate="tanh")
    triples = [  # ours, the library's in the same dtype, exact
        (linear(x, w), plain, wide),
        (split_linear(x, w, bias).sum(0), torch.nn.functional.linear(x, w, bias), wide + bias.cpu().double()),
        (gated_linear(x, w), torch.nn.functional.silu(plain_gate) * plain_up, torch.nn.functional.silu(gate) * up),
        (gated_linear(x, w, gelu=True), gelu(plain_gate) * plain_up, gelu(gate) * up),
    ]
    for ours, theirs, exact in triples:
        error, allowed = ((each.cpu().double() - exact).abs().max() for each in (ours, theirs))
        assert error <= 2 * allowed + 1e-5


@pytest.mark.parametrize(("bm", "at_once", "stages"), [(8, 132.0, 5), (8, 132.5, 3), (64, 500.0, 4), (8, 0, 5)])
def test_gates_share_a_processor_where_more_of_them_have_work(monkeypatch, bm, at_once, stages):
    monkeypatch.setattr(models_linear, "_processors", lambda device: 132)
    assert models_linear._wide_stages_of(128, bm, at_once, torch.device("cpu")) == stages


@pytest.mark.gpu
@pytest.mark.parametrize(("columns", "depth"), [(4608, 4096), (27392, 1024), (4096, 4096), (128, 2048)])
def test_no_bit_of_a_row_depends_on_how_many_rows_there_are(columns, depth):
    x = torch.randn(64, depth, device="cuda", dtype=torch.bfloat16)
    w = torch.randn(columns, depth, device="cuda", dtype=torch.bfloat16)
    for product in (linear, gated_linear, lambda x, w: split_linear(x, w).transpose(0, 1)):
        every = product(x, w)
        for rows in (1, 8, 33):
            assert torch.equal(product(x[:rows], w), every[:rows])
