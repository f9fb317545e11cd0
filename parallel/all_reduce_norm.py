"""All-reduce + residual + RMSNorm of the residual stream: one kernel where messages are small, NCCL above.

A decode layer has two of these, and their messages are a few KiB: latency is all. The fused kernel is one-shot there:
every rank pushes its rows to all others (the protocol of ``symmetric.py``), adds what it receives in rank order in
float32, adds the residual, normalises, and stores both. Where bytes begin to count it is two-shot: every row has an
owner, who alone receives summands and pushes the new residual. Both give the same bits, on every rank.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import triton
import triton.language as tl

from .collectives import all_reduce_
from .device import early
from .eight_bits import COLUMNS, INTERLEAVED, LARGEST, RowsInEightBits, quantize_groups
from .norm import rms_norm
from .symmetric import (
    Faults,
    SymmetricBuffer,
    deadline_of,
    load_granules,
    not_empty,
    note_fault,
    pack,
    poll_granules,
    push_granules,
    unpack,
)

OPERATION = 0
"""What a Fault's ``operation`` says for this kernel."""
MAX_FUSED_BYTES = 4 << 20
TWO_SHOT_BYTES = 1 << 17
"""From these on: with 4 H200, one shot is faster up to 64 KiB."""
GRACE_NS = tl.constexpr(1 << 30)
SUM_REGISTERS = 128  # a thread's at most; left to itself, the compiler saves registers and asks for summands in turn


