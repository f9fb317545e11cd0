"""The fused exchange: merge of parts, push to the owners, wait and merge over ranks, in one launch.

Every rank pushes each query head's partial (merged over its own parts on the way) straight into the receive slot of
the rank that owns the head, and merges what arrives for its own heads. The data is its own flag
(``parallel.symmetric``), so there is no fence, no flag and no barrier between the two halves: a program pushes some
heads of a row and merges some others. The lse travels as one word a head beside the granules of O.

Slots alternate with a step counter in device memory and the layer, so a captured graph replays correctly.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import triton
import triton.language as tl

from parallel.device import early
from parallel.symmetric import (
    Faults,
    SymmetricBuffer,
    deadline_of,
    load_granules,
    not_empty,
    note_fault,
    pack,
    poll_granules,
    poll_word,
    push_granules,
    push_word,
    unpack,
)

from .merge import parts_at_once
from .partial import Partials

OPERATION = 1
"""What a Fault's ``operation`` says for this kernel."""
MIN_CAPACITY, MAX_CAPACITY = 256, 4096
CAPACITY_BYTES = 1 << 24
"""Of a rank's partials in one slot, within these numbers of rows."""
MAX_SLICES = 4


@triton.jit
def _sum8(a0, a1, a2, a3, a4, a5, a6, a7, b0, b1, b2, b3, b4, b5, b6, b7):
    return a0 + b0, a1 + b1, a2 + b2, a3 + b3, a4 + b4, a5 + b5, a6 + b6, a7 + b7


@triton.jit
def _as_float(word):
    return word.to(tl.float32, bitcast=True)


@triton.jit
def _pair(low, high):
    return (low.to(tl.int64) & 0xFFFFFFFF) | (high.to(tl.int64) << 32)


@triton.jit
def _weighed(word, weight):
    return tl.where(weight > 0.0, _as_float(word) * weight, 0.0)


