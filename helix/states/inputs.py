"""What a state layer's projections give of a step's rows, as its kernels read it."""

from __future__ import annotations

from typing import NamedTuple

import torch

from .heads import StateHeads


class Inputs(NamedTuple):
    """The projected inputs of R rows, each as a sum over its first dim.

    Attributes:
        flat: [S, R, width], packed; see ``StateHeads.width``; without the scores where they come apart.
        apart: [S, R, 2 V], packed, the scores; None where ``flat`` has them.
    """

    flat: torch.Tensor
    apart: torch.Tensor | None = None

    @property
    def scores(self) -> torch.Tensor:
        """The tensor that has the scores."""
        return self.flat if self.apart is None else self.apart

    def joined(self) -> torch.Tensor:
        """Return the sums of all columns: [R, width]."""
        flat = self.flat.sum(0)
        return flat if self.apart is None else torch.cat((flat, self.apart.sum(0).to(flat.dtype)), -1)

    def sizes(self, heads: StateHeads) -> dict[str, int]:
        """Return how kernels find their way."""
        return {
            "SUMMANDS": self.flat.shape[0],
            "WIDTH": self.flat.shape[2],
            "SCORE_SUMMANDS": self.scores.shape[0],
            "SCORES_WIDTH": self.scores.shape[2],
            "SCORES_AT": heads.scores_at if self.apart is None else 0,
        }
