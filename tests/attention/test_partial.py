from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attention import reference
from attention.backends import select_backend
from attention.merge import merge_parts, merge_reference
from attention.reference import ReferenceAttention
from tests.attention.cases import attend, full_attention, make_case, shard

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
REFERENCE = ReferenceAttention()
KERNEL_DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else [])

shapes = st.fixed_dictionaries(
    {
        "lengths": st.lists(st.integers(1, 70), min_size=1, max_size=3),
        "block_size": st.sampled_from([1, 4, 16]),
        "kvp": st.integers(1, 5),
        "kv_heads": st.sampled_from([1, 2]),
        "group": st.sampled_from([1, 3, 4]),
        "window": st.sampled_from([None, None, 1, 7, 40]),
    }
)


def build(seed, shape, max_rows, **more):
    heads = shape["kv_heads"] * shape["group"]
    rest = {name: shape[name] for name in ("lengths", "block_size", "kvp", "kv_heads", "window")}
    num_rows = [min(n, 1 + (seed + i) % max_rows) for i, n in enumerate(shape["lengths"])]
    return make_case(seed, num_rows=num_rows, heads=heads, head_dim=more.pop("head_dim", 8), **rest, **more)


def merged_over_ranks(case, backend):
    partials = [
        attend(backend, case.q.to(DEVICE), *shard(case, rank, DEVICE), case.q.shape[-1] ** -0.5, case.value_dim)
        for rank in range(case.place.kvp)
    ]
    return merge_reference(
        torch.stack([out.cpu() for out, _ in partials]), torch.stack([lse.cpu() for _, lse in partials])
    )


@given(st.integers(0, 2**31), shapes)
def test_sharded_in_a_list_and_merged_equals_full_attention(seed, shape):
    case = build(seed, shape, max_rows=6)
    out, lse = merged_over_ranks(case, REFERENCE)
    expected, expected_lse = full_attention(case)
    torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-5, atol=1e-5)


def test_reference_in_small_pieces_equals_itself_in_one(monkeypatch):
    case = make_case(3, lengths=[90], num_rows=[40], heads=4, kv_heads=2, head_dim=8, block_size=4, kvp=2)
    whole = attend(REFERENCE, case.q.to(DEVICE), *shard(case, 1, DEVICE), 0.3)
    monkeypatch.setattr(reference, "SCORES_AT_ONCE", 500)
    pieces = attend(REFERENCE, case.q.to(DEVICE), *shard(case, 1, DEVICE), 0.3)
    torch.testing.assert_close(whole, pieces)


@pytest.mark.parametrize("name", ["reference", "triton"])
def test_an_empty_shard_gives_zero_and_minus_infinity(name):
    case = make_case(0, lengths=[5, 20], num_rows=[3, 1], heads=4, kv_heads=2, head_dim=16, block_size=16, kvp=4)
    case.first_owners = [0, 0]
    backend = select_backend(name, torch.device(DEVICE))
    out, lse = (each.cpu() for each in attend(backend, case.q.to(DEVICE), *shard(case, 3, DEVICE), 0.25))
    assert torch.equal(out, torch.zeros_like(out))
    assert torch.equal(lse, torch.full_like(lse, -torch.inf))
    out, lse = (each.cpu() for each in attend(backend, case.q.to(DEVICE), *shard(case, 1, DEVICE), 0.25))
    assert torch.equal(out[:3], torch.zeros_like(out[:3])) and torch.isneginf(lse[:3]).all()
    assert out[3].abs().min() > 0 and lse[3].isfinite().all()


@settings(max_examples=25)
@given(st.integers(0, 2**31), shapes, st.sampled_from(KERNEL_DTYPES), st.sampled_from([16, 32, 80]))
def test_kernel_equals_the_reference(seed, shape, dtype, head_dim):
    case = build(seed, shape, max_rows=12, head_dim=head_dim, dtype=dtype)
    kernel = select_backend("triton", torch.device(DEVICE))
    for rank in range(case.place.kvp):
        pages, rows = shard(case, rank, DEVICE)
        q, scale = case.q.to(DEVICE), head_dim**-0.5
        out, lse = attend(kernel, q, pages, rows, scale)
        exact, exact_lse = attend(REFERENCE, q.float(), pages.float(), rows, scale)  # pages of NaN are read by neither
        plain, _ = attend(REFERENCE, q, pages, rows, scale)
        ours, theirs = (out.float() - exact).abs().max(), (plain.float() - exact).abs().max()
        assert ours <= 2 * theirs + (2e-5 if dtype == torch.float32 else 4e-3)
        torch.testing.assert_close(lse, exact_lse, rtol=1e-4, atol=1e-4)


def test_kernel_result_does_not_depend_on_how_work_is_cut():
    case = make_case(7, lengths=[300, 40], num_rows=[1, 1], heads=8, kv_heads=2, head_dim=16, block_size=16, kvp=1)
    pages, rows = shard(case, 0, DEVICE)
    kernel, q = select_backend("triton", torch.device(DEVICE)), case.q.to(DEVICE)
    cutting = kernel.cutting(pages, 8, 1)
    results = [
        merge_parts(kernel(q, pages, rows.cut_for(replace(cutting, **change), 16), 0.25), q.dtype)
        for change in (
            *({"programs": programs, "unit": 16} for programs in (1, 2, 5, 200)),
            {"programs": 9, "persistent": False},
        )
    ]
    for out, lse in results[1:]:
        torch.testing.assert_close(out, results[0][0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(lse, results[0][1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("block_size", [128, 256])
def test_pieces_of_pages_longer_than_a_turn_read_the_right_pages(block_size):
    case = make_case(1, lengths=[700], num_rows=[1], heads=4, kv_heads=2, head_dim=32, block_size=block_size, kvp=1,
                     dtype=torch.float16)  # fmt: skip
    pages, rows = shard(case, 0, DEVICE)
    kernel, q = select_backend("triton", torch.device(DEVICE)), case.q.to(DEVICE)
    out, lse = merge_parts(
        kernel(q, pages, rows.cut_for(replace(kernel.cutting(pages, 4, 1), programs=4), block_size), 0.2), q.dtype
    )
    exact, exact_lse = attend(REFERENCE, q, pages, rows, 0.2)
    torch.testing.assert_close(out, exact, rtol=0, atol=1e-3)
    torch.testing.assert_close(lse, exact_lse, rtol=1e-4, atol=1e-4)


def test_strided_queries_are_read_by_their_strides():
    case = make_case(9, lengths=[30], num_rows=[4], heads=4, kv_heads=2, head_dim=16, block_size=4, kvp=1)
    pages, rows = shard(case, 0, DEVICE)
    wide = torch.randn(4, 6, 16, device=DEVICE)
    wide[:, :4] = case.q.to(DEVICE)
    kernel = select_backend("triton", torch.device(DEVICE))
    assert torch.equal(
        attend(kernel, wide[:, :4], pages, rows, 0.25)[0], attend(kernel, case.q.to(DEVICE), pages, rows, 0.25)[0]
    )


def test_unknown_back_end_is_refused():
    with pytest.raises(ValueError, match="attention.backend = 'flash' must be one of auto, reference, triton"):
        select_backend("flash", torch.device("cpu"))
