"""Symmetric memory: buffers that every rank of an NVLink domain writes in every other, and how words travel there.

The protocol is flag-in-data (as Lamport's, and NCCL's LL): the data is its own flag.

 1. Every word of a slot that nobody is writing holds EMPTY, a NaN that no sender sends (``push`` replaces it).
 2. A sender stores 16-byte granules straight into the receiver's slot, with no fence and no flag after them.
 3. A receiver loads its granules until no word is EMPTY, uses them, and stores EMPTY back.
 4. Consecutive messages alternate between two slots. A sender reaches the message after the next only when it has what
    the receiver's next one went into, which the receiver sends after its kernel, and with it step 3, is done: no slot
    is overwritten before it was read and emptied, whatever the ranks' speeds and however rows change between steps.

A wait is bounded: when its deadline passes a receiver gives up and notes whom it waited for, and every later wait of
the step gives up at once; the host finds the note when it reads the step's tokens. NVLink multicast is never used.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
import triton
import triton.language as tl

from .device import capability, host
from .launch import host_group

_PEER_BITS = 8


@dataclass(frozen=True)
class Fault:
    """A wait that was given up: the rank of the group that never arrived, the operation and its layer."""

    peer: int
    operation: int
    layer: int


class Faults:
    """One device word in which kernels note the first wait that they gave up.

    Attributes:
        word: [1] int32 on the device, 0 while all is well.
    """

    def __init__(self, device: torch.device) -> None:
        self.word = torch.zeros(1, dtype=torch.int32, device=device)

    @staticmethod
    def decode(word: int) -> Fault | None:
        """Return what a kernel noted; None for 0."""
        if word == 0:
            return None
        place, peer = word >> _PEER_BITS, (word & ((1 << _PEER_BITS) - 1)) - 1
        return Fault(peer=peer, operation=place & 3, layer=place >> 2)


class SymmetricBuffer:
    """Memory of one rank that all ranks of a group can write; it starts EMPTY everywhere.

    Collective over the group: every rank makes it with the same size, in the same order, on its own CUDA device.

    Attributes:
        peers: device address of an array with the address of each rank's buffer, in group order.
    """

    def __init__(self, group: dist.ProcessGroup, num_bytes: int, device: torch.device) -> None:
        # rendezvous tries multicast unless told otherwise, and raises where it is not allowed
        os.environ["TORCH_SYMM_MEM_DISABLE_MULTICAST"] = "1"
        import torch.distributed._symmetric_memory as symm

        self._local = symm.empty(num_bytes, dtype=torch.uint8, device=device)
        self._handle = symm.rendezvous(self._local, group)
        self._local.fill_(0xFF)
        torch.cuda.synchronize(device)
        dist.barrier(group)
        self.peers: int = self._handle.buffer_ptrs_dev


def shares_memory(group: dist.ProcessGroup | None, device: torch.device) -> bool:
    """Return whether all ranks of a group can write in each other's GPU memory: one host, peer access between all.

    Collective over the world: every rank calls it, each for its own group. The answer is this rank's own (peer
    access is asked of its driver): take the minimum over the world before acting on it.
    """
    if group is None or device.type != "cuda" or not dist.is_initialized():
        return False
    where = f"{host()} {os.environ.get('CUDA_VISIBLE_DEVICES', '')}"  # within which a device's index means one GPU
    places: list[tuple[str, int]] = [("", 0)] * dist.get_world_size()
    dist.all_gather_object(places, (where, device.index or 0), group=host_group())
    mine = [places[rank] for rank in dist.get_process_group_ranks(group)]
    if len(set(mine)) < len(mine) or any(name != where for name, _ in mine):  # equal ones: each sees its own alone
        return False
    return all(torch.cuda.can_device_access_peer(a, b) for _, a in mine for _, b in mine if a != b)


def can_launch_dependently(device: torch.device) -> bool:
    """Return whether kernels on this device may launch programmatically dependent (Hopper and later)."""
    return capability(device) >= (9, 0)


@triton.jit
def load_granules(address, on):
    """Load the four words of 16-byte granules of this rank's memory; 0 where ``on`` is 0."""
    return tl.inline_asm_elementwise(
        """{
        .reg .pred p;
        setp.ne.b32 p, $5, 0;
        mov.b32 $0, 0;
        mov.b32 $1, 0;
        mov.b32 $2, 0;
        mov.b32 $3, 0;
        @p ld.global.v4.b32 {$0, $1, $2, $3}, [$4];
        }""",
        "=&r,=&r,=&r,=&r,l,r",
        [address, on],
        dtype=(tl.int32, tl.int32, tl.int32, tl.int32),
        is_pure=False,
        pack=1,
    )


