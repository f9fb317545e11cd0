"""The prefix tree: which blocks are cached, under which tokens, and where their pages are.

A block hangs under the block before it, by the bytes of its own tokens, so an exact match of tokens needs no hash of
ours. Whole blocks may have children; the end of a sequence hangs there as a leaf of fewer tokens. The first block's
parent is the root of its salt.

``pins`` says who needs a block to stay where it is: sequences and claims that end at it, plus children that are pinned.
A pinned block's ancestors are therefore pinned, and pinning costs only the blocks that were not pinned before.
A block with a device page has ancestors with device pages: devices and hosts are emptied from the leaves.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator

from .events import block_hash, root_hash
from .keys import TOKEN_BYTES
from .retention import DEFAULT_PRIORITY

NOWHERE = -1
Order = tuple[int, int, int]
Entry = tuple[Order, int, "Block"]


class Block:
    """A node of the tree.

    Attributes:
        key: its tokens as little-endian int32.
        depth: its number in the sequence, from 0; -1 for a root.
        rank: the KVP rank that holds it.
        page, host_page: where it is; NOWHERE where it is not. One of the two, except at a root.
        pins: see the module; eviction leaves a pinned block alone.
        device_children: children with a device page.
        priority, expires: for eviction; at time ``expires`` (seconds) the priority becomes the default.
        last_used: the tick of its last use; a use of a child counts when the child goes.
        entry: what stands for it in an eviction queue.
    """

    __slots__ = (
        "children", "depth", "device_children", "entry", "expires", "first_child", "hash", "host_page", "key",
        "last_used", "page", "parent", "pins", "priority", "rank", "serial", "sorted_keys",
    )  # fmt: skip

    def __init__(self, key: bytes, parent: Block | None, rank: int, page: int, serial: int) -> None:
        self.key, self.parent, self.rank, self.page, self.serial = key, parent, rank, page, serial
        self.depth: int = -1 if parent is None else parent.depth + 1
        self.host_page = NOWHERE
        self.children: dict[bytes, Block] = {}
        self.first_child: Block | None = None  # the oldest, for ``match``
        self.sorted_keys: list[bytes] | None = None
        self.pins = self.device_children = self.last_used = 0
        self.priority = DEFAULT_PRIORITY
        self.expires: float | None = None
        self.entry: Entry | None = None
        self.hash: bytes | None = None

    @property
    def num_tokens(self) -> int:
        """Tokens that it holds."""
        return len(self.key) // TOKEN_BYTES

    @property
    def order(self) -> Order:
        """What is evicted first: lowest priority, least recently used, oldest."""
        return (self.priority, self.last_used, self.serial)

    @property
    def on_device(self) -> bool:
        """True where it has a device page."""
        return self.page != NOWHERE

    def longest_partial(self, wanted: bytes) -> tuple[Block | None, int]:
        """Return the child that shares the most leading tokens with ``wanted``, and how many; (None, 0) without any.

        In sorted order it is a neighbour of ``wanted``, so this costs a bisection, not a scan. The order is kept from
        the first look-up on.
        """
        if not self.children or not wanted:
            return None, 0
        if self.sorted_keys is None:
            self.sorted_keys = sorted(self.children)
        at = bisect_left(self.sorted_keys, wanted)
        best, length = None, 0
        for key in self.sorted_keys[max(at - 1, 0) : at + 1]:
            common = common_tokens(key, wanted)
            if common and common >= length:
                best, length = self.children[key], common
        return best, length

    def add(self, child: Block) -> None:
        """Hang a block under this one."""
        self.children[child.key] = child
        self.first_child = self.first_child or child
        if self.sorted_keys is not None:
            insort(self.sorted_keys, child.key)
        if child.on_device:
            self.device_children += 1

    def remove(self, child: Block) -> None:
        """Take a child off; its use counts as one of this block."""
        del self.children[child.key]
        if self.first_child is child:
            self.first_child = next(iter(self.children.values()), None)
        if self.sorted_keys is not None:
            del self.sorted_keys[bisect_left(self.sorted_keys, child.key)]
        if child.on_device:
            self.device_children -= 1
        self.last_used = max(self.last_used, child.last_used)

    def walk(self) -> Iterator[Block]:
        """Yield the blocks below this one, parents first."""
        todo = [*self.children.values()]
        for block in todo:
            yield block
            todo += block.children.values()


class PrefixTree:
    """The roots, by salt; a root's key is its salt as UTF-8."""

    def __init__(self) -> None:
        self.roots: dict[bytes, Block] = {}

    def root(self, salt: str) -> Block:
        """Return a salt's root."""
        key = salt.encode("utf-8", "surrogatepass")
        if key not in self.roots:
            root = self.roots[key] = Block(key, None, NOWHERE, NOWHERE, 0)
            root.hash = root_hash(key)
        return self.roots[key]

    def prune(self, block: Block) -> None:
        """Forget a root that nothing hangs under and nobody needs; other blocks stay."""
        if block.parent is None and not block.pins and not block.children:
            self.roots.pop(block.key, None)

    def walk(self) -> Iterator[Block]:
        """Yield every block, parents first."""
        for root in self.roots.values():
            yield from root.walk()


def match(root: Block, keys: list[bytes], limit: int) -> list[Block]:
    """Return the blocks that hold the longest run of at most ``limit`` leading keys.

    Most blocks have one child: comparing its key costs less than hashing ours.
    """
    chain: list[Block] = []
    append, block = chain.append, root
    for key in keys if limit >= len(keys) else keys[:limit]:
        child = block.first_child
        if child is None or child.key != key:
            child = block.children.get(key)
            if child is None:
                break
        append(child)
        block = child
    return chain


def hash_of(block: Block) -> bytes:
    """Return a block's name, computed once, from its root down."""
    missing = []
    each: Block | None = block
    while each is not None and each.hash is None:
        missing.append(each)
        each = each.parent
    for each in reversed(missing):
        assert each.parent is not None and each.parent.hash is not None
        each.hash = block_hash(each.parent.hash, each.key)
    assert block.hash is not None
    return block.hash


def common_tokens(one: bytes, other: bytes) -> int:
    """Return how many leading tokens two keys share."""
    low, high = 0, min(len(one), len(other)) // TOKEN_BYTES
    while low < high:
        middle = (low + high + 1) // 2
        if one[: middle * TOKEN_BYTES] == other[: middle * TOKEN_BYTES]:
            low = middle
        else:
            high = middle - 1
    return low
