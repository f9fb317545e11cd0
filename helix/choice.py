"""Choose the next token of every row: the most likely one, or a draw by temperature, top-k, top-p and min-p.

How a row chooses is data, so rows of all kinds share a step. A choice is a function of the row's logits, its settings,
its seed and its position, and of nothing else: not of the rows beside it, of how ranks share the vocabulary, of a
generator's history or of the order of a sum. Hence
  - a draw is the argmax of logit / T + Gumbel noise, which is a hash of (seed, position, token id);
  - what filters keep is decided by sums of integers (``mass.py``), which give the same bits in every order;
  - ties go to the lowest token id.

With noise of float32 a draw's odds are exact to about 2**-22 times the largest logit over the temperature.

Shape letters: R rows, V vocabulary size.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from . import choose_kernels
from .choose_kernels import FILTERED, NO_TOP_K, NOISE
from .filters import kept
from .mass import ORDERS_PER_NAT
from .noise import TOKEN_STREAM, gumbel, row_keys
from .sampling import SEED_LIMIT, SamplingParams
from .upload import upload


class Rules:
    """What settings say of how rows choose, on the host: alike in every step of the same rows.

    Attributes:
        params: of each row.
        draws, filters, bounds: whether any row draws, has a filter, and top-k or min-p.
    """

    def __init__(self, params: Sequence[SamplingParams]) -> None:
        self.params = list(params)
        draws = np.array([not each.is_greedy for each in params], bool)
        inverse = np.array([1 / each.temperature if each.temperature else 1.0 for each in params])
        min_p = np.array([-math.log2(each.min_p) if each.min_p else math.inf for each in params])
        top_k = np.array([min(each.top_k, NO_TOP_K) or NO_TOP_K for each in params], np.int64)
        bounds = draws & ((min_p < math.inf) | (top_k < NO_TOP_K))
        self.doubles = np.array([each.top_p if each.top_p < 1 else math.inf for each in params])
        filters = bounds | draws & (self.doubles < math.inf)
        self.floats = np.stack((inverse, inverse * ORDERS_PER_NAT, min_p)).astype(np.float32)
        self.integers = np.zeros((4, len(self.params)), np.int64)
        self.integers[:2] = NOISE * draws + FILTERED * filters, top_k
        self.draws, self.filters, self.bounds = bool(draws.any()), bool(filters.any()), bool(bounds.any())

    @classmethod
    def of_any(cls, *, filters: bool) -> Rules:
        """Return what holds of rows whose settings are data: any may draw, and where ``filters`` have them too."""
        rules = cls([])
        rules.draws, rules.filters, rules.bounds = True, filters, filters
        return rules

    def are_of(self, params: Sequence[SamplingParams]) -> bool:
        """Return whether they are those of the very same settings."""
        return len(params) == len(self.params) and all(map(operator.is_, params, self.params))

    def arrays(self, seeds: Sequence[int], positions: Sequence[int]) -> dict[str, npt.NDArray[np.generic]]:
        """Return ``RowSettings``' tensors as arrays on the host, right until the next call; see ``RowSettings.of``."""
        if not len(self.params) == len(seeds) == len(positions):
            raise ValueError(
                f"params, seeds, positions = {len(self.params)}, {len(seeds)}, {len(positions)} entries must be "
                "equally many"
            )
        wrong = next((row for row, seed in enumerate(seeds) if not 0 <= seed < SEED_LIMIT), None)
        if wrong is not None:
            raise ValueError(f"seeds[{wrong}] = {seeds[wrong]} must lie in [0, 2**63)")
        self.integers[2:] = seeds, positions
        return {"floats": self.floats, "doubles": self.doubles, "integers": self.integers}


@dataclass(frozen=True, eq=False)
class RowSettings:
    """How R rows choose.

    Attributes:
        rules: what holds for all of them; equal on all ranks.
        floats: [3, R] float32: 1 / T (1 for a greedy row), that over ln 2, and how many binary orders of probability
            below the most likely token min-p keeps (inf: all).
        doubles: [R] float64: top-p; inf is off.
        integers: [4, R] int64: flags, top-k (NO_TOP_K: off), seeds, and the positions of the tokens that are chosen.
    """

    rules: Rules
    floats: Tensor
    doubles: Tensor
    integers: Tensor

    @classmethod
    def of(cls, rules: Rules, seeds: Sequence[int], positions: Sequence[int], device: torch.device) -> RowSettings:
        """Return how row i chooses the token at positions[i] of a request with seeds[i].

        Raises:
            ValueError: when lengths differ, or a seed is outside [0, 2**63).
        """
        sent = upload(rules.arrays(seeds, positions), device)
        return cls(rules, sent["floats"], sent["doubles"], sent["integers"])


def scores(logits: Tensor, settings: RowSettings, first: int = 0) -> Tensor:
    """Return float32 [R, V'], of which the largest is chosen where no filter rules it out.

    ``logits`` are on a CPU, and those of the token ids from ``first`` on.
    """
    logits = logits.float()
    if not settings.rules.draws:
        return logits
    seeds, positions = settings.integers[2:].numpy()
    noise = gumbel(torch.from_numpy(row_keys(seeds, positions, TOKEN_STREAM)), logits.shape[1], first)
    draws = (settings.integers[0] & NOISE)[:, None] > 0
    return torch.where(draws, logits * settings.floats[0][:, None] + noise, logits)


def choose(logits: Tensor, settings: RowSettings) -> Tensor:
    """Return the token ids [R] int64 of rows of the whole vocabulary, of logits [R, V], which stay as they are."""
    if len(logits) != settings.integers.shape[1] or logits.dim() != 2:
        raise ValueError(f"logits = {list(logits.shape)} must be [{settings.integers.shape[1]}, vocabulary]")
    if logits.is_cuda:
        return choose_kernels.choose(
            logits, settings.floats, settings.doubles, settings.integers, bounds=settings.rules.bounds
        )
    found = scores(logits, settings)
    rows = (settings.integers[0] & FILTERED).nonzero()[:, 0]
    if settings.rules.filters:
        few = kept(logits[rows].float(), settings.floats[:, rows], settings.doubles[rows], settings.integers[:, rows])
        found = found.clone()
        found[rows] = found[rows].masked_fill(~few, -math.inf)
    return found.argmax(-1)
