"""The message of the collective exchange: partials of the heads that each rank owns, O and lse in one piece.

A message is [N, R, H, D + W]: of every row and of the H heads of rank n the partial O, and the bits of its float32 lse
in W elements of O's dtype. Heads that N does not divide are split as evenly as possible, and padded to the most that a
rank owns; padding repeats a head that exists, and the receiver drops it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from parallel.layout import split_evenly

TILE = 2048  # elements of a program: a row's heads of one rank, or some of them


def lse_words(dtype: torch.dtype) -> int:
    """Return how many elements of ``dtype`` one float32 log-sum-exp fills in a packed message."""
    return 4 // dtype.itemsize


@triton.jit
def _pack_kernel(
    out, lse, packed, Q: tl.constexpr, H: tl.constexpr, H_TILE: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr,
    W: tl.constexpr,
):  # fmt: skip
    """Some heads of a row and the rank that owns them, as bits: ``out`` in its dtype's size, ``lse`` in words."""
    row, n = tl.program_id(0).to(tl.int64), tl.program_id(1)
    rows, ranks = tl.num_programs(0), tl.num_programs(1)
    h = tl.program_id(2) * H_TILE + tl.arange(0, H_TILE)
    d = tl.arange(0, D_PAD)
    head = tl.minimum(n * (Q // ranks) + tl.minimum(n, Q % ranks) + h, Q - 1)
    source, cell = row * Q + head, (n * rows + row) * H + h
    inside = (h < H)[:, None] & (d < D)[None, :]
    o = tl.load(out + source[:, None] * D + d[None, :], mask=inside, other=0)
    tl.store(packed + cell[:, None] * (D + W) + d[None, :], o, mask=inside)
    words = packed.to(tl.pointer_type(tl.int32)) + cell * ((D + W) // W) + D // W
    tl.store(words, tl.load(lse + source, mask=h < H, other=0), mask=h < H)


def pack(out_RQD: torch.Tensor, lse_RQ: torch.Tensor, num_ranks: int) -> torch.Tensor:
    """Return what a rank sends: [N, R, H, D + W], slice n to rank n.

    Args:
        out_RQD: partials, of 2 or 4 bytes an element; D even. lse_RQ: float32.
        num_ranks: N.
    """
    rows, num_heads, width = out_RQD.shape
    padded, words = -(-num_heads // num_ranks), lse_words(out_RQD.dtype)
    packed = out_RQD.new_empty((num_ranks, rows, padded, width + words))
    bits = torch.int16 if words == 2 else torch.int32
    tile = _heads_of_a_program(padded, width)
    if rows:
        _pack_kernel[(rows, num_ranks, -(-padded // tile))](
            out_RQD.contiguous().view(bits), lse_RQ.contiguous().view(torch.int32), packed.view(bits),
            Q=num_heads, H=padded, H_TILE=tile, D=width, D_PAD=triton.next_power_of_2(width), W=words, num_warps=4,
        )  # fmt: skip
    return packed


def pack_reference(out_RQD: torch.Tensor, lse_RQ: torch.Tensor, num_ranks: int) -> torch.Tensor:
    """Return what ``pack`` does, in PyTorch."""
    num_heads = out_RQD.shape[1]
    padded = -(-num_heads // num_ranks)
    first = torch.tensor([split_evenly(num_heads, num_ranks, rank)[0] for rank in range(num_ranks)])
    heads = (first[:, None] + torch.arange(padded)).clamp(max=num_heads - 1).to(out_RQD.device)  # [N, H]
    words = lse_RQ.contiguous().view(out_RQD.dtype).view(*lse_RQ.shape, lse_words(out_RQD.dtype))
    return torch.cat((out_RQD[:, heads], words[:, heads]), -1).transpose(0, 1).contiguous()


@triton.jit
def _merge_packed_kernel(
    packed, out, sinks, heads, N: tl.constexpr, H: tl.constexpr, H_TILE: tl.constexpr, D: tl.constexpr,
    D_PAD: tl.constexpr, W: tl.constexpr, SINKS: tl.constexpr,
):  # fmt: skip
    """Some heads of a row, of all ranks."""
    row, rows = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    head = tl.program_id(1) * H_TILE + tl.arange(0, H_TILE)
    d = tl.arange(0, D_PAD)
    real = head < heads
    inside = real[:, None] & (d < D)[None, :]
    top = tl.full([H_TILE], float("-inf"), tl.float32)
    total = tl.zeros([H_TILE], tl.float32)
    if SINKS:  # a score without a value
        top, total = tl.load(sinks + head, mask=real, other=0.0), total + 1.0
    acc = tl.zeros([H_TILE, D_PAD], tl.float32)
    for n in tl.static_range(N):
        cell = (n * rows + row) * H + head
        words = packed.to(tl.pointer_type(tl.float32)) + cell * ((D + W) // W) + D // W
        lse = tl.load(words, mask=real, other=float("-inf"))
        o = tl.load(packed + cell[:, None] * (D + W) + d[None, :], mask=inside, other=0.0).to(tl.float32)
        o = tl.where((lse == float("-inf"))[:, None], 0.0, o)  # values of an empty partial may be NaN
        new_top = tl.maximum(top, lse)
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)
        old, new = tl.exp(top - shift), tl.exp(lse - shift)
        acc = acc * old[:, None] + o * new[:, None]
        total = total * old + new
        top = new_top
    acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    tl.store(out + (row * heads + head[:, None]) * D + d[None, :], acc.to(out.dtype.element_ty), mask=inside)


def merge_packed(
    packed_NRHW: torch.Tensor, heads: int, head_dim: int, sinks: torch.Tensor | None = None
) -> torch.Tensor:
    """Merge a received message with one Triton launch.

    Args:
        packed_NRHW: contiguous [N, R, H, D + W], float32, float16 or bfloat16.
        heads: how many of the H padded heads are real.
        head_dim: D.
        sinks: [heads] float32, scores that join; None for none.

    Returns:
        [R, heads, D] in the message's dtype.
    """
    n, rows, padded, _ = packed_NRHW.shape
    out = packed_NRHW.new_empty((rows, heads, head_dim))
    if rows and heads:
        tile = _heads_of_a_program(heads, head_dim)
        _merge_packed_kernel[(rows, -(-heads // tile))](
            packed_NRHW, out, packed_NRHW if sinks is None else sinks, heads, N=n, H=padded, H_TILE=tile, D=head_dim,
            D_PAD=triton.next_power_of_2(head_dim), W=lse_words(packed_NRHW.dtype), SINKS=sinks is not None,
            num_warps=4,
        )  # fmt: skip
    return out


def unpack(packed: torch.Tensor, head_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Split a message [..., D + W] into its partials [..., D] and their float32 lse [...]."""
    lse = packed[..., head_dim:].contiguous().view(torch.float32).squeeze(-1)
    return packed[..., :head_dim], lse


def _heads_of_a_program(heads: int, head_dim: int) -> int:
    return max(1, min(triton.next_power_of_2(heads), TILE // triton.next_power_of_2(head_dim)))
