"""A mixture of experts: the kernels against the reference, the reference against transformers, shares that add up."""

from dataclasses import replace

import pytest
import torch

from helix.models import grouped
from helix.models.experts import ExpertBiases, mix_queued, mix_reference, mixture
from helix.models.linear import can_stream
from helix.models.routing import route
from helix.models.spec import ClampedGate, Experts
from tests.helix.models.chosen import experts_in_use

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else [])


def inputs(seed, rows, num_experts, units, hidden, dtype=torch.float32):
    """Rows, a router, and experts."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=generator).div(shape[-1] ** 0.5).to(dtype).to(DEVICE)

    x, router = randn(rows, hidden) * hidden**0.5, randn(num_experts, hidden)
    return x, router, randn(num_experts, 2 * units, hidden), randn(num_experts, hidden, units)


def of(num_experts, num_chosen, units, normalised=True):
    """A router's settings."""
    return Experts(num_experts=num_experts, num_chosen=num_chosen, ffn_size=units, normalised=normalised)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("normalised", [True, False])
@pytest.mark.parametrize(
    ("rows", "num_experts", "held", "units", "hidden", "chosen"),
    [
        (1, 8, (0, 8), 32, 64, 2),
        (5, 3, (0, 3), 40, 72, 3),
        (70, 4, (1, 4), 96, 48, 2),
        (300, 6, (0, 2), 20, 40, 2),
        (2, 16, (0, 16), 16, 16, 1),
    ],
)
def test_queues_of_pairs_do_what_the_reference_does(dtype, normalised, rows, num_experts, held, units, hidden, chosen):
    check_queues(dtype, normalised, rows, num_experts, held, units, hidden, chosen)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "held", "share"), [(1, (0, 6), 1.0), (90, (2, 5), 0.25)])
