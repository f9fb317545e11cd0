"""What a transfer brings, store by store: pages of full layers, and records of states, or pages of windows.

The latter two are cut by heads over all ranks of a group and come once, behind a prompt's end, whatever the decode
group has cached of it: of a sequence that goes on at G its window is the tokens of [G - W, G), its state one record.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch

from parallel.layout import Layout, Range
from parallel.placement import IntArray

from ..cache.pages import PagedCache
from ..cache.windows import WindowPages
from ..models.spec import ModelSpec
from ..models.weights import part_of
from ..request import Sequence
from ..states.records import StateRecords
from .protocol import Ask, Pool, require
from .regions import CacheMap

if TYPE_CHECKING:
    from ..engine import Engine


class Store(Protocol):
    """This rank's memory of some layers.

    Attributes:
        memory: [L, P, bytes], where peers write and read.
    """

    memory: torch.Tensor

    def map(self, pool: Pool, layout: Layout, rank: int) -> CacheMap:
        """Return where a rank's lies in a group of some layout; ValueError when the pool is not one of this model."""

    def sends(self, layout: Layout, rank: int) -> bool:
        """Return whether a rank sends its heads: of ranks that hold the same ones, the first does."""


@dataclass(frozen=True)
class Post:
    """What to write: blocks, their pages here and there, and the tokens that they are cut to."""

    blocks: IntArray
    ours: IntArray
    theirs: IntArray
    tokens: Range


class Bounded(Store, Protocol):
    """The same of layers of bounded memory."""

    def check(self, ask: Ask, num_there: int) -> None:
        """Raise MessageError unless what is asked for fits the receiver's ``num_there`` records or pages."""

    def post(self, seq: Sequence, ask: Ask) -> Post:
        """Return what to write of a sequence whose prompt is computed; it is all there when this returns."""


class Records:
    """Records of states.

    Args:
        synchronize: waits for the device.
    """

    def __init__(self, spec: ModelSpec, records: StateRecords, synchronize: Callable[[], None]) -> None:
        self._spec, self._records, self._synchronize = spec, records, synchronize
        self.memory = records.memory

    def map(self, pool: Pool, layout: Layout, rank: int) -> CacheMap:
        """See ``Store``: a record is a page of one token."""
        heads, head_bytes = part_of(self._spec, layout, rank).value_heads, self._records.head_bytes
        if pool.page_bytes != (heads[1] - heads[0]) * head_bytes or len(pool.layers) != 1:
            raise ValueError(f"the records of rank {rank} have {pool.page_bytes} bytes")
        return CacheMap(pool.layers, pool.page_bytes, 1, heads, np.array([[0, head_bytes]]))

    def sends(self, layout: Layout, rank: int) -> bool:
        """See ``Store``: no two ranks hold the same value heads."""
        return True

    def check(self, ask: Ask, num_there: int) -> None:
        """See ``Bounded``."""
        require(ask.record < num_there, f"record = {ask.record} of {num_there}")

    def post(self, seq: Sequence, ask: Ask) -> Post:
        """See ``Bounded``."""
        self._records.write(seq.batch_slot, seq.prompt_len)
        self._synchronize()
        return Post(np.array([0]), np.array([seq.batch_slot]), np.array([ask.record]), (0, 1))


class Pages:
    """Pages of full layers, of which each rank has some KV heads; ``cache`` is this rank's."""

    def __init__(self, spec: ModelSpec, cache: PagedCache) -> None:
        self._spec, self._layout = spec, cache.layout
        self.memory = cache.pages

    def heads(self, layout: Layout, rank: int) -> Range:
        """Return the KV heads that a rank has in a group of some layout."""
        return layout.kv_heads(self._spec.num_kv_heads, rank // layout.kvp)

    def map(self, pool: Pool, layout: Layout, rank: int) -> CacheMap:
        """See ``Store``."""
        heads = self.heads(layout, rank)
        pages = replace(self._layout, num_kv_heads=heads[1] - heads[0])
        if pool.page_bytes != pages.page_bytes or len(pool.layers) != len(self.memory):
            raise ValueError(f"a pool of rank {rank} has {len(pool.layers)} layers of {pool.page_bytes} bytes")
        return CacheMap.of(pages, pool.layers, heads)

    def sends(self, layout: Layout, rank: int) -> bool:
        """See ``Store``."""
        copies = max(1, layout.tpa // self._spec.num_kv_heads)
        return rank // layout.kvp % copies == 0


class Windows(Pages):
    """Pages of layers with a window.

    Args:
        cache: this rank's.
        control: which of them are whose.
        block_size: tokens of a page.
    """

    def __init__(self, spec: ModelSpec, cache: PagedCache, control: WindowPages, block_size: int) -> None:
        super().__init__(spec, cache)
        self._control, self._block_size = control, block_size

    def heads(self, layout: Layout, rank: int) -> Range:
        """See ``Pages``."""
        return part_of(self._spec, layout, rank).window_kv_heads

    def sends(self, layout: Layout, rank: int) -> bool:
        """See ``Store``."""
        return self.heads(layout, rank) not in [self.heads(layout, each) for each in range(rank)]

    def check(self, ask: Ask, num_there: int) -> None:
        """See ``Bounded``."""
        count = -(-len(ask.token_ids) // self._block_size) - self._control.first_of_arrival(len(ask.token_ids))
        pages = ask.window_pages
        require(len(pages) == count, f"{len(pages)} pages of a window for {count} blocks")
        require(int(pages.max()) < num_there, f"page {int(pages.max())} of a window, of {num_there}")

    def post(self, seq: Sequence, ask: Ask) -> Post:
        """See ``Bounded``."""
        first, table = self._control.first_of_arrival(seq.prompt_len), seq.blocks.window
        assert table.first <= first, "its last row may be computed again"
        blocks = np.arange(first, first + len(ask.window_pages))
        ours = np.array(table.pages, np.int64)[blocks - table.first]
        return Post(blocks, ours, ask.window_pages, (first * self._block_size, seq.prompt_len))


def bounded_memory(spec: ModelSpec, engine: Engine) -> Bounded | None:
    """Return what a rank has of such layers; None where the model has none."""
    decoder, control = engine.runner.decoder, engine.scheduler.windows
    if decoder.states is not None and decoder.states.records is not None:
        return Records(spec, decoder.states.records, engine.synchronize)
    if decoder.window_cache is not None and control is not None:
        return Windows(spec, decoder.window_cache, control, engine.runner.placement.block_size)
    return None
