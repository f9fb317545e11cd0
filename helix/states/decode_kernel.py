"""State layers for few rows a run: decode and verification in one launch, which reads and writes each state once.

A program has one value head of one run. It works in what earlier steps left out, then the run's rows: convolution,
rule, norm and gate. The state after the first row is what it writes; the rows behind that may be rejected, so they are
computed in registers and only their inputs are kept (``cache.py``). How many tokens are worked in follows from
positions on the device, so one captured graph is right for every outcome of a verification.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from attention.append import load_sum
from parallel.device import early

from .cache import LayerStates
from .inputs import Inputs
from .reference import NORM_EPS

MAX_NUM = tl.constexpr(1 << 30)


@triton.jit
def silu_rounded(x, DTYPE: tl.constexpr):
    """Return silu(x) in float32, rounded to DTYPE before and after, as torch rounds."""
    x = x.to(DTYPE).to(tl.float32)
    return (x / (1.0 + tl.exp(-x))).to(DTYPE).to(tl.float32)


@triton.jit
def softplus(x):
    """Return log(1 + exp(x))."""
    return tl.maximum(x, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(x)))


@triton.jit
def _old(ring, conv, column, real, position, INPUT: tl.constexpr, RING: tl.constexpr, TAPS: tl.constexpr):
    """Return what kept tokens before a position add to the convolution of some columns there."""
    total = tl.zeros(column.shape, tl.float32)
    for tap in tl.static_range(TAPS - 1):
        at = position - TAPS + 1 + tap
        x = tl.load(ring + (at & (RING - 1)) * INPUT + column, mask=real & (at >= 0), other=0.0)
        total += x.to(tl.float32) * tl.load(conv + column * TAPS + tap, mask=real, other=0.0).to(tl.float32)
    return total


@triton.jit
def _convolve(flat, split_stride, row_at, ring, conv, column, real, first, position, WIDTH: tl.constexpr,
              INPUT: tl.constexpr, RING: tl.constexpr, TAPS: tl.constexpr, SUMMANDS: tl.constexpr,
              DTYPE: tl.constexpr):  # fmt: skip
    """Return the convolution of some columns at a position; tokens from ``first`` on are rows, from ``row_at`` on."""
    total = tl.zeros(column.shape, tl.float32)
    for tap in tl.static_range(TAPS):
        at = position - TAPS + 1 + tap
        new = real & (at >= first)
        x = load_sum(flat, split_stride, (row_at + at - first) * WIDTH + column, new, SUMMANDS, DTYPE).to(tl.float32)
        old = tl.load(ring + (at & (RING - 1)) * INPUT + column, mask=real & (at < first) & (at >= 0), other=0.0)
        x += old.to(tl.float32)
        total += x * tl.load(conv + column * TAPS + tap, mask=real, other=0.0).to(tl.float32)
    return silu_rounded(total, DTYPE)


@triton.jit
def _work_in(state, k, v, b, a, log_rate, bias, norm_eps):
    """Return the state with one more token in it; k is not normalised yet, b and a are scores."""
    k *= tl.rsqrt(tl.sum(k * k, 0) + norm_eps)
    state *= tl.exp(-tl.exp(log_rate) * softplus(a + bias))
    error = v - tl.sum(state * k[:, None], 0)
    return state + k[:, None] * (error / (1.0 + tl.exp(-b)))[None, :]


@triton.jit
def _ask(state, q, gate, weight, eps, norm_eps, D: tl.constexpr, W: tl.constexpr, DTYPE: tl.constexpr):
    """Return what a state answers to a query, normalised and gated."""
    q *= tl.rsqrt(tl.sum(q * q, 0) + norm_eps) * (D**-0.5)
    made = tl.sum(state * q[:, None], 0).to(DTYPE).to(tl.float32)
    made = (made * tl.rsqrt(tl.sum(made * made, 0) / W + eps)).to(DTYPE).to(tl.float32) * weight
    return (made.to(DTYPE).to(tl.float32) * (gate / (1.0 + tl.exp(-gate)))).to(DTYPE)


@triton.jit(do_not_specialize=["num_rows"])
def _advance_kernel(
    flat, scores, positions, row_seq, query_start, matrix, known, inputs, conv, rates, norm, out, num_rows, eps,
    norm_eps, SUMMANDS: tl.constexpr, WIDTH: tl.constexpr, SCORE_SUMMANDS: tl.constexpr, SCORES_WIDTH: tl.constexpr,
    SCORES_AT: tl.constexpr, V: tl.constexpr, K: tl.constexpr, OFFSET: tl.constexpr, GROUP: tl.constexpr,
    D: tl.constexpr, D_PAD: tl.constexpr, W: tl.constexpr, W_PAD: tl.constexpr, TAPS: tl.constexpr, RING: tl.constexpr,
    MAX_RUN: tl.constexpr, RUN_PAD: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    run, head = tl.program_id(0), tl.program_id(1)
    INPUT: tl.constexpr = 2 * K * D + V * W + 2 * V
    CHANNELS: tl.constexpr = 2 * K * D + V * W
    dtype: tl.constexpr = out.dtype.element_ty
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    # uploaded, or written by earlier steps: all up to the wait is there before the kernel before this one has ended
    start, stop = tl.load(query_start + run), tl.load(query_start + run + 1)
    r, d, w = tl.arange(0, RUN_PAD), tl.arange(0, D_PAD), tl.arange(0, W_PAD)
    is_long = stop - start > MAX_RUN
    at = tl.load(positions + start + r, mask=r < stop - start, other=-1).to(tl.int32)
    slot = tl.load(row_seq + start).to(tl.int64)
    num_real = tl.sum((at >= 0).to(tl.int32), 0)  # padding stands at the head of a run
    first = tl.where(num_real > 0, tl.min(tl.where(at >= 0, at, MAX_NUM), 0), 0)
    goes_on = (num_real > 0) & (first > 0)
    key_head = (OFFSET + head) // GROUP
    q_column, k_column, v_column = key_head * D + d, (K + key_head) * D + d, 2 * K * D + head * W + w
    b_column, a_column = CHANNELS + head, CHANNELS + V + head  # of what is kept
    from_b = scores + SCORES_AT + head
    in_key, in_value = d < D, w < W
    ring = inputs + slot * (RING * INPUT)
    here = matrix + (slot * V + head) * (D * W) + d[:, None] * W + w[None, :]
    there = in_key[:, None] & in_value[None, :]
    state = tl.load(here, mask=there & goes_on, other=0.0)
    log_rate, bias = tl.load(rates + head), tl.load(rates + V + head)
    weight = tl.load(norm + w, mask=in_value, other=0.0).to(tl.float32)
    if MAX_RUN > 1:  # tokens that turned out to stay
        position = tl.load(known + slot * V + head, mask=goes_on, other=0)
        waited = position < first
        while position < first:
            kept = ring + (position & (RING - 1)) * INPUT
            k = _convolve(flat, 0, 0, ring, conv, k_column, in_key, first, position, WIDTH, INPUT, RING, TAPS, 1, dtype)
            v = _convolve(
                flat, 0, 0, ring, conv, v_column, in_value, first, position, WIDTH, INPUT, RING, TAPS, 1, dtype
            )
            b, a = tl.load(kept + b_column).to(tl.float32), tl.load(kept + a_column).to(tl.float32)
            state = _work_in(state, k, v, b, a, log_rate, bias, norm_eps)
            position += 1
        if is_long & waited:
            tl.store(here, state, mask=there)
            tl.store(known + slot * V + head, first)
    if is_long & (first == 0):
        tl.store(here, state, mask=there)
        tl.store(known + slot * V + head, first)
    old_q = _old(ring, conv, q_column, in_key, first, INPUT, RING, TAPS)
    old_k = _old(ring, conv, k_column, in_key, first, INPUT, RING, TAPS)
    old_v = _old(ring, conv, v_column, in_value, first, INPUT, RING, TAPS)
    own_q = tl.load(conv + q_column * TAPS + TAPS - 1, mask=in_key, other=0.0).to(tl.float32)
    own_k = tl.load(conv + k_column * TAPS + TAPS - 1, mask=in_key, other=0.0).to(tl.float32)
    own_v = tl.load(conv + v_column * TAPS + TAPS - 1, mask=in_value, other=0.0).to(tl.float32)
    split_stride = tl.zeros([], tl.int64) + num_rows * WIDTH
    score_stride = tl.zeros([], tl.int64) + num_rows * SCORES_WIDTH
    row_at = (stop - num_real).to(tl.int64)
    base = row_at * WIDTH
    computes = (num_real > 0) & (is_long == 0)
    if PDL:
        tl.extra.cuda.gdc_wait()
    x_q = load_sum(flat, split_stride, base + q_column, in_key & computes, SUMMANDS, dtype)
    x_k = load_sum(flat, split_stride, base + k_column, in_key & computes, SUMMANDS, dtype)
    x_v = load_sum(flat, split_stride, base + v_column, in_value & computes, SUMMANDS, dtype)
    x_b = load_sum(from_b, score_stride, row_at * SCORES_WIDTH, computes, SCORE_SUMMANDS, dtype)
    x_a = load_sum(from_b + V, score_stride, row_at * SCORES_WIDTH, computes, SCORE_SUMMANDS, dtype)
    gate = load_sum(flat, split_stride, base + CHANNELS + head * W + w, in_value & computes, SUMMANDS, dtype)
    if computes:
        q = silu_rounded(old_q + x_q.to(tl.float32) * own_q, dtype)
        k = silu_rounded(old_k + x_k.to(tl.float32) * own_k, dtype)
        v = silu_rounded(old_v + x_v.to(tl.float32) * own_v, dtype)
        state = _work_in(state, k, v, x_b.to(tl.float32), x_a.to(tl.float32), log_rate, bias, norm_eps)
        made = _ask(state, q, gate.to(tl.float32), weight, eps, norm_eps, D, W, dtype)
        tl.store(out + (row_at * V + head) * W + w, made, mask=in_value)
        tl.store(here, state, mask=there)
        tl.store(known + slot * V + head, first + 1)
        # a column's input is kept by one program; nobody reads it now: others need those of earlier positions
        owns_key = in_key & ((head == 0) | ((OFFSET + head) % GROUP == 0))
        to = ring + (first & (RING - 1)) * INPUT
        tl.store(to + q_column, x_q, mask=owns_key)
        tl.store(to + k_column, x_k, mask=owns_key)
        tl.store(to + v_column, x_v, mask=in_value)
        tl.store(to + b_column, x_b)
        tl.store(to + a_column, x_a)
        if MAX_RUN > 1:  # rows that may be rejected: they enter the state in registers alone
            for i in range(1, num_real):
                position = first + i
                source = (row_at + i) * WIDTH
                k = _convolve(flat, split_stride, row_at, ring, conv, k_column, in_key, first, position, WIDTH, INPUT,
                              RING, TAPS, SUMMANDS, dtype)  # fmt: skip
                v = _convolve(flat, split_stride, row_at, ring, conv, v_column, in_value, first, position, WIDTH,
                              INPUT, RING, TAPS, SUMMANDS, dtype)  # fmt: skip
                q = _convolve(flat, split_stride, row_at, ring, conv, q_column, in_key, first, position, WIDTH, INPUT,
                              RING, TAPS, SUMMANDS, dtype)  # fmt: skip
                at_score = (row_at + i) * SCORES_WIDTH
                x_b = load_sum(from_b, score_stride, at_score, True, SCORE_SUMMANDS, dtype)
                x_a = load_sum(from_b + V, score_stride, at_score, True, SCORE_SUMMANDS, dtype)
                x_q = load_sum(flat, split_stride, source + q_column, in_key, SUMMANDS, dtype)
                x_k = load_sum(flat, split_stride, source + k_column, in_key, SUMMANDS, dtype)
                x_v = load_sum(flat, split_stride, source + v_column, in_value, SUMMANDS, dtype)
                gate = load_sum(flat, split_stride, source + CHANNELS + head * W + w, in_value, SUMMANDS, dtype)
                state = _work_in(state, k, v, x_b.to(tl.float32), x_a.to(tl.float32), log_rate, bias, norm_eps)
                made = _ask(state, q, gate.to(tl.float32), weight, eps, norm_eps, D, W, dtype)
                tl.store(out + ((row_at + i) * V + head) * W + w, made, mask=in_value)
                to = ring + (position & (RING - 1)) * INPUT
                tl.store(to + q_column, x_q, mask=owns_key)
                tl.store(to + k_column, x_k, mask=owns_key)
                tl.store(to + v_column, x_v, mask=in_value)
                tl.store(to + b_column, x_b)
                tl.store(to + a_column, x_a)
    for i in range(0, tl.where(is_long, 0, stop - start - num_real)):
        tl.store(out + ((start.to(tl.int64) + i) * V + head) * W + w, tl.zeros([W_PAD], dtype), mask=in_value)


def advance_few(
    inputs: Inputs,
    positions: torch.Tensor,
    row_seq: torch.Tensor,
    query_start: torch.Tensor,
    states: LayerStates,
    weights: dict[str, torch.Tensor],
    out: torch.Tensor,
    *,
    eps: float,
    max_run: int,
    pdl: bool = False,
) -> None:
    """Run a state layer's heads over the rows of runs of at most ``max_run`` rows, in one Triton launch.

    Of longer runs nothing is computed; the tokens before them enter the matrix.

    Args:
        inputs: the rows' projected inputs.
        positions, row_seq, query_start, states, weights, eps, max_run: as for ``advance_reference``, on the device.
        out: [R, V, W], packed; rows of longer runs are left as they are.
        pdl: launch programmatically dependent.
    """
    heads, rows = states.heads, out.shape[0]
    _advance_kernel[(query_start.shape[0] - 1, heads.num_value)](
        inputs.flat, inputs.scores, positions, row_seq, query_start, states.matrix, states.position, states.inputs,
        weights["state_conv"], weights["state_rates"], weights["state_norm"], out, rows, eps, NORM_EPS,
        **inputs.sizes(heads), V=heads.num_value, K=heads.num_key, OFFSET=heads.offset, GROUP=heads.group,
        D=heads.key_dim, D_PAD=triton.next_power_of_2(heads.key_dim), W=heads.value_dim,
        W_PAD=triton.next_power_of_2(heads.value_dim), TAPS=heads.taps, RING=states.inputs.shape[1], MAX_RUN=max_run,
        RUN_PAD=triton.next_power_of_2(max_run), num_warps=4, **early(pdl),
    )  # fmt: skip
