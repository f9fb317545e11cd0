"""The streaming kernels over latents of 8 bits: they run on Hopper alone; elsewhere ``latent_kv`` does the same."""

import pytest
import torch

from attention import stream_latent_eight_bits
from attention.backends import select_backend
from attention.reference import partial_attention
from tests.attention.cases import attend, in_8_bits, make_case, partials_of, shard, widened

pytestmark = pytest.mark.gpu
SCALE = 192**-0.5


@pytest.fixture(autouse=True)
def hopper():
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("needs a Hopper GPU")


@pytest.mark.parametrize(
    ("heads", "num_rows", "block_size", "lengths"),
    [
        (1, 1, 16, [1, 63, 64, 65, 127, 128, 129, 700, 5000]),
        (16, 1, 64, [20_000, 1, 129, 64, 300, 9_000]),
        (16, 4, 16, [5, 4, 256, 3000, 9_000]),
        (20, 3, 32, [700, 1291, 300]),
        (5, 3, 32, [700, 1291, 300]),
        (32, 1, 128, [9_000, 1, 129]),
        (128, 1, 64, [1, 65, 20_000, 700]),
        (96, 2, 256, [12_000, 3, 129]),
    ],
)
def test_it_equals_the_reference_over_what_8_bits_mean(heads, num_rows, block_size, lengths):
    case = make_case(
        heads, lengths=lengths, num_rows=[num_rows] * len(lengths), heads=heads, kv_heads=1, head_dim=576,
        value_dim=512, block_size=block_size, kvp=2 if num_rows == 3 else 1, dtype=torch.bfloat16,
    )  # fmt: skip
    for rank in range(case.place.kvp):
        plain, rows = shard(case, rank, "cuda")
        plain *= 1 + 9 * torch.rand(plain.shape[:-1], device="cuda").unsqueeze(-1) ** 8  # scales far apart
        pages, q = in_8_bits(plain, 512), case.q.cuda()
        assert stream_latent_eight_bits.supports(pages, 512)
        kernel = select_backend("triton", torch.device("cuda"))
        out, lse = attend(kernel, q, pages, rows, SCALE, 512)
        exact, exact_lse = partial_attention(q.float(), pages, rows, SCALE, value_dim=512)
        rounded, _ = partial_attention(q, widened(pages).bfloat16(), rows, SCALE, value_dim=512)
        ours, theirs = (out.float() - exact).abs().max(), (rounded.float() - exact).abs().max()
        assert ours <= 2 * theirs + 2e-2
        torch.testing.assert_close(lse, exact_lse, rtol=1e-4, atol=1e-3)
        first = partials_of(kernel, q, pages, rows, SCALE, 512)
        for _ in range(10):
            again = partials_of(kernel, q, pages, rows, SCALE, 512)
            assert torch.equal(again.lse, first.lse) and torch.equal(again.out, first.out)
