"""Which slices of which checkpoint tensors one rank keeps.

A rank's share of the model is a `Part`: half-open ranges of heads, feed-forward units and vocabulary rows. From a spec
and a part follow the rank's parameters, each a `Weight`: a shape, and the pieces of checkpoint tensors that are stacked
along dim 0 to fill it. Nothing is read here; `checkpoint.py` reads. Ranges may differ in length between ranks, and may
be empty.

Shape letters: h hidden size, D head size, V vocabulary, F feed-forward size.
"""

from dataclasses import dataclass

from .spec import ModelSpec

Range = tuple[int, int]


@dataclass(frozen=True)
class Part:
    """One rank's share of a model, as half-open ranges (start, stop).

    q_heads, kv_heads: the heads whose queries, keys and values this rank computes; equal on ranks of one KVP group.
    out_heads: the query heads whose merged attention output this rank projects; these tile all heads over all ranks.
    ffn: the feed-forward units of this rank. vocab: the rows of the output head of this rank.
    """

    q_heads: Range
    kv_heads: Range
    out_heads: Range
    ffn: Range
    vocab: Range

    def __post_init__(self) -> None:
        for name in ("q_heads", "kv_heads", "out_heads", "ffn", "vocab"):
            start, stop = getattr(self, name)
            if not 0 <= start <= stop:
                raise ValueError(f"part.{name} = ({start}, {stop}), must be a half-open range with 0 <= start <= stop")


@dataclass(frozen=True)
class Piece:
    """A slice of the checkpoint tensor `name`: half-open ranges along dim 0 (rows) and dim 1 (cols), None for all."""

    name: str
    rows: Range | None = None
    cols: Range | None = None


@dataclass(frozen=True)
class Weight:
    """A parameter of one rank: its shape, and the pieces that fill it from top to bottom (along dim 0)."""

    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]


def whole(spec: ModelSpec) -> Part:
    """Return the part of a rank that holds everything."""
    heads = (0, spec.num_heads)
    return Part(heads, (0, spec.num_kv_heads), heads, (0, spec.ffn_size), (0, spec.vocab_size))


def model_weights(spec: ModelSpec, part: Part) -> dict[str, Weight]:
    """Return this rank's weights outside the layers, by role.

    embedding [V, h] whole on every rank; final_norm [h]; lm_head [rows of part.vocab, h].
    """
    h, names = spec.hidden_size, spec.names
    head = names.embedding if spec.tied_embeddings else names.lm_head
    return {
        "embedding": Weight((spec.vocab_size, h), (Piece(names.embedding),)),
        "final_norm": Weight((h,), (Piece(names.final_norm),)),
        "lm_head": Weight((_len(part.vocab), h), (Piece(head, rows=part.vocab),)),
    }


def layer_weights(spec: ModelSpec, layer: int, part: Part) -> dict[str, Weight]:
    """Return this rank's weights of one layer, by role.

    input_norm, post_norm [h]
    qkv [(q heads + 2 * KV heads) * D, h]: rows of the q heads, then of the k heads, then of the v heads
    qkv_bias [(q heads + 2 * KV heads) * D] when the model has it, in the same order
    q_norm, k_norm [D] when the model has them
    o [h, out heads * D]: columns of part.out_heads
    gate_up [2 * ffn, h]: gate rows, then up rows, of part.ffn
    down [h, ffn]: columns of part.ffn
    """
    h, D, names = spec.hidden_size, spec.head_dim, spec.names

    def name(template: str) -> str:
        return template.format(layer=layer)

    q_rows, kv_rows, o_cols = _times(part.q_heads, D), _times(part.kv_heads, D), _times(part.out_heads, D)
    qkv_len, ffn_len = _len(q_rows) + 2 * _len(kv_rows), _len(part.ffn)
    up_name, up_start = (names.gate, spec.ffn_size) if names.up is None else (names.up, 0)
    up_rows = (up_start + part.ffn[0], up_start + part.ffn[1])

    weights = {
        "input_norm": Weight((h,), (Piece(name(names.input_norm)),)),
        "qkv": Weight(
            (qkv_len, h),
            (Piece(name(names.q), q_rows), Piece(name(names.k), kv_rows), Piece(name(names.v), kv_rows)),
        ),
        "o": Weight((h, _len(o_cols)), (Piece(name(names.o), cols=o_cols),)),
        "post_norm": Weight((h,), (Piece(name(names.post_norm)),)),
        "gate_up": Weight((2 * ffn_len, h), (Piece(name(names.gate), part.ffn), Piece(name(up_name), up_rows))),
        "down": Weight((h, ffn_len), (Piece(name(names.down), cols=part.ffn),)),
    }
    if spec.qkv_bias:
        weights["qkv_bias"] = Weight(
            (qkv_len,),
            (Piece(name(names.q_bias), q_rows), Piece(name(names.k_bias), kv_rows), Piece(name(names.v_bias), kv_rows)),
        )
    if spec.qk_norm:
        weights["q_norm"] = Weight((D,), (Piece(name(names.q_norm)),))
        weights["k_norm"] = Weight((D,), (Piece(name(names.k_norm)),))
    return weights


def tensor_shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Return the name and full shape of every checkpoint tensor that the model needs."""
    h, D, names = spec.hidden_size, spec.head_dim, spec.names
    q_len, kv_len, gates = spec.num_heads * D, spec.num_kv_heads * D, 2 if names.up is None else 1
    shapes: dict[str, tuple[int, ...]] = {names.embedding: (spec.vocab_size, h), names.final_norm: (h,)}
    if not spec.tied_embeddings:
        shapes[names.lm_head] = (spec.vocab_size, h)
    layer: dict[str, tuple[int, ...]] = {
        names.input_norm: (h,),
        names.q: (q_len, h),
        names.k: (kv_len, h),
        names.v: (kv_len, h),
        names.o: (h, q_len),
        names.post_norm: (h,),
        names.gate: (gates * spec.ffn_size, h),
        names.down: (h, spec.ffn_size),
    }
    if names.up is not None:
        layer[names.up] = (spec.ffn_size, h)
    if spec.qkv_bias:
        layer |= {names.q_bias: (q_len,), names.k_bias: (kv_len,), names.v_bias: (kv_len,)}
    if spec.qk_norm:
        layer |= {names.q_norm: (D,), names.k_norm: (D,)}
    for number in range(spec.num_layers):
        shapes |= {template.format(layer=number): shape for template, shape in layer.items()}
    return shapes


def _len(span: Range) -> int:
    return span[1] - span[0]


def _times(span: Range, size: int) -> Range:
    return span[0] * size, span[1] * size
