"""Which slices of which checkpoint tensors one rank keeps.

A rank's share of the model is a `Part`: half-open ranges of heads, feed-forward units and vocabulary rows. From a spec
and a part follow the rank's parameters, each a `Weight`: a shape, and the pieces of checkpoint tensors that are stacked
along dim 0 to fill it. Nothing is read here; `checkpoint.py` reads. Ranges may differ in length between ranks, and may
be empty.

Shape letters: h hidden size, D head size, W value size, V vocabulary.
"""

from dataclasses import replace

from parallel.layout import Layout, Range, split_evenly, split_units

from .clamped_experts import Shapes, clamped_experts_shapes, clamped_experts_weights
from .kinds import STATE, WINDOW
from .parts import Part, Piece, Weight
from .spec import Latent, ModelSpec
from .state_weights import state_shapes, state_weights

EXPERT_ROLES = ("experts_gate_up", "experts_down")
IN_8_BITS = frozenset(
    ("qkv", "q_b", "o", "output_gate", "state_in", "gate_up", "down", "shared_gate_up", "shared_down", *EXPERT_ROLES)
)  # roles whose products take quantised matrices


def part_of(spec: ModelSpec, layout: Layout, rank: int) -> Part:
    """Return the slices of a model that a rank keeps.

    Raises:
        ValueError: when the layout does not fit the model's sizes, or asks a dense model for expert parallelism.
    """
    layout.check_heads(spec.num_heads, spec.num_kv_heads)
    num_experts, units = spec.expert_sizes
    if num_experts:
        layout.check_experts(num_experts, units)
    elif layout.ep != 1:
        raise ValueError(f"parallel.ep = {layout.ep}, but {spec.family} models have no experts; use parallel.ep=1")
    sizes = {"ffn_size": spec.ffn_size, "vocab_size": spec.vocab_size}
    if spec.shared_size:
        sizes["units of shared experts"] = spec.shared_size
    if min(sizes.values()) < layout.world_size:
        raise ValueError(
            f"{layout.world_size} ranks cannot split a model of "
            f"{', '.join(f'{name} {size}' for name, size in sizes.items())}: "
            "each needs one of all at least; use fewer ranks"
        )
    tpa_rank, kvp_rank, world = rank // layout.kvp, rank % layout.kvp, layout.world_size
    window_q, window_kv = _window_heads(spec, world, rank)
    return Part(
        q_heads=layout.query_heads(spec.num_heads, spec.num_kv_heads, tpa_rank),
        kv_heads=layout.kv_heads(spec.num_kv_heads, tpa_rank),
        out_heads=layout.merged_heads(spec.num_heads, spec.num_kv_heads, tpa_rank, kvp_rank),
        ffn=split_units(spec.ffn_size, world, rank),
        vocab=split_evenly(spec.vocab_size, world, rank),
        experts=split_evenly(num_experts, layout.ep, rank % layout.ep),
        expert_ffn=split_units(units, layout.tpf, rank // layout.ep),
        shared_ffn=split_units(spec.shared_size, world, rank),
        window_q_heads=window_q,
        window_kv_heads=window_kv,
        value_heads=_value_heads(spec, world, rank),
    )


def _value_heads(spec: ModelSpec, world: int, rank: int) -> Range:
    """Return the value heads of a rank in state layers."""
    if spec.states is None:
        return 0, 0
    if world > spec.states.num_value_heads:
        raise ValueError(
            f"{world} ranks exceed the {spec.states.num_value_heads} value heads of {spec.family}'s state layers; "
            "use fewer ranks"
        )
    return split_evenly(spec.states.num_value_heads, world, rank)


def _window_heads(spec: ModelSpec, world: int, rank: int) -> tuple[Range, Range]:
    """Return the query and KV heads of a rank in layers with a window: those of plain tensor parallelism over all."""
    if not spec.window:
        return (0, 0), (0, 0)
    num_heads, num_kv_heads = spec.num_heads, spec.kv_heads_of(WINDOW)
    if num_kv_heads % world and world % num_kv_heads:
        raise ValueError(
            f"{world} ranks cannot split the {num_kv_heads} KV heads of {spec.family}'s layers with a window: their "
            "number must divide the heads or be a multiple of them; use another number of ranks"
        )
    flat = Layout(kvp=1, tpa=world)
    return flat.query_heads(num_heads, num_kv_heads, rank), flat.kv_heads(num_kv_heads, rank)


def whole(spec: ModelSpec) -> Part:
    """Return the part of a rank that holds everything."""
    return part_of(spec, Layout(), 0)


def model_weights(spec: ModelSpec, part: Part) -> dict[str, Weight]:
    """Return this rank's weights outside the layers, by role.

    embedding [V, h] whole on every rank; final_norm [h]; lm_head [rows of part.vocab, h].
    """
    h, names = spec.hidden_size, spec.names
    head = names.embedding if spec.tied_embeddings else names.lm_head
    return {
        "embedding": Weight((spec.vocab_size, h), (Piece(names.embedding),)),
        "final_norm": _norm(spec, names.final_norm, h),
        "lm_head": Weight((_len(part.vocab), h), (Piece(head, rows=part.vocab),), quantized=spec.is_quantized(head)),
    }


def layer_weights(spec: ModelSpec, layer: int, part: Part) -> dict[str, Weight]:
    """Return this rank's weights of one layer, by role.

    input_norm, post_norm [h]; mixed_norm, fed_norm [h] of what attention and feed-forward add, when the model has them
    qkv [(q heads + 2 * KV heads) * D, h]: rows of the q heads, then of the k heads, then of the v heads, zeros behind
        each of these where values are narrow, W elements
    qkv_bias [(q heads + 2 * KV heads) * D] when the model has it, in the same order
    q_norm, k_norm [D] when the model has them
    o_bias [h] whole on every rank, sinks [out heads] of part.out_heads, when the layer has them
    output_gate [out heads * D, h]: rows of part.out_heads, when the model has it
    o [h, out heads * D], or W for D: columns of part.out_heads
    gate_up [2 * ffn, h]: gate rows, then up rows, of part.ffn
    down [h, ffn]: columns of part.ffn
    with latents, of rank elements and T turned ones, instead of the first four (P plain elements a head, W of a value):
    qkv [(q_rank or q heads * (P + T)) + rank + T, h]: of queries or their latents, then of what is cached
    q_a_norm [q_rank], q_b [q heads * (P + T), q_rank] where queries have a latent too; latent_norm [rank]
    k_up [q heads * P, rank], v_up [q heads * W, rank], o [h, out heads * W]
    in a state layer, instead of the first four: see ``state_weights``
    where the layer has experts, instead of gate_up and down:
    router [all experts, h] whole on every rank, router_bias [all experts] where they are chosen by sigmoid
    shared_gate_up [2 * shared, h], shared_down [h, shared] of part.shared_ffn, where there are shared ones
    shared_router [1, h] whole on every rank, where what they add is gated
    experts_gate_up [experts * 2 * units, h]: of each of part.experts gate rows, then up rows, of part.expert_ffn
    experts_down [experts * h, units]: of each of part.experts columns of part.expert_ffn
    and their biases, see ``clamped_experts``

    A quantised checkpoint's matrices stay quantised in the roles of IN_8_BITS, where all of a role's pieces are: k_up
    and v_up multiply other dims of what the checkpoint has as one matrix, head by head, and are widened when read.
    """
    h, names = spec.hidden_size, spec.names
    weights = {
        "input_norm": _norm(spec, names.input_norm.format(layer=layer), h),
        "post_norm": _norm(spec, names.post_norm.format(layer=layer), h),
        **_added_norms(spec, layer),
        **_mixing(spec, layer, part.for_kind(spec.kind_of(layer))),
        **(_dense_ffn(spec, layer, part) if spec.experts_of(layer) is None else _experts_ffn(spec, layer, part)),
    }
    if spec.quantization is not None:
        for role in IN_8_BITS & weights.keys():
            if all(spec.is_quantized(piece.name) for piece in weights[role].pieces):
                weights[role] = replace(weights[role], quantized=True)
    return weights


def next_weights(spec: ModelSpec, part: Part) -> dict[str, Weight]:
    """Return this rank's weights of the layer that predicts one token further: those of a layer, and some beside them.

    embedding_norm, hidden_norm [h] of its two inputs, whole on every rank, as all of these are
    input [h, 2h]: columns of the embedding, then of the hidden state
    next_norm [h] of what it returns
    """
    h, names, layer = spec.hidden_size, spec.names, spec.num_layers
    norms = {
        "embedding_norm": names.next_embedding_norm,
        "hidden_norm": names.next_hidden_norm,
        "next_norm": names.next_norm,
    }
    return {
        **layer_weights(spec, layer, part),
        **{role: Weight((h,), (Piece(name.format(layer=layer)),)) for role, name in norms.items()},
        "input": Weight((h, 2 * h), (Piece(names.next_input.format(layer=layer)),)),
    }


def _norm(spec: ModelSpec, name: str, size: int) -> Weight:
    """Return the weight of a norm; where the files hold what exceeds one, it is kept in float32."""
    return Weight((size,), (Piece(name),), exact=spec.norms_exceed_one, plus=1.0 if spec.norms_exceed_one else 0.0)


def _added_norms(spec: ModelSpec, layer: int) -> dict[str, Weight]:
    """Return the norms of what attention and feed-forward add; none where that is added as it is."""
    names = {"mixed_norm": spec.names.mixed_norm, "fed_norm": spec.names.fed_norm} if spec.normalises_added else {}
    return {role: _norm(spec, name.format(layer=layer), spec.hidden_size) for role, name in names.items()}


def _mixing(spec: ModelSpec, layer: int, part: Part) -> dict[str, Weight]:
    """Return the weights of what mixes tokens in a layer."""
    if spec.kind_of(layer).name == STATE:
        return state_weights(spec, layer, part)
    return _attention(spec, layer, part) if spec.latent is None else _latent(spec, spec.latent, layer, part)


def _attention(spec: ModelSpec, layer: int, part: Part) -> dict[str, Weight]:
    h, D, names = spec.hidden_size, spec.head_dim, spec.names

    def name(template: str) -> str:
        return template.format(layer=layer)

    W = spec.narrow_values or D
    q_rows, kv_rows, o_cols = _times(part.q_heads, D), _times(part.kv_heads, D), _times(part.out_heads, W)
    q: tuple[Piece, ...] = (Piece(name(names.q), q_rows),)
    if spec.output_gate:  # of each head the rows of its query, then of its gate
        q = tuple(Piece(name(names.q), (2 * head * D, (2 * head + 1) * D)) for head in range(*part.q_heads))
    v, v_bias = (_values(name(each), part.kv_heads, W, D - W) for each in (names.v, names.v_bias))
    qkv_len = _len(q_rows) + 2 * _len(kv_rows)
    weights = {
        "qkv": Weight((qkv_len, h), (*q, Piece(name(names.k), kv_rows), *v)),
        "o": Weight((h, _len(o_cols)), (Piece(name(names.o), cols=o_cols),)),
    }
    if spec.output_gate:
        gate = [Piece(name(names.q), ((2 * head + 1) * D, (2 * head + 2) * D)) for head in range(*part.out_heads)]
        weights["output_gate"] = Weight((_len(o_cols), h), tuple(gate))
    if spec.qkv_bias:
        weights["qkv_bias"] = Weight(
            (qkv_len,),
            (Piece(name(names.q_bias), q_rows), Piece(name(names.k_bias), kv_rows), *v_bias),
        )
    if spec.o_bias:
        weights["o_bias"] = Weight((h,), (Piece(name(names.o_bias)),))
    if spec.kind_of(layer).name in spec.sinks:
        sinks = Piece(name(names.sinks), part.out_heads)
        weights["sinks"] = Weight((_len(part.out_heads),), (sinks,), exact=True)
    if spec.qk_norm:
        weights["q_norm"] = _norm(spec, name(names.q_norm), D)
        weights["k_norm"] = _norm(spec, name(names.k_norm), D)
    return weights


def _values(name: str, heads: Range, size: int, zeros: int) -> tuple[Piece, ...]:
    """Return the rows of values of so many elements a head, and zeros behind each."""
    if not zeros:
        return (Piece(name, _times(heads, size)),)
    return tuple(Piece(name, (head * size, (head + 1) * size), zeros=zeros) for head in range(*heads))


def _latent(spec: ModelSpec, latent: Latent, layer: int, part: Part) -> dict[str, Weight]:
    h, names, num_q, num_out = spec.hidden_size, spec.names, _len(part.q_heads), _len(part.out_heads)
    plain, value, both = latent.plain_dim, latent.value_dim, latent.plain_dim + latent.value_dim

    def name(template: str) -> str:
        return template.format(layer=layer)

    q_rows, o_cols = _times(part.q_heads, latent.q_dim), _times(part.out_heads, value)
    kv_a, kv_b = Piece(name(names.kv_a)), name(names.kv_b)  # of each head the rows of its key, then of its value
    k_up = tuple(Piece(kv_b, (head * both, head * both + plain)) for head in range(*part.q_heads))
    v_up = tuple(Piece(kv_b, (head * both + plain, (head + 1) * both)) for head in range(*part.q_heads))
    weights = {
        "latent_norm": Weight((latent.rank,), (Piece(name(names.kv_a_norm)),)),
        "k_up": Weight((num_q * plain, latent.rank), k_up),
        "v_up": Weight((num_q * value, latent.rank), v_up),
        "o": Weight((h, num_out * value), (Piece(name(names.o), cols=o_cols),)),
    }
    if latent.q_rank is None:
        return weights | {"qkv": Weight((_len(q_rows) + spec.head_dim, h), (Piece(name(names.q), q_rows), kv_a))}
    return weights | {
        "qkv": Weight((latent.q_rank + spec.head_dim, h), (Piece(name(names.q_a)), kv_a)),
        "q_a_norm": Weight((latent.q_rank,), (Piece(name(names.q_a_norm)),)),
        "q_b": Weight((_len(q_rows), latent.q_rank), (Piece(name(names.q_b), q_rows),)),
    }


def _dense_ffn(spec: ModelSpec, layer: int, part: Part) -> dict[str, Weight]:
    h, names, ffn_len = spec.hidden_size, spec.names, _len(part.ffn)
    up_name, up_start = (names.gate, spec.ffn_size) if names.up is None else (names.up, 0)
    up_rows = (up_start + part.ffn[0], up_start + part.ffn[1])
    gate, up, down = (each.format(layer=layer) for each in (names.gate, up_name, names.down))
    return {
        "gate_up": Weight((2 * ffn_len, h), (Piece(gate, part.ffn), Piece(up, up_rows))),
        "down": Weight((h, ffn_len), (Piece(down, cols=part.ffn),)),
    }


def _experts_ffn(spec: ModelSpec, layer: int, part: Part) -> dict[str, Weight]:
    if spec.experts is not None and spec.experts.clamped is not None:
        return clamped_experts_weights(spec, layer, part)
    h, names, units = spec.hidden_size, spec.names, part.expert_ffn
    mine = range(*part.experts)

    def name(template: str, expert: int) -> str:
        return template.format(layer=layer, expert=expert)

    both = [Piece(name(each, expert), units) for expert in mine for each in (names.expert_gate, names.expert_up)]
    down = [Piece(name(names.expert_down, expert), cols=units) for expert in mine]
    if spec.experts is not None and spec.experts.stacked:
        size, (start, stop) = spec.experts.ffn_size, units
        of_both, of_down = (each.format(layer=layer) for each in (names.experts_gate_up, names.experts_down))
        spans = (units, (size + start, size + stop))
        both = [Piece(of_both, rows, index=expert) for expert in mine for rows in spans]
        down = [Piece(of_down, cols=units, index=expert) for expert in mine]
    weights = {
        "router": Weight((spec.expert_sizes[0], h), (Piece(names.router.format(layer=layer)),)),
        "experts_gate_up": Weight((len(both) * _len(units), h), tuple(both)),
        "experts_down": Weight((len(mine) * h, _len(units)), tuple(down)),
    }
    if spec.experts is not None and spec.experts.sigmoid:
        bias = Piece(names.router_bias.format(layer=layer))
        weights["router_bias"] = Weight((spec.expert_sizes[0],), (bias,), exact=True)
    if spec.shared_size:
        gate, up, back = (each.format(layer=layer) for each in (names.shared_gate, names.shared_up, names.shared_down))
        shared = part.shared_ffn
        weights["shared_gate_up"] = Weight((2 * _len(shared), h), (Piece(gate, shared), Piece(up, shared)))
        weights["shared_down"] = Weight((h, _len(shared)), (Piece(back, cols=shared),))
        if spec.experts is not None and spec.experts.gates_shared:
            weights["shared_router"] = Weight((1, h), (Piece(names.shared_router.format(layer=layer)),))
    return weights


def tensor_shapes(spec: ModelSpec) -> Shapes:
    """Return the name and full shape of every checkpoint tensor that the model needs, but for scales."""
    h, names, gates = spec.hidden_size, spec.names, 2 if spec.names.up is None else 1
    shapes: Shapes = {names.embedding: (spec.vocab_size, h), names.final_norm: (h,)}
    if not spec.tied_embeddings:
        shapes[names.lm_head] = (spec.vocab_size, h)
    norms: Shapes = {names.input_norm: (h,), names.post_norm: (h,)}
    if spec.normalises_added:
        norms |= {names.mixed_norm: (h,), names.fed_norm: (h,)}
    dense: Shapes = {names.gate: (gates * spec.ffn_size, h), names.down: (h, spec.ffn_size)}
    if names.up is not None:
        dense[names.up] = (spec.ffn_size, h)
    num_experts, units = spec.expert_sizes
    one_expert: Shapes = {names.expert_gate: (units, h), names.expert_up: (units, h), names.expert_down: (h, units)}
    router: Shapes = {names.router: (num_experts, h)}
    if spec.experts is not None and spec.experts.sigmoid:
        router[names.router_bias] = (num_experts,)
    if shared := spec.shared_size:
        router |= {names.shared_gate: (shared, h), names.shared_up: (shared, h), names.shared_down: (h, shared)}
    if spec.experts is not None and spec.experts.gates_shared:
        router[names.shared_router] = (1, h)
    if spec.experts is not None and spec.experts.stacked:
        one_expert = {}
        router |= {names.experts_gate_up: (num_experts, 2 * units, h), names.experts_down: (num_experts, h, units)}
    if spec.experts is not None and spec.experts.clamped is not None:
        router = clamped_experts_shapes(spec)
    further = {names.next_embedding_norm: (h,), names.next_hidden_norm: (h,), names.next_norm: (h,)}
    for number in range(spec.num_layers + spec.predicts_next):
        beside = further | {names.next_input: (h, 2 * h)} if number == spec.num_layers else {}
        has_experts = spec.experts_of(number) is not None
        own = norms | _mixing_shapes(spec, number) | (router if has_experts else dense) | beside
        shapes |= {template.format(layer=number): shape for template, shape in own.items()}
        for expert in range(num_experts if has_experts else 0):
            shapes |= {each.format(layer=number, expert=expert): shape for each, shape in one_expert.items()}
    return shapes


def _mixing_shapes(spec: ModelSpec, layer: int) -> Shapes:
    """Return the shapes of the tensors of what mixes tokens in a layer, by their names' templates."""
    h, D, names, kind = spec.hidden_size, spec.head_dim, spec.names, spec.kind_of(layer).name
    if kind == STATE:
        return state_shapes(spec)
    if spec.latent is not None:
        return _latent_shapes(spec, spec.latent)
    W = spec.narrow_values or D
    num_heads, num_kv_heads = spec.num_heads, spec.kv_heads_of(kind)
    shapes: Shapes = {
        names.q: (num_heads * D * (2 if spec.output_gate else 1), h),
        names.k: (num_kv_heads * D, h),
        names.v: (num_kv_heads * W, h),
        names.o: (h, num_heads * W),
    }
    if spec.qkv_bias:
        of_q, of_k, of_v = num_heads * D, num_kv_heads * D, num_kv_heads * W
        shapes |= {names.q_bias: (of_q,), names.k_bias: (of_k,), names.v_bias: (of_v,)}
    if spec.o_bias:
        shapes[names.o_bias] = (h,)
    if kind in spec.sinks:
        shapes[names.sinks] = (num_heads,)
    if spec.qk_norm:
        shapes |= {names.q_norm: (D,), names.k_norm: (D,)}
    return shapes


def _latent_shapes(spec: ModelSpec, latent: Latent) -> Shapes:
    h, names, made = spec.hidden_size, spec.names, spec.num_heads * latent.q_dim
    shapes: Shapes = {
        names.kv_a: (spec.head_dim, h),
        names.kv_a_norm: (latent.rank,),
        names.kv_b: (spec.num_heads * (latent.plain_dim + latent.value_dim), latent.rank),
        names.o: (h, spec.num_heads * latent.value_dim),
    }
    if latent.q_rank is None:
        return shapes | {names.q: (made, h)}
    return shapes | {
        names.q_a: (latent.q_rank, h),
        names.q_a_norm: (latent.q_rank,),
        names.q_b: (made, latent.q_rank),
    }


def _len(span: Range) -> int:
    return span[1] - span[0]


def _times(span: Range, size: int) -> Range:
    return span[0] * size, span[1] * size
