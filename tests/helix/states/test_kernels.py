"""The kernels of state layers equal their plain PyTorch reference: outputs, and what they keep."""

import numpy as np
import pytest
import torch

from helix.models.states import States
from helix.states.cache import StateCache
from helix.states.cuts import Cuts, arrays_of_cuts
from helix.states.decode_kernel import advance_few
from helix.states.heads import StateHeads
from helix.states.inputs import Inputs
from helix.states.prompt_kernels import advance_many
from helix.states.reference import advance_reference

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
STATES = States(num_key_heads=2, num_value_heads=6, key_dim=16, value_dim=20, taps=4, eps=1e-6, by_key_head=False)
MAX_RUN = 4


def random(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


# As models have them, of keys that are much alike.
LARGE = States(num_key_heads=2, num_value_heads=6, key_dim=128, value_dim=128, taps=4, eps=1e-6, by_key_head=False)


def make_cache(heads, dtype):
    """A cache of 3 sequences that have seen 2, 40 and no tokens; the last slot holds what a sequence left."""
    cache = StateCache(heads, num_layers=1, num_slots=3, max_run=MAX_RUN, dtype=dtype, device=DEVICE)
    layer = cache.layers[0]
    layer.matrix.copy_(random(*layer.matrix.shape, seed=1))
    layer.inputs.copy_(random(*layer.inputs.shape, seed=2))
    layer.position.copy_(torch.tensor([2, 40, 7, 0]).unsqueeze(1).expand_as(layer.position))
    return layer


def weights_of(heads, dtype):
    rates = random(2 * heads.num_value, seed=4)
    return {
        "state_conv": random(heads.conv_size, 1, heads.taps, seed=3).to(dtype),
        "state_rates": rates,
        "state_norm": random(heads.value_dim, seed=5).to(dtype),
    }


# Runs of a step: (slot, first position, rows, padding before them).
STEPS = [
    [(0, 2, 1, 0), (1, 40, 3, 1), (2, 0, 2, 0), (3, 0, 0, 4)],  # the second's last token is worked in, two rows wait
    [(1, 42, 4, 0), (0, 3, 1, 3), (2, 1, 1, 3)],  # of two drafts one was kept
    [(2, 2, 1, 0), (1, 46, 1, 0), (0, 4, 1, 0)],
]
LONG_STEPS = [
    [(0, 2, 5, 0), (1, 40, 3, 0), (2, 0, 70, 0)],  # shorter than a chunk, one that is none, a chunk and some
    [(1, 42, 66, 0), (0, 7, 1, 0), (2, 70, 2, 0)],  # tokens that wait come first
    [(1, 108, 2, 0), (2, 71, 1, 0)],
]


def check(out, expected, dtype):
    """Equal to rounding, which in 16 bits may end an element in the unit beside."""
    if dtype == torch.float32:
        torch.testing.assert_close(out, expected, rtol=5e-4, atol=1e-4)
    assert (out - expected).float().norm() < 0.02 * expected.float().norm()


def compare(steps, dtype, summands, states=STATES, alike=0.0):
    """Run steps through the kernels and the reference, and compare all that comes out and is kept.

    ``alike``: how much of their inputs all rows share.
    """
    heads = StateHeads.of(states, (2, 5))
    mine, theirs, weights = make_cache(heads, dtype), make_cache(heads, dtype), weights_of(heads, dtype)
    for turn, step in enumerate(steps):
        positions = [p for _, first, rows, padding in step for p in (*[-1] * padding, *range(first, first + rows))]
        row_seq = [slot for slot, _, rows, padding in step for _ in range(rows + padding)]
        starts = torch.tensor([0, *(rows + padding for _, _, rows, padding in step)]).cumsum(0)
        flat = random(summands, len(positions), heads.width, seed=turn + 9)
        flat = (flat + alike * random(heads.width, seed=8)).to(dtype)
        given = (
            torch.tensor(positions, device=DEVICE),
            torch.tensor(row_seq, dtype=torch.int32, device=DEVICE),
            starts.to(DEVICE, torch.int32),
        )
        inputs = Inputs(flat)
        if turn == 1:  # scores come apart
            inputs = Inputs(*(each.contiguous() for each in flat.split((heads.scores_at, 2 * heads.num_value), -1)))
        expected = advance_reference(inputs.joined(), *given, theirs, weights, eps=1e-6, max_run=MAX_RUN)
        out = torch.full_like(expected, torch.nan)
        advance_few(inputs, *given, mine, weights, out, eps=1e-6, max_run=MAX_RUN)
        if any(rows > MAX_RUN for _, _, rows, _ in step):
            advance_many(inputs, *given, mine, weights, out, eps=1e-6, max_run=MAX_RUN)
        check(out, expected, dtype)
        assert torch.equal(mine.position, theirs.position)
        check(mine.matrix, theirs.matrix, dtype)
        for slot, first, rows, _ in step:
            kept = torch.arange(max(first + rows - heads.taps + 1, 0), first + rows) % mine.inputs.shape[1]
            ours, others = (states.inputs[slot, kept, : heads.conv_size] for states in (mine, theirs))
            torch.testing.assert_close(ours, others)


@pytest.mark.parametrize("length", [128, 150])
def test_states_that_a_run_passes_are_kept_as_they_are_there(length):
    """Behind 64 and 128 rows of a run, of the second of two layers, beside a run that keeps nothing."""
    dtype, heads = torch.float32, StateHeads.of(STATES, (2, 5))
    mine, theirs, weights = make_cache(heads, dtype), make_cache(heads, dtype), weights_of(heads, dtype)
    flat = random(1, 70 + length, heads.width, seed=7)
    given = torch.arange(70 + length, device=DEVICE), torch.arange(70 + length, device=DEVICE).ge(70).int()
    given[0][70:] += 40 - 70
    starts = np.array([0, 70, 70 + length])
    arrays = arrays_of_cuts(starts, [[], [(64, 2), (128, 0)]])
    shapes = [(3, 2, *each.shape[1:]) for each in (mine.matrix, mine.position, mine.inputs)]
    kept = [
        torch.zeros(shape, dtype=each, device=DEVICE)
        for shape, each in zip(shapes, (dtype, torch.int32, dtype), strict=True)
    ]
    cuts = Cuts(*(torch.from_numpy(each).to(DEVICE) for each in arrays.values()), kept=tuple(kept))
    out = torch.empty(70 + length, heads.num_value, heads.value_dim, device=DEVICE)
    given = *given, torch.from_numpy(starts).int().to(DEVICE)
    advance_few(Inputs(flat), *given, mine, weights, out, eps=1e-6, max_run=MAX_RUN)
    advance_many(Inputs(flat), *given, mine, weights, out, eps=1e-6, max_run=MAX_RUN, cuts=cuts, place=1)
    advance_reference(
        flat[0, :70], *(each[:70] for each in given[:2]), given[2][:2], theirs, weights, eps=1e-6, max_run=MAX_RUN
    )
    begin = 70
    for slot, stop in ((2, 64), (0, 128), (None, length)):
        some, runs = slice(begin, 70 + stop), torch.tensor([0, 70 + stop - begin])
        if begin < 70 + stop:
            made = advance_reference(
                flat[0, some], given[0][some], given[1][some], runs, theirs, weights, eps=1e-6, max_run=MAX_RUN
            )
            check(out[some], made, dtype)
        begin = 70 + stop
        ours = (mine.matrix, mine.position, mine.inputs) if slot is None else (each[:, 1] for each in kept)
        matrix, position, inputs = (each[1 if slot is None else slot] for each in ours)
        check(matrix, theirs.matrix[1], dtype)
        assert torch.equal(position, theirs.position[1]) and int(position[0]) == 40 + stop
        at = torch.arange(40 + stop - heads.taps + 1, 40 + stop) % len(inputs)
        torch.testing.assert_close(inputs[at, : heads.conv_size], theirs.inputs[1, at, : heads.conv_size])
    assert not any(each[:, 0].any() or each[1].any() for each in kept), "other layers and slots stay"


GPU = pytest.mark.gpu  # the interpreter cuts where bfloat16 is rounded


@pytest.mark.parametrize(
    ("dtype", "summands"), [(torch.float32, 2), pytest.param(torch.bfloat16, 1, marks=GPU)], ids=str
)
def test_few_rows_equal_the_reference(dtype, summands):
    compare(STEPS, dtype, summands)


@pytest.mark.parametrize(
    ("dtype", "summands"),
    [(torch.float32, 1), (torch.float16, 1), pytest.param(torch.bfloat16, 2, marks=GPU)],
    ids=str,
)
def test_many_rows_equal_the_reference(dtype, summands):
    compare(LONG_STEPS, dtype, summands)


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "alike"), [(torch.bfloat16, 0.0), (torch.float16, 2.0)], ids=str)
def test_heads_of_128_elements_equal_the_reference_whether_keys_are_alike_or_not(dtype, alike):
    compare(LONG_STEPS, dtype, 1, LARGE, alike)
