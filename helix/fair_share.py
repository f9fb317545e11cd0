"""How the prompt tokens of a step are divided: most to the prompt whose turn it is, a share to those with less left.

So a short prompt need not wait for a long one before it, and a long one is slowed down by the share at most. Only
counts decide, which are equal on all ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

Order = tuple[int, int]
"""Whose turn comes first, the lowest: the step of arrival, less the steps that its class is worth; then who came."""


class Due(NamedTuple):
    """A prompt that is being computed, or could be.

    Attributes:
        order: its own, or that of an earlier one that waits for its blocks.
        missing: tokens that are not computed, of itself or of a shorter one that waits for its blocks.
        todo: tokens of its own that are not computed.
    """

    order: Order
    missing: int
    todo: int


def divide(prompts: Sequence[Due], chunk: int, share: int) -> list[int]:
    """Return how many of a chunk's tokens each prompt gets.

    Those that miss less than the first in order get at most ``share`` tokens, the shortest first; the first in order
    gets the others; what it leaves the rest get, the shortest first.
    """
    counts = [0] * len(prompts)
    if not prompts:
        return counts
    first = min(range(len(prompts)), key=lambda at: prompts[at].order)
    rest = sorted(set(range(len(prompts))) - {first}, key=lambda at: (prompts[at].missing, prompts[at].order))
    left = chunk
    for at in rest:
        if prompts[at].missing < prompts[first].missing:
            counts[at] = min(prompts[at].todo, left - (chunk - share))
            left -= counts[at]
    counts[first] = min(prompts[first].todo, left)
    left -= counts[first]
    for at in rest:
        more = min(prompts[at].todo - counts[at], left)
        counts[at] += more
        left -= more
    return counts
