"""The largest logit of each row, where every rank holds a slice of the vocabulary; the lowest id among equals.

One 64-bit key a row and rank travels: the logit's bits in the order of its value, then the token id counted down, so
that the largest key is the answer. The keys go by symmetric memory (the protocol of ``symmetric.py``) where the group
shares it, and by all-gather elsewhere.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import triton
import triton.language as tl

from .collectives import all_gather
from .symmetric import Faults, SymmetricBuffer, deadline_of, note_fault, poll_granules, push_granules

OPERATION = 2
"""What a Fault's ``operation`` says for this kernel."""
_OPERATION = tl.constexpr(OPERATION)
MAX_FUSED_ROWS = 256
CHUNK = 2048


@triton.jit
def _chunk_kernel(logits, keys, columns, row_stride, last_id, CHUNKS: tl.constexpr, CHUNK: tl.constexpr):
    """keys[row, chunk]: the largest key of a chunk of a row."""
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    at = chunk * CHUNK + tl.arange(0, CHUNK)
    value = tl.load(logits + row * row_stride + at, mask=at < columns, other=float("-inf")).to(tl.float32) + 0.0
    bits = value.to(tl.int32, bitcast=True)  # + 0.0 has turned -0.0 into 0.0, its equal
    ordered = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64)
    key = tl.where(at < columns, (ordered << 32) | (last_id - at).to(tl.int64), -(1 << 63))
    tl.store(keys + row * CHUNKS + chunk, tl.max(key, 0))


@triton.jit(do_not_specialize=["rank", "timeout_ns"])
def _choose_kernel(
    keys, tokens, peers, faults, rank, timeout_ns, last_id, CAPACITY: tl.constexpr, N: tl.constexpr,
    N_PAD: tl.constexpr, CHUNKS: tl.constexpr, CHUNKS_PAD: tl.constexpr,
):  # fmt: skip
    """tokens[row]: the id of the largest key of all chunks of all ranks."""
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.arange(0, CHUNKS_PAD)
    best = tl.max(tl.load(keys + row * CHUNKS + chunk, mask=chunk < CHUNKS, other=-(1 << 63)), 0)
    if N > 1:
        n = tl.arange(0, N_PAD)
        there = n < N
        addresses = peers.to(tl.pointer_type(tl.int64))
        to = (tl.load(addresses + n, mask=there, other=0) + (rank.to(tl.int64) * CAPACITY + row) * 16).to(
            tl.pointer_type(tl.int64)
        )
        tl.store(to, tl.zeros([N_PAD], tl.int64) + best, mask=there)  # neither half of a key is ever EMPTY
        tl.store(to + 1, tl.zeros([N_PAD], tl.int64), mask=there)
        mine = tl.load(addresses + rank) + (n.to(tl.int64) * CAPACITY + row) * 16
        on = there.to(tl.int32)
        deadline = deadline_of(timeout_ns, faults) + tl.zeros([N_PAD], tl.int64)
        low, high, _, _, late = poll_granules(mine, deadline, on)
        received = (low.to(tl.int64) & 0xFFFFFFFF) | (high.to(tl.int64) << 32)
        best = tl.max(tl.where(there & (late == 0), received, -(1 << 63)), 0)
        tl.debug_barrier()
        empty = tl.full([N_PAD], -1, tl.int32)
        push_granules(mine, empty, empty, empty, empty, on)
        note_fault(faults, tl.where(late != 0, n, -1), _OPERATION)
    tl.store(tokens + row, last_id - (best & 0xFFFFFFFF))


class ShardedArgmax:
    """Chooses each row's most likely token from every rank's slice of the logits.

    Collective over the group: every rank makes it, and calls it with the same number of rows in the same order. Between
    two calls all ranks take part in another collective on the same stream, as the layers of a step do: the keys have
    one slot.

    Args:
        group: the ranks that hold slices; None is a group of one.
        vocab: the ids [start, stop) of this rank's slice; at least one.
        vocab_size: ids in all; below 2**31.
        device: this rank's.
        fused: use symmetric memory; needs a group that ``shares_memory``, and faults.
        faults: where waits that were given up are noted.
        timeout_s: how long to wait for a rank, in seconds.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None,
        *,
        vocab: tuple[int, int],
        vocab_size: int,
        device: torch.device,
        fused: bool = False,
        faults: Faults | None = None,
        timeout_s: float = 600.0,
    ) -> None:
        self._group, self._start, self._last = group, vocab[0], vocab_size - 1
        self._faults, self._timeout_ns = faults, int(timeout_s * 1e9)
        self._buffer: SymmetricBuffer | None = None
        if fused and group is not None and faults is not None:
            self._buffer = SymmetricBuffer(group, group.size() * MAX_FUSED_ROWS * 16, device)

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        """Return the token ids [R] int64, equal on all ranks, of this rank's slice of the logits [R, V_local]."""
        rows, columns = logits.shape
        if not logits.is_cuda or rows == 0:
            return self._gathered(self._keys(logits))
        chunks = -(-columns // CHUNK)
        keys = torch.empty((rows, chunks), dtype=torch.int64, device=logits.device)
        last = self._last - self._start
        _chunk_kernel[(rows, chunks)](logits, keys, columns, logits.stride(0), last, CHUNKS=chunks, CHUNK=CHUNK)
        fused = self._buffer is not None and rows <= MAX_FUSED_ROWS
        if self._group is not None and not fused:
            return self._gathered(keys.amax(1))
        tokens = torch.empty(rows, dtype=torch.int64, device=logits.device)
        buffer, faults, ranks = self._buffer, self._faults, self._group.size() if self._group else 1
        _choose_kernel[(rows,)](
            keys, tokens, buffer.peers if buffer else 0, faults.word if faults else tokens,
            self._group.rank() if self._group else 0, self._timeout_ns, self._last,
            CAPACITY=MAX_FUSED_ROWS, N=ranks, N_PAD=triton.next_power_of_2(ranks),
            CHUNKS=chunks, CHUNKS_PAD=triton.next_power_of_2(chunks), num_warps=1,
        )  # fmt: skip
        return tokens

    def of_keys(self, keys: torch.Tensor) -> torch.Tensor:
        """Return the token ids [R] of the largest of all ranks' keys [R] int64: scores in order, then ids counted down.

        It goes by all-gather.
        """
        return self._gathered(keys)

    def _keys(self, logits: torch.Tensor) -> torch.Tensor:
        best, index = logits.float().max(-1)
        bits = (best + 0.0).view(torch.int32)  # + 0.0 turns -0.0 into 0.0, its equal
        ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(torch.int64)
        return (ordered << 32) | (self._last - self._start - index)

    def _gathered(self, keys: torch.Tensor) -> torch.Tensor:
        return self._last - (all_gather(keys, self._group).amax(0) & 0xFFFFFFFF)
