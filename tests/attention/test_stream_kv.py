"""The streaming kernel: it runs on Hopper alone; elsewhere ``split_kv`` serves the same interface."""

from dataclasses import replace

import pytest
import torch

from attention import stream_kv
from attention.merge import merge_splits
from attention.partial import select_backend
from attention.reference import partial_attention
from tests.attention.cases import make_case, shard

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def hopper():
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("needs a Hopper GPU")


def compare(case, rank, scale, *, longest=None):
    pages, rows = shard(case, rank, "cuda")
    rows = replace(rows, max_visible_len=longest or rows.max_visible_len)
    group = case.q.shape[1] // pages.shape[2]
    assert stream_kv.supports(pages, rows.max_rows * group)
    q = case.q.cuda()
    kernel = select_backend("triton", torch.device("cuda"))
    out, lse = merge_splits(*kernel(q, pages, rows, scale), q.dtype)
    plain, _ = partial_attention(q, pages, rows, scale)
    exact, exact_lse = partial_attention(q.float(), pages.float(), rows, scale)
    ours, theirs = (out.float() - exact[0]).abs().max(), (plain[0].float() - exact[0]).abs().max()
    assert ours <= 2 * theirs + 4e-3
    torch.testing.assert_close(lse, exact_lse[0], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("block_size", [16, 64])
@pytest.mark.parametrize(("heads", "kv_heads", "num_rows"), [(16, 1, 1), (4, 4, 1), (14, 2, 1), (8, 2, 5), (16, 1, 4)])
def test_it_equals_the_reference(dtype, head_dim, block_size, heads, kv_heads, num_rows):
    lengths = [1 + num_rows, 64, 65, 128, 700, 1291]
    case = make_case(
        heads, lengths=lengths, num_rows=[num_rows] * 6, heads=heads, kv_heads=kv_heads, head_dim=head_dim,
        block_size=block_size, kvp=2, dtype=dtype,
    )  # fmt: skip
    for rank in range(2):
        compare(case, rank, head_dim**-0.5)
        compare(case, rank, head_dim**-0.5, longest=10**6)


@pytest.mark.parametrize("block_size", [16, 32, 64, 128, 256])
@pytest.mark.parametrize("length", [1, 63, 64, 65, 127, 128, 129, 255, 257, 5000, 40_000])
def test_every_length_and_page_size(block_size, length):
    case = make_case(
        length, lengths=[length], num_rows=[1], heads=8, kv_heads=2, head_dim=128, block_size=block_size, kvp=1,
        dtype=torch.bfloat16,
    )  # fmt: skip
    compare(case, 0, 0.1)
    compare(case, 0, 4.0)  # scores far apart


def test_many_sequences_share_few_splits():
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 900, (48,), generator=generator).tolist()
    case = make_case(
        1, lengths=lengths, num_rows=[1] * 48, heads=16, kv_heads=2, head_dim=128, block_size=64, kvp=1,
        dtype=torch.bfloat16,
    )  # fmt: skip
    compare(case, 0, 0.1)


def test_a_rerun_equals_itself_bit_for_bit():
    case = make_case(
        2, lengths=[3000], num_rows=[1], heads=16, kv_heads=1, head_dim=128, block_size=64, kvp=1, dtype=torch.bfloat16
    )
    pages, rows = shard(case, 0, "cuda")
    kernel = select_backend("triton", torch.device("cuda"))
    first, others = (
        kernel(case.q.cuda(), pages, rows, 0.1),
        [kernel(case.q.cuda(), pages, rows, 0.1) for _ in range(20)],
    )
    seen = first[1] > -torch.inf  # what a split that saw nothing leaves in memory is nobody's
    for out, lse in others:
        assert torch.equal(lse, first[1]) and torch.equal(out[seen], first[0][seen])
