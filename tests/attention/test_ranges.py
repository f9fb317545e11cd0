"""Attention by ranges: fillings of a small workspace, merged, against whole sequences and against latents."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attention.backends import select_backend
from attention.merge import merge_parts, merge_reference
from attention.partial import Workspace
from attention.ranges import PAGE, Filling, PlannedFillings, attend_ranges
from attention.rows import Rows
from tests.attention.cases import full_attention, make_case, shard

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def fillings_of(rows: Rows, block_size, capacity, cutting) -> list[Filling]:
    """What a rank's rows see, dealt out, on the device."""
    arrays = (rows.visible_len, rows.query_start, rows.row_seq, rows.page_table)
    planned = PlannedFillings.of(
        *(each.cpu().numpy() for each in arrays), block_size=block_size, capacity=capacity, cutting=cutting
    )
    sent = {name: torch.from_numpy(array).to(rows.positions.device) for name, array in planned.arrays.items()}
    return planned.on_device(sent, rows)


@pytest.mark.parametrize("name", ["reference", "triton"])
@settings(max_examples=8)
@given(
    st.integers(0, 2**31),
    st.lists(st.integers(1, 400), min_size=1, max_size=3),
    st.sampled_from([1, 16, 64]),
    st.integers(1, 3),
    st.sampled_from([PAGE, 2 * PAGE, 8 * PAGE]),
)
def test_made_ranges_merged_equal_full_attention(name, seed, lengths, block_size, kvp, capacity):
    """The workspace holds NaN where nothing was made, and what earlier fillings left."""
    num_rows = [min(n, 1 + (seed + 37 * i) % 40) for i, n in enumerate(lengths)]
    case = make_case(
        seed, lengths=lengths, num_rows=num_rows, heads=2, kv_heads=2, head_dim=12, block_size=block_size, kvp=kvp
    )
    case = replace(case, kv=[(k, v[..., :8]) for k, v in case.kv])
    for k, _ in case.kv:
        k[1, :, 8:] = k[0, :, 8:]  # what all heads share
    backend, merged, scale = select_backend(name, torch.device(DEVICE)), [], case.q.shape[-1] ** -0.5
    q = case.q.to(DEVICE)
    for rank in range(kvp):
        padded = replace(case, kv=[(k, torch.nn.functional.pad(v, (0, 4))) for k, v in case.kv])
        pages, rows = shard(padded, rank, DEVICE)
        flat = pages.permute(0, 3, 1, 2, 4).flatten(0, 1)  # by slot: [slots, 2, K, D]
        made = Workspace(*(torch.full((capacity, *s), torch.nan, device=DEVICE) for s in ((2, 8), (2, 8), (4,))), PAGE)

        def make(tokens, flat=flat, made=made):
            made.k[: len(tokens)] = flat[tokens][:, 0, :, :8]
            made.turned[: len(tokens)] = flat[tokens][:, 0, 0, 8:]
            made.v[: len(tokens)] = flat[tokens][:, 1, :, :8]

        fillings = fillings_of(rows, block_size, capacity, backend.cutting(made, 2, max(num_rows)))
        assert all(len(each.tokens) <= capacity for each in fillings)
        partials = attend_ranges(q, fillings, make, lambda q, rows, made=made: backend(q, made, rows, scale))
        merged.append([each.cpu() for each in merge_parts(partials, q.dtype)])
    out, lse = merge_reference(*(torch.stack(each) for each in zip(*merged, strict=True)))
    expected, expected_lse = full_attention(case)
    torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=2e-5)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-4, atol=2e-5)
