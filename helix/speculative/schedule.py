"""How many tokens a sequence drafts in a step, from how many sequences decode in it.

The more sequences share a step, the less a draft token gains: the rows of the target that it costs are no longer free.
The number of sequences is the same on every rank, so the draft length is too.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

NAME = "speculative.draft_len_schedule"


class DraftLenSchedule:
    """Maps "up to this batch size" to a draft length: {4: 4, 8: 2} means 4 up to 4 sequences, 2 up to 8, 0 above.

    Args:
        max_draft_len: the draft length where there is no schedule, and the most that a schedule may ask for.
        lengths: batch size -> draft length, in any order; None is max_draft_len at every batch size.

    Attributes:
        lengths: the schedule by ascending batch size; None without one.

    Raises:
        ValueError: in one line, what is wrong with a length or a batch size.
    """

    def __init__(self, max_draft_len: int, lengths: Mapping[int, int] | None = None) -> None:
        if max_draft_len < 0:
            raise ValueError(f"speculative.max_draft_len = {max_draft_len} must be at least 0")
        if lengths is not None:
            _check(lengths, max_draft_len)
        self.max_draft_len = max_draft_len
        self.lengths = None if lengths is None else dict(sorted(lengths.items()))

    def draft_len(self, num_sequences: int) -> int:
        """Return the draft length of a step in which so many sequences decode."""
        if self.lengths is None:
            return self.max_draft_len
        return next((length for up_to, length in self.lengths.items() if num_sequences <= up_to), 0)

    def reachable(self, batches: Iterable[int]) -> list[tuple[int, int]]:
        """Return every (batch bucket, draft length) that a step can have, for ascending buckets; lengths above 0 only.

        A step runs in the first bucket that holds its sequences, so a bucket meets the lengths of all batch sizes above
        the bucket before it.
        """
        pairs, last = [], 0
        for bucket in batches:
            lengths = {self.draft_len(number) for number in range(last + 1, bucket + 1)}
            pairs += [(bucket, length) for length in sorted(lengths) if length]
            last = bucket
        return pairs


def _check(lengths: Mapping[int, int], max_draft_len: int) -> None:
    if not isinstance(lengths, Mapping):
        raise ValueError(f"{NAME} = {lengths!r} must map batch sizes to draft lengths, such as {{4: 4, 8: 2}}")
    if not lengths:
        raise ValueError(f"{NAME} is empty; give batch sizes and lengths such as {{4: 4, 8: 2}}, or leave it out")
    for up_to, length in lengths.items():
        if type(up_to) is not int or type(length) is not int:
            raise ValueError(f"{NAME} has {up_to!r}: {length!r}; batch sizes and draft lengths must be integers")
        if up_to < 1:
            raise ValueError(f"{NAME} has batch size {up_to}, must be at least 1")
        if length < 0:
            raise ValueError(f"{NAME}[{up_to}] = {length} must be at least 0 (0 drafts nothing)")
        if length > max_draft_len:
            raise ValueError(
                f"{NAME}[{up_to}] = {length} exceeds speculative.max_draft_len = {max_draft_len}; "
                "lower it or raise that"
            )
