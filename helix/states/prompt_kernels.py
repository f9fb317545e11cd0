"""State layers for runs of many rows, prompts': the rule by chunks of 64 tokens (section 3.3 of arXiv 2412.06464).

 1. ``_convolve_kernel``: the short convolution of all rows, and the lengths of queries and keys.
 2. ``_solve_kernel``: what 16 tokens do to each other, row by row; one warp each, so that no warp waits for another.
 3. ``_within_kernel``: what the tokens of a chunk do to each other, for all chunks and heads at once.
 4. ``_across_kernel``: from chunk to chunk, in order: a program has some columns of one head's state, which it keeps in
    registers, and writes the state and the inputs that the next step needs, and where ``Cuts`` says so others before.
 5. ``_norm_kernel``: norm and gate of the outputs.

Which rows are a run's, and which runs are long, is on the device alone: launches depend on sizes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from attention.append import load_sum
from attention.shared_memory import shared_bytes

from .cache import LayerStates
from .cuts import Cuts
from .decode_kernel import silu_rounded, softplus
from .heads import CHUNK
from .inputs import Inputs
from .reference import NORM_EPS

ROWS = 32  # of the convolution, a program
# Elements that heads are padded to in 16 bits: with 16, ptxas of CUDA 12.8 (Triton 3.6, 3.7) takes a wrong register for
# a product's address.
LEAST = 128
PART = tl.constexpr(16)  # rows that are solved one by one: a block of a chunk's triangular system
STATE_COLUMNS = 32  # of a head's state, a program
STAGES = 3  # chunks whose inputs a program that goes from chunk to chunk has at once, where shared memory holds them
BESIDE_BYTES = 16 << 10  # of shared memory, what it needs beside these


@triton.jit(do_not_specialize=["num_rows"])
def _convolve_kernel(
    flat, positions, row_seq, inputs, conv, mixed, num_rows,
    SUMMANDS: tl.constexpr, V: tl.constexpr, K: tl.constexpr, D: tl.constexpr, W: tl.constexpr, WIDTH: tl.constexpr,
    TAPS: tl.constexpr, RING: tl.constexpr, BR: tl.constexpr, BLOCK: tl.constexpr, NORM_EPS: tl.constexpr,
):  # fmt: skip
    """One head's columns of BR rows; of queries, then keys, then values. Queries and keys come out of length one."""
    row, head, d = tl.program_id(0) * BR + tl.arange(0, BR), tl.program_id(1), tl.arange(0, BLOCK)
    CHANNELS: tl.constexpr = 2 * K * D + V * W
    INPUT: tl.constexpr = CHANNELS + 2 * V
    dtype: tl.constexpr = mixed.dtype.element_ty
    is_value = head >= 2 * K
    column = tl.where(is_value, 2 * K * D + (head - 2 * K) * W, head * D) + d
    real = (d < tl.where(is_value, W, D))[None, :]
    there = row < num_rows
    slot = tl.load(row_seq + row, mask=there, other=-1)
    split_stride = tl.zeros([], tl.int64) + num_rows * WIDTH
    # a sequence has one run of rows, so its rows before this one are this run's
    inside = there & (row >= TAPS - 1)
    inside &= tl.load(row_seq + row - (TAPS - 1), mask=inside, other=-1) == slot
    total = tl.zeros([BR, BLOCK], tl.float32)
    if tl.sum((there & (inside == 0)).to(tl.int32), 0) == 0:
        for tap in tl.static_range(TAPS):
            source = (row - (TAPS - 1 - tap)).to(tl.int64)[:, None] * WIDTH + column[None, :]
            x = load_sum(flat, split_stride, source, real & there[:, None], SUMMANDS, dtype).to(tl.float32)
            total += x * tl.load(conv + column * TAPS + tap, mask=real, other=0.0).to(tl.float32)
    else:  # some begin a run, or are behind its first rows
        position = tl.load(positions + row, mask=there, other=0).to(tl.int32)
        ring = inputs + slot.to(tl.int64) * (RING * INPUT)
        for tap in tl.static_range(TAPS):
            back = TAPS - 1 - tap
            same = there & (row >= back)
            same &= tl.load(row_seq + row - back, mask=same, other=-1) == slot
            source = (row - back).to(tl.int64)[:, None] * WIDTH + column[None, :]
            x = load_sum(flat, split_stride, source, real & same[:, None], SUMMANDS, dtype).to(tl.float32)
            at = position - back
            kept = there & (at >= 0) & (same == 0)
            old = (ring + (at & (RING - 1)) * INPUT)[:, None] + column[None, :]
            x += tl.load(old, mask=real & kept[:, None], other=0.0).to(tl.float32)
            total += x * tl.load(conv + column * TAPS + tap, mask=real, other=0.0).to(tl.float32)
    made = silu_rounded(total, dtype).to(tl.float32)
    length = tl.rsqrt(tl.sum(made * made, 1) + NORM_EPS) * tl.where(head < K, D**-0.5, 1.0)
    made = tl.where(is_value, made, made * length[:, None])
    to = mixed + row.to(tl.int64)[:, None] * CHANNELS + column[None, :]
    tl.store(to, made.to(dtype), mask=real & there[:, None])


