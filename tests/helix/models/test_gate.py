import pytest
import torch
import torch.nn.functional as F

from helix.models.gate import silu_mul_kernel

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("units", [1, 96, 5000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_the_kernel_equals_torch(units, dtype):
    gate_up = (torch.randn(3, 2 * units, generator=torch.Generator().manual_seed(units)) * 4).to(dtype).to(DEVICE)
    gate, up = gate_up.chunk(2, -1)
    close = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-3, "atol": 2e-3}  # a unit apart
    torch.testing.assert_close(silu_mul_kernel(gate_up), F.silu(gate) * up, **close)
