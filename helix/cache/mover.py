"""The data plane: execute the page movements that the control plane asks of this rank.

A list of movements means what it would mean if they ran one by one, in order, between two steps. On a device they run
beside the computing, on two streams of their own: *in* writes device pages (onboard, copy), *out* reads them (offload).
What keeps the meaning:

 1. Both streams first wait for what computing has been given so far: pages are read after their last write, and written
    after their last use.
 2. Within a stream everything runs in order.
 3. Across the two streams every page, on the device and on the host, has the event of its last movement there. A
    movement waits for the other stream's event of each page that it touches: a page is offloaded before it is written
    anew, a host page is read only when it is written, and written only when it is read.
 4. Computing waits once, at the end of ``execute``: for all movements into device pages, since the next step reads
    them, and for the offloads of pages that are handed to sequences, since the next step may write them. Other offloads
    go on beside the step.

Pinned host memory holds the host pages, each whole; copies between it and the device are one transfer for each run of
neighbouring host pages, through a staging buffer on the device. On a CPU the same movements are plain copies.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import groupby
from typing import TYPE_CHECKING, TypeVar

import torch

from .movements import CopyState, CopyTokens, Handover, Movement, MoveState, Offload, Onboard
from .pages import PagedCache

if TYPE_CHECKING:
    from ..states.checkpoints import StateCheckpoints

STAGING_BYTES = 64 << 20
OUT, IN = 0, 1
Place = tuple[str, int]  # ("device" or "host", page)
_Between = TypeVar("_Between", Offload, Onboard)


class PageMover:
    """Moves the pages of one rank.

    Args:
        cache: the rank's device pages.
        host_pages: how many host pages to make, in pinned memory where the cache is on a GPU.
        rank: this process's KVP rank; movements of other ranks are left to them.
        states: where checkpoints of states are; None where the model has no state layers.

    Raises:
        ValueError: when the host pages cannot be had; local to the rank, so agree on it.
    """

    def __init__(
        self, cache: PagedCache, host_pages: int, rank: int, *, states: StateCheckpoints | None = None
    ) -> None:
        self.cache, self.rank, self._states = cache, rank, states
        pages = cache.pages
        shape = (host_pages, pages.shape[0], pages.shape[2])
        self._page_bytes = pages[:, 0].nbytes
        try:
            self.host = torch.empty(shape, dtype=pages.dtype, pin_memory=pages.is_cuda and host_pages > 0)
        except RuntimeError as error:
            raise ValueError(
                f"cache.host_pages = {host_pages} pages of {self._page_bytes} bytes cannot be had; lower it ({error})"
            ) from error
        self._streams = [torch.cuda.Stream(pages.device) for _ in (OUT, IN)] if pages.is_cuda else []
        staged = max(1, min(host_pages, STAGING_BYTES // self._page_bytes)) if host_pages and pages.is_cuda else 0
        self._staging = [pages.new_empty((staged, *shape[1:])) for _ in (OUT, IN)]
        # the event of the last movement of each place, by stream; finished ones are forgotten
        self._events: list[dict[Place, torch.cuda.Event]] = [{}, {}]

    def execute(self, movements: Sequence[Movement]) -> None:
        """Start this rank's movements; what is computed next on the current stream comes after those that it needs."""
        for movement in movements:
            if isinstance(movement, CopyState | MoveState):
                assert self._states is not None
                self._states.move(movement)
        mine = [movement for movement in movements if movement.rank == self.rank]
        if not mine:
            return
        handed: list[Place] = []
        written = False
        self._begin()
        for kind, group in groupby(mine, key=type):
            run = list(group)
            if kind is Handover:
                handed += [("device", movement.page) for movement in run if isinstance(movement, Handover)]
            elif kind is Offload:
                self._in_batches([move for move in run if isinstance(move, Offload)], self._offload)
            elif kind is Onboard:
                written = True
                self._in_batches([move for move in run if isinstance(move, Onboard)], self._onboard)
            else:
                written = True
                for movement in run:
                    assert isinstance(movement, CopyTokens)
                    self._copy(movement)
        self._end(handed, written)

    def synchronize(self) -> None:
        """Wait on the host until every movement has ended."""
        for stream in self._streams:
            stream.synchronize()

    # --- the copies ---------------------------------------------------------------------------------------------------

    def _offload(self, batch: list[Offload]) -> None:
        pages, hosts = [move.page for move in batch], [move.host_page for move in batch]
        reads: list[Place] = [("device", page) for page in pages]
        with self._ordered(OUT, reads + [("host", page) for page in hosts]):
            if not self._streams:
                self.host[hosts] = self.cache.pages[:, pages].transpose(0, 1)
                return
            staging = self._staging[OUT][: len(batch)]
            torch.index_select(self.cache.pages.transpose(0, 1), 0, self._on_device(pages), out=staging)
            for start, stop in _runs(hosts):
                first = hosts[start]
                self.host[first : first + stop - start].copy_(staging[start:stop], non_blocking=True)

    def _onboard(self, batch: list[Onboard]) -> None:
        pages, hosts = [move.page for move in batch], [move.host_page for move in batch]
        writes: list[Place] = [("device", page) for page in pages]
        with self._ordered(IN, writes + [("host", page) for page in hosts]):
            if not self._streams:
                self.cache.pages[:, pages] = self.host[hosts].transpose(0, 1)
                return
            staging = self._staging[IN][: len(batch)]
            for start, stop in _runs(hosts):
                first = hosts[start]
                staging[start:stop].copy_(self.host[first : first + stop - start], non_blocking=True)
            self.cache.pages.transpose(0, 1).index_copy_(0, self._on_device(pages), staging)

    def _copy(self, move: CopyTokens) -> None:
        count = move.num_tokens
        with self._ordered(IN, [("device", move.source), ("device", move.target)]):
            for plane in self.cache.planes:
                plane[:, move.target, :, :, :count] = plane[:, move.source, :, :, :count]

    def _in_batches(self, run: list[_Between], move: Callable[[list[_Between]], None]) -> None:
        """Move in batches that fit the staging buffer and touch no page twice."""
        limit = self._staging[OUT].shape[0] or len(run)
        batch: list[_Between] = []
        pages: set[int] = set()
        hosts: set[int] = set()
        for each in run:
            if len(batch) == limit or each.page in pages or each.host_page in hosts:
                move(batch)
                batch, pages, hosts = [], set(), set()
            batch.append(each)
            pages.add(each.page)
            hosts.add(each.host_page)
        move(batch)

    def _on_device(self, pages: list[int]) -> torch.Tensor:
        """Return page ids on the device without waiting for the stream."""
        return torch.tensor(pages).pin_memory().to(self.cache.pages.device, non_blocking=True)

    # --- the order ----------------------------------------------------------------------------------------------------

    def _begin(self) -> None:
        """Let both streams wait for what computing was given so far."""
        if self._streams:
            computed = torch.cuda.current_stream(self.cache.pages.device).record_event()
            for stream in self._streams:
                stream.wait_event(computed)

    def _ordered(self, side: int, places: list[Place]) -> AbstractContextManager[object]:
        """Return a context that runs a movement on its stream, after the other stream's that touch its places."""
        if not self._streams:
            return nullcontext()
        return _Ordered(self, side, places)

    def _end(self, handed: list[Place], written: bool) -> None:
        """Let computing wait, once for each stream at most."""
        if not self._streams:
            return
        current = torch.cuda.current_stream(self.cache.pages.device)
        if written:
            current.wait_stream(self._streams[IN])
        self._wait(current, OUT, handed)
        for side, events in enumerate(self._events):
            ended = {id(event): event.query() for event in events.values()}
            self._events[side] = {place: event for place, event in events.items() if not ended[id(event)]}

    def _wait(self, stream: torch.cuda.Stream, side: int, places: list[Place]) -> None:
        """Let a stream wait for the other side's last movements of some places."""
        events = {id(event): event for place in places if (event := self._events[side].get(place)) is not None}
        for event in events.values():
            stream.wait_event(event)

    def _record(self, side: int, places: list[Place]) -> None:
        event = self._streams[side].record_event()
        self._events[side].update(dict.fromkeys(places, event))


class _Ordered:
    """See ``PageMover._ordered``."""

    def __init__(self, mover: PageMover, side: int, places: list[Place]) -> None:
        self._mover, self._side, self._places = mover, side, places
        self._context = torch.cuda.stream(mover._streams[side])

    def __enter__(self) -> None:
        self._mover._wait(self._mover._streams[self._side], 1 - self._side, self._places)
        self._context.__enter__()

    def __exit__(self, *error: object) -> None:
        self._context.__exit__(None, None, None)
        self._mover._record(self._side, self._places)


def _runs(pages: list[int]) -> list[tuple[int, int]]:
    """Return the index ranges of a list that hold neighbouring pages in ascending order."""
    cuts = [at for at in range(1, len(pages)) if pages[at] != pages[at - 1] + 1]
    return list(zip([0, *cuts], [*cuts, len(pages)], strict=True))