@triton.jit
def _chunk_at(query_start, num_runs, n, MAX_RUN: tl.constexpr, CHUNK: tl.constexpr):
    """Return the first row of the n-th chunk of all long runs, and where its run ends; 0, 0 past the last."""
    start, end = 0, 0
    left = n
    for run in range(num_runs):
        first, stop = tl.load(query_start + run), tl.load(query_start + run + 1)
        chunks = tl.where(stop - first > MAX_RUN, (stop - first + CHUNK - 1) // CHUNK, 0)
        here = (left >= 0) & (left < chunks)
        start, end = tl.where(here, first + left * CHUNK, start), tl.where(here, stop, end)
        left -= chunks
    return start, end


@triton.jit
def _beta_and_decay(given, rates, row, there, head, num_rows, SUMMANDS: tl.constexpr, WIDTH: tl.constexpr,
                    AT: tl.constexpr, V: tl.constexpr, DTYPE: tl.constexpr):  # fmt: skip
    """Return beta of some rows, and by what each decays the state, in logarithms; both zero for rows not there."""
    split_stride = tl.zeros([], tl.int64) + num_rows * WIDTH
    at = row * WIDTH + AT + head
    b = load_sum(given, split_stride, at, there, SUMMANDS, DTYPE).to(tl.float32)
    a = load_sum(given, split_stride, at + V, there, SUMMANDS, DTYPE).to(tl.float32)
    g = -tl.exp(tl.load(rates + head)) * softplus(a + tl.load(rates + V + head))
    return tl.where(there, 1.0 / (1.0 + tl.exp(-b)), 0.0), tl.where(there, g, 0.0)


@triton.jit
def _decayed_products(k, earlier, decay, beta, PRECISION: tl.constexpr):
    """Return what the triangular system of some tokens has below its diagonal, negated, where ``earlier`` says so."""
    between = tl.exp(tl.where(earlier, decay[:, None] - decay[None, :], float("-inf")))
    return -tl.dot(k, tl.trans(k), input_precision=PRECISION) * between * beta[:, None]


@triton.jit(do_not_specialize=["num_rows", "num_runs"])
def _solve_kernel(
    given, mixed, query_start, rates, inverses, num_rows, num_runs,
    SCORE_SUMMANDS: tl.constexpr, SCORES_WIDTH: tl.constexpr, SCORES_AT: tl.constexpr, V: tl.constexpr,
    K: tl.constexpr, OFFSET: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, W: tl.constexpr,
    MAX_RUN: tl.constexpr, CHUNK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The inverse of one block on the diagonal of a chunk's triangular system."""
    n, part, head = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    CHANNELS: tl.constexpr = 2 * K * D + V * W
    dtype: tl.constexpr = mixed.dtype.element_ty
    start, end = _chunk_at(query_start, num_runs, n, MAX_RUN, CHUNK)
    start += part * PART
    i, d = tl.arange(0, PART), tl.arange(0, D_PAD)
    row, there = start.to(tl.int64) + i, start + i < end
    k_at = mixed + row[:, None] * CHANNELS + (K + (OFFSET + head) // GROUP) * D + d[None, :]
    k = tl.load(k_at, mask=there[:, None] & (d < D)[None, :], other=0.0)
    beta, g = _beta_and_decay(
        given, rates, row, there, head, num_rows, SCORE_SUMMANDS, SCORES_WIDTH, SCORES_AT, V, dtype
    )
    earlier = i[:, None] > i[None, :]
    below = _decayed_products(k, earlier, tl.cumsum(g, 0), beta, PRECISION)
    inverse = tl.zeros([PART, PART], tl.float32)  # less the ones on the diagonal
    for turn in range(1, PART):
        mine = (i == turn)[:, None]
        line = tl.sum(tl.where(mine, below, 0.0), 0)
        line += tl.sum(line[:, None] * inverse, 0)
        inverse = tl.where(mine, line[None, :], inverse)
    inverse += tl.where(i[:, None] == i[None, :], 1.0, 0.0)
    cell = (n.to(tl.int64) * V + head) * CHUNK + part * PART + i
    tl.store(inverses + cell[:, None] * PART + i[None, :], inverse)


@triton.jit(do_not_specialize=["num_rows", "num_runs"])
def _within_kernel(
    given, mixed, query_start, rates, inverses, values, erased, scores, decays, num_rows, num_runs,
    SCORE_SUMMANDS: tl.constexpr, SCORES_WIDTH: tl.constexpr, SCORES_AT: tl.constexpr, V: tl.constexpr,
    K: tl.constexpr, OFFSET: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, W: tl.constexpr,
    W_PAD: tl.constexpr, MAX_RUN: tl.constexpr, CHUNK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    n, head = tl.program_id(0), tl.program_id(1)
    CHANNELS: tl.constexpr = 2 * K * D + V * W
    dtype: tl.constexpr = mixed.dtype.element_ty
    # entries of the inverse are at most one, so those of m at most PART: 16 bits hold them as exactly as tf32 does
    SOLVED: tl.constexpr = tl.float32 if dtype == tl.float32 else tl.float16
    start, end = _chunk_at(query_start, num_runs, n, MAX_RUN, CHUNK)
    if end > start:
        i, d, w = tl.arange(0, CHUNK), tl.arange(0, D_PAD), tl.arange(0, W_PAD)
        row, there = start.to(tl.int64) + i, start + i < end
        key_head = (OFFSET + head) // GROUP
        of_key, of_value = there[:, None] & (d < D)[None, :], there[:, None] & (w < W)[None, :]
        source = mixed + row[:, None] * CHANNELS
        cell = (n.to(tl.int64) * V + head) * CHUNK + i[:, None]
        beta, g = _beta_and_decay(
            given, rates, row, there, head, num_rows, SCORE_SUMMANDS, SCORES_WIDTH, SCORES_AT, V, dtype
        )
        decay = tl.cumsum(g, 0)
        tl.store(decays + (n.to(tl.int64) * V + head) * CHUNK + i, decay)
        k = tl.load(source + (K + key_head) * D + d[None, :], mask=of_key, other=0.0)
        # With the diagonal's blocks solved the system is 1 - m, whose m is zero on and above the diagonal of blocks, so
        # that no more than the third power of it is another matrix than zero.
        block = i // PART
        near = block[:, None] == block[None, :]
        inverse = tl.load(inverses + cell * PART + (i % PART)[None, :], mask=near, other=0.0)
        rest = _decayed_products(k, block[:, None] > block[None, :], decay, beta, PRECISION)
        m = tl.dot(inverse.to(SOLVED), rest.to(SOLVED), input_precision=PRECISION).to(SOLVED)
        square = tl.dot(m, m, input_precision=PRECISION).to(SOLVED)
        inverse += tl.dot(square, inverse.to(SOLVED), input_precision=PRECISION)
        inverse += tl.dot(m, inverse.to(SOLVED), input_precision=PRECISION)
        solved = inverse.to(dtype)
        made = (k.to(tl.float32) * (beta * tl.exp(decay))[:, None]).to(dtype)
        made = tl.dot(solved, made, input_precision=PRECISION)
        tl.store(erased + cell * D + d[None, :], made.to(dtype), mask=(d < D)[None, :])
        v = tl.load(source + 2 * K * D + head * W + w[None, :], mask=of_value, other=0.0).to(tl.float32)
        made = tl.dot(solved, (v * beta[:, None]).to(dtype), input_precision=PRECISION)
        tl.store(values + cell * W + w[None, :], made.to(dtype), mask=(w < W)[None, :])
        q = tl.load(source + key_head * D + d[None, :], mask=of_key, other=0.0)
        between = tl.exp(tl.where(i[:, None] >= i[None, :], decay[:, None] - decay[None, :], float("-inf")))
        made = tl.dot(q, tl.trans(k), input_precision=PRECISION) * between
        tl.store(scores + cell * CHUNK + i[None, :], made.to(dtype))


@triton.jit
def _keep(
    matrix, known, inputs, place, state, flat, start, stop, end, head, part, num_rows,
    SUMMANDS: tl.constexpr, WIDTH: tl.constexpr, V: tl.constexpr, K: tl.constexpr, OFFSET: tl.constexpr,
    GROUP: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, W: tl.constexpr, BW: tl.constexpr,
    TAPS: tl.constexpr, RING: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Keep some columns of a head's state before position ``end``, and the inputs that convolutions see from there on.

    The row at that position is ``stop``; what is kept of all heads is at ``place``.
    """
    INPUT: tl.constexpr = 2 * K * D + V * W + 2 * V
    d, w = tl.arange(0, D_PAD), part * BW + tl.arange(0, BW)
    cell = place * V + head
    to = matrix + cell * (D * W) + d[:, None] * W + w[None, :]
    tl.store(to, state, mask=(d < D)[:, None] & (w < W)[None, :])
    tl.store(known + cell, end, mask=part == 0)
    split_stride = tl.zeros([], tl.int64) + num_rows * WIDTH
    key_head = (OFFSET + head) // GROUP
    owns_key = ((head == 0) | ((OFFSET + head) % GROUP == 0)) & (part == 0)
    for back in tl.static_range(1, TAPS):
        is_row = stop - back >= start
        source = (stop - back).to(tl.int64) * WIDTH
        to = inputs + (place * RING + ((end - back) & (RING - 1))) * INPUT
        column, mine = 2 * K * D + head * W + w, (w < W) & is_row
        tl.store(to + column, load_sum(flat, split_stride, source + column, mine, SUMMANDS, DTYPE), mask=mine)
        mine = (d < D) & owns_key & is_row
        column = key_head * D + d
        tl.store(to + column, load_sum(flat, split_stride, source + column, mine, SUMMANDS, DTYPE), mask=mine)
        column = (K + key_head) * D + d
        tl.store(to + column, load_sum(flat, split_stride, source + column, mine, SUMMANDS, DTYPE), mask=mine)


@triton.jit(do_not_specialize=["num_rows", "layer", "num_layers"])
def _across_kernel(
    flat, positions, row_seq, query_start, matrix, known, inputs, kept_matrix, kept_known, kept_inputs, first_cut,
    cut_rows, cut_slots, mixed, values, erased, scores, decays, out, num_rows, layer, num_layers,
    SUMMANDS: tl.constexpr, WIDTH: tl.constexpr, V: tl.constexpr, K: tl.constexpr, OFFSET: tl.constexpr,
    GROUP: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, W: tl.constexpr, BW: tl.constexpr,
    TAPS: tl.constexpr, RING: tl.constexpr, MAX_RUN: tl.constexpr, CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    run, head, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    CHANNELS: tl.constexpr = 2 * K * D + V * W
    dtype: tl.constexpr = out.dtype.element_ty
    key_head = (OFFSET + head) // GROUP
    start, stop = tl.load(query_start + run), tl.load(query_start + run + 1)
    if stop - start > MAX_RUN:
        n = tl.zeros([], tl.int64)
        for before in range(run):
            length = tl.load(query_start + before + 1) - tl.load(query_start + before)
            n += tl.where(length > MAX_RUN, (length + CHUNK - 1) // CHUNK, 0)
        i, d, w = tl.arange(0, CHUNK), tl.arange(0, D_PAD), part * BW + tl.arange(0, BW)
        slot = tl.load(row_seq + start).to(tl.int64)
        here = matrix + (slot * V + head) * (D * W) + d[:, None] * W + w[None, :]
        state = tl.load(here, mask=(d < D)[:, None] & (w < W)[None, :], other=0.0)
        begin = start
        for cut in range(tl.load(first_cut + run), tl.load(first_cut + run + 1)):
            until = tl.load(cut_rows + cut)
            for at in range(begin, until, CHUNK):
                cell = (n * V + head) * CHUNK + i[:, None]
                of_key, of_value = (d < D)[None, :], (w < W)[None, :]
                row = tl.zeros([CHUNK], tl.int64) + at + i
                of_row = (row < stop)[:, None]
                source = mixed + row[:, None] * CHANNELS + key_head * D + d[None, :]
                decay, last = (
                    tl.load(decays + (n * V + head) * CHUNK + i),
                    tl.load(decays + (n * V + head + 1) * CHUNK - 1),
                )
                rounded = state.to(dtype)
                e = tl.load(erased + cell * D + d[None, :], mask=of_key, other=0.0)
                new = tl.load(values + cell * W + w[None, :], mask=of_value, other=0.0).to(tl.float32)
                new -= tl.dot(e, rounded, input_precision=PRECISION)
                q = tl.load(source, mask=of_row & of_key, other=0.0)
                made = tl.dot(q, rounded, input_precision=PRECISION) * tl.exp(decay)[:, None]
                made += tl.dot(tl.load(scores + cell * CHUNK + i[None, :]), new.to(dtype), input_precision=PRECISION)
                k = tl.load(source + K * D, mask=of_row & of_key, other=0.0)
                put = (new * tl.exp(last - decay)[:, None]).to(dtype)
                state = state * tl.exp(last) + tl.dot(tl.trans(k), put, input_precision=PRECISION)
                to = out + (row[:, None] * V + head) * W + w[None, :]
                tl.store(to, made.to(dtype), mask=of_row & of_value)
                n += 1
            begin = until
            kept = tl.load(cut_slots + cut).to(tl.int64)
            end = tl.load(positions + until - 1).to(tl.int32) + 1
            if kept < 0:
                _keep(
                    matrix, known, inputs, slot, state, flat, start, until, end, head, part, num_rows,
                    SUMMANDS, WIDTH, V, K, OFFSET, GROUP, D, D_PAD, W, BW, TAPS, RING, dtype,
                )  # fmt: skip
            else:
                _keep(
                    kept_matrix, kept_known, kept_inputs, kept * num_layers + layer, state, flat, start, until, end,
                    head, part, num_rows,
                    SUMMANDS, WIDTH, V, K, OFFSET, GROUP, D, D_PAD, W, BW, TAPS, RING, dtype,
                )  # fmt: skip


@triton.jit(do_not_specialize=["num_rows", "num_runs"])
def _norm_kernel(
    flat, query_start, norm, out, num_rows, num_runs, eps,
    SUMMANDS: tl.constexpr, WIDTH: tl.constexpr, V: tl.constexpr, W: tl.constexpr, W_PAD: tl.constexpr,
    CHANNELS: tl.constexpr, MAX_RUN: tl.constexpr, CHUNK: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """Norm and gate of one head's outputs for BR rows of a chunk."""
    n, part, head = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    dtype: tl.constexpr = out.dtype.element_ty
    start, end = _chunk_at(query_start, num_runs, n, MAX_RUN, CHUNK)
    row, w = start.to(tl.int64) + part * BR + tl.arange(0, BR), tl.arange(0, W_PAD)
    mine = (row < end)[:, None] & (w < W)[None, :]
    to = out + (row[:, None] * V + head) * W + w[None, :]
    made = tl.load(to, mask=mine, other=0.0).to(tl.float32)
    made = (made * tl.rsqrt(tl.sum(made * made, 1) / W + eps)[:, None]).to(dtype).to(tl.float32)
    weight = tl.load(norm + w, mask=w < W, other=0.0).to(tl.float32)
    made = (made * weight[None, :]).to(dtype).to(tl.float32)
    at = row[:, None] * WIDTH + CHANNELS + head * W + w[None, :]
    split_stride = tl.zeros([], tl.int64) + num_rows * WIDTH
    gate = load_sum(flat, split_stride, at, mine, SUMMANDS, dtype).to(tl.float32)
    tl.store(to, (made * gate / (1.0 + tl.exp(-gate))).to(dtype), mask=mine)


def advance_many(
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
    cuts: Cuts | None = None,
    place: int = 0,
) -> None:
    """Run a state layer's heads over the rows of runs of more than ``max_run`` rows, which all stay.

    It comes behind ``advance_few`` with the same arguments, which leaves such runs' states where they begin.
    ``cuts``: what is kept of the runs, of the state layer at ``place``; None for nothing.
    """
    heads, rows, runs = states.heads, out.shape[0], query_start.shape[0] - 1
    flat, found = inputs.flat, inputs.sizes(heads)
    from_flat = {name: found[name] for name in ("SUMMANDS", "WIDTH")}
    from_scores = {name: found[name] for name in ("SCORE_SUMMANDS", "SCORES_WIDTH", "SCORES_AT")}
    V, W, D, channels = heads.num_value, heads.value_dim, heads.key_dim, heads.conv_size
    chunks = rows // CHUNK + runs
    mixed = out.new_empty((rows, channels))
    least = LEAST if out.element_size() == 2 else 1
    padded_key, padded = (max(least, triton.next_power_of_2(each)) for each in (D, W))
    _convolve_kernel[(-(-rows // ROWS), 2 * heads.num_key + V)](
        flat, positions, row_seq, states.inputs, weights["state_conv"], mixed, rows, **from_flat,
        V=V, K=heads.num_key, D=D, W=W, TAPS=heads.taps, RING=states.inputs.shape[1], BR=ROWS,
        BLOCK=max(padded_key, padded), NORM_EPS=NORM_EPS, num_warps=4,
    )  # fmt: skip
    values, erased = out.new_empty((chunks, V, CHUNK, W)), out.new_empty((chunks, V, CHUNK, D))
    scores, decays = out.new_empty((chunks, V, CHUNK, CHUNK)), states.matrix.new_empty((chunks, V, CHUNK))
    inverses = states.matrix.new_empty((chunks, V, CHUNK, PART.value))
    made = values, erased, scores, decays
    sizes = {
        "V": V, "K": heads.num_key, "OFFSET": heads.offset, "GROUP": heads.group, "D": D,
        "D_PAD": padded_key, "W": W, "MAX_RUN": max_run, "CHUNK": CHUNK,
        "PRECISION": "ieee" if out.dtype == torch.float32 else "tf32",
    }  # fmt: skip
    given = inputs.scores, mixed, query_start, weights["state_rates"], inverses
    _solve_kernel[(chunks, CHUNK // PART.value, V)](*given, rows, runs, **from_scores, **sizes, num_warps=1)
    _within_kernel[(chunks, V)](*given, *made, rows, runs, **from_scores, W_PAD=padded, **sizes, num_warps=4)
    columns = min(STATE_COLUMNS, padded)
    turn_bytes = CHUNK * (3 * padded_key + CHUNK + columns) * out.element_size()
    stages = max(1, min(STAGES, (shared_bytes(out.device) - BESIDE_BYTES) // turn_bytes))
    cuts = Cuts.at_ends(query_start) if cuts is None else cuts
    own = states.matrix, states.position, states.inputs
    kept = own if cuts.kept is None else cuts.kept
    where = *own, *kept, cuts.first, cuts.rows, cuts.slots
    _across_kernel[(runs, V, -(-W // columns))](
        flat, positions, row_seq, query_start, *where, mixed, *made, out, rows, place, kept[0].shape[1],
        **from_flat, BW=columns, TAPS=heads.taps, RING=states.inputs.shape[1], **sizes,
        num_warps=4, num_stages=stages,
    )  # fmt: skip
    _norm_kernel[(chunks, CHUNK // 16, V)](
        flat, query_start, weights["state_norm"], out, rows, runs, eps, **from_flat, V=V, W=W, W_PAD=padded,
        CHANNELS=channels, MAX_RUN=max_run, CHUNK=CHUNK, BR=16, num_warps=4,
    )  # fmt: skip
