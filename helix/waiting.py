"""Who waits for a batch slot and pages, and who of them may begin in a step."""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable, Iterable

from .cache.claim import Claim
from .cache.control import CacheControl
from .cache.keys import BlockKeys
from .cache.pool import BlockTable
from .fair_share import Due
from .followers import Followers, lacks_the_same, leaders_of, next_block
from .request import Sequence, order_of

LOOKS = 2
"""Prompts whose length alone would not let them begin, of which a step finds out how much is cached."""
NOBODY = 1 << 62


class WaitingLine:
    """Sequences that wait, in order. What it looks at again and again costs nothing while nothing can have changed.

    Args:
        cache: the cache's control plane.
        divided: how many tokens of a step's chunk prompts get, see ``fair_share.divide``.
        recomputed: so many of the last tokens of a reused prefix are computed again, for their hidden states.

    Attributes:
        seqs: the sequences; to be read alone.
    """

    def __init__(self, cache: CacheControl, divided: Callable[[list[Due]], list[int]], *, recomputed: int) -> None:
        self._cache, self._divided, self._recomputed = cache, divided, recomputed
        self.seqs: list[Sequence] = []
        self._followers = Followers(cache.checkpoints)
        self._least = NOBODY  # no other one misses less
        self._blocked: tuple[Sequence, int] | None = None  # who did not fit, and when that was

    @property
    def has_blocked(self) -> bool:
        """True where somebody did not fit when it was tried last."""
        return self._blocked is not None

    def add(self, seq: Sequence) -> None:
        """Let a sequence wait that has its place in order."""
        insort(self.seqs, seq, key=order_of)
        seq.num_missing, seq.waits_for = None, None
        if self._blocked is None or order_of(seq) < order_of(self._blocked[0]):
            self._least = 0

    def remove(self, seq: Sequence) -> None:
        """Take a sequence out; if it did not fit, those behind it may."""
        self.seqs.remove(seq)
        self._followers.remove(seq)
        if self._blocked is not None and self._blocked[0] is seq:
            self._blocked, self._least = None, 0

    def hurry(self, dues: dict[Sequence, Due]) -> None:
        """Make prompts that run as urgent and as short as those that wait for their blocks."""
        self._followers.hurry(dues)

    def may_begin(self, dues: list[Due], num_slots: int) -> bool:
        """Return whether anybody may begin, in so many batch slots, beside the prompts that are due.

        Nobody is looked at: whoever waits is no earlier in order, and misses no less, than what is tried.
        """
        if self._blocked is not None and not self.is_blocked(self._blocked[0]):
            self._blocked, self._least = None, 0
        if self._followers.wake():
            self._least = 0
        if not (self.seqs and num_slots) or self._least == NOBODY:
            return False
        return self._gets_some(dues, self.seqs[0], max(self._least, 1))

    def choose(self, dues: list[Due], running: Iterable[Sequence], num_slots: int) -> list[tuple[Sequence, Claim]]:
        """Return who gets a part of the chunk if it begins, in order, with its claim, as far as so many batch slots go.

        ``dues`` are the prompts that run, of which ``running`` are; who is chosen is added to them.

        Claims stand before anybody is admitted: else the first could evict what the second was counted to reuse.
        """
        claims: list[tuple[Sequence, Claim]] = []
        leaders = leaders_of(running)
        looks, self._least = LOOKS, NOBODY
        refused = NOBODY  # who is later and misses as much gets nothing either
        for seq in self.seqs:
            if self._blocked is not None and self._blocked[0] is seq:
                break
            if len(claims) == num_slots:
                self._least = 0
                break
            if seq.waits_for is not None:
                continue
            likely = seq.num_missing or len(seq.token_ids)
            if likely >= refused or not self._gets_some(dues, seq, likely):
                refused = min(refused, likely)
                if seq.num_missing or not looks or not self._gets_some(dues, seq, 1):
                    self._least = min(self._least, seq.num_missing or 1)
                    continue
                looks -= 1
            claim = self.claim(seq)
            missing = len(seq.token_ids) - self.skipped(claim.num_tokens)
            seq.num_missing = missing
            if not seq.scores_prompt and self._followers.add(seq, claim, leaders):
                self._cache.drop(claim)
            elif not self._gets_some(dues, seq, missing):
                self._cache.drop(claim)
                self._least = min(self._least, missing)
            else:
                claims.append((seq, claim))
                dues.append(Due(order_of(seq), missing, missing))
                leaders.setdefault(next_block(claim), seq)
        return claims

    def admit(self, claims: list[tuple[Sequence, Claim]]) -> list[tuple[Sequence, BlockTable]]:
        """Admit those that claimed, in order, with their pages.

        Where one does not fit, those behind it give up their claims and it tries again; if it still does not fit it
        waits, and they wait behind it; it costs nothing then before something may let it fit.
        """
        admitted: list[tuple[Sequence, BlockTable]] = []
        for at, (seq, claim) in enumerate(claims):
            table = self._cache.admit(claim, len(seq.token_ids))
            if table is None:
                for _, other in claims[at + 1 :]:
                    self._cache.drop(other)
                del claims[at + 1 :]
                table = self._cache.admit(claim, len(seq.token_ids))
                if table is None:
                    self._cache.drop(claim)
                    self._blocked = (seq, self._cache.num_returns)
                    break
                self._least = 0  # those behind may fit all the same
            admitted.append((seq, table))
        return admitted

    def is_blocked(self, seq: Sequence) -> bool:
        """Return whether a sequence did not fit, and no page came back since."""
        return self._blocked == (seq, self._cache.num_returns)

    def let_look_again(self, leader: Sequence) -> None:
        """A prompt has begun: let those find out that they may wait for it who looked before."""
        for seq in self.seqs:
            if lacks_the_same(seq, leader):
                seq.num_missing, self._least = None, 0

    def claim(self, seq: Sequence, *, arrives: bool = False) -> Claim:
        """Claim what is cached of a sequence; see ``CacheControl.claim``."""
        if seq.keys is None:
            seq.keys = BlockKeys(seq.token_ids, self._cache.placement.block_size, seq.cache_salt)
        return self._cache.claim(seq.keys, seq.retention, seq.most_reused, arrives=arrives)

    def skipped(self, num_reused: int) -> int:
        """Return how many tokens of a reused prefix are not computed."""
        return max(num_reused - self._recomputed, 0)

    def _gets_some(self, dues: list[Due], seq: Sequence, missing: int) -> bool:
        """Return whether a waiting sequence gets tokens of the chunk beside the prompts that are due."""
        return self._divided([*dues, Due(order_of(seq), missing, missing)])[-1] > 0
