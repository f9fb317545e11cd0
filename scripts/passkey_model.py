"""A Llama whose weights are set by hand to find a key anywhere in a text: what it answers is known before it is run.

    python -m scripts.make_checkpoint DIR --family passkey

A text of small letters holds keys: a mark, and five characters behind it. No character of a key stands anywhere else in
the text; after the mark of one, at its end, the model repeats what stands behind it. With random weights nobody knows
which answer is right; here a missing block, or a head whose partial is lost, gives a wrong one, at any length up to two
million tokens and in 16 bits.

    row of a token:   A: which it is      B: which stood before it     C: what to say      1

    layer 0   every head attends to the token before, by RoPE alone:        its A -> B
    layer 1   every head attends to where B equals the last token's A:      its A -> C
    head      C -> logits

Each KV head carries a part of the 256 bytes, and each query head a part of its KV head's: no head is a copy of another.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from random import Random
from typing import Any

import torch

NUM_BYTES = 256
HEADS, KV_HEADS, HEAD_DIM = 8, 2, 128
HIDDEN = 1024
A, B, C, ONE = 0, NUM_BYTES, 2 * NUM_BYTES, 3 * NUM_BYTES  # where the parts of a row begin
ROPE_THETA = 1e16  # RoPE's pair i turns by 10 ** (-i / 4) a token
TURNING = 20  # pairs of layer 0, which tell positions apart
STILL = 36  # pairs from here on turn by less than a thousandth in a million tokens, and tell bytes apart
SHARPNESS = 60.0  # how far the score of the right token stands above the others': e ** -60 of a million is nothing
LETTERS = b"abcdefghijklmnopqrstuvwxyz "
KEY_LEN, MOST_KEYS = 6, 9  # a mark and five characters; keys of a text
CHARACTERS = bytes(range(ord("!"), ord("!") + KEY_LEN * MOST_KEYS))
SIZES = {
    "num_hidden_layers": 2,
    "hidden_size": HIDDEN,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD_DIM,
    "intermediate_size": 128,
    "rope_parameters": {"rope_type": "default", "rope_theta": ROPE_THETA},
    "rms_norm_eps": 1e-6,
}


def text_with_keys(length: int, positions: Sequence[int], *, seed: int = 0) -> tuple[list[int], list[list[int]]]:
    """Return a text of random letters and the keys in it; a prompt is the text and a key's mark, its answer the rest.

    Args:
        length: tokens of the text.
        positions: where the keys' marks stand, from 1 (the first token has none before it) to length - 7; at most
            MOST_KEYS.
        seed: of letters and keys.

    Raises:
        ValueError: for keys outside the text, too many or over one another.
    """
    places = sorted(positions)
    if len(places) > MOST_KEYS or any(after - before < KEY_LEN for before, after in itertools.pairwise(places)):
        raise ValueError(f"positions = {places} must be at most {MOST_KEYS}, {KEY_LEN} tokens from one to the next")
    if places and not 1 <= places[0] <= places[-1] < length - KEY_LEN:
        raise ValueError(
            f"positions = {places} must lie from 1 to {length - KEY_LEN - 1}, in a text of {length} tokens"
        )
    draw = Random(seed)
    text = bytearray(draw.choices(LETTERS, k=length))
    drawn = draw.sample(CHARACTERS, KEY_LEN * len(places))  # each once: a character is found by the one before it
    keys = [drawn[start : start + KEY_LEN] for start in range(0, len(drawn), KEY_LEN)]
    for position, key in zip(positions, keys, strict=True):
        text[position : position + KEY_LEN] = bytes(key)
    return list(text), keys


def construct(model: Any) -> None:
    """Set every weight of a transformers Llama of ``SIZES``."""
    weights = dict(model.named_parameters())
    with torch.no_grad():
        for weight in weights.values():
            weight.zero_()
        eye = torch.eye(NUM_BYTES)
        embedding = weights["model.embed_tokens.weight"]
        embedding[:NUM_BYTES, A : A + NUM_BYTES] = eye
        embedding[:, ONE] = 1.0
        for layer in range(2):
            prefix = f"model.layers.{layer}."
            # a row's norm is that of its ones: 2 of them, then 3, then 4; the weight makes them ones again
            weights[prefix + "input_layernorm.weight"].fill_(math.sqrt((2 + layer) / HIDDEN))
            weights[prefix + "post_attention_layernorm.weight"].fill_(1.0)
            q, k, v, o = (weights[prefix + f"self_attn.{name}_proj.weight"] for name in "qkvo")
            for head in range(HEADS):
                (_look_back if layer == 0 else _look_for_byte)(_rows(q, head), None)
                _say(v, o[:, head * HEAD_DIM : (head + 1) * HEAD_DIM], head, to=B if layer == 0 else C)
            for head in range(KV_HEADS):
                (_look_back if layer == 0 else _look_for_byte)(None, _rows(k, head))
        weights["model.norm.weight"].fill_(math.sqrt(4 / HIDDEN))
        weights["lm_head.weight"][:NUM_BYTES, C : C + NUM_BYTES] = 20.0 * eye


def _rows(weight: torch.Tensor, head: int) -> torch.Tensor:
    return weight[head * HEAD_DIM : (head + 1) * HEAD_DIM]


def _look_back(q: torch.Tensor | None, k: torch.Tensor | None) -> None:
    """Scores that depend on the distance alone, highest at 1: a sum of cos((distance - 1) * turn) over pairs."""
    pair = torch.arange(TURNING)
    turn = 10.0 ** (-pair / 4)
    size = math.sqrt(2 * SHARPNESS * math.sqrt(HEAD_DIM))
    if q is not None:
        q[pair, ONE], q[pair + HEAD_DIM // 2, ONE] = size * turn.cos(), -size * turn.sin()
    if k is not None:
        k[pair, ONE] = size


def _look_for_byte(q: torch.Tensor | None, k: torch.Tensor | None) -> None:
    """Scores that are high where the byte before (B) is the one asked for (A), wherever that is."""
    elements = [i + half for half in (0, HEAD_DIM // 2) for i in range(STILL, HEAD_DIM // 2)]
    codes = math.sqrt(SHARPNESS * math.sqrt(HEAD_DIM)) * _codes(len(elements))
    for matrix, part in ((q, A), (k, B)):
        if matrix is not None:
            matrix[elements, part : part + NUM_BYTES] = codes.T


def _codes(size: int) -> torch.Tensor:
    """A unit vector a byte [256, size]: those of keys are orthogonal to all others."""
    alone = len(CHARACTERS)
    codes = torch.zeros(NUM_BYTES, size)
    others = torch.randn(NUM_BYTES, size - alone, generator=torch.Generator().manual_seed(0))
    codes[:, alone:] = others / others.norm(dim=1, keepdim=True)
    for number, byte in enumerate(CHARACTERS):
        codes[byte] = torch.eye(size)[number]
    return codes


def _say(v: torch.Tensor, o: torch.Tensor, head: int, *, to: int) -> None:
    """Carry which byte the token attended to is (A) to another part of the row; this head carries some bytes of it."""
    group = HEADS // KV_HEADS
    kv_head, part = divmod(head, group)
    for element, byte in enumerate(_bytes_of(kv_head)):
        v[kv_head * HEAD_DIM + element, A + byte] = 1.0
        if element % group == part:
            o[to + byte, element] = 1.0


def _bytes_of(kv_head: int) -> Sequence[int]:
    return range(kv_head, NUM_BYTES, KV_HEADS)
