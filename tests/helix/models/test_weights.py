"""The parts of a model that the ranks of a layout keep: every element once, in the right order."""

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from helix.models.families import load_spec
from helix.models.parts import Part, Piece, Weight
from helix.models.spec import ModelSpec
from helix.models.weights import layer_weights, model_weights, tensor_shapes, whole
from parallel.layout import split_evenly

FAMILIES = ("glm", "llama", "qwen2", "qwen3", "qwen3_moe")


@pytest.fixture(params=FAMILIES)
def spec(request: pytest.FixtureRequest, tmp_path: Path) -> ModelSpec:
    return make_spec(tmp_path, request.param)


def make_spec(folder: Path, family: str, **settings: Any) -> ModelSpec:
    config = {
        "model_type": family,
        "hidden_size": 20,
        "num_hidden_layers": 2,
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
        "head_dim": 8,
        "intermediate_size": 14,
        "vocab_size": 30,
        "pad_token_id": 0,
        "hidden_act": "silu",
        **settings,
    }
    if family == "llama":
        config["hidden_size"] = 24
    if family == "qwen3_moe":
        config |= {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 9, "decoder_sparse_step": 2}
    (folder / "config.json").write_text(json.dumps(config))
    return load_spec(folder)


def ranges(*bounds: int) -> list[tuple[int, int]]:
    return list(pairwise(bounds))


