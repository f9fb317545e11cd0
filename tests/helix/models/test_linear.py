import pytest
import torch

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
    tolerance = 1e-4 if dtype == torch.float32 else 5e-2
    pairs = [
        (linear(x, w), wide),
        (split_linear(x, w, bias).sum(0), wide + bias.cpu().double()),
        (gated_linear(x, w), torch.nn.functional.silu(gate) * up),
    ]
    for ours, exact in pairs:
        torch.testing.assert_close(ours.cpu().double(), exact, rtol=tolerance, atol=tolerance)