@triton.jit(do_not_specialize=["num_rows", "scale_stride"])
def _add_norm_kernel(
    x, residual, weight, normed, scales, scale_stride, num_rows, eps, H: tl.constexpr, H_PAD: tl.constexpr,
    SUMMANDS: tl.constexpr, GROUP: tl.constexpr, POWERS: tl.constexpr, LARGEST: tl.constexpr,
    INTERLEAVED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Add and normalise one row; where GROUP columns share a scale it leaves in 8 bits."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, H_PAD)
    mask = i < H
    scale = tl.load(weight + i, mask=mask, other=0.0).to(tl.float32)  # no kernel writes it
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    total = tl.load(x + row * H + i, mask=mask, other=0.0).to(tl.float32)
    for s in tl.static_range(1, SUMMANDS):
        total += tl.load(x + (s * num_rows + row) * H + i, mask=mask, other=0.0).to(tl.float32)
    if SUMMANDS > 1:
        total = total.to(residual.dtype.element_ty).to(tl.float32)
    total += tl.load(residual + row * H + i, mask=mask, other=0.0).to(tl.float32)
    stream = total.to(residual.dtype.element_ty)
    tl.store(residual + row * H + i, stream, mask=mask)
    value = stream.to(tl.float32)
    scaled = value * tl.rsqrt(tl.sum(value * value, 0) / H + eps) * scale
    if GROUP:
        rounded = scaled.to(residual.dtype.element_ty).to(tl.float32)
        narrow, its_scale = quantize_groups(
            tl.reshape(rounded, [H_PAD // GROUP, GROUP]), POWERS, normed.dtype.element_ty, LARGEST, INTERLEAVED
        )
        g = tl.arange(0, H_PAD // GROUP)
        tl.store(scales + g.to(tl.int64) * scale_stride + row, its_scale, mask=g < H // GROUP)
        tl.store(normed + row * H + i, tl.reshape(narrow, [H_PAD]), mask=mask)
    else:
        tl.store(normed + row * H + i, scaled.to(normed.dtype.element_ty), mask=mask)


@triton.jit
def _add_word(a, b, word, DTYPE: tl.constexpr):
    low, high = unpack(word, DTYPE)
    return a + low, b + high


@triton.jit
def _round(a, b, DTYPE: tl.constexpr):
    return a.to(DTYPE).to(tl.float32), b.to(DTYPE).to(tl.float32)


@triton.jit
def _scale_word(a, b, word, next_word, scale, DTYPE: tl.constexpr, EXACT: tl.constexpr):
    """Return two values times scale and their weights: both in one word, or float32 in a word each where EXACT."""
    if EXACT:
        low, high = word.to(tl.float32, bitcast=True), next_word.to(tl.float32, bitcast=True)
    else:
        low, high = unpack(word, DTYPE)
    return pack(a * scale * low, b * scale * high, DTYPE)


@triton.jit
def _load_sum(x, num_rows, row, at, on, H: tl.constexpr, SUMMANDS: tl.constexpr, DTYPE: tl.constexpr):
    """Load a row of x as four words of DTYPE a granule: its own, or the sum of SUMMANDS float32 rows."""
    if SUMMANDS == 1:
        row_bytes: tl.constexpr = H * DTYPE.primitive_bitwidth // 8
        return load_granules(x.to(tl.int64) + row * row_bytes + at, on)
    else:
        tl.static_assert(DTYPE.primitive_bitwidth == 16)
        a0 = tl.zeros(at.shape, tl.float32)
        a1, a2, a3, a4, a5, a6, a7 = a0, a0, a0, a0, a0, a0, a0
        for s in tl.static_range(SUMMANDS):
            source = x.to(tl.int64) + (s * num_rows + row) * (4 * H) + 2 * at  # eight values of 4 bytes a granule
            w0, w1, w2, w3 = load_granules(source, on)
            a0 += w0.to(tl.float32, bitcast=True)
            a1 += w1.to(tl.float32, bitcast=True)
            a2 += w2.to(tl.float32, bitcast=True)
            a3 += w3.to(tl.float32, bitcast=True)
            w0, w1, w2, w3 = load_granules(source + 16, on)
            a4 += w0.to(tl.float32, bitcast=True)
            a5 += w1.to(tl.float32, bitcast=True)
            a6 += w2.to(tl.float32, bitcast=True)
            a7 += w3.to(tl.float32, bitcast=True)
        return pack(a0, a1, DTYPE), pack(a2, a3, DTYPE), pack(a4, a5, DTYPE), pack(a6, a7, DTYPE)


@triton.jit(do_not_specialize=["num_rows", "rank", "slot", "place", "timeout_ns"])
def _fused_kernel(
    x, residual, weight, normed, peers, faults, num_rows, rank, slot, place, timeout_ns, eps,
    CAPACITY: tl.constexpr, N: tl.constexpr, H: tl.constexpr, GRANULES: tl.constexpr, SUMMANDS: tl.constexpr,
    TWO_SHOT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One row: all of it stays in registers as granules, four words or eight values a thread."""
    row = tl.program_id(0).to(tl.int64)
    owner = (row % N).to(tl.int32) if TWO_SHOT else rank  # in one shot every rank does what an owner does
    dtype: tl.constexpr = residual.dtype.element_ty
    row_bytes: tl.constexpr = H * dtype.primitive_bitwidth // 8
    source_bytes: tl.constexpr = CAPACITY * row_bytes
    addresses = peers.to(tl.pointer_type(tl.int64))
    at = tl.arange(0, GRANULES) * 16
    on = (at < row_bytes).to(tl.int32)
    exact: tl.constexpr = weight.dtype.element_ty.primitive_bitwidth > dtype.primitive_bitwidth
    if exact:
        g0, g1, g2, g3 = load_granules(weight.to(tl.int64) + 2 * at, on)
        g4, g5, g6, g7 = load_granules(weight.to(tl.int64) + 2 * at + 16, on)
    else:
        g0, g2, g4, g6 = load_granules(weight.to(tl.int64) + at, on)
        g1, g3, g5, g7 = g0, g2, g4, g6
    base = (slot.to(tl.int64) * N * CAPACITY + row) * row_bytes + at
    mine = tl.load(addresses + rank) + base
    targets = tl.tuple(())  # my place at each peer, which never moves
    for n in tl.static_range(1, N):
        targets += (tl.load(addresses + (rank + n) % N) + base + rank.to(tl.int64) * source_bytes,)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    # Who waits for others that wait gives up later, and finds the word of those who know who never came: the exchanges
    # of other groups first, then owners, who send what they have, then the rest.
    patience = timeout_ns.to(tl.int64) + tl.where(rank == owner, GRACE_NS, 2 * GRACE_NS)
    deadline = deadline_of(patience, faults) + tl.zeros([GRANULES], tl.int64)
    w0, w1, w2, w3 = _load_sum(x, num_rows, row, at, on, H, SUMMANDS, dtype)
    w0, w1, w2, w3 = not_empty(w0), not_empty(w1), not_empty(w2), not_empty(w3)
    for n in tl.static_range(1, N):
        to = tl.where((rank + n) % N == owner, on, 0) if TWO_SHOT else on
        push_granules(targets[n - 1], w0, w1, w2, w3, to)
    adds = tl.where(rank == owner, on, 0)  # what an owner sends has the residual in it
    s0, s1, s2, s3 = load_granules(residual.to(tl.int64) + row * row_bytes + at, adds)
    a0 = tl.zeros([GRANULES], tl.float32)
    a1, a2, a3, a4, a5, a6, a7 = a0, a0, a0, a0, a0, a0, a0
    missing = tl.full([GRANULES], -1, tl.int32)
    for n in tl.static_range(N):
        comes = (n != rank) & ((rank == owner) | (n == owner))
        own = (n == rank) & (rank == owner)
        r0, r1, r2, r3, late = poll_granules(mine + n * source_bytes, deadline, tl.where(comes, on, 0))
        r0, r1, r2, r3 = tl.where(own, w0, r0), tl.where(own, w1, r1), tl.where(own, w2, r2), tl.where(own, w3, r3)
        missing = tl.where((late != 0) & (missing < 0), n, missing)
        a0, a1 = _add_word(a0, a1, r0, dtype)
        a2, a3 = _add_word(a2, a3, r1, dtype)
        a4, a5 = _add_word(a4, a5, r2, dtype)
        a6, a7 = _add_word(a6, a7, r3, dtype)
    a0, a1 = _add_word(a0, a1, s0, dtype)
    a2, a3 = _add_word(a2, a3, s1, dtype)
    a4, a5 = _add_word(a4, a5, s2, dtype)
    a6, a7 = _add_word(a6, a7, s3, dtype)
    w0, w1 = not_empty(pack(a0, a1, dtype)), not_empty(pack(a2, a3, dtype))
    w2, w3 = not_empty(pack(a4, a5, dtype)), not_empty(pack(a6, a7, dtype))
    if TWO_SHOT:
        for n in tl.static_range(1, N):
            push_granules(targets[n - 1], w0, w1, w2, w3, adds)
    push_granules(residual.to(tl.int64) + row * row_bytes + at, w0, w1, w2, w3, on)
    # the norm is of the stream as it is stored
    a0, a1 = _round(a0, a1, dtype)
    a2, a3 = _round(a2, a3, dtype)
    a4, a5 = _round(a4, a5, dtype)
    a6, a7 = _round(a6, a7, dtype)
    squares = a0 * a0 + a1 * a1 + a2 * a2 + a3 * a3 + a4 * a4 + a5 * a5 + a6 * a6 + a7 * a7
    scale = tl.rsqrt(tl.sum(squares, 0) / H + eps)  # its barrier stands between the polls and the emptying
    push_granules(
        normed.to(tl.int64) + row * row_bytes + at,
        _scale_word(a0, a1, g0, g1, scale, dtype, exact), _scale_word(a2, a3, g2, g3, scale, dtype, exact),
        _scale_word(a4, a5, g4, g5, scale, dtype, exact), _scale_word(a6, a7, g6, g7, scale, dtype, exact), on,
    )  # fmt: skip
    tl.debug_barrier()
    empty = tl.full([GRANULES], -1, tl.int32)
    for n in tl.static_range(N):
        comes = (n != rank) & ((rank == owner) | (n == owner))
        push_granules(mine + n * source_bytes, empty, empty, empty, empty, tl.where(comes, on, 0))
    note_fault(faults, missing, place)


class AllReduceNorm:
    """Sums a row-parallel projection over a group, adds it to the residual stream and normalises.

    Collective over the group: every rank makes it, and calls it with the same number of rows in the same order, an even
    number of times a step.

    Args:
        group: the ranks that hold summands; None is a group of one.
        hidden_size: h, a row's elements; a row must fill whole granules of 16 bytes.
        dtype: of rows, residual and weights.
        device: this rank's.
        fused: use the fused kernel for small messages; needs a group that ``shares_memory``, and faults.
        faults: where the fused kernel notes waits that it gave up.
        timeout_s: how long the kernels of a step wait for a rank, in seconds; this one waits 1 to 2 s longer.
        pdl: launch programmatically dependent; every kernel before and after it on the stream must allow it.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None,
        *,
        hidden_size: int,
        dtype: torch.dtype,
        device: torch.device,
        fused: bool = False,
        faults: Faults | None = None,
        timeout_s: float = 600.0,
        pdl: bool = False,
    ) -> None:
        self._group, self._hidden_size, self._pdl = group, hidden_size, pdl
        self._row_bytes = hidden_size * dtype.itemsize
        self._timeout_ns = int(timeout_s * 1e9)
        self._faults = faults
        self._buffer: SymmetricBuffer | None = None
        self._capacity = max(1, MAX_FUSED_BYTES // self._row_bytes)
        if fused and group is not None and faults is not None and self._row_bytes % 16 == 0:
            self._buffer = SymmetricBuffer(group, 2 * group.size() * self._capacity * self._row_bytes, device)

    def is_fused(self, num_rows: int) -> bool:
        """Return whether a message of so many rows goes through the fused kernel; the same on every rank."""
        return self._buffer is not None and num_rows <= self._capacity

    def can_quantize(self, x: torch.Tensor) -> bool:
        """Return whether rows like the stream's, x [R, h], can be asked for in 8 bits; the same on every rank."""
        large = x.is_cuda and len(x) > 0 and not self.is_fused(len(x))
        return large and x.element_size() == 2 and self._hidden_size % COLUMNS == 0

    def _is_two_shot(self, num_rows: int) -> bool:
        size = 1 if self._group is None else self._group.size()
        return num_rows >= size > 2 and num_rows * self._row_bytes >= TWO_SHOT_BYTES

    def __call__(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, *, index: int = 0
    ) -> torch.Tensor:
        """Return RMSNorm(residual + sum of x over the group) * weight, and store the sum in ``residual``.

        Args:
            x: [R, h] in residual's dtype, this rank's summand, packed; overwritten where the message is large. Or
                [S, R, h], float32 where S > 1: it is the sum of these, rounded to residual's dtype (of 2 bytes).
            residual: [R, h], packed, equal on all ranks; replaced by residual + the sum.
            weight: [h], of the norm, in residual's dtype or float32.
            eps: of the norm.
            index: which call of the step this is, counted from 0; layer = index // 2.

        Returns:
            [R, h] in residual's dtype, equal on all ranks bit for bit.
        """
        rows, normed = residual.shape[0], torch.empty_like(residual)
        if rows == 0:
            return normed
        h, summands = self._hidden_size, x.shape[0] if x.dim() == 3 else 1
        if self._buffer is None or not self.is_fused(rows) or self._faults is None or self._group is None:
            x = self._reduced(x, residual.dtype)
            if not x.is_cuda:
                return rms_norm(residual.add_(x.view_as(residual)), weight, eps)
            self._add_norm(x, residual, weight, normed, None, eps)
            return normed
        granules = max(32, triton.next_power_of_2(-(-self._row_bytes // 16)))  # one a thread: see push_granules
        _fused_kernel[(rows,)](
            x, residual, weight, normed, self._buffer.peers, self._faults.word, rows, self._group.rank(),
            index % 2, index // 2 * 4 + OPERATION, self._timeout_ns, eps,
            CAPACITY=self._capacity, N=self._group.size(), H=h, GRANULES=granules, SUMMANDS=summands,
            TWO_SHOT=self._is_two_shot(rows), num_warps=min(16, granules // 32), **_launch(self._pdl, summands),
        )  # fmt: skip
        return normed

    def in_8_bits(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, *, powers_of_two: bool
    ) -> RowsInEightBits:
        """Do what a call does where ``can_quantize``, and return rows in 8 bits, as if they were quantised afterwards
        (but for the order in which their squares are added up).

        powers_of_two: whether their scales are rounded up to such. All else as in a call, which this is one of.
        """
        rows = RowsInEightBits.empty_like(residual)
        x = self._reduced(x, residual.dtype)
        self._add_norm(x, residual, weight, rows.values, rows.scales, eps, powers_of_two=powers_of_two)
        return rows

    def _reduced(self, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Return the sum over the group, where there is one, of the sum of summands."""
        if self._group is None:
            return x
        x = x.sum(0).to(dtype) if x.dim() == 3 and x.shape[0] > 1 else x
        all_reduce_(x, self._group)
        return x

    def _add_norm(
        self,
        x: torch.Tensor,
        residual: torch.Tensor,
        weight: torch.Tensor,
        normed: torch.Tensor,
        scales: torch.Tensor | None,
        eps: float,
        *,
        powers_of_two: bool = False,
    ) -> None:
        """Add summands x to the residual, and fill ``normed``, in 8 bits where there are ``scales``."""
        summands, rows, h = x.shape[0] if x.dim() == 3 else 1, residual.shape[0], self._hidden_size
        _add_norm_kernel[(rows,)](
            x, residual, weight, normed, normed if scales is None else scales,
            0 if scales is None else scales.stride(0), rows, eps, H=h, H_PAD=triton.next_power_of_2(h),
            SUMMANDS=summands, GROUP=0 if scales is None else COLUMNS, POWERS=powers_of_two, LARGEST=LARGEST,
            INTERLEAVED=INTERLEAVED, num_warps=8, **_launch(self._pdl, summands),
        )  # fmt: skip


def _launch(pdl: bool, summands: int) -> dict[str, int]:
    """Return ``early``'s options, and room for summands; Triton's interpreter knows no bound of registers."""
    return early(pdl) | ({"maxnreg": SUM_REGISTERS} if pdl and summands > 1 else {})
