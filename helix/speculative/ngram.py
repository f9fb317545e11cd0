"""Drafts by prompt look-up: what followed when the sequence's last tokens stood in it before.

Every rank looks in the same tokens and so finds the same drafts; no message is sent. A look-up costs microseconds
whatever the length: the tokens that a sequence starts with are indexed once, in NumPy, and those that it makes go into
a dict one by one. The index is a sorted array of 64-bit numbers, hash of the run above, place below: plain numbers are
what NumPy sorts fastest (8 ms a million), and a dict would take ten times the memory.
"""

from __future__ import annotations

from collections.abc import Sequence as Many

import numpy as np
import numpy.typing as npt

from ..request import Sequence

_MULTIPLIER = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1


class _Ngrams:
    """Where each run of n tokens ended last.

    Args:
        token_ids: int64 [S], what the sequence starts with.
        n: the run's length.
    """

    def __init__(self, token_ids: npt.NDArray[np.int64], n: int) -> None:
        self._n = n
        count = max(len(token_ids) - n, 0)  # the run at the very end is what is looked for
        hashes = np.zeros(count, np.uint64)
        for offset in range(n):
            hashes += token_ids[offset : offset + count].astype(np.uint64)
            hashes *= np.uint64(_MULTIPLIER)
        self._places = (1 << len(token_ids).bit_length()) - 1  # the bits of a place
        hashes &= np.uint64(_MASK ^ self._places)
        hashes |= np.arange(n, n + count, dtype=np.uint64)
        hashes.sort()
        self._entries = hashes
        self._new: dict[tuple[int, ...], int] = {}

    def add(self, token_ids: list[int], end: int) -> None:
        """Note the run that ends before a position, the last one so far."""
        if end >= self._n:
            self._new[tuple(token_ids[end - self._n : end])] = end

    def find(self, token_ids: list[int]) -> int | None:
        """Return where the last run that equals the final n tokens ended, or None."""
        suffix = token_ids[-self._n :]
        new = self._new.get(tuple(suffix))
        if new is not None or len(suffix) < self._n:
            return new
        value = 0
        for token in suffix:
            value = (value + token) * _MULTIPLIER & _MASK
        last = value | self._places
        at = int(np.searchsorted(self._entries, np.uint64(last), side="right")) - 1
        while at >= 0 and (entry := int(self._entries[at])) | self._places == last:
            end = entry & self._places
            if token_ids[end - self._n : end] == suffix:
                return end
            at -= 1  # another run of the same hash
        return None


class NgramIndex:
    """Finds what followed when the longest suffix of a growing list of tokens stood in it before.

    Args:
        token_ids: the sequence's own list; it may grow, and what it holds may not change.
        ngram_min, ngram_max: the shortest and the longest suffix that is looked for, in tokens.
    """

    def __init__(self, token_ids: list[int], ngram_min: int, ngram_max: int) -> None:
        self._token_ids = token_ids
        self._indexed = len(token_ids)  # runs that end before it are in; the one that ends there is the suffix itself
        start = np.array(token_ids, np.int64)
        self._ngrams = [_Ngrams(start, n) for n in range(ngram_max, ngram_min - 1, -1)]

    def find(self, limit: int) -> list[int]:
        """Return up to ``limit`` tokens that followed the last occurrence of the longest suffix; none where none is."""
        ids = self._token_ids
        for end in range(self._indexed, len(ids)):
            for ngrams in self._ngrams:
                ngrams.add(ids, end)
        self._indexed = len(ids)
        ends = (ngrams.find(ids) for ngrams in self._ngrams)
        found = next((end for end in ends if end is not None), None)
        if found is None:
            return []
        period = len(ids) - found
        tokens = ids[found : found + limit]
        while len(tokens) < limit:  # what repeats goes on repeating
            tokens.append(tokens[-period])
        return tokens


class NgramDrafter:
    """Drafts for every sequence from its own tokens; see ``Drafter``.

    Args:
        ngram_min, ngram_max: the shortest and the longest suffix that is looked for, in tokens.
    """

    def __init__(self, ngram_min: int, ngram_max: int) -> None:
        self._ngram_min, self._ngram_max = ngram_min, ngram_max
        self._indices: dict[Sequence, NgramIndex] = {}

    def draft(self, seqs: Many[Sequence], limits: Many[int]) -> list[list[int]]:
        """Look up each sequence's last tokens; no collective."""
        return [self._find(seq, limit) if limit else [] for seq, limit in zip(seqs, limits, strict=True)]

    def drop(self, seq: Sequence) -> None:
        """Forget a sequence's index."""
        self._indices.pop(seq, None)

    def _find(self, seq: Sequence, limit: int) -> list[int]:
        index = self._indices.get(seq)
        if index is None:
            index = self._indices[seq] = NgramIndex(seq.token_ids, self._ngram_min, self._ngram_max)
        return index.find(limit)
