"""All ranks of a group on one GPU: a stream for each, and buffers that are peers because they are neighbours.

Why: kernels over symmetric memory are made for more ranks than a machine at hand may have GPUs. Here ``run`` launches
every rank's kernels on a stream of its own, so that they wait for each other on one device as they would over NVLink.

What a kernel waits for must be resident: all ranks' programs together have to fit the GPU at once. So rows are few, and
kernels do not launch dependently: those that wait for the one before them would take the places of other ranks.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch

MAX_RANKS = 8  # kernels of more streams than the driver has queues (8, unless told otherwise) wait for each other


class LocalWorld:
    """The group of all ranks; ``ranks`` are what each of them passes as its process group.

    Its buffers stand in for ``SymmetricBuffer`` in the modules that are patched, by the order in which ranks make them.
    """

    def __init__(self, size: int, monkeypatch: pytest.MonkeyPatch, *modules: str) -> None:
        assert size <= MAX_RANKS
        self.size = size
        self.ranks = [LocalGroup(self, rank) for rank in range(size)]
        self.streams = [torch.cuda.Stream() for _ in range(size)]
        self.buffers: list[tuple[torch.Tensor, torch.Tensor]] = []
        for module in modules:
            monkeypatch.setattr(f"{module}.SymmetricBuffer", LocalBuffer)

    def run(self, call: Callable[[int], Any], *, delays: torch.Generator) -> list[Any]:
        """Call ``call(rank)`` on each rank's stream, in a random order after random delays; wait for all of them."""
        torch.cuda.synchronize()
        order = torch.randperm(self.size, generator=delays).tolist()
        results: list[Any] = [None] * self.size
        for rank in order:
            with torch.cuda.stream(self.streams[rank]):
                torch.cuda._sleep(int(torch.randint(1, 20000, (), generator=delays)))
                results[rank] = call(rank)
        torch.cuda.synchronize()
        return results


class LocalGroup:
    """What one rank knows of its world, in the words of a process group."""

    def __init__(self, world: LocalWorld, rank: int) -> None:
        self.world, self._rank, self.num_buffers = world, rank, 0

    def size(self) -> int:
        return self.world.size

    def rank(self) -> int:
        return self._rank


class LocalBuffer:
    """A ``SymmetricBuffer`` among the ranks of a LocalWorld."""

    def __init__(self, group: LocalGroup, num_bytes: int, device: torch.device) -> None:
        buffers = group.world.buffers
        if group.num_buffers == len(buffers):
            memory = torch.full((group.size(), num_bytes), 0xFF, dtype=torch.uint8, device=device)
            buffers.append((memory, torch.tensor([rank.data_ptr() for rank in memory], device=device)))
        memory, addresses = buffers[group.num_buffers]
        assert memory.shape[1] == num_bytes, "the ranks' buffers differ in size"
        group.num_buffers += 1
        self.peers = addresses.data_ptr()
