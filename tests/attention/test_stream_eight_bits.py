"""The streaming kernel over pages of 8 bits: it runs on Hopper alone; elsewhere ``split_kv`` does the same."""

import pytest
import torch

from attention import stream_eight_bits
from attention.backends import select_backend
from attention.reference import partial_attention
from tests.attention.cases import attend, in_8_bits, make_case, partials_of, shard, widened

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def hopper():
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("needs a Hopper GPU")


@pytest.mark.parametrize(
    ("block_size", "dtype"), [(16, torch.bfloat16), (64, torch.bfloat16), (128, torch.float16)], ids=str
)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "num_rows", "lengths"),
    [
        (16, 1, 1, [1, 63, 64, 65, 127, 128, 129, 700, 5000]),
        (4, 4, 1, [9_000, 1, 129]),
        (14, 2, 1, [700, 1291, 300]),
        (32, 2, 4, [5, 4, 256, 3000, 9_000]),
        (16, 2, 3, [12_000, 3, 129, 700, 64, 9_000, 65, 128, 3_333, 4]),
    ],
)
def test_it_equals_the_reference_over_what_8_bits_mean(block_size, dtype, heads, kv_heads, num_rows, lengths):
    case = make_case(
        heads, lengths=lengths, num_rows=[num_rows] * len(lengths), heads=heads, kv_heads=kv_heads, head_dim=128,
        block_size=block_size, kvp=2 if num_rows == 3 else 1, dtype=dtype,
    )  # fmt: skip
    for rank in range(case.place.kvp):
        plain, rows = shard(case, rank, "cuda")
        size = 2.0 ** torch.randint(-40, 4, plain.shape[:-1], device="cuda").clamp(min=-1).unsqueeze(-1)
        tiny = torch.rand(plain.shape[:-1], device="cuda").unsqueeze(-1)
        plain *= torch.where(tiny < 0.02, 0.0, torch.where(tiny < 0.2, 2.0**-45, size))  # scales far apart
        pages, q = in_8_bits(plain), case.q.cuda()
        assert stream_eight_bits.supports(pages, num_rows * heads // kv_heads)
        kernel = select_backend("triton", torch.device("cuda"))
        out, lse = attend(kernel, q, pages, rows, 0.05)
        exact, exact_lse = partial_attention(q.float(), pages, rows, 0.05)
        rounded, _ = partial_attention(q, widened(pages).to(dtype), rows, 0.05)
        ours, theirs = (out.float() - exact).abs().max(), (rounded.float() - exact).abs().max()
        assert ours <= 2 * theirs + 2e-2
        torch.testing.assert_close(lse, exact_lse, rtol=1e-4, atol=1e-3)
        first = partials_of(kernel, q, pages, rows, 0.05)
        for _ in range(10):
            again = partials_of(kernel, q, pages, rows, 0.05)
            assert torch.equal(again.lse, first.lse) and torch.equal(again.out, first.out)
