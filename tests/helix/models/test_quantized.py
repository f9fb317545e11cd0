"""Quantised matrices: slices that begin and end anywhere, against what the whole matrix means in float64."""

from dataclasses import replace

import pytest
import torch

from helix.models.chunk_product import quantize_rows
from helix.models.decoder import Decoder
from helix.models.experts import mix_queued, mix_reference, mixture
from helix.models.gate import silu_mul_kernel
from helix.models.linear import (
    _stages_of,
    _tile_of,
    can_stream,
    feed_forward,
    gated_linear,
    linear,
    multiplies_in_8_bits,
    split_linear,
)
from helix.models.quantization import Quantization, num_blocks
from helix.models.quantized import (
    BLOCK,
    Quantized,
    in_stored_order,
    product,
    quantize,
    quantize_blocks,
    widen_blocks,
    widen_slice,
)
from helix.models.rope import RopeSpec
from helix.models.routing import route
from helix.models.spec import Experts, ModelSpec
from parallel.all_reduce_norm import AllReduceNorm
from parallel.eight_bits import RowsInEightBits
from parallel.grid import HelixGrid
from parallel.layout import Layout

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TRITON_ROUNDS_448 = DEVICE == "cpu"  # to 352 or 384, in the interpreter


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
    left = columns[0] // BLOCK
    its = grid[torch.arange(*rows) // BLOCK, left : left + num_blocks(*columns)]
    out.put(0, values[slice(*rows), slice(*columns)], its.T)
    return out


@pytest.mark.parametrize("offset", [0, 32, 96, 100])
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
        one = downs[1][torch.arange(160) // BLOCK, :2].T
        down.put(expert * 160, downs[0][:160, 100:172], one * (expert + 1))
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


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_byte_is_widened_exactly(dtype):
    """One row of x for each of 64 columns: products are the values themselves, subnormal ones too."""
    codes = torch.arange(256, dtype=torch.uint8)
    codes[[127, 255]] = 0  # NaN
    w = Quantized.empty(256, (48, 148), DEVICE)
    bytes_of = (codes[:, None].int() + torch.arange(100)[None, :] * 7) % 256
    bytes_of[(bytes_of & 127) == 127] = 1
    w.put(0, bytes_of.to(torch.uint8), torch.tensor([[1.0], [2.0]]).expand(2, 256))
    x = torch.zeros(64, 104, dtype=dtype, device=DEVICE)[:, :100]
    x[torch.arange(64), 30 + torch.arange(64)] = 1.0
    assert can_stream(x, w)
    assert torch.equal(linear(x, w).double(), (w.widen(0, 256, torch.float64)[:, 30:94].T))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rows", [1, 2, 8, 9, 17, 33, 64])
@pytest.mark.parametrize(
    ("width", "columns"), [(4608, (0, 4096)), (4096, (1712, 3424)), (96, (96, 192)), (200, (80, 2128))]
)
def test_streamed_rows_obey_the_tolerance_rule(dtype, rows, width, columns):
    values, grid = blocks_of((width + 36, columns[1]), seed=rows)
    exact_w = widen_blocks(values, grid)[36:, slice(*columns)].double() * 0.02
    w = cut(values, grid * 0.02, (36, 36 + width), columns)
    x = torch.randn(rows, columns[1] - columns[0], generator=torch.Generator().manual_seed(rows)).to(dtype)
    wide = exact_w.to(dtype).to(DEVICE)
    exact = x.double() @ exact_w.T
    gate, up = exact.chunk(2, -1)
    x = x.to(DEVICE)
    assert can_stream(x, w)
    plain = torch.nn.functional.linear(x, wide)
    plain_gate, plain_up = plain.chunk(2, -1)
    silu = torch.nn.functional.silu
    for ours, theirs, wanted in (
        (linear(x, w), plain, exact),
        (split_linear(x, w).sum(0), plain, exact),
        (gated_linear(x, w), silu(plain_gate) * plain_up, silu(gate) * up),
    ):
        error, allowed = ((each.cpu().double() - wanted).abs().max() for each in (ours, theirs))
        assert error <= 2 * allowed + 1e-5 * wanted.abs().max()
    together, alone = (split_linear(each, w, exact=True) for each in (x, x[-1:].contiguous()))
    assert torch.equal(together[:, -1:], alone)  # whoever shares the batch
    assert torch.equal(split_linear(x, w, exact=True), together)


@pytest.mark.parametrize("rows", [1, 16, 32, 33, 64])
@pytest.mark.parametrize("turns", [3, 40])
def test_stages_fill_a_processors_memory_and_no_more(rows, turns):
    bn, most = _tile_of(rows)
    x_bytes, w_bytes = max(8, 1 << (rows - 1).bit_length()) * BLOCK * 2, bn * (BLOCK + 4)
    for neighbours in range(2, most + 1):
        stages, x_stages = _stages_of(bn, x_bytes, neighbours, turns)
        assert 2 <= x_stages <= stages
        taken = stages * w_bytes + x_stages * x_bytes + 512  # barriers, and what warps are handed
        assert neighbours * (taken + 1024) <= 228 * 1024 and taken + 1024 <= 227 * 1024
        assert neighbours * (taken + 1024 + w_bytes) > 228 * 1024


@pytest.mark.gpu
@pytest.mark.parametrize("held", [(0, 16), (5, 16)], ids=str)
@pytest.mark.parametrize(("rows", "units", "hidden"), [(1, 64, 512), (5, 40, 776), (17, 192, 2048), (64, 768, 520)])
def test_few_rows_go_through_every_quantised_expert_in_use(held, rows, units, hidden):
    generator = torch.Generator().manual_seed(rows)
    num = held[1] - held[0]
    x = torch.randn(rows, hidden, generator=generator).to(torch.bfloat16).to(DEVICE)
    router = (torch.randn(16, hidden, generator=generator) * hidden**-0.5).to(torch.bfloat16).to(DEVICE)
    gate_up, down = (
        quantize((torch.randn(num * n, k, generator=generator) * k**-0.5).to(DEVICE)).unflatten(0, (num, n))
        for n, k in ((2 * units, hidden), (hidden, units))
    )
    down = replace(down, shift=64, scales=down.scales[[*range(len(down.scales)), -1]].contiguous())
    wide = [torch.stack([w[e].widen(0, w.shape[1], torch.float64) for e in range(num)]) for w in (gate_up, down)]
    experts = Experts(num_experts=16, num_chosen=3, ffn_size=units, normalised=True)
    weights, ids = route(x.double(), router.double(), experts)
    exact = mix_reference(x.double(), weights, ids, *wide, first=held[0])
    plain = mix_reference(x, weights, ids, *(w.to(torch.bfloat16) for w in wide), first=held[0])
    assert can_stream(x, gate_up)
    ours = [mixture(x, router, gate_up, down, experts=experts, first=held[0]) for _ in range(2)]
    assert torch.equal(*ours)
    error, allowed = ((each - exact).abs().max() for each in (ours[0].sum(0), plain))
    assert error <= 2 * allowed + 4e-3


@pytest.mark.parametrize(("width", "start"), [(300, 44), (512, 0), (96, 96)])
def test_rows_are_quantised_in_the_blocks_of_the_whole_matrix(width, start):
    """In the order of the matrix's columns, so that products of what is stored are products of what is meant."""
    generator = torch.Generator().manual_seed(width)
    w = cut(*blocks_of((40, start + width), seed=width), (0, 40), (start, start + width))
    x = torch.randn(70, width, generator=generator) * (torch.rand(width, generator=generator) * 6 - 3).exp2()
    row_of = torch.randint(-1, 70, (33,), generator=generator, dtype=torch.int32)
    for powers, chosen in ((False, None), (True, None), (True, row_of.to(DEVICE))):
        values, scales = quantize_rows(x.to(torch.bfloat16).to(DEVICE), replace(w, powers_of_two=powers), chosen)
        wide = widen_slice(values, scales, w.shift - w.lead, torch.float32).cpu()
        rows = torch.arange(70) if chosen is None else row_of
        wide, rows = wide[rows >= 0], rows[rows >= 0]
        meant = in_stored_order(x, w.shift)[rows]
        assert (wide - meant).abs().max() <= meant.abs().max() / (4 if TRITON_ROUNDS_448 else 16)
        assert (wide - meant).abs().mean() <= 0.04 * meant.abs().mean()
        assert not powers or torch.equal(scales.log2(), scales.log2().round())
        packed = torch.cat((x, x.flip(0)), 1).to(torch.bfloat16).to(DEVICE)
        units = quantize_rows(silu_mul_kernel(packed), replace(w, powers_of_two=powers), chosen)
        gated = quantize_rows(packed, replace(w, powers_of_two=powers), chosen, gated=True)
        for ours, wanted in zip(gated, units, strict=True):
            seen = slice(None) if chosen is None else chosen >= 0
            ours, wanted = (each.mT[seen] if each.dtype == torch.float32 else each.view(torch.uint8)[seen]
                            for each in (ours, wanted))  # fmt: skip
            assert torch.equal(ours, wanted)


@pytest.mark.parametrize(("hidden", "rows"), [(4096, 70), (384, 5)])
@pytest.mark.parametrize("powers", [False, True])
def test_rows_that_are_normalised_in_8_bits_are_those_of_two_steps(hidden, rows, powers):
    generator = torch.Generator().manual_seed(rows)
    x, residual, weight = (torch.randn(shape, generator=generator).to(torch.bfloat16).to(DEVICE)
                           for shape in ((rows, hidden), (rows, hidden), (hidden,)))  # fmt: skip
    w = replace(Quantized.empty(8, (0, hidden), DEVICE), powers_of_two=powers)
    norm = AllReduceNorm(None, hidden_size=hidden, dtype=x.dtype, device=x.device)
    streams = [residual.clone() for _ in range(2)]
    normed = torch.empty_like(x)
    norm._add_norm(x, streams[0], weight, normed, None, 1e-5)
    narrow = norm.in_8_bits(x, streams[1], weight, 1e-5, powers_of_two=powers)
    values, scales = quantize_rows(normed, w)
    assert torch.equal(*streams)
    # on a GPU squares are added up in another order, so that a few elements in a million are rounded the other way
    few = 0.0 if DEVICE == "cpu" else 1e-3
    assert (narrow.values.view(torch.uint8) != values.view(torch.uint8)).float().mean() <= few
    assert (narrow.scales != scales).float().mean() <= few
    torch.testing.assert_close(narrow.scales, scales, rtol=1e-2, atol=0.0)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("rows", "width", "columns"), [(65, 96, (96, 256)), (300, 200, (44, 1044)), (129, 4608, (0, 4096))]
)
def test_chunks_are_products_of_what_was_quantised(rows, width, columns):
    w = cut(*blocks_of((width, columns[1]), seed=rows), (0, width), columns)
    x = torch.randn(rows, columns[1] - columns[0], device=DEVICE).to(torch.bfloat16)
    bias = torch.randn(width, device=DEVICE).to(torch.bfloat16)
    assert multiplies_in_8_bits(w, x)
    values, scales = quantize_rows(x, w)
    exact = widen_slice(values, scales, w.shift - w.lead, torch.float64) @ w.widen_stored(0, width, torch.float64).T
    gate, up = exact.chunk(2, -1)
    for ours, wanted in (
        (linear(x, w, chunk=True), exact),
        (split_linear(x, w, bias, chunk=True)[0], exact + bias.double()),
        (gated_linear(x, w, chunk=True), torch.nn.functional.silu(gate) * up),
    ):
        assert (ours.double() - wanted).abs().max() <= 6e-3 * wanted.abs().max()
    assert torch.equal(linear(x, w, chunk=True), linear(x, w, chunk=True))
    down = cut(*blocks_of((width, width), seed=rows), (0, 96), (0, width // 2))
    wanted = split_linear(gated_linear(x, w, chunk=True), down, chunk=True)
    assert torch.equal(feed_forward(x, w, down, chunk=True), wanted)
    if not w.shift:
        narrow = RowsInEightBits(values, scales, x.dtype)
        assert torch.equal(feed_forward(narrow, w, down, chunk=True), wanted)
        assert torch.equal(split_linear(narrow, w, bias, chunk=True), split_linear(x, w, bias, chunk=True))
    assert torch.equal(linear(x, w), product(x, w))  # rows that decode are not quantised


@pytest.mark.gpu
@pytest.mark.parametrize(("rows", "units", "hidden"), [(70, 64, 512), (300, 192, 776), (2000, 768, 520)])
def test_queues_of_experts_are_worked_off_in_8_bits(rows, units, hidden):
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, hidden, generator=generator).to(torch.bfloat16).to(DEVICE)
    logits = torch.randn(rows, 16, generator=generator).to(DEVICE)
    gate_up, down = (
        quantize((torch.randn(11 * n, k, generator=generator) * k**-0.5).to(DEVICE)).unflatten(0, (11, n))
        for n, k in ((2 * units, hidden), (hidden, units))
    )
    wide = [torch.stack([w[e].widen(0, w.shape[1], torch.float64) for e in range(11)]) for w in (gate_up, down)]
    experts = Experts(num_experts=16, num_chosen=3, ffn_size=units, normalised=True)
    weights, ids = logits.softmax(-1).topk(3)
    exact = mix_reference(x.double(), weights.double() / weights.sum(-1, keepdim=True), ids, *wide, first=5)
    assert multiplies_in_8_bits(gate_up, x) and multiplies_in_8_bits(down, x)
    ours = [mix_queued(x, logits, gate_up, down, experts=experts, first=5, chunk=True) for _ in range(2)]
    assert torch.equal(*ours)
    error = (ours[0] - exact).square().mean().sqrt() / exact.square().mean().sqrt()
    assert error <= 0.06  # rows quantised twice


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