@triton.jit
def push_granules(address, w0, w1, w2, w3, on):
    """Store four words to each 16-byte granule of any rank's memory; skipped where ``on`` is 0.

    Every thread that holds a replica of an element stores it. To another rank's slot a granule must go once, so the
    tensor there has at least as many elements as the program has threads: a copy that lands late would refill an
    emptied slot.
    """
    tl.inline_asm_elementwise(
        """{
        .reg .pred p;
        setp.ne.b32 p, $6, 0;
        @p st.relaxed.sys.global.v4.b32 [$1], {$2, $3, $4, $5};
        mov.b32 $0, 0;
        }""",
        "=r,l,r,r,r,r,r",
        [address, w0, w1, w2, w3, on],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def deadline_of(timeout_ns, faults):
    """Return the time, in nanoseconds of the GPU's clock, at which waits are given up: now after an earlier fault."""
    return tl.extra.cuda.globaltimer() + tl.where(tl.load(faults, volatile=True) == 0, timeout_ns, 0)


@triton.jit
def poll_granules(address, deadline, on):
    """Load granules until no word is EMPTY; returns their four words, and 1 where the deadline passed first."""
    return tl.inline_asm_elementwise(
        """{
        .reg .pred p, q;
        .reg .b32 n, t;
        .reg .b64 now;
        mov.b32 n, 0;
        mov.b32 $0, 0;
        mov.b32 $1, 0;
        mov.b32 $2, 0;
        mov.b32 $3, 0;
        mov.b32 $4, 0;
        setp.eq.b32 p, $7, 0;
        @p bra DONE;
        AGAIN:
        ld.relaxed.sys.global.v4.b32 {$0, $1, $2, $3}, [$5];
        setp.eq.b32 p, $0, -1;
        setp.eq.or.b32 p, $1, -1, p;
        setp.eq.or.b32 p, $2, -1, p;
        setp.eq.or.b32 p, $3, -1, p;
        @!p bra DONE;
        add.u32 n, n, 1;
        and.b32 t, n, 255;
        setp.ne.b32 q, t, 0;
        @q bra AGAIN;
        mov.u64 now, %globaltimer;
        setp.lt.u64 q, now, $6;
        @q bra AGAIN;
        mov.b32 $4, 1;
        DONE:
        }""",
        "=&r,=&r,=&r,=&r,=&r,l,l,r",
        [address, deadline, on],
        dtype=(tl.int32, tl.int32, tl.int32, tl.int32, tl.int32),
        is_pure=False,
        pack=1,
    )


@triton.jit
def push_word(address, word, on):
    """Store one word to each address, by every thread that holds a replica; skipped where ``on`` is 0."""
    tl.inline_asm_elementwise(
        """{
        .reg .pred p;
        setp.ne.b32 p, $3, 0;
        @p st.relaxed.sys.global.b32 [$1], $2;
        mov.b32 $0, 0;
        }""",
        "=r,l,r,r",
        [address, word, on],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def poll_word(address, deadline, on):
    """Load words until none is EMPTY; returns them, and 1 where the deadline passed first."""
    return tl.inline_asm_elementwise(
        """{
        .reg .pred p, q;
        .reg .b32 n, t;
        .reg .b64 now;
        mov.b32 n, 0;
        mov.b32 $0, 0;
        mov.b32 $1, 0;
        setp.eq.b32 p, $4, 0;
        @p bra DONE;
        AGAIN:
        ld.relaxed.sys.global.b32 $0, [$2];
        setp.ne.b32 p, $0, -1;
        @p bra DONE;
        add.u32 n, n, 1;
        and.b32 t, n, 255;
        setp.ne.b32 q, t, 0;
        @q bra AGAIN;
        mov.u64 now, %globaltimer;
        setp.lt.u64 q, now, $3;
        @q bra AGAIN;
        mov.b32 $1, 1;
        DONE:
        }""",
        "=&r,=&r,l,l,r",
        [address, deadline, on],
        dtype=(tl.int32, tl.int32),
        is_pure=False,
        pack=1,
    )


@triton.jit
def not_empty(word):
    """Return the word, or another NaN where it equals EMPTY."""
    return tl.where(word == -1, 0x7FFFFFFF, word)


@triton.jit
def unpack(word, DTYPE: tl.constexpr):
    """Return the two values of a word of 2-byte DTYPE as float32, or the one of float32 and 0."""
    if DTYPE.primitive_bitwidth == 32:
        return word.to(tl.float32, bitcast=True), tl.zeros(word.shape, tl.float32)
    else:
        low = (word & 0xFFFF).to(tl.uint16).to(DTYPE, bitcast=True).to(tl.float32)
        high = ((word >> 16) & 0xFFFF).to(tl.uint16).to(DTYPE, bitcast=True).to(tl.float32)
        return low, high


@triton.jit
def pack(low, high, DTYPE: tl.constexpr):
    """Undo ``unpack``, rounding to DTYPE."""
    if DTYPE.primitive_bitwidth == 32:
        return low.to(tl.int32, bitcast=True)
    else:
        low_bits = low.to(DTYPE).to(tl.uint16, bitcast=True).to(tl.int32)
        return low_bits | (high.to(DTYPE).to(tl.uint16, bitcast=True).to(tl.int32) << 16)


@triton.jit
def note_fault(word, missing_peer, place):
    """Note that waits for ``missing_peer`` (a tensor, -1: none) were given up, unless an earlier one is noted.

    ``place`` is layer * 4 + operation. No thread waits for another.
    """
    tl.inline_asm_elementwise(
        """{
        .reg .pred p;
        setp.ge.s32 p, $2, 0;
        mov.b32 $0, 0;
        @p atom.relaxed.sys.global.cas.b32 $0, [$1], 0, $3;
        }""",
        "=&r,l,r,r",
        [word.to(tl.int64) + tl.zeros(missing_peer.shape, tl.int64), missing_peer, (place << 8) | (missing_peer + 1)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )
