"""A head beside a model that predicts one token further: EAGLE-3 (arXiv 2503.01840), of models of Llama's kind.

It is one layer whose input is twice as wide: the token's embedding, and a state. That is made of the model's residual
stream before three of its layers, by one matrix; of rows that it drafted itself it is the layer's own stream. It knows
the most frequent tokens alone, and maps them to the model's.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from attention.rows import Rows
from parallel.grid import HelixGrid
from parallel.sharded_argmax import ShardedArgmax

from .checkpoint import Checkpoint
from .config_files import find_config, read_json
from .families import spec_of
from .linear import linear
from .next_decoder import NextDecoder
from .parts import Part, Piece, Weight
from .spec import ModelSpec
from .weight_names import WeightNames
from .weights import layer_weights, part_of

FAMILIES = ("llama", "qwen3")
SETTING = "speculative.path"
_NAMES = WeightNames(
    input_norm="midlayer.input_layernorm.weight",
    post_norm="midlayer.post_attention_layernorm.weight",
    q="midlayer.self_attn.q_proj.weight",
    k="midlayer.self_attn.k_proj.weight",
    v="midlayer.self_attn.v_proj.weight",
    o="midlayer.self_attn.o_proj.weight",
    gate="midlayer.mlp.gate_proj.weight",
    up="midlayer.mlp.up_proj.weight",
    down="midlayer.mlp.down_proj.weight",
    next_hidden_norm="midlayer.hidden_norm.weight",
    next_input="fc.weight",
    final_norm="norm.weight",
    lm_head="lm_head.weight",
)
_TO_MODEL = "d2t"  # of each of the head's tokens, how far its id in the model is from its own


@dataclass(frozen=True)
class EagleHead:
    """What a head is.

    Attributes:
        path: its folder.
        spec: its layer as that of a model, whose vocabulary are the tokens that it knows.
        taps: the model's layers before which its residual stream is taken.
    """

    path: Path
    spec: ModelSpec
    taps: tuple[int, ...]

    def weights(self, part: Part) -> dict[str, Weight]:
        """Return a rank's weights of the head by role: those of a layer, and some beside them, whole on every rank.

        qkv has 2h columns: of the embedding, then of the state. hidden_norm, next_norm [h]; input [h, 3h]
        head [rows of part.vocab, h], the rank's own
        """
        h, names, weights = self.spec.hidden_size, self.spec.names, layer_weights(self.spec, 0, part)
        rows = part.vocab[1] - part.vocab[0]
        return weights | {
            "qkv": replace(weights["qkv"], shape=(weights["qkv"].shape[0], 2 * h)),
            "hidden_norm": Weight((h,), (Piece(names.next_hidden_norm),)),
            "next_norm": Weight((h,), (Piece(names.final_norm),)),
            "input": Weight((h, len(self.taps) * h), (Piece(names.next_input),)),
            "head": Weight((rows, h), (Piece(names.lm_head, rows=part.vocab),)),
        }

    def open(self) -> Checkpoint:
        """Return its checkpoint, checked. Raises CheckpointError."""
        spec, names = self.spec, self.spec.names
        h, f, q, kv = spec.hidden_size, spec.ffn_size, spec.num_heads, spec.num_kv_heads
        shapes: dict[str, tuple[int, ...]] = {
            **dict.fromkeys((names.input_norm, names.post_norm, names.next_hidden_norm, names.final_norm), (h,)),
            names.q: (q * spec.head_dim, 2 * h),
            **dict.fromkeys((names.k, names.v), (kv * spec.head_dim, 2 * h)),
            names.o: (h, q * spec.head_dim),
            **dict.fromkeys((names.gate, str(names.up)), (f, h)),
            names.down: (h, f),
            names.next_input: (h, len(self.taps) * h),
            names.lm_head: (spec.vocab_size, h),
        }
        return Checkpoint(self.path, spec, shapes)


def read_head(path: str, target: ModelSpec) -> EagleHead:
    """Return the head of a folder.

    Raises:
        ValueError: in one line, when there is none, or it does not fit the model that it is to draft for.
    """
    if not path:
        raise ValueError(f"{SETTING} is empty: give the folder of an EAGLE-3 head")
    if target.family not in FAMILIES:
        raise ValueError(
            f"speculative.method = eagle3 drafts for {' and '.join(FAMILIES)} models, and the model is a "
            f"{target.family}; use speculative=ngram or speculative=draft_model"
        )
    source = f"{SETTING} = {path}"
    try:
        raw = read_json(find_config(path), path)
    except ValueError as error:
        raise ValueError(str(error).replace("model.path", SETTING, 1)) from error
    spec = spec_of(raw | {"model_type": "llama"}, source)
    spec = replace(
        spec, names=_NAMES, vocab_size=int(raw.get("draft_vocab_size") or spec.vocab_size), tied_embeddings=False
    )
    same = {
        "hidden_size": (spec.hidden_size, target.hidden_size),
        "num_attention_heads": (spec.num_heads, target.num_heads),
        "num_key_value_heads": (spec.num_kv_heads, target.num_kv_heads),
        "head_dim": (spec.head_dim, target.head_dim),
        "rms_norm_eps": (spec.rms_eps, target.rms_eps),
        "num_hidden_layers": (spec.num_layers, 1),
    }
    for name, (found, wanted) in same.items():
        if found != wanted:
            whose = "one layer drafts" if name == "num_hidden_layers" else "the model's is, and its keys share pages"
            raise ValueError(f"{source}: {name} = {found}, must be {wanted}: {whose}; give this model's own head")
    if spec.qkv_bias:
        raise ValueError(f"{source}: attention_bias = True, must be false: a head's layer has no biases")
    if target.num_layers < 7:
        raise ValueError(f"{source}: a model of {target.num_layers} layers has no three to draft from, needs 7")
    return EagleHead(Path(path).expanduser(), spec, (2, target.num_layers // 2, target.num_layers - 3))


class EagleDecoder(NextDecoder):
    """A model and the head that drafts for it; see ``NextDecoder``.

    Args:
        spec: of the model, ``has_head``.
        head: what drafts.
    """

    def __init__(self, spec: ModelSpec, grid: HelixGrid, *, head: EagleHead, **rest: Any) -> None:
        super().__init__(spec, grid, **rest)
        self.head, self.taps = head, head.taps
        part = part_of(head.spec, grid.layout, grid.rank)
        self.head_weights = head.weights(part)
        self.next = self._allocate(self.head_weights)
        self._inv_freq_of_head = head.spec.rope.inv_freq.to(device=self.device, dtype=torch.float32)
        self._argmax_of_head = ShardedArgmax(
            grid.world_group, vocab=part.vocab, vocab_size=head.spec.vocab_size, device=self.device
        )
        self.ids = torch.arange(head.spec.vocab_size, device=self.device)  # of the head's tokens in the model

    def fill_head(self, checkpoint: Checkpoint) -> None:
        """Read the head's weights, and close its checkpoint.

        Raises:
            CheckpointError: when it maps tokens to ids that the model does not have.
        """
        assert self.next is not None
        for role, weight in self.head_weights.items():
            checkpoint.read(weight, self.next[role])
        self.ids += checkpoint.integers(_TO_MODEL, len(self.ids), up_to=self.spec.vocab_size).to(self.device)
        checkpoint.close()

    @torch.inference_mode()
    def state_of(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return what the head knows of a step's rows, of the streams that the step left: [R, h]."""
        assert self.next is not None
        tapped, self.tapped = self.tapped, []
        return linear(torch.cat(tapped, -1), self.next["input"], pdl=self._pdl)

    def _next_input(
        self,
        token_ids: torch.Tensor,
        before: torch.Tensor,
        rows: Rows,
        chosen: tuple[torch.Tensor, torch.Tensor] | None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        assert self.next is not None
        both, cos, sin = self._embedded_beside(
            before, token_ids, rows, chosen, self.next["input_norm"], self.head.spec.rope, self._inv_freq_of_head
        )
        return before, both, cos, sin

    def _drafted(self, normed: torch.Tensor, stream: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        assert self.next is not None
        best = self._argmax_of_head(linear(normed, self.next["head"], pdl=self._pdl))
        return stream, self.ids[best.clamp(0, len(self.ids) - 1)]  # anything may stand there while kernels are compiled
