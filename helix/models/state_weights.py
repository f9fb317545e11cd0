"""Which slices of a state layer's tensors one rank keeps: those of its value heads, and of the key heads they read.

Letters: h hidden size, D elements of a key, W of a value, V value heads of the rank, K key heads that these read.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from parallel.layout import Range

from .parts import Part, Piece, Weight

if TYPE_CHECKING:
    from .spec import ModelSpec
    from .states import States


def state_weights(spec: ModelSpec, layer: int, part: Part) -> dict[str, Weight]:
    """Return a rank's weights of one state layer's heads, by role.

    state_in [2 K D + 2 V W + 2 V, h]: rows of queries, keys, values, of the output's gate, of the scores of beta, then
        of the decay
    state_scores [2 V, h]: the scores, where the checkpoint holds the others in 8 bits and these not
    state_conv [2 K D + V W, 1, taps]: of queries, keys and values
    state_rates [2 V] float32: the logarithm of each head's rate of decay, then what is added to the decay's score
    state_norm [W]: of a head's output
    o [h, V W]: columns of the value heads
    """
    states, names, heads = spec.states, spec.names, part.value_heads
    assert states is not None
    keys, D, W, h = states.key_heads(heads), states.key_dim, states.value_dim, spec.hidden_size
    num_value, size = heads[1] - heads[0], states.num_key_heads * D

    def name(template: str) -> str:
        return template.format(layer=layer)

    value_rows = (heads[0] * W, heads[1] * W)
    channels = (
        (keys[0] * D, keys[1] * D),
        (size + keys[0] * D, size + keys[1] * D),
        (2 * size + value_rows[0], 2 * size + value_rows[1]),
    )
    if states.by_key_head:
        inputs = _pieces_by_key_head(states, name(names.state_qkvz), name(names.state_ba), heads)
    else:
        inputs = (
            *(Piece(name(names.state_qkv), rows) for rows in channels),
            Piece(name(names.state_z), value_rows),
            Piece(name(names.state_b), heads),
            Piece(name(names.state_a), heads),
        )
    scored = {name(each) for each in (names.state_ba, names.state_b, names.state_a)}
    num_channels = sum(stop - start for start, stop in channels)
    conv, rates = name(names.state_conv), (name(names.state_log_rate), name(names.state_bias))
    apart = len({spec.is_quantized(piece.name) for piece in inputs}) > 1
    num_scores = len([piece for piece in inputs if piece.name in scored])
    scores = {"state_scores": Weight((2 * num_value, h), inputs[-num_scores:])} if apart else {}
    return scores | {
        "state_in": Weight(
            (num_channels + num_value * (W if apart else W + 2), h), inputs[:-num_scores] if apart else inputs
        ),
        "state_conv": Weight((num_channels, 1, states.taps), tuple(Piece(conv, rows) for rows in channels)),
        "state_rates": Weight((2 * num_value,), tuple(Piece(each, heads) for each in rates), exact=True),
        "state_norm": Weight((W,), (Piece(name(names.state_norm)),)),
        "o": Weight((h, num_value * W), (Piece(name(names.state_out), cols=value_rows),)),
    }


def _pieces_by_key_head(states: States, qkvz: str, ba: str, heads: Range) -> tuple[Piece, ...]:
    """Return the pieces of the input projection where a key head's rows stand together.

    Of ``qkvz`` they are its query, its key, the values of its value heads and their gates; of ``ba`` the scores of
    beta of these, then of the decay.
    """
    D, W, group = states.key_dim, states.value_dim, states.group
    rows, keys = 2 * D + 2 * group * W, range(*states.key_heads(heads))
    places = [(head // group, head % group) for head in range(*heads)]
    q = [Piece(qkvz, (key * rows, key * rows + D)) for key in keys]
    k = [Piece(qkvz, (key * rows + D, key * rows + 2 * D)) for key in keys]
    v, z = (
        [Piece(qkvz, (at := key * rows + 2 * D + (which * group + turn) * W, at + W)) for key, turn in places]
        for which in (0, 1)
    )
    b, a = ([Piece(ba, (at := (2 * key + which) * group + turn, at + 1)) for key, turn in places] for which in (0, 1))
    return (*q, *k, *v, *z, *b, *a)


def state_shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Return the names and full shapes of the tensors of a state layer's heads."""
    states, names, h = spec.states, spec.names, spec.hidden_size
    assert states is not None
    num_value = states.num_value_heads
    keys, values = states.num_key_heads * states.key_dim, num_value * states.value_dim
    if states.by_key_head:
        inputs = {names.state_qkvz: (2 * keys + 2 * values, h), names.state_ba: (2 * num_value, h)}
    else:
        scores = dict.fromkeys((names.state_b, names.state_a), (num_value, h))
        inputs = {names.state_qkv: (2 * keys + values, h), names.state_z: (values, h)} | scores
    return inputs | {
        names.state_conv: (2 * keys + values, 1, states.taps),
        names.state_log_rate: (num_value,),
        names.state_bias: (num_value,),
        names.state_norm: (states.value_dim,),
        names.state_out: (h, values),
    }
