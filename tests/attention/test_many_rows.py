"""The kernel of prefill chunks: it runs on Hopper alone; elsewhere ``split_kv`` serves the same interface."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from attention import many_rows, stream_kv
from attention.backends import select_backend
from attention.merge import merge_parts
from attention.partial import Workspace
from attention.ranges import PAGE, PlannedFillings, attend_ranges
from attention.reference import partial_attention
from attention.rows import Rows
from tests.attention.cases import attend, make_case, shard

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def hopper():
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("needs a Hopper GPU")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize(("heads", "kv_heads"), [(16, 1), (4, 4), (14, 2), (24, 2)])
@pytest.mark.parametrize("block_size", [16, 64, 128, 256])
def test_it_equals_the_reference(dtype, head_dim, heads, kv_heads, block_size):
    lengths = [1, 70, 129, 700, 1291]
    case = make_case(
        heads, lengths=lengths, num_rows=[1, 70, 128, 300, 9], heads=heads, kv_heads=kv_heads, head_dim=head_dim,
        block_size=block_size, kvp=2, dtype=dtype,
    )  # fmt: skip
    for rank in range(2):
        pages, rows = shard(case, rank, "cuda")
        assert many_rows.supports(pages, heads // kv_heads)
        assert not stream_kv.supports(pages, int(rows.query_start.diff().max()) * heads // kv_heads)
        q, scale = case.q.cuda(), head_dim**-0.5
        out, lse = attend(select_backend("triton", q.device), q, pages, rows, scale)
        plain, _ = partial_attention(q, pages, rows, scale)
        exact, exact_lse = partial_attention(q.float(), pages.float(), rows, scale)
        ours, theirs = (out.float() - exact).abs().max(), (plain.float() - exact).abs().max()
        assert ours <= 2 * theirs + 4e-3
        torch.testing.assert_close(lse, exact_lse, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("block_size", [16, 64, 256])
@pytest.mark.parametrize(("window", "head_dim", "kv_heads"), [(1, 128, 2), (128, 64, 1), (1000, 128, 1), (130, 256, 8)])
def test_windows_hide_what_is_before_them(window, head_dim, kv_heads, block_size):
    case = make_case(
        window, lengths=[70, 300, 5000, 1291], num_rows=[70, 128, 513, 80], heads=8, kv_heads=kv_heads,
        head_dim=head_dim, block_size=block_size, kvp=1, dtype=torch.bfloat16, window=window,
    )  # fmt: skip
    pages, rows = shard(case, 0, "cuda")
    q, scale = case.q.cuda(), head_dim**-0.5
    out, lse = attend(select_backend("triton", q.device), q, pages, rows, scale)
    plain, _ = partial_attention(q, pages, rows, scale)
    exact, exact_lse = partial_attention(q.float(), pages.float(), rows, scale)
    ours, theirs = (out.float() - exact).abs().max(), (plain.float() - exact).abs().max()
    assert ours <= 2 * theirs + 4e-3
    torch.testing.assert_close(lse, exact_lse, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("block_size", [16, 32, 64])
@pytest.mark.parametrize("length", [127, 128, 129, 2048, 5000])
def test_chunks_of_every_length_see_what_is_theirs(length, block_size):
    case = make_case(
        length, lengths=[length], num_rows=[min(length, 513)], heads=8, kv_heads=2, head_dim=128,
        block_size=block_size, kvp=1, dtype=torch.bfloat16,
    )  # fmt: skip
    pages, rows = shard(case, 0, "cuda")
    q = case.q.cuda()
    out, lse = attend(select_backend("triton", q.device), q, pages, rows, 0.3)
    exact, exact_lse = partial_attention(q.float(), pages.float(), rows, 0.3)
    torch.testing.assert_close(out.float(), exact, rtol=3e-2, atol=3e-2)
    torch.testing.assert_close(lse, exact_lse, rtol=1e-4, atol=1e-3)


def test_runs_that_begin_with_padding_and_runs_of_no_rows():
    case = make_case(
        5, lengths=[3000, 700], num_rows=[7, 5], heads=16, kv_heads=1, head_dim=128, block_size=16, kvp=1,
        dtype=torch.bfloat16,
    )  # fmt: skip
    pages, rows = shard(case, 0, "cuda")
    visible_len = rows.visible_len.clone()
    visible_len[:3] = 0
    query_start = torch.tensor([0, 7, 7, 12], dtype=torch.int32, device="cuda")
    rows = replace(rows, visible_len=visible_len, query_start=query_start)
    q = case.q.cuda()
    out, lse = attend(select_backend("triton", q.device), q, pages, rows, 0.3)
    exact, exact_lse = partial_attention(q.float(), pages.float(), rows, 0.3)
    assert torch.equal(out[:3], torch.zeros_like(out[:3])) and torch.isneginf(lse[:3]).all()
    torch.testing.assert_close(out.float(), exact, rtol=3e-2, atol=3e-2)
    torch.testing.assert_close(lse, exact_lse, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("heads", [3, 16])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_workspace_of_keys_of_192_and_values_of_128_equals_the_reference(dtype, heads):
    """Runs that share a filling, take several, are cut into parts, begin past what others hold, and see one token."""
    runs = [(300, 900), (1, 1), (70, 5000), (128, 128), (3, 129)]
    seen = [np.arange(length - rows + 1, length + 1) for rows, length in runs]
    counts = [rows for rows, _ in runs]
    visible, starts, seqs = np.concatenate(seen), np.cumsum([0, *counts]), np.repeat(np.arange(len(runs)), counts)
    table = np.random.default_rng(0).permutation(len(runs) * 80).reshape(-1, 80)
    backend, device, scale = select_backend("triton", torch.device("cuda"), pdl=True), "cuda", 192**-0.5
    generator = torch.Generator(device).manual_seed(heads)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, device=device).to(dtype)

    q, cached = (
        randn(len(visible), heads, 192),
        [randn(table.size * 64, *s) for s in ((heads, 128), (heads, 128), (64,))],
    )

    def attended(capacity, dtype):
        made = Workspace(*(torch.full((capacity, *x.shape[1:]), torch.nan, dtype=dtype, device=device) for x in cached),
                         PAGE)  # fmt: skip
        kernel = backend if dtype == q.dtype else select_backend("reference", torch.device(device))
        cutting = kernel.cutting(made, heads, 300)
        assert cutting is None or cutting.kernel == "many_rows"
        planned = PlannedFillings.of(visible, starts, seqs, table, block_size=64, capacity=capacity, cutting=cutting)
        arrays = {name: torch.from_numpy(array).to(device) for name, array in planned.arrays.items()}
        zeros = torch.zeros(len(visible), dtype=torch.int64, device=device)
        fillings = planned.on_device(arrays, Rows(zeros, zeros, zeros, zeros, zeros, zeros))

        def make(tokens):
            for to, source in zip((made.k, made.v, made.turned), cached, strict=True):
                to[: len(tokens)] = source[tokens].to(dtype)

        partials = attend_ranges(q.to(dtype), fillings, make, lambda q, rows: kernel(q, made, rows, scale))
        return merge_parts(partials, dtype)

    exact, exact_lse = attended(8192, torch.float32)
    for capacity in (8192, 1024):
        out, lse = attended(capacity, dtype)
        torch.testing.assert_close(out.float(), exact, rtol=2e-2, atol=1e-2)
        torch.testing.assert_close(lse, exact_lse, rtol=1e-4, atol=1e-3)


def test_a_rerun_equals_itself_bit_for_bit():
    case = make_case(
        2, lengths=[5000], num_rows=[700], heads=16, kv_heads=1, head_dim=128, block_size=64, kvp=1,
        dtype=torch.bfloat16,
    )  # fmt: skip
    pages, rows = shard(case, 0, "cuda")
    q, kernel = case.q.cuda(), select_backend("triton", torch.device("cuda"), pdl=True)
    first, *others = [attend(kernel, q, pages, rows, 0.1) for _ in range(20)]
    for out, lse in others:
        assert torch.equal(out, first[0]) and torch.equal(lse, first[1])
