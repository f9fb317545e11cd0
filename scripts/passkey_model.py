"""A Llama whose weights are set by hand to find a key anywhere in a text: what it answers is known before it is run.

    python -m scripts.make_checkpoint DIR --family passkey

A text holds "#" and then characters that stand nowhere else in it; after a last "#" the model repeats them. With random
weights nobody knows which answer is right; here a missing block, or a head whose partial is lost, gives a wrong one, at
any length up to two million tokens and in 16 bits.

    row of a token:   A: which it is      B: which stood before it     C: what to say      1

    layer 0   every head attends to the token before, by RoPE alone:        its A -> B
    layer 1   every head attends to where B equals the last token's A:      its A -> C
    head      C -> logits

Each KV head carries a part of the 256 bytes, and each query head a part of its KV head's: no head is a copy of another.
"""

from __future__ import annotations

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
MARK, ALPHABET = ord("#"), bytes(range(ord("0"), ord("9") + 1))
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


def prompt_with_key(length: int, position: int, *, seed: int = 0) -> tuple[list[int], list[int]]:
    """Return a prompt of random letters that asks for a key in it, and the tokens of the right answer.

    Args:
        length: tokens of the prompt.
        position: where its "#" stands, from 1 (the first token has none before it) to length - 8.
        seed: of letters and key.

    Raises:
        ValueError: when the key, "#" and five digits, does not end before the last token.
    """
    if not 1 <= position <= length - 8:
        raise ValueError(f"position = {position} must lie from 1 to {length - 8}, for a prompt of {length} tokens")
    draw = Random(seed)
    text = bytearray(draw.choices(b"abcdefghijklmnopqrstuvwxyz ", k=length))
    answer = draw.sample(ALPHABET, 5)  # each once: a character is found by the one before it
    text[position : position + 6] = bytes([MARK, *answer])
    text[-1] = MARK
    return list(text), answer


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
    alone = [MARK, *ALPHABET]
    codes = torch.zeros(NUM_BYTES, size)
    others = torch.randn(NUM_BYTES, size - len(alone), generator=torch.Generator().manual_seed(0))
    codes[:, len(alone) :] = others / others.norm(dim=1, keepdim=True)
    for number, byte in enumerate(alone):
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
