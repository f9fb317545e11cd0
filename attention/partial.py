"""Partial attention over the local shard: what goes in and what comes out, whatever computes it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from .pages import Pages
from .rows import Rows
from .work import Cutting


@dataclass(frozen=True)
class Partials:
    """What one rank's attention makes of R rows: partial results over disjoint ranges of the local shard.

    Attributes:
        out: [L, Q, W], each partial normalised over its own range; values under lse = -inf may be anything.
        lse: [L, Q] float32, natural log; -inf where a range holds nothing that the row sees.
        part_start: [R + 1] int32, data: the partials of row r are part_start[r] to part_start[r + 1], which may be
            none; ``out`` is float32 then. None: row r has one partial, r, in the dtype of the queries.
        most: a bound of the partials of a row.
    """

    out: torch.Tensor
    lse: torch.Tensor
    part_start: torch.Tensor | None = None
    most: int = 1

    @property
    def num_rows(self) -> int:
        """R."""
        return self.out.shape[0] if self.part_start is None else self.part_start.shape[0] - 1


@dataclass(frozen=True)
class Workspace:
    """Keys and values that were made of what the cache holds, for a while: pages that stand one after the other.

    The tokens of one run stand one after the other as well, from the first page of its row of the page table on.

    Attributes:
        k: [S, K, D], the part of the keys that each head has for itself; heads are packed, tokens may be strided.
        v: [S, K, W], values, alike.
        turned: [S, T], the last elements of the keys of all heads, which RoPE turned; packed, or strided by tokens.
        block_size: tokens of a page, which divides S.
    """

    k: torch.Tensor
    v: torch.Tensor
    turned: torch.Tensor
    block_size: int


class PartialAttention(Protocol):
    """Attends R rows to the local shard of a paged cache. No communication."""

    def cutting(
        self,
        pages: Pages | Workspace,
        num_heads: int,
        max_rows: int,
        *,
        value_dim: int | None = None,
        window: bool = False,
    ) -> Cutting | None:
        """Return how steps whose longest run has so many rows are to be cut; None where no work list is read.

        Args:
            pages: one layer's pages, or a workspace.
            num_heads: Q.
            max_rows: rows of the longest run.
            value_dim: as in a call.
            window: rows have a ``visible_from``.
        """
        ...

    def __call__(
        self,
        q_RQD: torch.Tensor,
        pages: Pages | Workspace,
        rows: Rows,
        scale: float,
        *,
        value_dim: int | None = None,
    ) -> Partials:
        """Return partial results of all rows.

        Ranges are partials like those of ranks, and the exchange merges both at once.

        Args:
            q_RQD: [R, Q, D]; query head i reads KV head i // (Q / K). Heads are packed, rows may be strided.
            pages: [P, 2, K, block_size, D], one layer's pages, K before V; or [P, 1, 1, block_size, D], latents, which
                are K and, their first elements, V of all heads. The last two dims are packed. Or a workspace, of keys
                and values that were made: D is that of k and turned together. Pages in 8 bits mean what
                ``QuantizedPages`` says, and are read as exactly as others.
            rows: the step's rows; their K and V are already appended.
            scale: what the scores are multiplied by, positive, usually D ** -0.5.
            value_dim: W, elements of a latent that are V; None where V has a plane of its own, as wide as K.
        """
        ...
