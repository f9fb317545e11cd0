"""The control plane: which pages of which KVP rank belong to which sequence, and what a new one finds cached.

Every rank runs it on the same inputs and so takes the same decisions; no message is sent. It holds no tensor, reads no
clock, and chooses by nothing that differs between ranks.

The life of a sequence:

 1. ``claim``: find its longest cached prefix, whole blocks and then part of one, and pin it. The scheduler claims for
    *all* requests that may start in a step before it admits any, so that no admission evicts what another was promised.
 2. ``admit``: evict, allocate, onboard and copy; or change nothing and return None. ``drop`` undoes a claim.
 3. ``extend`` as it grows; ``commit`` after every step: full blocks enter the tree as soon as they are computed.
 4. ``release`` at its end, or when it is preempted: the blocks stay in the tree until their pages are needed.

Page movements collect in a list that ``take_movements`` hands out once a step. Reuse is by blocks, whatever kvp is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from parallel.placement import BlockCyclic

from .beginnings import Beginnings
from .checkpoints import Checkpoints
from .claim import Claim
from .counters import CacheCounters
from .events import Listener
from .keys import BlockKeys
from .movements import CopyTokens, Movement, Onboard
from .pool import BlockTable
from .retention import Retention
from .store import BlockStore
from .tree import Block, match


class CacheControl:
    """The cache of all KVP ranks.

    Args:
        placement: the rule of ownership.
        num_pages: device pages of each rank.
        host_pages: host pages of each rank.
        reuse: keep blocks for later requests.
        partial_reuse: also use the leading tokens of a block, and keep the unfilled last block of a sequence.
        offload_min_priority: blocks below this priority are dropped, not offloaded.
        checkpoints: behind which blocks a sequence may begin; None where it may behind any.

    Attributes:
        num_returns: how often pages came back from a sequence; what did not fit need not try again before.
    """

    def __init__(
        self,
        placement: BlockCyclic,
        num_pages: int,
        *,
        host_pages: int = 0,
        reuse: bool = True,
        partial_reuse: bool = True,
        offload_min_priority: int = 0,
        checkpoints: Checkpoints | None = None,
    ) -> None:
        self.placement, self.num_pages, self.checkpoints = placement, num_pages, checkpoints
        self._reuse, self._partial_reuse = reuse, reuse and partial_reuse
        self._host_pages, self._offload_min_priority = host_pages, offload_min_priority
        self.blocks = self._new_store(CacheCounters())
        self._detached: set[tuple[int, int]] = set()  # (rank, page): out of use, see ``detach``
        self._beginnings = Beginnings()
        self.num_returns = 0

    def _new_store(self, counters: CacheCounters) -> BlockStore:
        return BlockStore(
            self.placement,
            self.num_pages,
            host_pages=self._host_pages,
            offload_min_priority=self._offload_min_priority,
            counters=counters,
        )

    # --- what is there ------------------------------------------------------------------------------------------------

    @property
    def counters(self) -> CacheCounters:
        """What was done since ``reset_counters``."""
        return self.blocks.counters

    def reset_counters(self) -> CacheCounters:
        """Start a new set of counters and return it."""
        self.blocks.counters = CacheCounters()
        return self.blocks.counters

    def num_available(self, rank: int) -> int:
        """Return how many device pages of a rank a new sequence could have: free ones and evictable ones."""
        return self.blocks.num_available(rank)

    def fits(self, length: int) -> bool:
        """Return whether empty pools can hold a sequence of so many tokens."""
        return -(-self.placement.num_blocks(length) // self.placement.kvp) <= self.num_pages

    def occupancy(self) -> list[dict[str, int]]:
        """Return each KVP rank's pages: free, cached for later, held by sequences; and its host's in use."""
        blocks = self.blocks
        return [
            {
                "free": blocks.device.num_free(rank),
                "cached": blocks.num_evictable(rank),
                "held": self.num_pages - blocks.num_available(rank),
                "host": blocks.host_pages - blocks.host.num_free(rank),
            }
            for rank in range(self.placement.kvp)
        ]

    # --- time, events, movements --------------------------------------------------------------------------------------

    def advance(self, now: float) -> None:
        """Tell the time, in seconds of one clock for all ranks; priorities end that are due. It never goes back."""
        self.blocks.advance(now)

    def listen(self, listener: Listener) -> None:
        """Call a function with every event from now on, after one "stored" for each block that is cached now.

        What it raises later is logged, and it is called no more.
        """
        self.blocks.listen(listener)

    def unlisten(self, listener: Listener) -> None:
        """Stop calling a function that listens."""
        self.blocks.unlisten(listener)

    def take_movements(self) -> list[Movement]:
        """Return the page movements since the last call; they are executed before the next step is computed."""
        movements, self.blocks.movements = self.blocks.movements, []
        return movements

    # --- admission ----------------------------------------------------------------------------------------------------

    def claim(
        self, keys: BlockKeys, retention: Sequence[Retention] = (), most: int = 1 << 62, *, arrives: bool = False
    ) -> Claim:
        """Find and pin the longest cached prefix of a sequence, of ``most`` tokens, its last token excepted.

        ``arrives``: its states or window are brought by others, so that it may begin where no checkpoint has them.
        """
        keys.update()
        root = self.blocks.tree.root(keys.salt)
        limit = min(len(keys.token_ids) - 1, most)
        most_blocks = limit // keys.block_size if self._reuse else 0
        if arrives or self.checkpoints is None:
            chain, num_matched = match(root, keys.full, most_blocks), 0
        else:
            chain, num_matched = self.checkpoints.match(root, keys.full, most_blocks)
        pages = [block.page for block in chain]
        claim = Claim(keys, tuple(retention), root, chain, pages, num_matched=num_matched * keys.block_size)
        self.blocks.pin_chain(root, chain)
        if self._partial_reuse:
            claim.partial, claim.partial_tokens = claim.tail.longest_partial(keys.part(len(chain), limit))
            if claim.partial is not None:
                self.blocks.pin(claim.partial)
        return claim

    def drop(self, claim: Claim) -> None:
        """Undo a claim."""
        self._drop_partial(claim)
        self.blocks.unpin(claim.tail)

    def admit(self, claim: Claim, length: int) -> BlockTable | None:
        """Give a sequence the pages of ``length`` tokens, what it claimed among them; the claim is used up.

        ``num_reused`` of the table is the reuse that the scheduler may count on. Where there are too few pages a claim
        on part of a block is given up, since its source may be what is missing; None when that does not help either,
        with the claim of the whole blocks still standing.
        """
        table = self._try_admit(claim, length)
        if table is None and claim.partial is not None:
            self._drop_partial(claim)
            table = self._try_admit(claim, length)
        return table

    def _drop_partial(self, claim: Claim) -> None:
        if claim.partial is not None:
            self.blocks.unpin(claim.partial)
            claim.partial, claim.partial_tokens = None, 0

    def _try_admit(self, claim: Claim, length: int) -> BlockTable | None:
        first_owner = self._first_owner(claim)
        blocks, partial, found = self.blocks, claim.partial, len(claim.chain)
        on_device = claim.find_on_device()
        takes_over = partial is not None and self._can_take_over(partial, claim.partial_tokens)
        owners = self._owners(first_owner, on_device, self.placement.num_blocks(length))
        if takes_over:
            del owners[found - on_device]
        if not self._available(owners):
            return None
        pages = [blocks.take(rank) for rank in owners]
        for block, page in zip(claim.chain[on_device:], pages, strict=False):
            blocks.onboard(block, page)
        table = BlockTable(
            first_owner,
            claim.pages[:on_device] + pages,
            num_reused=claim.num_tokens,
            num_matched=claim.num_matched,
            num_cached=found,
            tail=claim.tail,
            keys=claim.keys,
            retention=claim.retention,
            keeps=self._reuse,
        )
        if partial is not None and takes_over:
            table.pages.insert(found, blocks.take_over(partial))
        elif partial is not None:
            self._copy_part(partial, claim.partial_tokens, table.pages[found])
        if self._reuse:
            self._beginnings.add(table)
        self._retain(claim)
        blocks.counters.blocks_reused += on_device + takes_over
        blocks.counters.tokens_reused += table.num_reused
        blocks.counters.tokens_missed += length - table.num_reused
        return table

    def _can_take_over(self, partial: Block, num_tokens: int) -> bool:
        """Return whether a sequence may go on in the page of a block: all of it matches, and nobody else needs it.

        Of several claims on one block the last finds it so; the others copy.
        """
        return partial.on_device and partial.pins == 1 and partial.num_tokens == num_tokens

    def _copy_part(self, partial: Block, num_tokens: int, page: int) -> None:
        """Bring the matched tokens of a block into a page of the sequence's own; the block stays."""
        blocks, rank = self.blocks, partial.rank
        if partial.on_device:
            blocks.movements.append(CopyTokens(rank, partial.page, page, num_tokens))
            blocks.counters.blocks_copied += 1
        else:
            blocks.movements.append(Onboard(rank, partial.host_page, page))
            blocks.counters.blocks_onboarded += 1
        blocks.unpin(partial, used=True)

    def _owners(self, first_owner: int, start: int, stop: int) -> list[int]:
        kvp = self.placement.kvp
        return [(block + first_owner) % kvp for block in range(start, stop)]

    def _available(self, owners: list[int]) -> bool:
        return all(count <= self.blocks.num_available(rank) for rank, count in Counter(owners).items())

    def _retain(self, claim: Claim) -> None:
        """Give the blocks that a request reuses the priorities that it asks for."""
        size = self.placement.block_size
        for each in claim.retention:
            stop = len(claim.chain) if each.end is None else -(-each.end // size)
            for block in claim.chain[-(-each.start // size) : stop]:
                self.blocks.retain(block, claim.retention)

    # --- the rank of the first block ----------------------------------------------------------------------------------

    def _first_owner(self, claim: Claim) -> int:
        """Return the rank of block 0: that of the block it shares, else the one with the most room.

        Part of a first block alone does not unbalance the ranks: it decides where no rank has more room than its own,
        the page aside that it is in. Where another rank is chosen the claim on it is given up.
        """
        if claim.chain:
            return claim.chain[0].rank
        partial, room = claim.partial, [self.num_available(rank) for rank in range(self.placement.kvp)]
        chosen = self._beginnings.rank_of(claim.keys)
        if chosen is None and partial is not None and room[partial.rank] + 1 >= max(room):
            chosen = partial.rank
        if chosen is None:  # of equal ranks the one with more free pages, so that less goes; then the lowest
            chosen = max(range(len(room)), key=lambda rank: (room[rank], self.blocks.device.num_free(rank), -rank))
        if partial is not None and partial.rank != chosen:
            self._drop_partial(claim)
        return chosen

    # --- growth -------------------------------------------------------------------------------------------------------

    def extend(self, table: BlockTable, length: int) -> bool:
        """Give a table the pages that ``length`` tokens need; change nothing and return False where they are not."""
        num_blocks = self.placement.num_blocks(length)
        if num_blocks <= len(table.pages):
            return True
        owners = self._owners(table.first_owner, len(table.pages), num_blocks)
        if not self._available(owners):
            return False
        table.pages += [self.blocks.take(rank) for rank in owners]
        return True

    def offload_ahead(self) -> None:
        """Offload what would go next while few pages are free, so that decode finds pages whose copy has ended."""
        self.blocks.offload_ahead()

    def commit(self, table: BlockTable, num_computed: int) -> None:
        """Put the blocks into the tree that the sequence's first ``num_computed`` tokens fill.

        Their tokens are known, and K and V are written, or will be by a step that runs before any later use.
        """
        keys, num_full = table.keys, num_computed // self.placement.block_size
        if not table.keeps or keys is None or num_full <= table.num_cached:
            return
        keys.update()
        self._beginnings.remove(table)
        for number in range(table.num_cached, num_full):
            table.keeps = self._commit_block(table, number, keys.full[number])
            if not table.keeps:
                return

    def _commit_block(self, table: BlockTable, number: int, key: bytes) -> bool:
        blocks, parent, page = self.blocks, table.tail, table.pages[number]
        assert parent is not None
        rank = (number + table.first_owner) % self.placement.kvp
        block = parent.children.get(key)
        if block is not None and block.rank != rank:
            return False  # the same tokens begin on another rank: what follows could not hang under them
        if block is None:
            block = blocks.add(parent, key, rank, page, table.retention)
        elif block.on_device:
            table.own.append(number)
        else:  # it went to the host while this sequence computed it again
            blocks.move_to_device(block, page)
        blocks.pin(block)
        blocks.unpin(parent)
        table.tail, table.num_cached = block, number + 1
        return True

    # --- the end ------------------------------------------------------------------------------------------------------

    def release(self, table: BlockTable, num_computed: int) -> None:
        """Take a sequence out, at its end or to resume it later, and empty its table.

        Its first ``num_computed`` tokens stay cached until their pages are needed; 0 keeps nothing that is new.
        """
        if table.tail is None:
            return
        self.commit(table, num_computed)
        first_own = table.num_cached + self._keep_rest(table, num_computed)
        for number in (*table.own, *range(first_own, len(table.pages))):
            self.blocks.device.give((number + table.first_owner) % self.placement.kvp, table.pages[number])
        self._empty(table)

    def detach(self, table: BlockTable) -> list[tuple[int, int]]:
        """Take a sequence out whose pages another group may still write, and empty its table.

        Its own pages are returned as (rank, page). They stay out of use, whatever happens, until ``reattach``.
        """
        kvp = self.placement.kvp
        numbers = (*table.own, *range(table.num_cached, len(table.pages)))
        pages = [((number + table.first_owner) % kvp, table.pages[number]) for number in numbers]
        self._detached.update(pages)
        self._empty(table)
        return pages

    def reattach(self, pages: list[tuple[int, int]]) -> None:
        """Make pages free that ``detach`` took out of use."""
        self.num_returns += 1
        for rank, page in pages:
            self._detached.remove((rank, page))
            self.blocks.device.give(rank, page)

    def _empty(self, table: BlockTable) -> None:
        assert table.tail is not None
        self.num_returns += 1
        self._beginnings.remove(table)
        self.blocks.unpin(table.tail, used=True)
        table.pages.clear()
        table.own.clear()
        table.tail = table.keys = None  # whoever keeps the table does not keep its tokens

    def _keep_rest(self, table: BlockTable, num_computed: int) -> bool:
        """Hang the unfilled last block into the tree, unless its tokens are there already."""
        number, rest = divmod(num_computed, self.placement.block_size)
        if not (rest and self._partial_reuse and table.keeps and number == table.num_cached):
            return False
        assert table.tail is not None and table.keys is not None
        rank = (number + table.first_owner) % self.placement.kvp
        key = table.keys.part(number, num_computed)
        twin, common = table.tail.longest_partial(key)
        if twin is not None and common == rest:
            return False
        self.blocks.add(table.tail, key, rank, table.pages[number], table.retention)
        return True

    def clear(self) -> None:
        """Forget everything that is cached and every movement that was not taken; no sequence may run."""
        old = self.blocks
        if any(root.pins for root in old.tree.roots.values()):
            raise RuntimeError("the cache cannot be cleared while sequences hold pages of it")
        self.blocks = self._new_store(old.counters)
        self.blocks.follow(old)
        for rank, page in self._detached:
            self.blocks.device.remove(rank, page)
        if self.checkpoints is not None:
            self.checkpoints.clear()
