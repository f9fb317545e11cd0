"""Experts as gpt-oss has them: with biases, gates clamped, their matrices stacked, turned, gate and up in turn.

in the file                              on a rank
gate_up_proj [E, h, 2 F], g0 u0 g1 ...   experts_gate_up [e * 2 f, h]: of each expert gate rows, then up rows
gate_up_proj_bias [E, 2 F]               experts_gate_up_bias [e * 2 f]
down_proj [E, F, h]                      experts_down [e * h, f]
down_proj_bias [E, h]                    experts_down_bias [e * h], whole on each of the TPF ranks
"""

from .parts import Part, Piece, Weight
from .spec import ModelSpec

Shapes = dict[str, tuple[int, ...]]


def clamped_experts_weights(spec: ModelSpec, layer: int, part: Part) -> dict[str, Weight]:
    """Return a rank's weights of the experts of a layer, by role; see the module. Router and its bias are whole."""
    h, names, (start, stop) = spec.hidden_size, spec.names, part.expert_ffn
    num_held, units, pairs = part.experts[1] - part.experts[0], stop - start, (2 * start, 2 * stop)

    def pieces(name: str) -> list[Piece]:
        file = name.format(layer=layer)
        return [
            Piece(file, pairs, index=each, turned=True, parity=odd) for each in range(*part.experts) for odd in (0, 1)
        ]

    def of_down(name: str, cols: tuple[int, int] | None) -> tuple[Piece, ...]:
        file = name.format(layer=layer)
        return tuple(Piece(file, cols=cols, index=each, turned=True) for each in range(*part.experts))

    num_experts = spec.expert_sizes[0]
    return {
        "router": Weight((num_experts, h), (Piece(names.router.format(layer=layer)),)),
        "score_bias": Weight((num_experts,), (Piece(names.score_bias.format(layer=layer)),), exact=True),
        "experts_gate_up": Weight((num_held * 2 * units, h), tuple(pieces(names.experts_gate_up))),
        "experts_gate_up_bias": Weight((num_held * 2 * units,), tuple(pieces(names.experts_gate_up_bias))),
        "experts_down": Weight((num_held * h, units), of_down(names.experts_down, part.expert_ffn)),
        "experts_down_bias": Weight((num_held * h,), of_down(names.experts_down_bias, None)),
    }


def clamped_experts_shapes(spec: ModelSpec) -> Shapes:
    """Return the shapes of the checkpoint tensors of a layer's experts and router, by their names' templates."""
    h, names, (num_experts, units) = spec.hidden_size, spec.names, spec.expert_sizes
    return {
        names.router: (num_experts, h),
        names.score_bias: (num_experts,),
        names.experts_gate_up: (num_experts, h, 2 * units),
        names.experts_gate_up_bias: (num_experts, 2 * units),
        names.experts_down: (num_experts, units, h),
        names.experts_down_bias: (num_experts, h),
    }
