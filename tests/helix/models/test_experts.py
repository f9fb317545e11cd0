"""A mixture of experts: the kernels against the reference, the reference against transformers, shares that add up."""

import pytest
import torch

from helix.models.experts import blocks_of, mix, mix_kernels, mix_reference, route
from helix.models.spec import Experts

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else [])


def inputs(seed, rows, num_experts, units, hidden, chosen, dtype=torch.float32):
    """Rows, their choice of experts, and the experts."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=generator).to(dtype).to(DEVICE)

    weights, ids = torch.rand(rows, num_experts, generator=generator).topk(chosen, -1)
    gate_up, down = randn(num_experts, 2 * units, hidden) / hidden**0.5, randn(num_experts, hidden, units) / units**0.5
    return randn(rows, hidden), weights.to(DEVICE), ids.to(DEVICE), gate_up, down


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("rows", "num_experts", "units", "hidden", "chosen"),
    [(1, 8, 32, 64, 2), (5, 3, 40, 72, 3), (70, 4, 96, 48, 2), (2, 16, 16, 16, 1)],
)
def test_the_kernels_do_what_the_reference_does(dtype, rows, num_experts, units, hidden, chosen):
    x, weights, ids, gate_up, down = inputs(rows, rows, num_experts, units, hidden, chosen, dtype)
    exact = mix_reference(x.double(), weights.double(), ids, gate_up.double(), down.double(), first=0)
    plain = mix_reference(x, weights, ids, gate_up, down, first=0)
    ours = mix_kernels(x, weights, ids, gate_up, down, first=0)
    assert ours.dtype == dtype
    assert (ours - exact).abs().max() <= 2 * (plain - exact).abs().max() + (1e-5 if dtype == torch.float32 else 4e-3)


@pytest.mark.parametrize("compute", [mix_reference, mix_kernels])
def test_what_ranks_add_makes_the_whole(compute):
    """Experts split two ways and units of each split two ways; the last row's experts are all on one rank."""
    x, weights, ids, gate_up, down = inputs(3, 9, 6, 40, 32, 2)
    ids[-1] = torch.tensor([4, 5])
    total = torch.zeros_like(x)
    for experts in (slice(0, 3), slice(3, 6)):
        for units in (slice(0, 24), slice(24, 40)):
            gate, up = gate_up[experts].chunk(2, 1)
            share = torch.cat((gate[:, units], up[:, units]), 1).contiguous()
            total += compute(x, weights, ids, share, down[experts, :, units].contiguous(), first=experts.start)
    torch.testing.assert_close(total, mix(x, weights, ids, gate_up, down, first=0), rtol=1e-4, atol=1e-5)


def test_no_rows_no_experts_and_no_units_add_nothing():
    x, weights, ids, gate_up, down = inputs(0, 4, 3, 16, 32, 2)
    assert mix_kernels(x[:0], weights[:0], ids[:0], gate_up, down, first=0).shape == (0, 32)
    assert not mix_kernels(x, weights, ids, gate_up[:0], down[:0], first=3).any()
    assert not mix_kernels(x, weights, ids, gate_up[:, :0], down[:, :, :0], first=0).any()
    assert not mix_kernels(x, weights, ids, gate_up, down, first=3).any()  # all chosen are another rank's


@pytest.mark.parametrize("rows", [1, 4, 16])
@pytest.mark.parametrize("num_experts", [1, 3, 8])
def test_blocks_hold_every_pair_of_this_rank_once_and_no_other(rows, num_experts):
    generator = torch.Generator().manual_seed(rows * num_experts)
    for pairs in (1, 2, 17, 64):
        local_ids = torch.randint(-2, num_experts + 2, (pairs,), generator=generator)
        order, block_expert, block_start, stop = blocks_of(local_ids, num_experts, rows)
        assert sorted(order.tolist()) == list(range(pairs))
        held = []
        for expert, start in zip(block_expert.tolist(), block_start.tolist(), strict=True):
            if expert >= 0:
                pairs_of_block = order[start : min(start + rows, int(stop[expert]))].tolist()
                assert pairs_of_block and all(local_ids[pair] == expert for pair in pairs_of_block)
                held += pairs_of_block
        assert sorted(held) == [pair for pair in range(pairs) if 0 <= local_ids[pair] < num_experts]


@pytest.mark.parametrize("normalised", [True, False])
def test_routing_and_mixing_equal_transformers(normalised):
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

    config = Qwen3MoeConfig(
        hidden_size=32, moe_intermediate_size=24, num_experts=6, num_experts_per_tok=3, norm_topk_prob=normalised
    )
    block = Qwen3MoeSparseMoeBlock(config)
    with torch.no_grad():
        for weight in block.parameters():
            weight.normal_(0.0, 0.3, generator=torch.Generator().manual_seed(weight.numel()))
        x = torch.randn(7, 32, generator=torch.Generator().manual_seed(0))
        theirs = block(x.unsqueeze(0))
    theirs = theirs[0] if isinstance(theirs, tuple) else theirs
    experts = Experts(num_experts=6, num_chosen=3, ffn_size=24, normalised=normalised)
    weights, ids = route(x, block.gate.weight.detach(), experts)
    gate_up, down = block.experts.gate_up_proj.detach(), block.experts.down_proj.detach()
    ours = mix_reference(x, weights, ids, gate_up, down, first=0)
    torch.testing.assert_close(ours, theirs.view(7, 32), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"num_experts": 0}, "experts.num_experts = 0, must be an integer of at least 1"),
        ({"num_chosen": 9}, "experts.num_chosen = 9 exceeds experts.num_experts = 8"),
    ],
)
def test_experts_that_cannot_be_are_refused(changes, problem):
    with pytest.raises(ValueError, match=problem):
        Experts(**({"num_experts": 8, "num_chosen": 2, "ffn_size": 4, "normalised": True} | changes))