def test_clamped_gates_and_biases_are_those_of_the_reference(dtype, rows, held, share):
    x, router, gate_up, down = inputs(rows, rows, 6, 40, 72, dtype)
    gate_up, down = 3 * gate_up[slice(*held)], down[slice(*held)]
    gate = ClampedGate(1.702, 1.5)
    experts = replace(of(6, 3, 40), clamped=gate)
    generator = torch.Generator().manual_seed(9)
    of_up, of_down = torch.randn(6, 80, generator=generator), torch.randn(6, 72, generator=generator)
    held_biases = [each[slice(*held)].to(dtype).to(DEVICE) for each in (of_up, of_down)]
    biases = ExpertBiases(torch.randn(6, generator=generator).to(DEVICE), *held_biases, share=share)

    def mixed(kind):
        exact = ExpertBiases(biases.score, biases.gate_up.to(kind), biases.down.to(kind), share)
        chosen = route(x.to(kind), router.to(kind), experts, score_bias=biases.score)
        weights = (each.to(kind) for each in (gate_up, down))
        return mix_reference(x.to(kind), *chosen, *weights, first=held[0], gate=gate, biases=exact)

    logits = x.double() @ router.double().T + biases.score
    ours = mix_queued(x, logits.float(), gate_up, down, experts=experts, first=held[0], biases=biases)
    error, allowed = ((each - mixed(torch.float64)).abs().max() for each in (ours, mixed(dtype)))
    assert error <= 2 * allowed + (1e-5 if dtype == torch.float32 else 4e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("held", [(0, 8), (2, 7)], ids=str)
@pytest.mark.parametrize(("rows", "units", "hidden"), [(1000, 200, 392), (2048, 1408, 2048), (5000, 64, 128)])
def test_blocks_of_many_rows_do_what_the_reference_does(dtype, held, rows, units, hidden):
    check_queues(dtype, False, rows, 8, held, units, hidden, 3)


def test_pairs_are_copied_into_blocks_of_one_expert_and_back(monkeypatch):
    """The products stand in for the kernel, which runs on Hopper alone: of as many rows as a block says it has."""
    launched = []

    def products(x, w, out, which, *, gated):
        launched.append(gated)
        expert_of, rows_of, num_blocks = which
        assert out.shape[0] >= int(num_blocks) * grouped.BLOCK_ROWS
        for block, rows in enumerate(rows_of[: int(num_blocks)].tolist()):
            its = slice(block * grouped.BLOCK_ROWS, block * grouped.BLOCK_ROWS + rows)
            made = x[its].double() @ w[int(expert_of[block])].double().T  # exact, so that no row's place matters
            gate, up = made.chunk(2, -1)
            out[its] = torch.nn.functional.silu(gate) * up if gated else made

    monkeypatch.setattr(grouped, "supports", lambda *_: True)
    monkeypatch.setattr(grouped, "_launch", products)
    for held in ((0, 4), (1, 3)):
        check_queues(torch.float32, True, 600, 4, held, 12, 40, 2)
    assert launched == 2 * 2 * [True, False]


def check_queues(dtype, normalised, rows, num_experts, held, units, hidden, chosen):
    """Compare queues with the reference, in the rows' dtype and exactly; a rerun is equal."""
    x, router, gate_up, down = inputs(rows, rows, num_experts, units, hidden, dtype)
    experts, gate_up, down = of(num_experts, chosen, units, normalised), gate_up[slice(*held)], down[slice(*held)]
    weights, ids = route(x.double(), router.double(), experts)
    exact = mix_reference(x.double(), weights, ids, gate_up.double(), down.double(), first=held[0])
    plain = mix_reference(x, weights, ids, gate_up, down, first=held[0])
    logits = x.double() @ router.double().T
    ours = [mix_queued(x, logits.float(), gate_up, down, experts=experts, first=held[0]) for _ in range(2)]
    assert torch.equal(*ours)  # whatever the order of the queues
    assert ours[0].dtype == dtype
    error, allowed = ((each - exact).abs().max() for each in (ours[0], plain))
    assert error <= 2 * allowed + (1e-5 if dtype == torch.float32 else 4e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("held", [(0, 16), (0, 5), (5, 16)], ids=str)
@pytest.mark.parametrize(("rows", "units", "hidden"), [(1, 32, 512), (5, 40, 776), (17, 192, 2048), (64, 768, 520)])
def test_few_rows_go_through_every_expert_in_use(dtype, held, rows, units, hidden):
    x, router, gate_up, down = inputs(rows, rows, 16, units, hidden, dtype)
    experts, gate_up, down = of(16, 3, units), gate_up[slice(*held)], down[slice(*held)]
    assert can_stream(x, gate_up.flatten(0, 1))
    weights, ids = route(x.double(), router.double(), experts)
    exact = mix_reference(x.double(), weights, ids, gate_up.double(), down.double(), first=held[0])
    plain = mix_reference(x, weights, ids, gate_up, down, first=held[0])
    ours = [mixture(x, router, gate_up, down, experts=experts, first=held[0]) for _ in range(2)]
    assert torch.equal(*ours)
    error, allowed = ((each - exact).abs().max() for each in (ours[0].sum(0), plain))
    assert error <= 2 * allowed + 4e-3


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(
    ("rows", "units", "shared_units", "hidden"),
    [(1, 64, 128, 512), (17, 96, 40, 2048), (2, 352, 88, 520), (64, 200, 712, 512)],
)
def test_shared_experts_add_to_those_that_rows_choose(rows, units, shared_units, hidden, gated):
    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float32
    x, router, gate_up, down = inputs(rows, rows, 8, units, hidden, dtype)
    _, _, [shared_gate_up], [shared_down] = inputs(1, rows, 1, shared_units, hidden, dtype)
    experts = of(8, 3, units)
    weights, ids = route(x.double(), router.double(), experts)
    exact = mix_reference(x.double(), weights, ids, gate_up.double(), down.double(), first=0)
    gate, up = (x.double() @ shared_gate_up.double().T).chunk(2, -1)
    added = (torch.nn.functional.silu(gate) * up) @ shared_down.double().T
    shared_router = router[:1].flip(-1).contiguous() if gated else None
    exact += added if shared_router is None else added * (x.double() @ shared_router.double().T).sigmoid()
    shared = {"shared": (shared_gate_up, shared_down), "shared_router": shared_router}
    for pdl in (False, True) if DEVICE == "cuda" else (False,):
        ours = [mixture(x, router, gate_up, down, experts=experts, first=0, **shared, pdl=pdl) for _ in range(20)]
        assert all(torch.equal(each, ours[0]) for each in ours)
        assert len(ours[0]) > 1 or DEVICE == "cpu"
        torch.testing.assert_close(ours[0].double().sum(0), exact, rtol=1e-2, atol=1e-2 if DEVICE == "cuda" else 1e-4)


@pytest.mark.gpu
def test_few_rows_that_choose_no_expert_of_this_rank_add_nothing():
    x, _, gate_up, down = inputs(0, 4, 3, 64, 256, torch.bfloat16)
    router = torch.ones(8, 256, device=DEVICE, dtype=torch.bfloat16)
    router[5:] = -1
    assert not mixture(x.abs(), router, gate_up, down, experts=of(8, 2, 64), first=5).any()


@pytest.mark.parametrize("normalised", [True, False])
@pytest.mark.parametrize(("rows", "num_experts", "held"), [(1, 8, (0, 8)), (6, 5, (2, 5)), (64, 40, (10, 30))])
def test_experts_in_use_are_those_that_rows_chose(normalised, rows, num_experts, held):
    generator = torch.Generator().manual_seed(rows)
    x, router = torch.randn(rows, 16, generator=generator), torch.randn(num_experts, 16, generator=generator)
    experts = of(num_experts, 3, 4, normalised)
    weights, ids = route(x, router, experts)
    expected = torch.zeros(rows, num_experts).scatter(1, ids, weights)[:, slice(*held)]
    logits = (x @ router.T).to(DEVICE)
    summands = torch.stack((logits - 3.0, torch.full_like(logits, 3.0)))
    used = experts_in_use(summands, held[1] - held[0], experts, first=held[0])
    torch.testing.assert_close(used.row_weights.cpu(), expected.T, rtol=1e-4, atol=1e-6)
    assert used.ids[: int(used.count)].tolist() == expected.any(0).nonzero()[:, 0].tolist()


def test_what_ranks_add_makes_the_whole():
    """Experts split two ways and units of each split two ways; the last row's experts are all on one rank."""
    x, router, gate_up, down = inputs(3, 9, 6, 40, 32)
    router[4], router[5] = x[-1], 2 * x[-1]
    experts, total = of(6, 2, 40), torch.zeros_like(x)
    for held in (slice(0, 3), slice(3, 6)):
        for units in (slice(0, 24), slice(24, 40)):
            gate, up = gate_up[held].chunk(2, 1)
            share = torch.cat((gate[:, units], up[:, units]), 1).contiguous()
            part = down[held, :, units].contiguous()
            total += mix_queued(x, x @ router.T, share, part, experts=experts, first=held.start)
    whole = mixture(x, router, gate_up, down, experts=experts, first=0).sum(0)
    torch.testing.assert_close(total, whole, rtol=1e-4, atol=1e-5)


def test_no_rows_no_experts_and_no_units_add_nothing():
    x, router, gate_up, down = inputs(0, 4, 3, 16, 32)
    logits, experts = x @ router.T, of(3, 2, 16)
    assert mix_queued(x[:0], logits[:0], gate_up, down, experts=experts, first=0).shape == (0, 32)
    assert not mix_queued(x, logits, gate_up[:0], down[:0], experts=experts, first=3).any()
    assert not mix_queued(x, logits, gate_up[:, :0], down[:, :, :0], experts=experts, first=0).any()


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


@pytest.mark.parametrize("sigmoid", [False, True])
def test_many_rows_choose_the_experts_that_exact_scores_choose(sigmoid):
    """Scores rounded to bfloat16 choose another set in some percent of rows; float32 sums differ by rounding alone."""
    x, router, _, _ = inputs(7, 2000, 64, 8, 512, torch.bfloat16)
    experts = replace(of(64, 6, 8), sigmoid=sigmoid)
    bias = torch.zeros(64, device=DEVICE) if sigmoid else None
    exact = (x.double() @ router.double().T).topk(6, -1).indices.sort(-1).values
    many = route(x, router, experts, bias)[1].sort(-1).values
    few = torch.cat([route(some, router, experts, bias)[1] for some in x.split(8)]).sort(-1).values
    rounded = (x.float() @ router.float().T).bfloat16().topk(6, -1).indices.sort(-1).values
    assert (rounded != exact).any(-1).float().mean() > 0.005  # the test can see it
    assert (many != exact).any(-1).float().mean() < 0.001
    assert (many != few).any(-1).float().mean() < 0.001
