"""Quantised matrices: slices that begin and end anywhere, against what the whole matrix means in float64."""

import pytest
import torch

from helix.models.decoder import Decoder
from helix.models.experts import mix_queued, mix_reference
from helix.models.linear import gated_linear, linear, split_linear
from helix.models.quantization import Quantization, num_blocks
from helix.models.quantized import BLOCK, Quantized, quantize_blocks, widen_blocks
from helix.models.spec import Experts, ModelSpec, RopeSpec
from parallel.grid import HelixGrid
from parallel.layout import Layout

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def blocks_of(shape, seed=0):
    """A random matrix's values and the scales of its blocks, which differ widely."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(shape, generator=generator)
    far = torch.rand(shape[0] // BLOCK + 1, shape[1] // BLOCK + 1, generator=generator) * 6 - 3
    far = far.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
    return quantize_blocks(w * far.exp2()[: shape[0], : shape[1]])


def cut(values, grid, rows, columns):
    """The slice of a whole matrix that a rank would keep."""
    out = Quantized.empty(rows[1] - rows[0], columns, DEVICE)
    out.values.copy_(values[slice(*rows), slice(*columns)])
    left = columns[0] // BLOCK
    its = grid[torch.arange(*rows) // BLOCK, left : left + num_blocks(*columns)]
    out.scales.copy_(its.T)
    return out


@pytest.mark.parametrize("offset", [0, 32, 100])
@pytest.mark.parametrize("dtype", [torch.float32] if DEVICE == "cpu" else [torch.bfloat16, torch.float32], ids=str)
def test_any_width_and_offset_equals_the_float64_product(dtype, offset):
    values, grid = blocks_of((640, 1024), seed=offset)
    whole = widen_blocks(values, grid).double()
    generator = torch.Generator().manual_seed(offset)
    for width in range(64, 513, 32):
        rows, columns = (offset, offset + width), (3 * offset, 3 * offset + width + 32)
        x = torch.randn(5, width + 32, generator=generator).to(dtype)
        bias = torch.randn(width, generator=generator).to(dtype)
        w = cut(values, grid, rows, columns)
        exact = x.double() @ whole[slice(*rows), slice(*columns)].T
        scale = exact.abs().max()
        tolerance = 1e-5 if dtype == torch.float32 else 2e-2
        x, bias = x.to(DEVICE), bias.to(DEVICE)
        gate, up = exact.chunk(2, -1)
        pairs = [
            (linear(x, w), exact),
            (split_linear(x, w, bias).sum(0), exact + bias.cpu().double()),
            (gated_linear(x, w), torch.nn.functional.silu(gate) * up),
        ]
        for index, (ours, wanted) in enumerate(pairs):
            assert (ours.cpu().double() - wanted).abs().max() <= tolerance * scale ** (1 + (index == 2)), (width, index)


@pytest.mark.parametrize("rows", [3, 80])
def test_queues_of_experts_widen_what_the_reference_widens(rows):
    generator = torch.Generator().manual_seed(rows)
    x, logits = 0.02 * torch.randn(rows, 160, generator=generator), torch.randn(rows, 4, generator=generator)
    ups, downs = blocks_of((4 * 300, 160)), blocks_of((160, 400))
    gate_up = cut(*ups, (40, 40 + 4 * 2 * 72), (0, 160)).unflatten(0, (4, -1))
    down = Quantized.empty(4 * 160, (100, 172), DEVICE)
    for expert in range(4):
        one = cut(*downs, (0, 160), (100, 172))
        down.values[expert * 160 : (expert + 1) * 160] = one.values
        down.scales[:, expert * 160 : (expert + 1) * 160] = one.scales * (expert + 1)
    down = down.unflatten(0, (4, -1))
    wide = [torch.stack([w[e].widen(0, w.shape[1], torch.float32) for e in range(4)]) for w in (gate_up, down)]
    experts = Experts(num_experts=4, num_chosen=2, ffn_size=72, normalised=True)
    weights, ids = logits.softmax(-1).topk(2)
    weights = weights / weights.sum(-1, keepdim=True)
    exact = mix_reference(x, weights, ids, *(w.cpu() for w in wide), first=0)
    on_device = x.to(DEVICE), logits.to(DEVICE)
    ours = mix_queued(*on_device, gate_up, down, experts=experts, first=0)
    assert (ours.cpu() - exact).abs().max() <= 1e-5 * exact.abs().max()
    plain = mix_reference(on_device[0], weights.to(DEVICE), ids.to(DEVICE), gate_up, down, first=0)
    assert (plain.cpu() - exact).abs().max() <= 1e-5 * exact.abs().max()


def test_a_quantised_model_takes_little_more_than_half_the_bytes():
    """Padding and scales included, also where no rank's share of anything is a multiple of 128."""
    spec = ModelSpec(
        family="glm", num_layers=1, hidden_size=2048, num_heads=24, num_kv_heads=2, head_dim=64, ffn_size=3424,
        vocab_size=1000, rms_eps=1e-5, qkv_bias=True, qk_norm=False, tied_embeddings=False, max_position=1024,
        rope=RopeSpec(torch.ones(4), 1.0, True, 8),
    )  # fmt: skip
    quantised = ModelSpec(
        **{name: getattr(spec, name) for name in spec.__dataclass_fields__} | {"quantization": Quantization()}
    )
    for layout in (Layout(), Layout(kvp=3), Layout(kvp=3, tpa=2)):
        for rank in range(layout.world_size):
            grid = HelixGrid(layout, rank, None, None)
            plain, ours = (
                Decoder(each, grid, dtype=torch.bfloat16, device=torch.device("cpu"), attention=None).layer_bytes
                for each in (spec, quantised)
            )
            assert ours <= 0.55 * plain
