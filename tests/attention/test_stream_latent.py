"""The streaming kernel over latents: it runs on Hopper alone; elsewhere ``latent_kv`` serves the same interface."""

import pytest
import torch

from attention import stream_latent
from attention.backends import select_backend
from attention.latent_append import latent_append, latent_queries
from attention.reference import partial_attention
from attention.rows import Rows
from tests.attention.cases import attend, make_case, partials_of, shard

pytestmark = pytest.mark.gpu
SCALE = 192**-0.5


@pytest.fixture(autouse=True)
def hopper():
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("needs a Hopper GPU")


def latents(lengths, num_rows, *, heads, block_size=64, kvp=1, dtype=torch.bfloat16):
    return make_case(
        heads, lengths=lengths, num_rows=num_rows, heads=heads, kv_heads=1, head_dim=576, value_dim=512,
        block_size=block_size, kvp=kvp, dtype=dtype,
    )  # fmt: skip


def compare(case, rank=0, scale=SCALE):
    pages, rows = shard(case, rank, "cuda")
    assert stream_latent.supports(pages, 512)
    q = case.q.cuda()
    out, lse = attend(select_backend("triton", torch.device("cuda")), q, pages, rows, scale, 512)
    plain, _ = partial_attention(q, pages, rows, scale, value_dim=512)
    exact, exact_lse = partial_attention(q.float(), pages.float(), rows, scale, value_dim=512)
    ours, theirs = (out.float() - exact).abs().max(), (plain.float() - exact).abs().max()
    assert ours <= 2 * theirs + 4e-3
    torch.testing.assert_close(lse, exact_lse, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    ("heads", "num_rows", "block_size", "dtype"),
    [
        (1, 1, 16, torch.bfloat16),
        (16, 1, 64, torch.bfloat16),
        (16, 4, 16, torch.bfloat16),  # 64 columns
        (16, 5, 64, torch.bfloat16),  # two tiles of a sequence
        (20, 3, 32, torch.float16),  # 60 of 64 columns
        (32, 1, 128, torch.bfloat16),
        (64, 1, 256, torch.bfloat16),
        (96, 2, 64, torch.bfloat16),  # two passes of 48 heads
        (128, 1, 64, torch.bfloat16),
        (128, 40, 64, torch.float16),  # as many tiles as a prompt has
    ],
)
def test_it_equals_the_reference(heads, num_rows, block_size, dtype):
    lengths = [num_rows, num_rows + 1, 64, 65, 700, 5000]
    case = latents(lengths, [num_rows] * 6, heads=heads, block_size=block_size, kvp=2, dtype=dtype)
    for rank in range(2):
        compare(case, rank)


@pytest.mark.parametrize("block_size", [16, 64, 256])
@pytest.mark.parametrize("length", [1, 63, 64, 65, 129, 257, 100_000])
def test_every_length_and_page_size(block_size, length):
    case = latents([length], [1], heads=16, block_size=block_size)
    compare(case)
    compare(case, scale=2.0)  # scores far apart


def test_spans_go_over_the_ends_of_sequences_of_any_lengths():
    """Programs take parts of several sequences, and sequences several programs."""
    lengths = torch.randint(2, 900, (70,), generator=torch.Generator().manual_seed(0)).tolist()
    for heads, num_rows in ((16, 1), (16, 3), (128, 2)):
        compare(latents([20_000, *lengths, 9_000], [num_rows] * 72, heads=heads))


@pytest.mark.parametrize("heads", [16, 64, 128])
def test_a_rerun_equals_itself_bit_for_bit(heads):
    case = latents([3000, 100], [1, 1], heads=heads)
    pages, rows = shard(case, 0, "cuda")
    kernel = select_backend("triton", torch.device("cuda"))
    first, *others = [partials_of(kernel, case.q.cuda(), pages, rows, SCALE, 512) for _ in range(21)]
    assert first.part_start is not None
    for other in others:
        assert torch.equal(other.lse, first.lse) and torch.equal(other.out, first.out)


def one_sequence(tokens, num_rows):
    """Shuffled pages, and the rows of the last tokens, which are not appended yet."""
    device, num_pages = torch.device("cuda"), -(-tokens // 64)
    pages = torch.randn(num_pages, 1, 1, 64, 576, device=device).bfloat16()
    table = torch.randperm(num_pages, dtype=torch.int32, device=device)
    positions = torch.arange(tokens - num_rows, tokens, device=device)
    slot = table[positions // 64].long() * 64 + positions % 64
    pages.view(-1, 576)[slot] = torch.nan
    rows = Rows(
        positions=positions,
        row_seq=torch.zeros(num_rows, dtype=torch.int32, device=device),
        visible_len=(positions + 1).int(),
        slot=slot,
        page_table=table.unsqueeze(0),
        query_start=torch.tensor([0, num_rows], dtype=torch.int32, device=device),
    )
    return pages, rows


@pytest.mark.parametrize(("heads", "num_rows"), [(16, 1), (16, 4), (128, 2)])
def test_new_tokens_are_read_once_they_are_appended(heads, num_rows):
    """Behind a kernel that lasts, append, queries and attention all begin before it has ended."""
    device = torch.device("cuda")
    long_pages, long_rows = one_sequence(100_000, 1)
    long_pages.nan_to_num_()
    cos, sin = torch.randn(2, num_rows, 32, device=device).unbind(0)
    norm = torch.ones(512, device=device).bfloat16()
    for tokens in (num_rows, 64, 129, 132 * 64, 132 * 64 + 3, 40_001):
        pages, rows = one_sequence(tokens, num_rows)
        flat = torch.randn(2, num_rows, heads * 192 + 576, device=device)
        absorbed = torch.randn(heads, num_rows, 512, device=device).bfloat16()
        results = []
        for pdl in (False, True, True):
            attention, own_pages = select_backend("triton", device, pdl=pdl), pages.clone()
            long_q = torch.randn(1, heads, 576, device=device).bfloat16()
            partials_of(attention, long_q, long_pages, long_rows, SCALE, 512)
            first = latent_append(
                flat, cos, sin, own_pages, rows.slot, latent_norm=norm, q_norm=None, eps=1e-6, interleaved=False,
                pdl=pdl,
            )  # fmt: skip
            first = first.unflatten(-1, (heads, 192))
            q = latent_queries(first, absorbed, cos, sin, interleaved=False, pdl=pdl)
            results.append(attend(attention, q, own_pages, rows, SCALE, 512, pdl=pdl))
        (plain, plain_lse), *others = results
        assert plain.isfinite().all() and plain_lse.isfinite().all()
        assert all(torch.equal(out, plain) and torch.equal(lse, plain_lse) for out, lse in others)
