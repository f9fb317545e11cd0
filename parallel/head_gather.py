"""Heads of the same rows, of which every rank makes some and needs all: one kernel over symmetric memory, or NCCL.

Where heads are dear to make and small to send (queries of latents, ``helix.models.query_share``), each rank of a group
makes a contiguous range of them and they are gathered. The kernel follows the protocol of ``symmetric.py``: every
program pushes a piece of its rank's heads of a row to all others, and waits for the same piece of theirs. Heads that
the group does not divide are split as evenly as possible.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
import triton
import triton.language as tl

from .collectives import all_gather
from .device import early
from .layout import split_evenly
from .symmetric import (
    Faults,
    SymmetricBuffer,
    deadline_of,
    load_granules,
    not_empty,
    note_fault,
    poll_granules,
    push_granules,
)

OPERATION = 3
"""What a Fault's ``operation`` says for this kernel."""
MAX_FUSED_ROWS = 64
PIECE = 128  # granules of a program, one a thread


@triton.jit(do_not_specialize=["rank", "place", "timeout_ns"])
def _gather_kernel(
    mine, out, peers, faults, rank, place, timeout_ns,
    HEADS: tl.constexpr, HEAD_BYTES: tl.constexpr, N: tl.constexpr, CAPACITY: tl.constexpr, PIECE: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    # programs of a row start before those of the next, on every rank: what a resident one waits for is resident or done
    row = tl.program_id(1).to(tl.int64)
    small: tl.constexpr = HEADS // N
    extra: tl.constexpr = HEADS % N
    most_bytes: tl.constexpr = (small + (1 if extra else 0)) * HEAD_BYTES
    at = (tl.program_id(0) * PIECE + tl.arange(0, PIECE)).to(tl.int64) * 16
    addresses = peers.to(tl.pointer_type(tl.int64))
    slot = tl.load(addresses + rank) + row * most_bytes + at
    to_row = out.to(tl.int64) + row * (HEADS * HEAD_BYTES) + at
    own_bytes = (small + (rank < extra).to(tl.int32)) * HEAD_BYTES
    on = (at < own_bytes).to(tl.int32)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    deadline = deadline_of(timeout_ns, faults) + tl.zeros([PIECE], tl.int64)
    w0, w1, w2, w3 = load_granules(mine.to(tl.int64) + row * own_bytes + at, on)
    w0, w1, w2, w3 = not_empty(w0), not_empty(w1), not_empty(w2), not_empty(w3)
    for n in tl.static_range(1, N):
        target = tl.load(addresses + (rank + n) % N) + (rank.to(tl.int64) * CAPACITY + row) * most_bytes + at
        push_granules(target, w0, w1, w2, w3, on)
    push_granules(to_row + (rank * small + tl.minimum(rank, extra)) * HEAD_BYTES, w0, w1, w2, w3, on)
    missing = tl.full([PIECE], -1, tl.int32)
    for n in tl.static_range(N):
        comes = ((at < (small + (1 if n < extra else 0)) * HEAD_BYTES) & (n != rank)).to(tl.int32)
        r0, r1, r2, r3, late = poll_granules(slot + n * (CAPACITY * most_bytes), deadline, comes)
        missing = tl.where((late != 0) & (missing < 0), n, missing)
        push_granules(to_row + (n * small + min(n, extra)) * HEAD_BYTES, r0, r1, r2, r3, comes)
    tl.debug_barrier()  # all polls of this program are done: its granules may be emptied
    empty = tl.full([PIECE], -1, tl.int32)
    for n in tl.static_range(N):
        comes = ((at < (small + (1 if n < extra else 0)) * HEAD_BYTES) & (n != rank)).to(tl.int32)
        push_granules(slot + n * (CAPACITY * most_bytes), empty, empty, empty, empty, comes)
    note_fault(faults, missing, place)


class HeadGather:
    """Gathers the heads of rows that the ranks of a group share out among them.

    Collective over the group: every rank makes it with equal arguments, and calls it with equally many rows in the same
    order. Between two calls all ranks take part in another collective on the same stream, as the exchange of a layer
    is: the heads have one slot.

    Args:
        group: the ranks that share the heads.
        num_heads: Q, of all ranks together; at least one a rank.
        head_dim: D.
        dtype, device: of the heads.
        max_rows: rows of a call at most.
        fused: use symmetric memory for up to MAX_FUSED_ROWS rows of heads of D elements; needs a group that
            ``shares_memory``, faults, and heads of whole granules.
        faults: where waits that were given up are noted.
        timeout_s: how long to wait for a rank, in seconds.
        pdl: launch programmatically dependent.

    Attributes:
        heads: the range [first, stop) of this rank.
        max_rows: as given.
        is_fused: whether there is symmetric memory.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        *,
        num_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
        max_rows: int,
        fused: bool = False,
        faults: Faults | None = None,
        timeout_s: float = 600.0,
        pdl: bool = False,
    ) -> None:
        self._group, self._num_heads, self.max_rows, self._pdl = group, num_heads, max_rows, pdl
        self._head_bytes = head_dim * dtype.itemsize
        self._faults, self._timeout_ns = faults, int(timeout_s * 1e9)
        ranks = group.size()
        self.heads = split_evenly(num_heads, ranks, group.rank())
        self._padded = -(-num_heads // ranks)
        self._buffer: SymmetricBuffer | None = None
        self._capacity = min(max_rows, MAX_FUSED_ROWS)
        if fused and faults is not None and self._head_bytes % 16 == 0:
            self._buffer = SymmetricBuffer(group, ranks * self._capacity * self._padded * self._head_bytes, device)

    @property
    def is_fused(self) -> bool:
        """Whether there is symmetric memory."""
        return self._buffer is not None

    def __call__(self, mine: torch.Tensor, *, layer: int = 0) -> torch.Tensor:
        """Return all heads [R, Q, D] of rows of which this rank has its own, packed [R, heads of this rank, D].

        Heads of another size than D, the same on every rank, go by all-gather.
        """
        rows, _, width = mine.shape
        if self._buffer is None or self._faults is None or not self._fits(mine):
            return self._gathered(mine)
        out = mine.new_empty((rows, self._num_heads, width))
        if rows:
            pieces = -(-self._padded * self._head_bytes // (16 * PIECE))
            _gather_kernel[(pieces, rows)](
                mine, out, self._buffer.peers, self._faults.word, self._group.rank(), layer * 4 + OPERATION,
                self._timeout_ns, HEADS=self._num_heads, HEAD_BYTES=self._head_bytes, N=self._group.size(),
                CAPACITY=self._capacity, PIECE=PIECE, num_warps=PIECE // 32, **early(self._pdl),
            )  # fmt: skip
        return out

    def _fits(self, mine: torch.Tensor) -> bool:
        return mine.shape[0] <= self._capacity and mine.shape[2] * mine.element_size() == self._head_bytes

    def _gathered(self, mine: torch.Tensor) -> torch.Tensor:
        ranks = self._group.size()
        gathered = all_gather(F.pad(mine, (0, 0, 0, self._padded - mine.shape[1])), self._group).transpose(0, 1)
        if self._num_heads % ranks == 0:
            return gathered.flatten(1, 2)
        sizes = [stop - start for start, stop in (split_evenly(self._num_heads, ranks, rank) for rank in range(ranks))]
        return torch.cat([gathered[:, rank, :size] for rank, size in enumerate(sizes)], 1)
