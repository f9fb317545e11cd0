"""How bytes move between the pools of two ranks: one-sided writes through NIXL and its UCX back end.

The pool is registered once; a write names its regions. CPU and GPU memory take the same path (UCX picks shared memory,
NVLink, RDMA or TCP), but for pages on GPUs of one machine, which a kernel writes where they can be mapped
(``mapped_peer``).

No thread of NIXL's runs: it would keep a core busy (97% of one, idle). So ``progress`` is called in every loop of a
receiver, and ``Write.poll`` in every loop of a sender.
"""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import torch

from parallel.layout import Range
from parallel.placement import IntArray

from .facts import machine
from .mapped_peer import MappedPeer
from .peer_memory import Mapped, export
from .protocol import DONE, RUNNING, UNKNOWN, Pool
from .regions import CacheMap, build_regions
from .requirements import import_nixl

_log = logging.getLogger(__name__)


class Write:
    """Bytes on their way to one receiver.

    Args:
        agent: NIXL's.
        handle: its transfer, which is started.
        peer: the receiver.

    Attributes:
        reason: what went wrong, if anything did.
    """

    def __init__(self, agent: Any, handle: Any, peer: str) -> None:
        self._agent, self._handle, self._peer, self.reason = agent, handle, peer, ""
        try:
            agent.transfer(handle)
        except Exception as error:  # nixl has an exception class of its own for each way to fail
            self._end(f"could not be started: {error}")

    def poll(self) -> str:
        """Return running, done, or unknown: something may still land."""
        if self._handle is not None:
            try:
                state = self._agent.check_xfer_state(self._handle)
            except Exception as error:
                state = str(error)
            if state == "PROC":
                return RUNNING
            self._end("" if state == "DONE" else f"broke off: {state}")
        return UNKNOWN if self.reason else DONE

    def abandon(self) -> None:
        """Give up what still runs."""
        if self._handle is not None:
            self._end("was given up")

    def _end(self, problem: str) -> None:
        """Note how it ended, and let NIXL forget it."""
        self.reason = f"a write to {self._peer} {problem}" if problem else ""
        handle, self._handle = self._handle, None
        try:
            handle.release()
        except Exception as error:
            _log.debug("releasing a write to %s: %s", self._peer, error)


class Peer:
    """A receiver's pool, ready to be written.

    Attributes:
        rank: the receiver's, in its group.
    """

    def __init__(self, agent: Any, pool: Pool, source: CacheMap, target: CacheMap, mine: Pool, *, rank: int) -> None:
        self.rank = rank
        self._agent, self._pools, self._maps = agent, (mine, pool), (source, target)
        self._name: str = agent.add_remote_agent(pool.metadata)
        agent.make_connection(self._name)  # the first write sends its first message

    def write(self, blocks: IntArray, source_pages: IntArray, target_pages: IntArray, tokens: Range) -> Write:
        """Start writing the tokens of some blocks; everything in them has been computed.

        Args:
            blocks: [n] int64, ascending global blocks that both ranks own.
            source_pages, target_pages: [n] int64, their pages.
            tokens: the half-open range of positions to write; it may cut the first and the last block.
        """
        regions = build_regions(*self._maps, blocks, source_pages, target_pages, tokens)
        ours, theirs = (
            self._agent.get_xfer_descs(_descriptors(regions, column, pool.device), pool.memory)
            for column, pool in enumerate(self._pools)
        )
        handle = self._agent.initialize_xfer("WRITE", ours, theirs, self._name)
        return Write(self._agent, handle, f"decode rank {self.rank}")

    def close(self) -> None:
        """Forget the receiver."""
        self._agent.remove_remote_agent(self._name)


AnyPeer = Peer | MappedPeer


class Transport:
    """This rank's end: its pool, registered.

    Args:
        name: unique among all ranks of both groups.
        pages: [L, P, page], the rank's, which stay where they are.

    Raises:
        ValueError: where NIXL is not installed or its UCX back end does not start.
    """

    def __init__(self, name: str, pages: torch.Tensor) -> None:
        nixl = import_nixl()
        config = nixl.nixl_agent_config(enable_prog_thread=False, backends=["UCX"])
        try:
            self._agent = nixl.nixl_agent(name, config)
            self._registered = self._agent.register_memory(pages)
        except Exception as error:
            raise ValueError(f"NIXL cannot use the cache's memory: {error}") from error
        if "UCX" not in self._agent.backends:
            raise ValueError("NIXL has no UCX back end here; install it with: pip install -e .[transfer]")
        self._pages = pages  # peers write there: it must live as long as this does
        step = pages.stride(0) * pages.element_size()
        self.pool = Pool(
            metadata=self._agent.get_agent_metadata(),
            layers=pages.data_ptr() + np.arange(pages.shape[0], dtype=np.int64) * step,
            page_bytes=pages.stride(1) * pages.element_size(),
            num_pages=pages.shape[1],
            memory="VRAM" if pages.is_cuda else "DRAM",
            device=pages.device.index or 0,
            machine=machine(),
            handle=export(pages) if pages.is_cuda else b"",
        )

    def connect(self, pool: Pool, source: CacheMap, target: CacheMap, *, rank: int) -> AnyPeer:
        """Return a receiver's pool, ready to be written: by a kernel where it can be mapped, else through NIXL.

        Raises:
            ValueError: when NIXL cannot reach it.
        """
        if (memory := self._map(pool, rank)) is not None:
            return MappedPeer(memory, source, target, self._pages.device, rank=rank)
        return self.connect_by_nixl(pool, source, target, rank=rank)

    def connect_by_nixl(self, pool: Pool, source: CacheMap, target: CacheMap, *, rank: int) -> Peer:
        """Return a receiver's pool, ready to be written through NIXL; ValueError when it cannot reach it."""
        try:
            return Peer(self._agent, pool, source, target, self.pool, rank=rank)
        except Exception as error:
            raise ValueError(f"NIXL cannot reach the pool of decode rank {rank}: {error}") from error

    def _map(self, pool: Pool, rank: int) -> Mapped | None:
        """Return the memory of a pool on a GPU of this machine; None, with the reason in the log, where it is not."""
        if not (self._pages.is_cuda and pool.handle and pool.machine and pool.machine == machine()):
            return None
        try:
            mapped = Mapped(pool.handle, self._pages.device)
        except OSError as error:
            _log.info("transfer: NIXL writes to decode rank %d, whose pages cannot be mapped: %s", rank, error)
            return None
        _log.info("transfer: a kernel writes to decode rank %d, whose pages are mapped", rank)
        return mapped

    def progress(self) -> None:
        """Let connections and writes of others go on."""
        self._agent.get_new_notifs()

    def close(self) -> None:
        """Unregister the pool: from here on nobody can write it."""
        self._agent.deregister_memory(self._registered)
        del self._agent, self._registered


def _descriptors(regions: IntArray, column: int, device: int) -> IntArray:
    """Return one side of regions as [n, 3]: address, bytes, device."""
    return np.stack((regions[:, column], regions[:, 2], np.full(len(regions), device)), 1)
