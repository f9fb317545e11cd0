"""What drafts: the one interface behind which n-gram look-up and draft models stand."""

from __future__ import annotations

from collections.abc import Sequence as Many
from typing import Protocol

from ..request import Sequence


class Drafter(Protocol):
    """Guesses how sequences go on.

    A drafter learns what became of its drafts from the sequences' own ``token_ids``, which hold accepted tokens alone,
    when it is asked again; that may be many steps later, since no step asks for drafts while the draft length is 0.
    """

    def draft(self, seqs: Many[Sequence], limits: Many[int]) -> list[list[int]]:
        """Return for each sequence at most ``limits[i]`` tokens (none, or fewer, are fine) that may come next.

        Collective over the world: every rank calls it with the same sequences and limits, and all return the same.
        """
        ...

    def drop(self, seq: Sequence) -> None:
        """Forget a sequence that ended or was preempted; it may never have been drafted for, and may come back."""
        ...