@triton.jit
def _merged_parts(part, part_lse, start, stop, head, g, heads, MOST_PAD: tl.constexpr, TURN: tl.constexpr,
                  GRANULES: tl.constexpr, DTYPE: tl.constexpr):  # fmt: skip
    """Merge one head's float32 parts [start, stop), at most TURN at a time: the words of a row g of its
    GRANULES, and its lse [1, 1].
    """
    VALUES: tl.constexpr = 128 // DTYPE.primitive_bitwidth  # of one granule on the wire; float32 in the parts
    AT_ONCE: tl.constexpr = min(TURN, 1024 // g.shape[1])
    every = start + tl.arange(0, MOST_PAD)
    lse = tl.load(part_lse + every.to(tl.int64) * heads + head, mask=every < stop, other=float("-inf"))
    top = tl.max(lse, 0)
    shift = tl.where(top == float("-inf"), 0.0, top)
    total = tl.sum(tl.exp(lse - shift), 0)
    scale = 1.0 / tl.where(total == 0.0, 1.0, total)
    b0 = tl.zeros([AT_ONCE, g.shape[1]], tl.float32)
    b1, b2, b3, b4, b5, b6, b7 = b0, b0, b0, b0, b0, b0, b0
    for first in range(start, stop, AT_ONCE):
        p = first + tl.arange(0, AT_ONCE)[:, None]
        cell = p.to(tl.int64) * heads + head + g * 0
        on = ((p < stop) & (g >= 0)).to(tl.int32)  # no load waits for a weight; _weighed drops what is empty
        address = part.to(tl.int64) + (cell * GRANULES + g) * VALUES * 4
        x0, x1, x2, x3 = load_granules(address, on)
        if VALUES == 8:
            x4, x5, x6, x7 = load_granules(address + 16, on)
        weight = tl.exp(tl.load(part_lse + cell, mask=p < stop, other=float("-inf")) - shift) * scale
        b0, b1 = b0 + _weighed(x0, weight), b1 + _weighed(x1, weight)
        b2, b3 = b2 + _weighed(x2, weight), b3 + _weighed(x3, weight)
        if VALUES == 8:
            b4, b5 = b4 + _weighed(x4, weight), b5 + _weighed(x5, weight)
            b6, b7 = b6 + _weighed(x6, weight), b7 + _weighed(x7, weight)
    a0, a1, a2, a3, a4, a5, a6, a7 = tl.reduce((b0, b1, b2, b3, b4, b5, b6, b7), 0, _sum8)
    natural = tl.where(total == 0.0, float("-inf"), shift + tl.log(tl.where(total == 0.0, 1.0, total)))
    if VALUES == 8:
        w0, w1, w2, w3 = pack(a0, a1, DTYPE), pack(a2, a3, DTYPE), pack(a4, a5, DTYPE), pack(a6, a7, DTYPE)
    else:
        w0, w1, w2, w3 = pack(a0, a0, DTYPE), pack(a1, a1, DTYPE), pack(a2, a2, DTYPE), pack(a3, a3, DTYPE)
    return w0[None, :], w1[None, :], w2[None, :], w3[None, :], natural + tl.zeros([1, 1], tl.float32)


@triton.jit
def _weigh(a, b, word, weight, decay, DTYPE: tl.constexpr):
    low, high = unpack(word, DTYPE)
    # values of an empty partial have weight 0 and may be anything
    low, high = tl.where(weight == 0.0, 0.0, low), tl.where(weight == 0.0, 0.0, high)
    return a * decay + low * weight, b * decay + high * weight


@triton.jit(do_not_specialize=["rank", "layer", "layers", "place", "timeout_ns", "merged_heads"])
def _exchange_kernel(
    part, part_lse, part_start, sinks, merged, peers, faults, clock, rank, layer, layers, place, timeout_ns,
    merged_heads,
    HEADS: tl.constexpr, D: tl.constexpr, N: tl.constexpr, CAPACITY: tl.constexpr, PADDED: tl.constexpr,
    SLOT_BYTES: tl.constexpr, PUSH: tl.constexpr, PUSH_PAD: tl.constexpr, MERGE: tl.constexpr, SLICES: tl.constexpr,
    SPLIT: tl.constexpr, MOST_PAD: tl.constexpr, TURN: tl.constexpr, SINKS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    # A program takes some heads of a row, and one slice of their granules; every slice has an lse word of its own.
    # Programs start in the order of their index, all of a row before the next, on every rank: what a resident program
    # waits for is resident or done at its sender.
    tile, slice, row = tl.program_id(0) // SLICES, tl.program_id(0) % SLICES, tl.program_id(1).to(tl.int64)
    dtype: tl.constexpr = merged.dtype.element_ty
    head_bytes: tl.constexpr = D * dtype.primitive_bitwidth // 8
    granules: tl.constexpr = head_bytes // 16
    part_of_head: tl.constexpr = granules // SLICES
    lse_at: tl.constexpr = N * CAPACITY * PADDED * head_bytes  # O of all sources, then their lse
    addresses = peers.to(tl.pointer_type(tl.int64))
    g = slice * part_of_head + tl.arange(0, part_of_head)[None, :]

    # push: heads [tile * PUSH, ...) of this row to their owners
    small: tl.constexpr = HEADS // N
    extra: tl.constexpr = HEADS % N
    i = tl.arange(0, PUSH_PAD)[:, None]
    head = tile * PUSH + i
    past = head - extra * (small + 1)
    owner = tl.where(past < 0, head // (small + 1), extra + past // small)
    index = tl.where(past < 0, head % (small + 1), past % small)
    there = (i < PUSH) & (head < HEADS)
    target = tl.load(addresses + owner, mask=there, other=0)
    mine = tl.load(addresses + rank)
    if SPLIT:  # the step's work was uploaded before its first layer
        first_part, last_part = tl.load(part_start + row), tl.load(part_start + row + 1)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    deadline = deadline_of(timeout_ns, faults) + tl.zeros([MERGE, part_of_head], tl.int64)
    slot = ((tl.load(clock).to(tl.int64) * layers + layer) & 1) * SLOT_BYTES
    target += slot
    mine += slot
    if SPLIT:
        w0, w1, w2, w3, lse = _merged_parts(
            part, part_lse, first_part, last_part, tile, g, HEADS, MOST_PAD, TURN, granules, dtype
        )
    else:
        on_all = (there & (g >= 0)).to(tl.int32)
        w0, w1, w2, w3 = load_granules(part.to(tl.int64) + (row * HEADS + head) * head_bytes + g * 16, on_all)
        lse = tl.load(part_lse + row * HEADS + head, mask=there, other=0.0)
    cell = (rank.to(tl.int64) * CAPACITY + row) * PADDED + index
    lse_to = (target + lse_at + (cell * SLICES + slice) * 4).to(tl.pointer_type(tl.int32))
    tl.store(lse_to, not_empty(lse.to(tl.int32, bitcast=True)), mask=there)
    w0, w1, w2, w3 = not_empty(w0), not_empty(w1), not_empty(w2), not_empty(w3)
    # A granule must be sent once: a second copy could land after the receiver has emptied the slot. A plain store is
    # done by one thread; inline assembly by every thread that holds a replica, so there is a granule for each.
    if SPLIT:
        to = (target + cell * head_bytes + g * 16).to(tl.pointer_type(tl.int64))
        tl.store(to, _pair(w0, w1), mask=there & (g >= 0))
        tl.store(to + 1, _pair(w2, w3), mask=there & (g >= 0))
    else:
        push_granules(target + cell * head_bytes + g * 16, w0, w1, w2, w3, (there & (g >= 0)).to(tl.int32))

    # merge: own heads [tile * MERGE, ...) of this row, from all sources
    own = tile * MERGE + tl.arange(0, MERGE)[:, None]
    on = ((own < merged_heads) & (g >= 0)).to(tl.int32)
    top = tl.full([MERGE, part_of_head], float("-inf"), tl.float32)
    total = tl.zeros([MERGE, part_of_head], tl.float32)
    a0, a1, a2, a3, a4, a5, a6, a7 = total, total, total, total, total, total, total, total
    if SINKS:  # a score without a value
        top = tl.load(sinks + own + g * 0, mask=(own < merged_heads) & (g >= 0), other=0.0)
        total += 1.0
    missing = tl.full([MERGE, part_of_head], -1, tl.int32)
    for n in tl.static_range(N):
        cell = (n * CAPACITY + row) * PADDED + own + g * 0
        word, late = poll_word(mine + lse_at + (cell * SLICES + slice) * 4, deadline, on)
        r0, r1, r2, r3, late_o = poll_granules(mine + cell * head_bytes + g * 16, deadline, on)
        missing = tl.where(((late | late_o) != 0) & (missing < 0), n, missing)
        lse_n = _as_float(word)
        new_top = tl.maximum(top, lse_n)
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)
        decay, weight = tl.exp(top - shift), tl.exp(lse_n - shift)
        total = total * decay + weight
        a0, a1 = _weigh(a0, a1, r0, weight, decay, dtype)
        a2, a3 = _weigh(a2, a3, r1, weight, decay, dtype)
        a4, a5 = _weigh(a4, a5, r2, weight, decay, dtype)
        a6, a7 = _weigh(a6, a7, r3, weight, decay, dtype)
        top = new_top
    scale = 1.0 / tl.where(total == 0.0, 1.0, total)
    push_granules(
        merged.to(tl.int64) + (row * merged_heads + own) * head_bytes + g * 16,
        pack(a0 * scale, a1 * scale, dtype), pack(a2 * scale, a3 * scale, dtype),
        pack(a4 * scale, a5 * scale, dtype), pack(a6 * scale, a7 * scale, dtype), on,
    )  # fmt: skip
    tl.debug_barrier()  # all polls of this program are done: its granules may be emptied
    empty = tl.full([MERGE, part_of_head], -1, tl.int32)
    for n in tl.static_range(N):
        cell = (n * CAPACITY + row) * PADDED + own + g * 0
        push_word(mine + lse_at + (cell * SLICES + slice) * 4, empty, on)
        push_granules(mine + cell * head_bytes + g * 16, empty, empty, empty, empty, on)
    note_fault(faults, missing, place)


class FusedExchange:
    """Partials in, merged heads out, in one kernel over symmetric memory.

    Collective over the group: every rank makes it with equal arguments, and calls it for the same layers with the same
    rows in the same order; ``begin_step`` stands before the first layer of every step.

    Args:
        group: the KVP group; its ranks ``shares_memory``.
        num_heads: Q, query heads of each rank's partials; at least one a rank.
        head_dim: D; a head fills a power of two of 16-byte granules.
        num_layers: exchanges a step at the most.
        dtype: of partials and result.
        device: this rank's.
        faults: where waits that were given up are noted.
        timeout_s: how long to wait for a rank, in seconds.
        pdl: launch programmatically dependent.

    Attributes:
        max_rows: of a call.
        head_dim: D.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        *,
        num_heads: int,
        head_dim: int,
        num_layers: int,
        dtype: torch.dtype,
        device: torch.device,
        faults: Faults,
        timeout_s: float = 600.0,
        pdl: bool = False,
    ) -> None:
        if not supports(head_dim, dtype):
            raise ValueError(f"head_dim = {head_dim} of {dtype} must fill a power of two of 16-byte granules")
        self._kvp, self._rank = group.size(), group.rank()
        self._num_heads, self.head_dim, self._num_layers, self._dtype = num_heads, head_dim, num_layers, dtype
        self._padded = -(-num_heads // self._kvp)
        self._merged = num_heads // self._kvp + (self._rank < num_heads % self._kvp)
        fitting = CAPACITY_BYTES // (num_heads * head_dim * dtype.itemsize)
        self.max_rows = max(MIN_CAPACITY, min(fitting, MAX_CAPACITY))
        self._slot_bytes = self._kvp * self.max_rows * self._padded * (head_dim * dtype.itemsize + 4 * MAX_SLICES)
        self._buffer = SymmetricBuffer(group, 2 * self._slot_bytes, device)
        self._clock = torch.zeros(1, dtype=torch.int32, device=device)
        self._faults, self._pdl = faults, pdl
        self._timeout_ns = int(timeout_s * 1e9)

    def begin_step(self) -> None:
        """Advance the step counter on the current stream."""
        self._clock.add_(1)

    def __call__(self, partials: Partials, *, layer: int = 0, sinks: torch.Tensor | None = None) -> torch.Tensor:
        """Exchange and merge one layer's partials; see ``Exchange``. At most max_rows rows."""
        rows, (_, heads, head_dim) = partials.num_rows, partials.out.shape
        split = partials.part_start is not None
        merged = torch.empty((rows, self._merged, head_dim), dtype=self._dtype, device=partials.out.device)
        if rows == 0:
            return merged
        granules = head_dim * self._dtype.itemsize // 16
        push = 1 if split else _heads_of_a_program(rows, heads, granules)
        programs, slices = -(-heads // push), _slices_of_a_head(rows, heads, granules)
        _exchange_kernel[(programs * slices, rows)](
            partials.out, partials.lse, self._clock if partials.part_start is None else partials.part_start,
            partials.lse if sinks is None else sinks, merged,
            self._buffer.peers, self._faults.word, self._clock,
            self._rank, layer, self._num_layers, layer * 4 + OPERATION, self._timeout_ns, self._merged,
            HEADS=heads, D=head_dim, N=self._kvp, CAPACITY=self.max_rows, PADDED=self._padded,
            SLOT_BYTES=self._slot_bytes, PUSH=push, PUSH_PAD=1 if split else max(push, 32 * slices // granules),
            MERGE=triton.next_power_of_2(-(-self._padded // programs)), SLICES=slices,
            SPLIT=split, MOST_PAD=triton.next_power_of_2(partials.most), TURN=parts_at_once(rows * heads),
            SINKS=sinks is not None,
            num_warps=4 if split else max(1, min(4, push * granules // slices // 32)), **early(self._pdl),
        )  # fmt: skip
        return merged


def supports(head_dim: int, dtype: torch.dtype) -> bool:
    """Return whether the fused exchange can carry heads of this size."""
    granules, rest = divmod(head_dim * dtype.itemsize, 16)
    return rest == 0 and granules > 0 and granules & (granules - 1) == 0 and dtype.itemsize in (2, 4)


def _heads_of_a_program(rows: int, heads: int, granules: int) -> int:
    """Return how many heads a program pushes: 128 granules where rows are many, fewer to spread few rows."""
    push = max(1, 128 // granules)
    while push > 1 and rows * -(-heads // push) < 32:
        push //= 2
    return push


def _slices_of_a_head(rows: int, heads: int, granules: int) -> int:
    """Return into how many slices a head is cut, so that few heads occupy many programs; the same on every rank."""
    slices = 1
    while slices < MAX_SLICES and granules // slices > 4 and rows * heads * slices < 128:
        slices *= 2
    return slices
