"""The gated delta rule of state layers: equal to transformers' layer, however a sequence is cut into runs."""

import pytest
import torch

from helix.models.states import States
from helix.states.cache import StateCache
from helix.states.heads import StateHeads
from helix.states.reference import Tokens, advance_reference, chunked, recurrent

STATES = States(num_key_heads=2, num_value_heads=6, key_dim=8, value_dim=5, taps=4, eps=1e-6, by_key_head=False)
HIDDEN = 24


def random(*shape, seed=0, scale=1.0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


@pytest.fixture(scope="module")
def layer():
    """Transformers' layer, its weights random."""
    from transformers.models.qwen3_5.configuration_qwen3_5 import Qwen3_5TextConfig
    from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5GatedDeltaNet

    config = Qwen3_5TextConfig(
        hidden_size=HIDDEN, num_hidden_layers=1, linear_num_key_heads=2, linear_num_value_heads=6,
        linear_key_head_dim=8, linear_value_head_dim=5, layer_types=["linear_attention"],
    )  # fmt: skip
    made = Qwen3_5GatedDeltaNet(config, 0)
    with torch.no_grad():
        for seed, weight in enumerate(made.parameters()):
            weight.copy_(random(*weight.shape, seed=seed, scale=0.3))
    return made


def slices(layer, first, stop):
    """The input projection and the weights of a rank that has value heads [first, stop)."""
    start, end = STATES.key_heads((first, stop))
    qkv = torch.cat([
        torch.arange(start * 8, end * 8),
        16 + torch.arange(start * 8, end * 8),
        32 + torch.arange(first * 5, stop * 5),
    ])  # fmt: skip
    mine, values = slice(first, stop), slice(first * 5, stop * 5)
    flat = [layer.in_proj_qkv.weight[qkv], layer.in_proj_z.weight[values]]
    flat += [layer.in_proj_b.weight[mine], layer.in_proj_a.weight[mine]]
    return torch.cat(flat), {
        "state_conv": layer.conv1d.weight[qkv],
        "state_rates": torch.cat((layer.A_log[mine], layer.dt_bias[mine])),
        "state_norm": layer.norm.weight,
    }


@torch.no_grad()
def run(flats, weights, heads, cuts, *, max_run, slots=(2, 0)):
    """The outputs of sequences whose rows come in runs: ``cuts`` are (sequence, first position, rows, rows kept)."""
    cache = StateCache(
        heads, num_layers=1, num_slots=4, max_run=max_run, dtype=torch.float32, device=torch.device("cpu")
    )
    cache.layers[0].matrix.fill_(torch.nan)  # of whoever had the slot before
    cache.layers[0].inputs.fill_(torch.nan)
    outs = [torch.full((len(flat), heads.num_value, heads.value_dim), torch.nan) for flat in flats]
    for step in cuts:
        rows, positions, row_seq, starts = [], [], [], [0]
        for seq, first, num, kept in step:
            rows.append(flats[seq][first : first + num].clone())
            rows[-1][kept:] += 1.0  # drafts that are rejected are other tokens
            positions += range(first, first + num)
            row_seq += [slots[seq]] * num
            starts.append(len(positions))
        out = advance_reference(
            torch.cat(rows), torch.tensor(positions), torch.tensor(row_seq), torch.tensor(starts), cache.layers[0],
            weights, eps=1e-6, max_run=max_run,
        )  # fmt: skip
        for start, (seq, first, _, kept) in zip(starts, step, strict=False):
            outs[seq][first : first + kept] = out[start : start + kept]
    return outs


CUTS = [
    [(0, 0, 1, 1)],
    [(0, 1, 2, 2), (1, 0, 70, 70)],  # shorter than the convolution; a chunk and some
    [(0, 3, 4, 2), (1, 70, 1, 1)],  # of three drafts one is kept
    [(0, 5, 4, 4), (1, 71, 4, 1)],
    [(1, 72, 2, 2)],
    [(0, 9, 66, 66), (1, 74, 3, 3)],  # a prompt's chunk after drafts
]


@pytest.mark.parametrize("heads", [(0, 6), (0, 3), (2, 5), (5, 6)])
def test_states_equal_transformers_however_rows_are_cut(layer, heads):
    projection, weights = slices(layer, *heads)
    inputs = [random(75, HIDDEN, seed=8), random(77, HIDDEN, seed=9)]
    mine = StateHeads.of(STATES, heads)
    outs = run([each @ projection.T for each in inputs], weights, mine, CUTS, max_run=4)
    for x, out in zip(inputs, outs, strict=True):
        gated = []
        hook = layer.out_proj.register_forward_pre_hook(lambda _, args, gated=gated: gated.append(args[0]))
        with torch.no_grad():
            layer(x.unsqueeze(0))
        hook.remove()
        expected = gated[0][0].unflatten(-1, (6, 5))[:, slice(*heads)]
        torch.testing.assert_close(out, expected, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("length", [3, 64, 130])
def test_chunks_equal_the_rule_token_by_token(length):
    q, k = (torch.nn.functional.normalize(random(3, length, 16, seed=seed), dim=-1) for seed in (0, 1))
    v, matrix = random(3, length, 8, seed=2), random(3, 16, 8, seed=3)
    g, beta = -random(3, length, seed=4).abs(), random(3, length, seed=5).sigmoid()
    tokens = Tokens(q, k, v, g, beta)
    for ours, theirs in zip(chunked(tokens, matrix), recurrent(tokens, matrix), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
