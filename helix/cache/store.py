"""Where the blocks are: device and host pages of all KVP ranks, who needs them, and which go when room is needed.

Below the life of sequences (``control.py``) and above the shape of the tree (``tree.py``). Three rules hold throughout:

 - a page is free, in the tree, or a sequence's own, and never two of these;
 - the ancestors of a pinned block are pinned, and those of a block on a device are on devices;
 - every unpinned block without children on a device is in its queue, so room that is counted can be had.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

from parallel.placement import BlockCyclic

from ..callbacks import Callback
from .counters import CacheCounters
from .events import DEVICE, HOST, CacheEvent, Listener
from .eviction import EvictionQueue, Expiries
from .movements import Handover, Movement, Offload, Onboard
from .pool import PagePool
from .retention import DEFAULT_PRIORITY, Retention, at
from .tree import NOWHERE, Block, Order, PrefixTree, hash_of

AHEAD_PAGES = 8  # free pages a rank below which blocks go to the host before their pages are needed


class BlockStore:
    """The pages of all KVP ranks and the blocks in them.

    Args:
        placement: the rule of ownership.
        num_pages: device pages of each rank.
        host_pages: host pages of each rank.
        offload_min_priority: blocks below this priority are dropped, not offloaded.
        counters: what to count in; the owner may replace it.
    """

    def __init__(
        self,
        placement: BlockCyclic,
        num_pages: int,
        *,
        host_pages: int,
        offload_min_priority: int,
        counters: CacheCounters,
    ) -> None:
        kvp = placement.kvp
        self.placement, self.num_pages, self.host_pages = placement, num_pages, host_pages
        self.counters = counters
        self.tree = PrefixTree()
        self.device, self.host = PagePool(kvp, num_pages), PagePool(kvp, host_pages)
        self.movements: list[Movement] = []
        self.listeners: list[Callback[[CacheEvent]]] = []
        self.now = 0.0
        self.expiries = Expiries()
        self._offload_min_priority = offload_min_priority
        self._ahead = min(AHEAD_PAGES, num_pages // 8) if host_pages else 0
        self._evictable = [0] * kvp  # blocks with a device page that nothing pins
        self._device_queue = EvictionQueue(_may_leave_device)  # of all ranks, and of each:
        self._device_queues = [EvictionQueue(_may_leave_device) for _ in range(kvp)]
        self._host_queues = [EvictionQueue(_may_leave_host) for _ in range(kvp)]
        self._offloaded: list[set[int]] = [set() for _ in range(kvp)]  # free pages that an offload may still read
        self._tick = self._serial = 0

    # --- room ---------------------------------------------------------------------------------------------------------

    def num_evictable(self, rank: int) -> int:
        """Return how many blocks with a device page on a rank nothing pins."""
        return self._evictable[rank]

    def num_available(self, rank: int) -> int:
        """Return how many device pages of a rank can be had: free ones, and those of evictable blocks."""
        return self.device.num_free(rank) + self._evictable[rank]

    def take(self, rank: int) -> int:
        """Return a device page for a sequence, after evicting what has to go; one must be available."""
        while not self.device.num_free(rank):
            self._evict(self._victim(rank))
        page = self.device.take(rank)
        if page in self._offloaded[rank]:
            self._offloaded[rank].remove(page)
            self.movements.append(Handover(rank, page))
        return page

    def offload_ahead(self) -> None:
        """Offload what would go next while few pages are free, so that decode finds pages whose copy has ended."""
        for rank in range(self.placement.kvp):
            while self.device.num_free(rank) < self._ahead and self._evictable[rank]:
                victim = self._victim(rank)
                if not self._moves_to_host(victim):
                    break
                self._evict(victim)

    # --- blocks -------------------------------------------------------------------------------------------------------

    def add(self, parent: Block, key: bytes, rank: int, page: int, retention: Sequence[Retention]) -> Block:
        """Hang a new block under a pinned one, with a page that a sequence gives up to it; nothing pins it yet."""
        self._serial += 1
        block = Block(key, parent, rank, page, self._serial)
        block.last_used = self._next_tick()
        parent.add(block)
        self._evictable[rank] += 1
        self.retain(block, retention)
        self._queue(block)
        self._tell("stored", block)
        return block

    def take_over(self, block: Block) -> int:
        """Take a leaf on the device that only the caller pins out of the tree; return its page, the caller's then."""
        parent, page = block.parent, block.page
        assert parent is not None and block.pins == 1 and not block.children and block.on_device
        self._tell("removed", block)
        parent.remove(block)
        block.pins, block.parent, block.page, block.expires = 0, None, NOWHERE, None
        self.unpin(parent)
        return page

    def onboard(self, block: Block, page: int) -> None:
        """Copy a block from the host to a page that was taken for it, which then is the block's."""
        self.movements.append(Onboard(block.rank, block.host_page, page))
        self.counters.blocks_onboarded += 1
        self.move_to_device(block, page)

    def move_to_device(self, block: Block, page: int) -> None:
        """Give a block on the host a device page with the same content, and free its host page."""
        assert block.parent is not None
        self.host.give(block.rank, block.host_page)
        block.host_page, block.page = NOWHERE, page
        block.parent.device_children += 1
        if not block.pins:
            self._evictable[block.rank] += 1
        self._tell("moved", block)

    def retain(self, block: Block, ranges: Sequence[Retention]) -> None:
        """Give a block the priority that a request asks for where the block begins; none leaves it as it is."""
        wanted = at(ranges, block.depth * self.placement.block_size) if ranges else None
        if wanted is None:
            return
        lasts = wanted.duration_s is None or wanted.priority == DEFAULT_PRIORITY
        expires = None if lasts or wanted.duration_s is None else self.now + wanted.duration_s
        changed = expires != block.expires
        block.priority, block.expires = wanted.priority, expires
        if expires is not None and changed:
            self.expiries.push(block)

    def advance(self, now: float) -> None:
        """Set the time, in seconds; it never goes back. Priorities end that are due."""
        self.now = max(self.now, now)
        for block in self.expiries.pop_due(self.now):
            self._queue(block)

    # --- pins ---------------------------------------------------------------------------------------------------------

    def pin_chain(self, root: Block, chain: list[Block]) -> None:
        """Pin the last block of a chain that begins under a root, or the root of an empty chain."""
        first = bisect_left(chain, True, key=_is_unpinned)  # pinned ones come first
        if first == len(chain):
            (chain[-1] if chain else root).pins += 1
            return
        for block in chain[first:]:
            block.pins = 1
        (chain[first - 1] if first else root).pins += 1
        pages = bisect_left(chain, True, first, key=_is_off_device) - first
        kvp, owner = self.placement.kvp, chain[first].rank
        for turn in range(kvp):
            self._evictable[(owner + turn) % kvp] -= (pages - turn + kvp - 1) // kvp

    def pin(self, block: Block) -> None:
        """Pin one block whose parent is pinned."""
        if not block.pins:
            assert block.parent is not None
            block.parent.pins += 1
            self._evictable[block.rank] -= block.on_device
        block.pins += 1

    def unpin(self, block: Block, *, used: bool = False) -> None:
        """Take back one pin, and those of the ancestors that hung on it; ``used`` counts as a use now."""
        if used:
            block.last_used = self._next_tick()
        each: Block | None = block
        while each is not None:
            each.pins -= 1
            if each.pins:
                return
            if each.page >= 0:
                self._evictable[each.rank] += 1
            if not each.device_children:
                self._queue(each)
            if each.parent is None:
                self.tree.prune(each)
            each = each.parent

    # --- eviction -----------------------------------------------------------------------------------------------------

    def _victim(self, rank: int) -> Block:
        """Return the block that goes next to make room on a rank.

        That is the lowest in order of the first blocks of the queues that lead to a page of this rank. Where none does,
        this rank's blocks lie below other ranks' first ones, and the lowest of these goes.
        """
        lowest = self._device_queue.peek()
        assert lowest is not None
        if self._leads_to(lowest, rank):  # nearly always, which spares the look at every rank's queue
            return lowest
        firsts = [first for queue in self._device_queues if (first := queue.peek()) is not None]
        return next((block for block in sorted(firsts, key=_order) if self._leads_to(block, rank)), lowest)

    def _leads_to(self, block: Block, rank: int) -> bool:
        """Return whether a page of a rank is free once a leaf and those ancestors go that are leaves then."""
        each: Block | None = block
        for _ in range(self.placement.kvp):
            if each is None or each.pins or not each.on_device or (each is not block and each.device_children > 1):
                return False
            if each.rank == rank:
                return True
            each = each.parent
        return False

    def _evict(self, block: Block) -> None:
        """Free the device page of a leaf: move it to the host, or drop it with what hangs below it on the host."""
        if not self._moves_to_host(block):
            for each in reversed(list(block.walk())):
                self._drop(each)
            self._drop(block)
            return
        rank, page, parent = block.rank, block.page, block.parent
        assert parent is not None
        if not self.host.num_free(rank):
            lowest = self._host_queues[rank].peek()
            assert lowest is not None
            self._drop(lowest)
        block.host_page, block.page = self.host.take(rank), NOWHERE
        parent.device_children -= 1
        parent.last_used = max(parent.last_used, block.last_used)
        self._evictable[rank] -= 1
        self.device.give(rank, page)
        self._offloaded[rank].add(page)
        self.movements.append(Offload(rank, page, block.host_page))
        self.counters.blocks_offloaded += 1
        self._tell("moved", block)
        self._queue(block)
        self._queue(parent)

    def _moves_to_host(self, block: Block) -> bool:
        """Return whether a block moves to the host: its priority allows it, and there is room or something lower.

        A block with children on the host moves whatever its priority: without it they could not be found.
        """
        if not self.host_pages or (block.priority < self._offload_min_priority and not block.children):
            return False
        if self.host.num_free(block.rank):
            return True
        lowest = self._host_queues[block.rank].peek()
        return lowest is not None and (lowest.order < block.order or bool(block.children))

    def _drop(self, block: Block) -> None:
        """Take a childless block that nothing pins out of the tree and free its page."""
        parent = block.parent
        assert parent is not None
        self._tell("removed", block)
        parent.remove(block)
        if block.on_device:
            self._evictable[block.rank] -= 1
            self.device.give(block.rank, block.page)
        else:
            self.host.give(block.rank, block.host_page)
        block.page, block.host_page, block.parent, block.expires = NOWHERE, NOWHERE, None, None
        self.counters.blocks_evicted += 1
        self._queue(parent)
        self.tree.prune(parent)

    def _queue(self, block: Block) -> None:
        """Put a block into the queue of what may go, if it may."""
        if _may_leave_device(block):
            self._device_queue.add(self._device_queues[block.rank].push(block))
        elif _may_leave_host(block):
            self._host_queues[block.rank].push(block)

    def _next_tick(self) -> int:
        self._tick += 1
        return self._tick

    # --- events -------------------------------------------------------------------------------------------------------

    def listen(self, listener: Listener) -> None:
        """Call a function with every event from now on, after one "stored" for each block that is there."""
        for block in self.tree.walk():
            listener(_event("stored", block))
        self.listeners.append(Callback(listener))

    def unlisten(self, listener: Listener) -> None:
        """Stop calling a function; ValueError where it does not listen."""
        del self.listeners[[each.function for each in self.listeners].index(listener)]

    def follow(self, old: BlockStore) -> None:
        """Take the place of a store whose blocks go: its listeners hear of that, children first, and stay."""
        for block in reversed(list(old.tree.walk())):
            old._tell("removed", block)
        self.listeners, self.now = old.listeners, old.now
        self._offloaded = old._offloaded

    def _tell(self, event: str, block: Block) -> None:
        if self.listeners:
            told = _event(event, block)
            for listener in self.listeners:
                listener(told)


def _event(event: str, block: Block) -> CacheEvent:
    assert block.parent is not None
    tier = DEVICE if block.on_device else HOST
    salt = None if block.depth else block.parent.key
    names = hash_of(block).hex(), hash_of(block.parent).hex()
    return CacheEvent(event, *names, tier, block.rank, block.num_tokens, block.key, salt)


def _order(block: Block) -> Order:
    return block.order


def _is_unpinned(block: Block) -> bool:
    return not block.pins


def _is_off_device(block: Block) -> bool:
    return block.page < 0


def _may_leave_device(block: Block) -> bool:
    return block.page >= 0 and not block.pins and not block.device_children


def _may_leave_host(block: Block) -> bool:
    return block.host_page >= 0 and not block.pins and not block.children
