"""Pages on a GPU of this machine that another process owns, written by a kernel of this rank's.

Through NIXL every piece is a copy of its own, a few microseconds long, so that scattered pages reach a tenth of what an
NVLink carries. A kernel that has the pages mapped writes any number of pieces in one launch, straight to their places:
nothing is gathered on the way, and the receiver has no part in it.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from parallel.layout import Range
from parallel.placement import IntArray

from .copy_regions import compile_copies, copy_regions
from .peer_memory import Mapped
from .protocol import DONE, RUNNING, UNKNOWN
from .regions import CacheMap, build_regions


class Copies:
    """Copies that a kernel does.

    Args:
        ended: the event behind them.
        kept: what must live until then.
        peer: whose memory they write.

    Attributes:
        reason: what went wrong, if anything did.
    """

    def __init__(self, ended: torch.cuda.Event, kept: list[torch.Tensor], peer: str) -> None:
        self._ended, self._kept, self._peer = ended, kept, peer
        self.reason = ""

    def poll(self) -> str:
        """Return running, done, or unknown: something may still land."""
        if self.reason:
            return UNKNOWN
        if not self._ended.query():
            return RUNNING
        self._kept.clear()
        return DONE

    def abandon(self) -> None:
        """Give up what still runs."""
        if self.poll() == RUNNING:
            self.reason = f"a write to {self._peer} was given up"


class MappedPeer:
    """A receiver's pool, mapped and ready to be written.

    Args:
        memory: the pool.
        source, target: this rank's pages and, where they are for their owner, the receiver's.
        device: this rank's GPU.
        rank: the receiver's, in its group.
    """

    def __init__(self, memory: Mapped, source: CacheMap, target: CacheMap, device: torch.device, *, rank: int) -> None:
        self.rank, self._memory = rank, memory
        self._source = source
        self._target = replace(target, layers=target.layers - target.layers[0] + memory.address)
        self._device, self._stream = device, torch.cuda.Stream(device)
        with torch.cuda.stream(self._stream):
            compile_copies(device)

    def write(self, blocks: IntArray, source_pages: IntArray, target_pages: IntArray, tokens: Range) -> Copies:
        """Start writing the tokens of some blocks, as ``transport.Peer.write`` does."""
        regions = build_regions(self._source, self._target, blocks, source_pages, target_pages, tokens)
        ended = torch.cuda.Event()
        with torch.cuda.stream(self._stream):
            kept = copy_regions(regions, self._device)
            ended.record()
        return Copies(ended, kept, f"decode rank {self.rank}")

    def close(self) -> None:
        """Forget the receiver, once what is under way has landed."""
        self._stream.synchronize()
        self._memory.close()
