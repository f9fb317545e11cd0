"""How many tokens a sequence drafts in a step, from how many sequences decode in it and how long they are.

The more sequences share a step, the less a draft token gains: the rows of the target that it costs are no longer free.
Nor is attention over latents, whose every head multiplies every token: its rows cost what the context is long. Both
numbers are the same on every rank, so the draft length is too.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

NAME = "speculative.draft_len_schedule"
CONTEXT_NAME = "speculative.draft_len_by_context"


class DraftLenSchedule:
    """Maps "up to this batch size" to a draft length: {4: 4, 8: 2} means 4 up to 4 sequences, 2 up to 8, 0 above.

    Args:
        max_draft_len: the draft length where there is no schedule, and the most that a schedule may ask for.
        lengths: batch size -> draft length, in any order; None is max_draft_len at every batch size.
        by_context: likewise tokens of all sequences that decode -> draft length; the lower of both counts.

    Attributes:
        lengths: the schedule by ascending batch size; None without one.
        by_context: the one by ascending context; None without one.

    Raises:
        ValueError: in one line, what is wrong with a length, a batch size or a context.
    """

    def __init__(
        self, max_draft_len: int, lengths: Mapping[int, int] | None = None, by_context: Mapping[int, int] | None = None
    ) -> None:
        if max_draft_len < 0:
            raise ValueError(f"speculative.max_draft_len = {max_draft_len} must be at least 0")
        self.max_draft_len = max_draft_len
        self.lengths = self._checked(NAME, "batch size", lengths)
        self.by_context = self._checked(CONTEXT_NAME, "context", by_context)

    def draft_len(self, num_sequences: int, context: int = 0) -> int:
        """Return the draft length of a step in which so many sequences decode, of so many tokens together."""
        return min(self._look_up(self.lengths, num_sequences), self._look_up(self.by_context, context))

    def reachable(self, batches: Iterable[int]) -> list[tuple[int, int]]:
        """Return every (batch bucket, draft length) that a step can have, for ascending buckets; lengths above 0 only.

        A step runs in the first bucket that holds its sequences, so a bucket meets the lengths of all batch sizes above
        the bucket before it.
        """
        limits = [self.max_draft_len] if self.by_context is None else list(self.by_context.values())
        pairs, last = [], 0
        for bucket in batches:
            wanted = {self._look_up(self.lengths, number) for number in range(last + 1, bucket + 1)}
            lengths = {min(length, limit) for length in wanted for limit in limits}
            pairs += [(bucket, length) for length in sorted(lengths) if length]
            last = bucket
        return pairs

    def _look_up(self, lengths: Mapping[int, int] | None, number: int) -> int:
        if lengths is None:
            return self.max_draft_len
        return next((length for up_to, length in lengths.items() if number <= up_to), 0)

    def _checked(self, name: str, key: str, lengths: Mapping[int, int] | None) -> dict[int, int] | None:
        if lengths is None:
            return None
        if not isinstance(lengths, Mapping):
            raise ValueError(f"{name} = {lengths!r} must map {key}s to draft lengths, such as {{4: 4, 8: 2}}")
        if not lengths:
            raise ValueError(f"{name} is empty; give {key}s and lengths such as {{4: 4, 8: 2}}, or leave it out")
        for up_to, length in lengths.items():
            if type(up_to) is not int or type(length) is not int:
                raise ValueError(f"{name} has {up_to!r}: {length!r}; {key}s and draft lengths must be integers")
            if up_to < 1:
                raise ValueError(f"{name} has {key} {up_to}, must be at least 1")
            if length < 0:
                raise ValueError(f"{name}[{up_to}] = {length} must be at least 0 (0 drafts nothing)")
            if length > self.max_draft_len:
                raise ValueError(
                    f"{name}[{up_to}] = {length} exceeds speculative.max_draft_len = {self.max_draft_len}; "
                    "lower it or raise that"
                )
        return dict(sorted(lengths.items()))
