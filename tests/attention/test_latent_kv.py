"""Attention over latents: the reference against the definition, the kernel against the reference."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attention.append import append, rotate
from attention.backends import select_backend
from attention.latent_append import latent_append, latent_queries, turn_queries
from attention.latent_products import latent_append_and_queries, latent_queries_of, latent_values
from attention.merge import merge_reference
from attention.reference import partial_attention
from tests.attention.cases import attend as attend_with
from tests.attention.cases import full_attention, make_case, shard

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else [])


def latents(seed, lengths, num_rows, *, heads, head_dim, value_dim, block_size, kvp, dtype=torch.float32):
    return make_case(
        seed, lengths=lengths, num_rows=num_rows, heads=heads, kv_heads=1, head_dim=head_dim, value_dim=value_dim,
        block_size=block_size, kvp=kvp, dtype=dtype,
    )  # fmt: skip


def attend(name, case, pages, rows):
    backend, q = select_backend(name, torch.device(DEVICE)), case.q.to(pages)
    return attend_with(backend, q, pages, rows, q.shape[-1] ** -0.5, case.value_dim)


@pytest.mark.parametrize("name", ["reference", "triton"])
@settings(max_examples=20)
@given(
    st.integers(0, 2**31),
    st.lists(st.integers(1, 70), min_size=1, max_size=3),
    st.sampled_from([1, 4, 16]),
    st.integers(1, 4),
    st.sampled_from([(1, 12, 8), (3, 24, 16), (8, 40, 32)]),
)
def test_sharded_and_merged_equals_full_attention(name, seed, lengths, block_size, kvp, sizes):
    heads, head_dim, value_dim = sizes
    num_rows = [min(n, 1 + (seed + i) % 7) for i, n in enumerate(lengths)]
    case = latents(
        seed, lengths, num_rows, heads=heads, head_dim=head_dim, value_dim=value_dim, block_size=block_size, kvp=kvp
    )
    parts = [attend(name, case, *shard(case, rank, DEVICE)) for rank in range(kvp)]
    out, lse = merge_reference(torch.stack([o.cpu() for o, _ in parts]), torch.stack([s.cpu() for _, s in parts]))
    expected, expected_lse = full_attention(case)
    torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=2e-5)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize(
    ("heads", "rows", "dtype"),
    [
        pytest.param(heads, rows, dtype, marks=[pytest.mark.slow] if DEVICE == "cpu" and (turn + place) % 2 else [])
        for turn, (heads, rows) in enumerate([(16, 40), (16, 1), (20, 3), (128, 1)])
        for place, dtype in enumerate(DTYPES)
    ],
    ids=str,
)
def test_the_kernel_equals_the_reference_at_the_sizes_of_deepseek(dtype, heads, rows):
    case = latents(
        heads, [300, 70], [rows, 1], heads=heads, head_dim=576, value_dim=512, block_size=64, kvp=1, dtype=dtype
    )
    pages, rows = shard(case, 0, DEVICE)
    out, lse = attend("triton", case, pages, rows)
    q, scale = case.q.to(DEVICE), 576**-0.5
    exact, exact_lse = partial_attention(q.float(), pages.float(), rows, scale, value_dim=512)
    plain = partial_attention(q, pages, rows, scale, value_dim=512)[0]
    ours, theirs = (out.float() - exact).abs().max(), (plain.float() - exact).abs().max()
    assert ours <= 2 * theirs + (2e-5 if dtype == torch.float32 else 4e-3)
    torch.testing.assert_close(lse, exact_lse, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["reference", "triton"])
def test_an_empty_shard_gives_zero_and_minus_infinity(name):
    case = latents(0, [5, 20], [3, 1], heads=4, head_dim=24, value_dim=16, block_size=16, kvp=4)
    case.first_owners = [0, 0]
    out, lse = attend(name, case, *shard(case, 3, DEVICE))
    assert not out.any() and torch.isneginf(lse).all()


def test_latents_land_in_their_slots_and_nothing_else_changes():
    case = latents(4, [40], [5], heads=2, head_dim=24, value_dim=16, block_size=4, kvp=2)
    pages, rows = shard(case, 1, DEVICE)
    cached = torch.randn(5, 1, 24, device=DEVICE)
    expected = pages.clone()
    for row, slot in enumerate(rows.slot.tolist()):
        if slot >= 0:
            expected[slot // 4, 0, :, slot % 4] = cached[row]
    append(cached, None, pages, rows.slot)
    torch.testing.assert_close(pages, expected, rtol=0, atol=0, equal_nan=True)
    assert any(slot >= 0 for slot in rows.slot.tolist()) and -1 in rows.slot.tolist()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("summands", [1, 3])
@pytest.mark.parametrize("norm_q", [True, False])
@pytest.mark.parametrize("interleaved", [True, False])
def test_two_launches_do_what_the_steps_do(dtype, summands, norm_q, interleaved):
    """40 elements of queries (2 heads of 12 + 8 without a norm), latents of 24, turned keys of 8."""
    generator = torch.Generator().manual_seed(summands)

    def randn(*shape):
        return torch.randn(*shape, generator=generator).to(DEVICE)

    rows, rank, turned = 5, 24, 8
    flat, cos, sin = randn(summands, rows, 40 + rank + turned), randn(rows, turned // 2), randn(rows, turned // 2)
    flat = flat.to(dtype) if summands == 1 else flat
    latent_norm, q_norm = randn(rank).to(dtype), randn(40).to(dtype)
    pages, slot = randn(4, 1, 1, 4, rank + turned).to(dtype), torch.tensor([3, -1, 12, 9, -1], device=DEVICE)
    whole = flat.sum(0).to(dtype) if summands > 1 else flat[0]
    first, compressed, turning = whole.split((40, rank, turned), -1)

    def norm(x, weight):
        return torch.nn.functional.rms_norm(x.float(), weight.shape, weight.float(), 1e-6).to(dtype)

    expected = pages.clone()
    turning = rotate(turning.unsqueeze(1), cos, sin, interleaved=interleaved)
    append(torch.cat((norm(compressed, latent_norm).unsqueeze(1), turning), -1), None, expected, slot)
    got = latent_append(
        flat, cos, sin, pages, slot, latent_norm=latent_norm, q_norm=q_norm if norm_q else None, eps=1e-6,
        interleaved=interleaved,
    )  # fmt: skip
    close = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 1e-2, "atol": 1e-2}
    torch.testing.assert_close(got, norm(first, q_norm) if norm_q else first, **close)
    torch.testing.assert_close(pages, expected, **close)

    heads, absorbed = got.unflatten(-1, (2, 20)), randn(2, rows, rank).to(dtype)
    queries = latent_queries(heads, absorbed, cos, sin, interleaved=interleaved)
    by_steps = torch.cat((absorbed.transpose(0, 1), rotate(heads[..., 12:], cos, sin, interleaved=interleaved)), -1)
    torch.testing.assert_close(queries, by_steps, **close)

    expected = torch.cat((heads[..., :12], rotate(heads[..., 12:], cos, sin, interleaved=interleaved)), -1)
    turn_queries(heads, cos, sin, interleaved=interleaved)
    torch.testing.assert_close(heads, expected, **close)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "heads", "plain", "rank"), [(1, 2, 12, 24), (19, 3, 16, 80)])
@pytest.mark.parametrize("interleaved", [True, False])
def test_products_of_few_rows_do_what_the_steps_do(dtype, rows, heads, plain, rank, interleaved):
    generator = torch.Generator().manual_seed(rows)

    def randn(*shape):
        return torch.randn(*shape, generator=generator).to(DEVICE)

    first, k_up = randn(rows, heads, plain + 8).to(dtype), (randn(heads, plain, rank) * plain**-0.5).to(dtype)
    cos, sin = randn(rows, 4), randn(rows, 4)
    absorbed = torch.einsum("rhp,hpc->rhc", first[..., :plain].double(), k_up.double()).to(dtype)
    expected = torch.cat((absorbed, rotate(first[..., plain:], cos, sin, interleaved=interleaved)), -1)
    close = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 1e-2, "atol": 1e-2}
    parts = first.flatten(1).float()
    parts = torch.stack((parts * 0.5, parts * 0.25, parts * 0.25))  # exact, and so is their sum
    got = latent_queries_of(parts, k_up, cos, sin, interleaved=interleaved)
    torch.testing.assert_close(got, expected, **close)

    merged, v_up = randn(rows, heads, rank).to(dtype), (randn(heads, 20, rank) * rank**-0.5).to(dtype)
    values = torch.einsum("rhc,hwc->rhw", merged.double(), v_up.double()).to(dtype)
    torch.testing.assert_close(latent_values(merged, v_up), values, **close)

    flat = torch.randn(2, rows, heads * (plain + 8) + rank + 8, generator=generator).to(DEVICE)
    pages, slot = randn(rows, 1, 1, 4, rank + 8).to(dtype), torch.arange(rows, device=DEVICE) * 3
    slot[1::2] = -1
    norm, both = {"latent_norm": randn(rank).to(dtype), "eps": 1e-6, "interleaved": interleaved}, []
    for pages_of in (pages.clone(), pages.clone()):
        if not both:
            first = latent_append(flat, cos, sin, pages_of, slot, q_norm=None, **norm)
            queries = latent_queries_of(first.unsqueeze(0), k_up, cos, sin, interleaved=interleaved)
        else:
            queries = latent_append_and_queries(flat, k_up, cos, sin, pages_of, slot, **norm)
        both.append((queries, pages_of))
    assert torch.equal(both[0][0], both[1][0]) and not torch.equal(both[1][1], pages)
    torch.testing.assert_close(both[0][1], both[1][1], rtol=0, atol=0)