# One list of parts a layout, a part for each rank. Heads 12, KV heads 4, feed-forward 14, vocabulary 30; experts, where
# there are any, 5 of 9 units.
def parts(tpa: list[int], kvp: int, ffn: list[int], vocab: list[int], ep: int = 1) -> list[Part]:
    out = []
    num_ranks = (len(tpa) - 1) * kvp
    for rank in range(num_ranks):
        kv = ranges(*tpa)[rank // kvp]
        first, last = kv[0] * 3, kv[1] * 3
        cuts = [first + (last - first) * i // kvp for i in range(kvp + 1)]  # uneven where kvp does not divide
        experts, units = split_evenly(5, ep, rank % ep), split_evenly(9, num_ranks // ep, rank // ep)
        heads = ((first, last), kv, ranges(*cuts)[rank % kvp])
        out.append(Part(*heads, ranges(*ffn)[rank], ranges(*vocab)[rank], experts, units))
    return out


LAYOUTS = {
    "one rank": parts([0, 4], 1, [0, 14], [0, 30]),
    "tpa 4": parts([0, 1, 2, 3, 4], 1, [0, 4, 8, 11, 14], [0, 8, 16, 23, 30]),
    "kvp 2 x tpa 2": parts([0, 2, 4], 2, [0, 4, 8, 11, 14], [0, 8, 16, 23, 30], ep=2),
    "kvp 2 x tpa 2, ep 4": parts([0, 2, 4], 2, [0, 4, 8, 11, 14], [0, 8, 16, 23, 30], ep=4),
    "kvp 5, empty feed-forward and vocabulary ranges": parts([0, 4], 5, [0, 7, 7, 14, 14, 14], [0, 0, 30, 30, 30, 30]),
    "tpa 3, uneven": parts([0, 1, 2, 4], 1, [0, 1, 13, 14], [0, 29, 30, 30]),
    "kvp 7, more ranks than heads of a group": parts([0, 2, 4], 7, [0, *[1] * 13, 14], [0, *[2] * 13, 30]),
}


def count(shapes: dict[str, tuple[int, ...]], pieces: list[Piece]) -> dict[str, torch.Tensor]:
    """Count how often each element of each tensor is taken."""
    counts = {name: torch.zeros(shape, dtype=torch.int32) for name, shape in shapes.items()}
    for piece in pieces:
        taken = counts[piece.name][slice(*piece.rows) if piece.rows else slice(None)]
        if piece.cols:
            taken = taken[:, slice(*piece.cols)]
        taken += 1
    return counts


def fill(weight: Weight, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    stack = []
    for piece in weight.pieces:
        rows = tensors[piece.name][slice(*piece.rows) if piece.rows else slice(None)]
        stack.append(rows[:, slice(*piece.cols)] if piece.cols else rows)
    return torch.cat(stack)


def all_weights(spec: ModelSpec, part: Part) -> dict[str, Weight]:
    layers = {
        f"{n}.{role}": weight for n in range(spec.num_layers) for role, weight in layer_weights(spec, n, part).items()
    }
    return model_weights(spec, part) | layers


@pytest.mark.parametrize("layout", LAYOUTS)
def test_ranks_tile_every_tensor_exactly_once(spec: ModelSpec, layout: str) -> None:
    shapes = tensor_shapes(spec)
    ranks = LAYOUTS[layout]
    kvp = sum(part.kv_heads == ranks[0].kv_heads for part in ranks)
    every_rank = ("embedding", "final_norm", "input_norm", "post_norm", "q_norm", "k_norm", "router")
    copies = {role: len(ranks) for role in every_rank} | {"qkv": kvp, "qkv_bias": kvp}
    by_role: dict[str, list[Piece]] = {}
    for part in ranks:
        for role, weight in all_weights(spec, part).items():
            by_role.setdefault(role, []).extend(weight.pieces)
    seen: set[str] = set()
    for role, pieces in by_role.items():
        names = {piece.name for piece in pieces}
        wanted = copies.get(role.rpartition(".")[2], 1)
        for name, counts in count({name: shapes[name] for name in names}, pieces).items():
            assert (counts == wanted).all(), (role, name, counts.unique())
        assert not names & seen
        seen |= names
    assert seen == set(shapes)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_shape_is_that_of_the_stacked_pieces(spec: ModelSpec, layout: str) -> None:
    tensors = {name: torch.zeros(shape) for name, shape in tensor_shapes(spec).items()}
    for part in LAYOUTS[layout]:
        for role, weight in all_weights(spec, part).items():
            assert fill(weight, tensors).shape == weight.shape, role


def test_qkv_rows_are_queries_then_keys_then_values(spec: ModelSpec) -> None:
    h, D = spec.hidden_size, spec.head_dim
    part = Part((3, 9), (1, 3), (3, 6), (2, 5), (0, 1))
    prefix = "model.layers.1.self_attn."
    weights = layer_weights(spec, 1, part)
    assert weights["qkv"].shape == ((6 + 2 + 2) * D, h)
    assert weights["qkv"].pieces == (
        Piece(prefix + "q_proj.weight", (3 * D, 9 * D)),
        Piece(prefix + "k_proj.weight", (D, 3 * D)),
        Piece(prefix + "v_proj.weight", (D, 3 * D)),
    )
    assert weights["o"] == Weight((h, 3 * D), (Piece(prefix + "o_proj.weight", cols=(3 * D, 6 * D)),))
    assert ("qkv_bias" in weights) == spec.qkv_bias
    assert ("q_norm" in weights) == ("k_norm" in weights) == spec.qk_norm
    if spec.qkv_bias:
        assert [piece.rows for piece in weights["qkv_bias"].pieces] == [(3 * D, 9 * D), (D, 3 * D), (D, 3 * D)]


def test_fused_and_split_gates_give_the_same_parameter(tmp_path: Path) -> None:
    split, fused = make_spec(tmp_path, "qwen2"), make_spec(tmp_path, "glm")
    gate, up = torch.randn(14, 20), torch.randn(14, 20)
    mlp = "model.layers.0.mlp."
    part = Part((0, 1), (0, 1), (0, 1), (3, 8), (0, 1))
    left = fill(layer_weights(split, 0, part)["gate_up"], {mlp + "gate_proj.weight": gate, mlp + "up_proj.weight": up})
    right = fill(layer_weights(fused, 0, part)["gate_up"], {mlp + "gate_up_proj.weight": torch.cat((gate, up))})
    assert torch.equal(left, right)
    assert torch.equal(left, torch.cat((gate[3:8], up[3:8])))


def test_a_rank_keeps_its_units_of_its_experts_and_all_of_the_router(tmp_path: Path) -> None:
    spec = make_spec(tmp_path, "qwen3_moe")
    part = Part((0, 1), (0, 1), (0, 1), (3, 8), (0, 1), experts=(2, 4), expert_ffn=(4, 9))
    assert {"gate_up", "down"} < set(layer_weights(spec, 0, part))  # every second layer has experts
    weights, mlp = layer_weights(spec, 1, part), "model.layers.1.mlp."
    assert not {"gate_up", "down"} & set(weights)
    assert weights["router"] == Weight((5, 20), (Piece(mlp + "gate.weight"),))
    gates = [Piece(f"{mlp}experts.{e}.{each}_proj.weight", (4, 9)) for e in (2, 3) for each in ("gate", "up")]
    assert weights["experts_gate_up"] == Weight((2 * 2 * 5, 20), tuple(gates))
    downs = [Piece(f"{mlp}experts.{e}.down_proj.weight", cols=(4, 9)) for e in (2, 3)]
    assert weights["experts_down"] == Weight((2 * 20, 5), tuple(downs))


def test_tied_head_takes_its_rows_from_the_embedding(tmp_path: Path) -> None:
    spec = make_spec(tmp_path, "llama", tie_word_embeddings=True)
    part = Part((0, 1), (0, 1), (0, 1), (0, 1), (10, 17))
    assert model_weights(spec, part)["lm_head"] == Weight((7, 24), (Piece("model.embed_tokens.weight", (10, 17)),))
    assert "lm_head.weight" not in tensor_shapes(spec)


def test_whole_part_covers_the_model(spec: ModelSpec) -> None:
    expected = LAYOUTS["one rank"][0]
    assert whole(spec) == (expected if spec.experts else replace(expected, experts=(0, 0), expert_ffn=(0, 0)))


def test_reversed_range_is_refused() -> None:
    with pytest.raises(ValueError, match=r"part.ffn = \(5, 2\), must be a half-open range"):
        Part((0, 1), (0, 1), (0, 1), (5, 2), (0, 1))
