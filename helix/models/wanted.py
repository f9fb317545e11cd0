"""Which rows of a step somebody reads: those that choose tokens, of a prompt's chunk one or none.

The others are computed for the keys and values that later steps read, and in the last layer nothing else of them is:
neither their attention nor what stands behind it. Of 40 layers that is a fortieth of a prompt's time, nearly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from attention.ranges import Filling
from attention.rows import Rows


@dataclass(frozen=True, eq=False)
class Wanted:
    """The L rows of a step whose final hidden states are read.

    Attributes:
        index: [L] int64, which of the step's R rows they are, ascending; one at least, equal on all ranks.
        rows: the same, as attention reads rows.
        fillings: see ``Decoder.forward``; of these rows, and there are some where the step has some.
    """

    index: torch.Tensor
    rows: Rows
    fillings: Sequence[Filling]

    def of(self, x: torch.Tensor) -> torch.Tensor:
        """Return these rows of x [R, ...]; x where it has them alone."""
        return x if len(x) == len(self.index) else x[self.index]
