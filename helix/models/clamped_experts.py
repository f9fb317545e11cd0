"""Experts as gpt-oss has them: with biases, gates clamped, their matrices stacked, turned, gate and up in turn.

What the file has, and a rank of it:

    gate_up_proj [E, h, 2 F], g0 u0 g1 ...   experts_gate_up [e * 2 f, h]: of each expert gate rows, then up rows
    gate_up_proj_bias [E, 2 F]               experts_gate_up_bias [e * 2 f]
    down_proj [E, F, h]                      experts_down [e * h, f]
    down_proj_bias [E, h]                    experts_down_bias [e * h], whole on each of the TPF ranks

In MXFP4 matrices are not turned: gate_up_proj_blocks [E, 2 F, h / 32, 16], gate_up_proj_scales [E, 2 F, h / 32].
"""

from .fp4 import BLOCKS, GROUP, SCALES
from .parts import Part, Piece, Weight
from .spec import ModelSpec

Shapes = dict[str, tuple[int, ...]]


def clamped_experts_weights(spec: ModelSpec, layer: int, part: Part) -> dict[str, Weight]:
    """Return a rank's weights of the experts of a layer, by role; see the module. Router and its bias are whole."""
    h, names, (start, stop) = spec.hidden_size, spec.names, part.expert_ffn
    num_held, units, pairs = part.experts[1] - part.experts[0], stop - start, (2 * start, 2 * stop)
    turned, end = (False, BLOCKS) if spec.experts is not None and spec.experts.in_4_bits else (True, "")

    def pieces(name: str) -> list[Piece]:
        file = name.format(layer=layer)
        return [
            Piece(file, pairs, index=each, turned=turned, parity=odd) for each in range(*part.experts) for odd in (0, 1)
        ]

    def of_down(name: str, cols: tuple[int, int] | None) -> tuple[Piece, ...]:
        file = name.format(layer=layer)
        return tuple(Piece(file, cols=cols, index=each, turned=turned) for each in range(*part.experts))

    num_experts = spec.expert_sizes[0]
    return {
        "router": Weight((num_experts, h), (Piece(names.router.format(layer=layer)),)),
        "score_bias": Weight((num_experts,), (Piece(names.score_bias.format(layer=layer)),), exact=True),
        "experts_gate_up": Weight((num_held * 2 * units, h), tuple(pieces(names.experts_gate_up + end))),
        "experts_gate_up_bias": Weight((num_held * 2 * units,), tuple(pieces(names.experts_gate_up_bias))),
        "experts_down": Weight((num_held * h, units), of_down(names.experts_down + end, part.expert_ffn)),
        "experts_down_bias": Weight((num_held * h,), of_down(names.experts_down_bias, None)),
    }


def clamped_experts_shapes(spec: ModelSpec) -> Shapes:
    """Return the shapes of the checkpoint tensors of a layer's experts and router, by their names' templates."""
    h, names, (num_experts, units) = spec.hidden_size, spec.names, spec.expert_sizes
    shapes: Shapes = {
        names.router: (num_experts, h),
        names.score_bias: (num_experts,),
        names.experts_gate_up_bias: (num_experts, 2 * units),
        names.experts_down_bias: (num_experts, h),
    }
    for name, rows, columns in ((names.experts_gate_up, 2 * units, h), (names.experts_down, h, units)):
        if spec.experts is not None and spec.experts.in_4_bits:
            groups = (num_experts, rows, columns // GROUP)
            shapes |= {name + BLOCKS: (*groups, GROUP // 2), name + SCALES: groups}
        else:
            shapes[name] = (num_experts, columns, rows)
    return shapes
