"""Sequences that wait for blocks that a running prompt computes, to claim them when they are there.

So what several prompts have in common is computed once, though they arrive together: questions on one document, or the
samples of one prompt.
"""

from __future__ import annotations

from collections.abc import Iterable

from .cache.checkpoints import Checkpoints
from .cache.claim import Claim
from .cache.keys import BlockKeys
from .cache.tree import Block
from .fair_share import Due
from .request import Sequence, order_of

Name = tuple[Block, bytes]
"""A block that is not there yet: its parent in the prefix tree, and its key."""


class Followers:
    """Those that wait for another's blocks, by ``Sequence.waits_for``.

    Args:
        checkpoints: behind which blocks a sequence may begin; None where it may behind any.
    """

    def __init__(self, checkpoints: Checkpoints | None) -> None:
        self._seqs: list[Sequence] = []
        self._checkpoints = checkpoints

    def add(self, seq: Sequence, claim: Claim, leaders: dict[Name, Sequence]) -> bool:
        """Let a sequence wait for the prompt that computes the next block that its claim lacks; False where none does.

        It waits for all that the two share, which is computed under the claim's blocks, one after the other; with
        checkpoints, for the last one in it that the other leaves.
        """
        found = len(claim.chain)
        leader = leaders.get((claim.tail, _key(claim.keys, found)))
        if leader is None or leader.keys is None:
            return False
        num_shared = _num_shared(claim.keys, leader.keys, found, (len(seq.token_ids) - 1) // claim.keys.block_size)
        num_tokens = num_shared * claim.keys.block_size
        if self._checkpoints is not None:
            num_tokens = self._checkpoints.last_below(num_tokens, len(leader.token_ids), leader.blocks.num_matched)
        if num_tokens <= claim.num_tokens:
            return False
        seq.waits_for = (leader, num_tokens)
        self._seqs.append(seq)
        return True

    def remove(self, seq: Sequence) -> None:
        """Forget a sequence, if it is one of them."""
        if seq.waits_for is not None:
            self._seqs.remove(seq)
            seq.waits_for = None

    def wake(self) -> bool:
        """Let those go whose blocks are there, or will not be; return whether there were any."""
        awake = []
        for seq in self._seqs:
            assert seq.waits_for is not None
            leader, num_tokens = seq.waits_for
            if leader.batch_slot < 0 or leader.num_computed >= num_tokens or not leader.blocks.keeps:
                awake.append(seq)
        for seq in awake:
            self.remove(seq)
        return bool(awake)

    def hurry(self, dues: dict[Sequence, Due]) -> None:
        """Make prompts as urgent and as short as those that wait for them."""
        for seq in self._seqs:
            assert seq.waits_for is not None
            leader = seq.waits_for[0]
            if leader in dues:
                order, missing, todo = dues[leader]
                shorter = min(missing, len(seq.token_ids) - leader.num_computed)
                dues[leader] = Due(min(order, order_of(seq)), shorter, todo)


def leaders_of(running: Iterable[Sequence]) -> dict[Name, Sequence]:
    """Return who computes which block next, of those that enter the prefix tree."""
    leaders: dict[Name, Sequence] = {}
    for seq in running:
        table = seq.blocks
        if table.keeps and table.tail is not None and table.keys is not None:
            key = _key(table.keys, table.num_cached)
            if key:
                leaders.setdefault((table.tail, key), seq)
    return leaders


def next_block(claim: Claim) -> Name:
    """Return the block that who claimed computes first, if it begins."""
    return (claim.tail, _key(claim.keys, len(claim.chain)))


def lacks_the_same(seq: Sequence, leader: Sequence) -> bool:
    """Return whether one that looked before a prompt began lacks the block that the prompt computes first."""
    if seq.keys is None or seq.num_missing is None or leader.keys is None:
        return False
    found = leader.blocks.num_cached
    num_found = (len(seq.token_ids) - seq.num_missing) // seq.keys.block_size
    return num_found == found and _num_shared(seq.keys, leader.keys, 0, found + 1) > found


def _key(keys: BlockKeys, number: int) -> bytes:
    """Return the key of a whole block; empty where there is none."""
    return keys.full[number] if number < len(keys.full) else b""


def _num_shared(one: BlockKeys, other: BlockKeys, start: int, stop: int) -> int:
    """Return how many leading whole blocks two sequences share, of at most ``stop``; the first ``start`` are known."""
    stop = min(stop, len(one.full), len(other.full))
    return next((at for at in range(start, stop) if one.full[at] != other.full[at]), max(start, stop))
