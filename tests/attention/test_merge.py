import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attention.merge import join_sinks, join_sinks_kernel, merge_parts, merge_reference
from tests.attention.cases import stacked

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EXTREMES = [-torch.inf, -1e4, 0.0, 1e4]


def adversarial(seed: int, n: int, rows: int, heads: int, head_dim: int):
    """Partials whose lse are random, equal, extreme or -inf; values under -inf are NaN."""
    generator = torch.Generator().manual_seed(seed)
    out = torch.randn(n, rows, heads, head_dim, generator=generator)
    lse = torch.randn(n, rows, heads, generator=generator) * 5
    kind = torch.randint(0, 8, lse.shape, generator=generator)
    for index, value in enumerate(EXTREMES):
        lse[kind == index] = value
    lse[:, 0] = -torch.inf
    if rows > 1:
        lse[:, 1] = 1e4
    return out.masked_fill(torch.isneginf(lse).unsqueeze(-1), torch.nan), lse


def oracle(out, lse):
    """The merge in float64, written from its definition, one row and head at a time."""
    n, rows, heads, head_dim = out.shape
    merged = torch.zeros(rows, heads, head_dim, dtype=torch.float64)
    for row in range(rows):
        for head in range(heads):
            seen = [i for i in range(n) if lse[i, row, head] > -torch.inf]
            if seen:
                weight = torch.softmax(lse[seen, row, head].double(), 0)
                merged[row, head] = (weight.unsqueeze(-1) * out[seen, row, head].double()).sum(0)
    return merged


@given(st.integers(0, 2**31), st.integers(1, 8), st.integers(1, 4))
def test_adversarial_lse_match_the_float64_oracle(seed, n, rows):
    out, lse = adversarial(seed, n, rows, 3, 8)
    merged, total = merge_reference(out, lse)
    torch.testing.assert_close(merged.double(), oracle(out, lse), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(total.double(), torch.logsumexp(lse.double(), 0), rtol=1e-6, atol=1e-6)


def test_merge_is_order_independent():
    out, lse = adversarial(1, 6, 4, 2, 16)
    order = torch.randperm(6)
    torch.testing.assert_close(merge_reference(out, lse)[0], merge_reference(out[order], lse[order])[0])


def test_nothing_seen_anywhere_gives_zero_and_minus_infinity():
    merged, total = merge_reference(torch.full((4, 1, 1, 8), torch.nan), torch.full((4, 1, 1), -torch.inf))
    assert torch.equal(merged, torch.zeros(1, 1, 8))
    assert torch.equal(total, torch.full((1, 1), -torch.inf))


def test_merging_in_groups_equals_merging_at_once():
    out, lse = adversarial(2, 8, 5, 2, 16)
    halves = [merge_reference(out[part].nan_to_num(), lse[part]) for part in (slice(0, 3), slice(3, 8))]
    merged, _ = merge_reference(torch.stack([o for o, _ in halves]), torch.stack([each for _, each in halves]))
    # near 1e4 a float32 lse resolves 1e-3, and so do the weights that come from it
    torch.testing.assert_close(merged, merge_reference(out, lse)[0], rtol=2e-3, atol=1e-3)


def with_sinks(out, lse, sinks):
    """The same partials, and one more without a value whose lse are the sinks."""
    shape = lse.shape[1:]
    return torch.cat((out, torch.zeros_like(out[:1]))), torch.cat((lse, sinks.expand(1, *shape)))


@pytest.mark.parametrize("parts", [1, 5])
def test_sinks_join_the_parts_of_rows(parts):
    out, lse = adversarial(3, parts, 6, 4, 16)
    sinks = torch.tensor([-2.0, 0.0, 3.0, 1e4])
    expected = oracle(*with_sinks(out, lse, sinks)).float()
    merged, total = merge_reference(out, lse)
    torch.testing.assert_close(
        join_sinks(merged.double(), total.double(), sinks).float(), expected, rtol=2e-4, atol=1e-5
    )
    merged[torch.isneginf(total)] = torch.nan  # as an empty partial may be
    torch.testing.assert_close(join_sinks(merged, total, sinks), expected, rtol=2e-4, atol=1e-5)
    joined = join_sinks_kernel(merged.to(DEVICE), total.to(DEVICE), sinks.to(DEVICE)).cpu()
    torch.testing.assert_close(joined, expected, rtol=2e-4, atol=1e-5)
    held = stacked(out.to(DEVICE), lse.to(DEVICE))
    torch.testing.assert_close(
        merge_parts(held, torch.float32, sinks=sinks.to(DEVICE))[0].cpu(), expected, rtol=2e-4, atol=1e-5
    )
