"""A world without tensors to drive the cache in: pages are lists of tokens, and what a table shows is read back.

``World`` is several replicas of the control plane, one a simulated rank, plus the pages of all KVP ranks; every
operation runs on all replicas, and ``check`` compares them and recounts everything from scratch.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from helix.cache.claim import Claim
from helix.cache.control import CacheControl
from helix.cache.events import CacheEvent
from helix.cache.keys import BlockKeys
from helix.cache.movements import CopyTokens, Handover, Movement, Offload, Onboard
from helix.cache.pool import BlockTable
from helix.cache.retention import Retention
from helix.cache.tree import Block
from parallel.placement import BlockCyclic

Page = list[int | None]


class Pages:
    """The content of every page, on devices and hosts; movements run one by one, as their list means."""

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self.device: dict[tuple[int, int], Page] = {}
        self.host: dict[tuple[int, int], Page] = {}
        self.offloading: set[tuple[int, int]] = set()  # an offload may still read them

    def page(self, rank: int, page: int) -> Page:
        return self.device.setdefault((rank, page), [None] * self.block_size)

    def execute(self, movements: Iterable[Movement]) -> None:
        for move in movements:
            match move:
                case CopyTokens(rank, source, target, count):
                    assert source != target
                    self.page(rank, target)[:] = [None] * self.block_size
                    self.page(rank, target)[:count] = self.page(rank, source)[:count]
                case Offload(rank, page, host_page):
                    self.host[rank, host_page] = list(self.page(rank, page))
                    self.offloading.add((rank, page))
                case Onboard(rank, host_page, page):
                    self.device[rank, page] = list(self.host[rank, host_page])
                case Handover(rank, page):
                    self.offloading.discard((rank, page))

    def write(self, place: BlockCyclic, table: BlockTable, tokens: list[int], start: int, stop: int) -> None:
        for position in range(start, stop):
            block, offset = divmod(position, self.block_size)
            where = place.owner(position, table.first_owner), table.pages[block]
            assert where not in self.offloading, "written while an offload may read it: it was not handed over"
            self.page(*where)[offset] = tokens[position]

    def read(self, place: BlockCyclic, table: BlockTable, stop: int) -> list[int | None]:
        return [
            self.page(place.owner(position, table.first_owner), table.pages[position // self.block_size])[
                position % self.block_size
            ]
            for position in range(stop)
        ]


@dataclass
class Running:
    """A sequence on every replica; ``tokens`` is shared with their keys."""

    tokens: list[int]
    keys: list[BlockKeys]
    tables: list[BlockTable]
    num_computed: int


@dataclass
class World:
    kvp: int
    block_size: int
    num_pages: int
    settings: dict[str, object] = field(default_factory=dict)
    replicas: int = 2

    def __post_init__(self) -> None:
        self.place = BlockCyclic(self.block_size, self.kvp)
        self.caches = [
            CacheControl(self.place, self.num_pages, **self.settings)  # type: ignore[arg-type]
            for _ in range(self.replicas)
        ]
        self.cache = self.caches[0]
        self.pages = Pages(self.block_size)
        self.running: list[Running] = []
        self.events: list[list[CacheEvent]] = [[] for _ in self.caches]
        for cache, events in zip(self.caches, self.events, strict=True):
            cache.listen(events.append)

    def keys(self, tokens: list[int], salt: str = "") -> list[BlockKeys]:
        return [BlockKeys(tokens, self.block_size, salt) for _ in self.caches]

    def claim(self, keys: list[BlockKeys], retention: tuple[Retention, ...] = ()) -> list[Claim]:
        claims = [cache.claim(each, retention) for cache, each in zip(self.caches, keys, strict=True)]
        assert len({claim.num_tokens for claim in claims}) == 1
        assert claims[0].num_tokens < len(keys[0].token_ids), "the last token is always computed"
        return claims

    def drop(self, claims: list[Claim]) -> None:
        for cache, claim in zip(self.caches, claims, strict=True):
            cache.drop(claim)

    def admit(self, claims: list[Claim]) -> Running | None:
        """Admit, move, and check that what is reused is in the pages of the table."""
        tokens = claims[0].keys.token_ids
        tables = [cache.admit(claim, len(tokens)) for cache, claim in zip(self.caches, claims, strict=True)]
        if None in tables:
            assert all(table is None for table in tables)
            return None
        running = Running(tokens, [c.keys for c in claims], [t for t in tables if t is not None], 0)
        running.num_computed = running.tables[0].num_reused
        self.running.append(running)
        return running

    def start(self, tokens: list[int], salt: str = "", retention: tuple[Retention, ...] = ()) -> Running | None:
        claims = self.claim(self.keys(tokens, salt), retention)
        running = self.admit(claims)
        if running is None:
            self.drop(claims)
        self.move()
        return running

    def move(self) -> None:
        moves = [cache.take_movements() for cache in self.caches]
        assert all(each == moves[0] for each in moves), "ranks move different pages"
        self.pages.execute(moves[0])
        self.moved = moves[0]

    def compute(self, running: Running, count: int | None = None) -> None:
        """Compute the next tokens that are known, and check what attention would have read."""
        stop = len(running.tokens) if count is None else min(len(running.tokens), running.num_computed + count)
        table = running.tables[0]
        self.pages.write(self.place, table, running.tokens, running.num_computed, stop)
        assert self.pages.read(self.place, table, stop) == running.tokens[:stop], "a page holds other tokens"
        running.num_computed = stop
        for cache, each in zip(self.caches, running.tables, strict=True):
            cache.commit(each, stop)

    def extend(self, running: Running, more: list[int]) -> bool:
        """Append tokens and their pages; nothing changes where pages are missing."""
        length = len(running.tokens) + len(more)
        done = [cache.extend(table, length) for cache, table in zip(self.caches, running.tables, strict=True)]
        assert len(set(done)) == 1
        if done[0]:
            running.tokens += more
        self.move()
        return done[0]

    def release(self, running: Running, *, keep: bool = True) -> None:
        for cache, table in zip(self.caches, running.tables, strict=True):
            cache.release(table, running.num_computed if keep else 0)
        self.running.remove(running)

    def run(self, tokens: list[int], made: list[int] | None = None, **settings: object) -> int:
        """Run a sequence to its end and return how many tokens it reused."""
        running = self.start(list(tokens), **settings)  # type: ignore[arg-type]
        assert running is not None
        reused = running.num_computed
        self.compute(running)
        for token in made or []:
            assert self.extend(running, [token])
            self.compute(running)
        self.release(running)
        self.check()
        return reused

    def for_all(self, call: Callable[[CacheControl], object]) -> None:
        for cache in self.caches:
            call(cache)
        self.move()

    def check(self, claims: Iterable[list[Claim]] = ()) -> None:
        """Recount pages, pins and queues of the first replica, and compare the others with it."""
        claims = list(claims)
        blocks = list(self.cache.blocks.tree.walk())
        self.check_tree(blocks)
        self.check_pins(blocks, [each[0] for each in claims])
        self.check_pages(blocks)
        views = [view(cache) for cache in self.caches]
        assert all(each == views[0] for each in views), "ranks differ"
        assert all(each == self.events[0] for each in self.events)
        tables = [[(t.first_owner, t.pages, t.num_cached) for t in each.tables] for each in self.running]
        assert all(each == row[0] for row in tables for each in row)

    def check_tree(self, blocks: list[Block]) -> None:
        for block in blocks:
            parent = block.parent
            assert parent is not None and parent.children[block.key] is block
            assert (block.page >= 0) != (block.host_page >= 0), "a block is in one place"
            assert 0 < block.num_tokens <= self.block_size
            assert block.num_tokens == self.block_size or not block.children, "only whole blocks have children"
            assert block.depth == parent.depth + 1
            if parent.parent is not None:
                assert block.rank == (parent.rank + 1) % self.kvp, "ownership follows the position"
                assert block.page < 0 or parent.page >= 0, "a block on the device hangs under one on the host"
            for each in (block, parent):
                assert each.device_children == sum(child.page >= 0 for child in each.children.values())
                assert each.first_child in ({None} if not each.children else set(each.children.values()))
                assert each.sorted_keys is None or each.sorted_keys == sorted(each.children)
        for root in self.cache.blocks.tree.roots.values():
            assert root.children or root.pins, "a root without use is kept"

    def check_pins(self, blocks: list[Block], claims: list[Claim]) -> None:
        direct: dict[int, int] = {}
        for pinned in [each.tables[0].tail for each in self.running] + [each.tail for each in claims]:
            direct[id(pinned)] = direct.get(id(pinned), 0) + 1
        for claim in claims:
            if claim.partial is not None:
                direct[id(claim.partial)] = direct.get(id(claim.partial), 0) + 1
        for block in [*blocks, *self.cache.blocks.tree.roots.values()]:
            pinned_children = sum(child.pins > 0 for child in block.children.values())
            assert block.pins == direct.pop(id(block), 0) + pinned_children, "pins are miscounted"
        assert not direct, "a block that someone needs has left the tree"

    def check_pages(self, blocks: list[Block]) -> None:
        store = self.cache.blocks
        for rank in range(self.kvp):
            held = store.device.free_pages(rank) + [b.page for b in blocks if b.rank == rank and b.page >= 0]
            for running in self.running:
                table = running.tables[0]
                cached = set(range(table.num_cached)) - set(table.own)
                held += [
                    page
                    for block, page in enumerate(table.pages)
                    if (block + table.first_owner) % self.kvp == rank and block not in cached
                ]
            assert sorted(held) == list(range(self.num_pages)), f"rank {rank}: a page is lost or owned twice"
            on_host = store.host.free_pages(rank) + [b.host_page for b in blocks if b.rank == rank and b.host_page >= 0]
            assert sorted(on_host) == list(range(store.host_pages)), f"rank {rank}: a host page is lost or owned twice"
            evictable = [b for b in blocks if b.rank == rank and b.page >= 0 and not b.pins]
            assert store.num_evictable(rank) == len(evictable)
            leaves = [b for b in evictable if not b.device_children]
            first = store._device_queues[rank].peek()
            assert first is (min(leaves, key=lambda block: block.order) if leaves else None)
            goers = [b for b in blocks if b.rank == rank and b.host_page >= 0 and not b.pins and not b.children]
            first = store._host_queues[rank].peek()
            assert first is (min(goers, key=lambda block: block.order) if goers else None)


def view(cache: CacheControl) -> list[object]:
    """Everything that decisions depend on, in a form that compares."""
    store = cache.blocks
    rows: list[object] = [
        (b.key, b.depth, b.rank, b.page, b.host_page, b.pins, b.priority, b.expires, b.last_used, b.serial)
        for b in store.tree.walk()
    ]
    for rank in range(cache.placement.kvp):
        rows += [store.device.free_pages(rank), store.host.free_pages(rank), store.num_evictable(rank)]
    return [*rows, store.now, cache.counters]


def path_of(block: Block) -> tuple[bytes, list[int]]:
    """The salt, and all tokens up to a block's end."""
    tokens: list[int] = []
    while block.parent is not None:
        tokens = [int.from_bytes(block.key[at : at + 4], "little") for at in range(0, len(block.key), 4)] + tokens
        block = block.parent
    return block.key, tokens


def world(kvp: int = 1, block_size: int = 4, num_pages: int = 32, **settings: object) -> World:
    return World(kvp, block_size, num_pages, settings)


def counted(each: World) -> tuple[int, int, int]:
    counters = each.cache.counters
    return counters.blocks_reused, counters.blocks_copied, counters.blocks_onboarded
