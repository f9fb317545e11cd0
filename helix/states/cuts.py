"""Where states are kept of a step's runs while it is computed: a run of a prompt goes on, its states stay behind."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import torch

CUTS = ("cuts.first", "cuts.rows", "cuts.slots")
"""The names of the arrays of ``Cuts``."""


@dataclass(frozen=True)
class Cuts:
    """The cuts of C runs, n in all, on a device; the last cut of each run is its end.

    Attributes:
        first: [C + 1] int32, the first cut of each run, then n.
        rows: [n] int32, the row of the step before which a cut is, whole chunks of rows behind the run's first.
        slots: [n] int32, the checkpoint that keeps what is behind the rows before it; -1 is the sequence's own.
        kept: what checkpoints keep, as ``StateCache.tensors`` does but [slots, layers, ...]; None where there are none.
    """

    first: torch.Tensor
    rows: torch.Tensor
    slots: torch.Tensor
    kept: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None

    @classmethod
    def at_ends(cls, query_start: torch.Tensor) -> Cuts:
        """Return those of runs that keep nothing; ``query_start`` is [C + 1], the first row of each, then all."""
        runs = query_start.shape[0]
        numbers = torch.arange(runs, dtype=torch.int32, device=query_start.device)
        return cls(numbers, query_start[1:].int(), torch.full_like(numbers[1:], -1))

    def of(self, run: int) -> list[tuple[int, int]]:
        """Return the row and the checkpoint of each cut of a run, on the host."""
        first, stop = self.first[run : run + 2].tolist()
        return list(zip(self.rows[first:stop].tolist(), self.slots[first:stop].tolist(), strict=True))


def arrays_of_cuts(
    query_start: npt.NDArray[np.int64], keeps: Sequence[Sequence[tuple[int, int]]] | None
) -> dict[str, npt.NDArray[np.int32]]:
    """Return the arrays of ``Cuts`` by their names, ``CUTS``.

    Args:
        query_start: [C + 1], the first row of each run, then all.
        keeps: of each run, behind how many of its rows which checkpoints keep it, in order; None where none do.
    """
    first, rows, slots = [0], list[int](), list[int]()
    for run, (start, stop) in enumerate(pairwise(query_start.tolist())):
        kept = keeps[run] if keeps is not None else ()
        rows += [start + count for count, _ in kept] + [stop]
        slots += [slot for _, slot in kept] + [-1]
        first.append(len(rows))
    return {name: np.array(each, np.int32) for name, each in zip(CUTS, (first, rows, slots), strict=True)}
