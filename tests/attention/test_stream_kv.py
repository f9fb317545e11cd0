"""The streaming kernel: it runs on Hopper alone; elsewhere ``split_kv`` serves the same interface."""

import pytest
import torch

from attention import stream_kv
from attention.append import rope_append
from attention.backends import select_backend
from attention.reference import partial_attention
from attention.rows import Rows
from tests.attention.cases import attend, make_case, partials_of, shard

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def hopper():
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("needs a Hopper GPU")


def compare(case, rank, scale):
    pages, rows = shard(case, rank, "cuda")
    columns = int(rows.query_start.diff().max()) * case.q.shape[1] // pages.shape[2]
    assert stream_kv.supports(pages, columns) or columns * pages.shape[4] == 64 * 256  # which the other kernel takes
    q = case.q.cuda()
    kernel = select_backend("triton", torch.device("cuda"))
    out, lse = attend(kernel, q, pages, rows, scale)
    plain, _ = partial_attention(q, pages, rows, scale)
    exact, exact_lse = partial_attention(q.float(), pages.float(), rows, scale)
    ours, theirs = (out.float() - exact).abs().max(), (plain.float() - exact).abs().max()
    assert ours <= 2 * theirs + 4e-3
    torch.testing.assert_close(lse, exact_lse, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("block_size", [16, 64])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize(("heads", "kv_heads", "num_rows"), [(16, 1, 1), (4, 4, 1), (14, 2, 1), (8, 2, 5), (16, 1, 4)])
def test_it_equals_the_reference(dtype, head_dim, block_size, heads, kv_heads, num_rows):
    lengths = [1 + num_rows, 64, 65, 128, 700, 1291]
    case = make_case(
        heads, lengths=lengths, num_rows=[num_rows] * 6, heads=heads, kv_heads=kv_heads, head_dim=head_dim,
        block_size=block_size, kvp=2, dtype=dtype,
    )  # fmt: skip
    for rank in range(2):
        compare(case, rank, head_dim**-0.5)


@pytest.mark.parametrize("block_size", [16, 32, 64, 128, 256])
@pytest.mark.parametrize("length", [1, 63, 64, 65, 127, 128, 129, 255, 257, 5000, 40_000])
def test_every_length_and_page_size(block_size, length):
    case = make_case(
        length, lengths=[length], num_rows=[1], heads=8, kv_heads=2, head_dim=128, block_size=block_size, kvp=1,
        dtype=torch.bfloat16,
    )  # fmt: skip
    compare(case, 0, 0.1)
    compare(case, 0, 4.0)  # scores far apart


@pytest.mark.parametrize("block_size", [16, 64, 256])
@pytest.mark.parametrize(("window", "num_rows", "head_dim"), [(1, 1, 128), (128, 1, 64), (130, 5, 64), (1024, 3, 256)])
def test_windows_hide_what_is_before_them(window, num_rows, head_dim, block_size):
    lengths = [num_rows, 127, 128, 129, 700, 1291, 9000]
    case = make_case(
        window, lengths=lengths, num_rows=[num_rows] * 7, heads=8, kv_heads=2, head_dim=head_dim,
        block_size=block_size, kvp=1, dtype=torch.bfloat16, window=window,
    )  # fmt: skip
    compare(case, 0, head_dim**-0.5)


def test_many_sequences_share_few_programs():
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
    first, *others = [partials_of(kernel, case.q.cuda(), pages, rows, 0.1) for _ in range(21)]
    assert first.part_start is not None
    for other in others:
        assert torch.equal(other.lse, first.lse) and torch.equal(other.out, first.out)


@pytest.mark.parametrize("num_rows", [1, 3])
def test_spans_go_over_the_ends_of_sequences_of_any_lengths(num_rows):
    """Programs take parts of several sequences, and sequences several programs."""
    lengths = [40_000, num_rows, 129, 700, 64, 9_000, 65, 128, 3_333, num_rows + 1, 20_000]
    case = make_case(
        3, lengths=lengths, num_rows=[num_rows] * len(lengths), heads=16, kv_heads=2, head_dim=128, block_size=64,
        kvp=2, dtype=torch.bfloat16,
    )  # fmt: skip
    for rank in range(2):
        compare(case, rank, 0.1)


def one_sequence(tokens, num_rows, block_size, device):
    """Pages of one KV head of 128 elements, shuffled, and the rows of the last tokens, which are not appended yet."""
    num_pages = -(-tokens // block_size)
    pages = torch.randn(num_pages, 2, 1, block_size, 128, device=device).bfloat16()
    table = torch.randperm(num_pages, dtype=torch.int32, device=device)
    positions = torch.arange(tokens - num_rows, tokens, device=device)
    slot = table[positions // block_size].long() * block_size + positions % block_size
    pages.transpose(2, 3).flatten(3)[slot // block_size, :, slot % block_size] = torch.nan
    rows = Rows(
        positions=positions,
        row_seq=torch.zeros(num_rows, dtype=torch.int32, device=device),
        visible_len=(positions + 1).int(),
        slot=slot,
        page_table=table.unsqueeze(0),
        query_start=torch.tensor([0, num_rows], dtype=torch.int32, device=device),
    )
    return pages, rows


@pytest.mark.parametrize("block_size", [16, 64])
@pytest.mark.parametrize("num_rows", [1, 4, 6])  # the last takes the kernel of many rows
def test_new_tokens_are_read_once_they_are_appended(block_size, num_rows):
    """Behind a kernel that lasts, append and attention both begin before it has ended."""
    device = torch.device("cuda")
    long_pages, long_rows = one_sequence(200_000, 1, block_size, device)
    long_pages.nan_to_num_()
    turns = torch.randn(2, num_rows, 64, device=device).unbind(0)
    for tokens in (num_rows, 127, 128, 129, 132, 255, 257, 132 * 64, 132 * 128 + 3, 40_001):
        pages, rows = one_sequence(tokens, num_rows, block_size, device)
        qkv = torch.randn(2, num_rows, 18 * 128, device=device)
        results = []
        for pdl in (False, True, True):
            attention, own_pages = select_backend("triton", device, pdl=pdl), pages.clone()
            partials_of(attention, torch.randn(1, 16, 128, device=device).bfloat16(), long_pages, long_rows, 0.1)
            q = rope_append(qkv, *turns, own_pages, rows.slot, num_heads=16, norms=None, interleaved=False, pdl=pdl)
            results.append(attend(attention, q, own_pages, rows, 0.1, pdl=pdl))
        (plain, plain_lse), *others = results
        assert plain.isfinite().all() and plain_lse.isfinite().all()
        assert all(torch.equal(out, plain) and torch.equal(lse, plain_lse) for out, lse in others)
