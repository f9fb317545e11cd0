"""What a step does before its first layer: the rows' embeddings, their norm, and the angles of their positions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from triton.language.extra import libdevice

from parallel.norm import rms_norm

from .rope import RopeSpec


@triton.jit
def _embed_kernel(
    token_ids, chosen, stride, row_seq, positions, embedding, weight, inv_freq, stream, normed, cos, sin, eps, scaling,
    embedding_scale,
    H: tl.constexpr, H_PAD: tl.constexpr, HALF: tl.constexpr, HALF_PAD: tl.constexpr, HAS_CHOSEN: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    token = tl.load(token_ids + row)
    if HAS_CHOSEN:
        last = tl.maximum(-1 - token, 0) * stride + tl.load(row_seq + row)
        token = tl.where(token < 0, tl.load(chosen + last), token)
    i = tl.arange(0, H_PAD)
    x = tl.load(embedding + token * H + i, mask=i < H, other=0.0)
    x = (x.to(tl.float32) * embedding_scale).to(x.dtype)
    tl.store(stream + row * H + i, x, mask=i < H)
    value = x.to(tl.float32)
    value *= tl.rsqrt(tl.sum(value * value, 0) / H + eps)
    value *= tl.load(weight + i, mask=i < H, other=0.0).to(tl.float32)
    tl.store(normed + row * H + i, value.to(normed.dtype.element_ty), mask=i < H)
    pair = tl.arange(0, HALF_PAD)
    angle = tl.load(positions + row).to(tl.float32) * tl.load(inv_freq + pair, mask=pair < HALF, other=0.0)
    tl.store(cos + row * HALF + pair, libdevice.cos(angle) * scaling, mask=pair < HALF)
    tl.store(sin + row * HALF + pair, libdevice.sin(angle) * scaling, mask=pair < HALF)


def embed(
    token_ids: torch.Tensor,
    positions: torch.Tensor,
    *,
    embedding: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    rope: RopeSpec,
    inv_freq: torch.Tensor,
    chosen: tuple[torch.Tensor, torch.Tensor] | None = None,
    scale: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the stream [R, h], its RMSNorm [R, h], and cos and sin of the positions' angles.

    Args:
        token_ids, positions: [R] int64.
        embedding: [V, h]; weight: [h] of the norm, eps its.
        rope: how positions turn; inv_freq is its own, on the device.
        chosen: tokens [N, B] int64 and the column of it [R] where a row's token is, of which an id of -1 means the
            first, -2 the second; CUDA alone.
        scale: what embeddings are multiplied by, a number of their dtype.

    Returns:
        stream and normed in the embedding's dtype; cos, sin [R, rotary_dim / 2] float32, scaled.
    """
    if not token_ids.is_cuda:
        stream = F.embedding(token_ids, embedding) * scale
        return stream, rms_norm(stream, weight, eps), *rope.turn(positions, inv_freq)
    rows, hidden, half = token_ids.shape[0], embedding.shape[1], inv_freq.shape[0]
    stream, normed = embedding.new_empty((2, rows, hidden)).unbind(0)
    cos, sin = inv_freq.new_empty((2, rows, half)).unbind(0)
    if rows:
        last, row_seq = chosen or (token_ids, token_ids)
        _embed_kernel[(rows,)](
            token_ids, last, last.stride(0), row_seq, positions, embedding, weight, inv_freq, stream, normed, cos, sin,
            eps, rope.attention_scaling, scale,
            H=hidden, H_PAD=triton.next_power_of_2(hidden), HALF=half, HALF_PAD=triton.next_power_of_2(half),
            HAS_CHOSEN=chosen is not None, num_warps=8,
        )  # fmt: skip
    return stream, normed, cos, sin
