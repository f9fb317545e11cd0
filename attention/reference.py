"""Partial attention in plain PyTorch, on any device: the oracle that every other back end is tested against."""

from __future__ import annotations

from itertools import pairwise

import torch

from .pages import Pages, pages_to_wide
from .partial import Partials, Workspace
from .rows import Rows

SCORES_AT_ONCE = 1 << 20


class ReferenceAttention:
    """The reference back end; see ``PartialAttention``. It makes one partial of every row and needs no work list."""

    def cutting(
        self,
        pages: Pages | Workspace,
        num_heads: int,
        max_rows: int,
        *,
        value_dim: int | None = None,
        window: bool = False,
    ) -> None:
        """Return None: nothing is cut."""

    def __call__(
        self,
        q_RQD: torch.Tensor,
        pages: Pages | Workspace,
        rows: Rows,
        scale: float,
        *,
        value_dim: int | None = None,
    ) -> Partials:
        """Attend rows to the local shard."""
        return Partials(*partial_attention(q_RQD, pages, rows, scale, value_dim=value_dim))


def partial_attention(
    q_RQD: torch.Tensor,
    pages: Pages | Workspace,
    rows: Rows,
    scale: float,
    *,
    value_dim: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend rows to the local shard in float32 (float64 stays float64): out [R, Q, W] in q's dtype, and lse [R, Q]."""
    num_rows, num_heads, head_dim = q_RQD.shape
    value_dim = value_dim or (pages.v.shape[-1] if isinstance(pages, Workspace) else head_dim)
    dtype = torch.float64 if q_RQD.dtype == torch.float64 else torch.float32
    out = torch.zeros((num_rows, num_heads, value_dim), dtype=dtype, device=q_RQD.device)
    lse = torch.full((num_rows, num_heads), -torch.inf, dtype=dtype, device=q_RQD.device)
    begins = torch.zeros_like(rows.visible_len) if rows.visible_from is None else rows.visible_from
    starts = rows.query_start.tolist()
    for start, stop in pairwise(starts):
        length, skipped = (
            (int(rows.visible_len[start:stop].max()), int(begins[start:stop].min())) if stop > start else (0, 0)
        )
        if length <= skipped:
            continue  # rows that see nothing keep out = 0 and lse = -inf
        table = rows.page_table[rows.row_seq[start]]
        if isinstance(pages, Workspace):
            skipped, (k_KSD, v_KSD) = 0, _made(pages, table, length)
        else:  # pages before the first one that is seen may hold anything
            first_page = skipped // pages.shape[3]
            skipped = first_page * pages.shape[3]
            k_KSD, v_KSD = gather_tokens(pages, table[first_page:], length - skipped, dtype)
        kv = k_KSD, v_KSD[..., :value_dim]
        step = max(1, SCORES_AT_ONCE // ((length - skipped) * num_heads))
        for first in range(start, stop, step):
            last = min(first + step, stop)
            visible, begin = rows.visible_len[first:last] - skipped, begins[first:last] - skipped
            seen = visible > begin.clamp(min=0)
            q = q_RQD[first:last][seen].to(dtype) * scale
            out[first:last][seen], lse[first:last][seen] = _attend(q, kv, visible[seen], begin[seen])
    return out.to(q_RQD.dtype), lse


def _attend(
    q_RQD: torch.Tensor, kv: tuple[torch.Tensor, torch.Tensor], visible: torch.Tensor, begin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend rows that each see at least one token, [begin, visible), to K [K, S, D] and V [K, S, W] of a sequence."""
    k_KSD, v_KSD = (each.to(q_RQD.dtype) for each in kv)
    q_KGRD = q_RQD.unflatten(1, (k_KSD.shape[0], -1)).permute(1, 2, 0, 3)
    scores = q_KGRD @ k_KSD.unsqueeze(1).mT
    token = torch.arange(k_KSD.shape[1], device=visible.device)
    scores.masked_fill_((token >= visible.unsqueeze(1)) | (token < begin.unsqueeze(1)), -torch.inf)
    lse_KGR = torch.logsumexp(scores, -1)
    out_KGRD = scores.sub_(lse_KGR.unsqueeze(-1)).exp_() @ v_KSD.unsqueeze(1)
    return out_KGRD.permute(2, 0, 1, 3).flatten(1, 2), lse_KGR.permute(2, 0, 1).flatten(1)


def gather_tokens(
    pages: Pages, table: torch.Tensor, length: int, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return K and V, each [K, length, D], of a sequence's first ``length`` local tokens; of latents, these twice.

    Args:
        pages: [P, 2, K, block_size, D], or [P, 1, 1, block_size, D].
        table: [pages of the sequence] int32, in ascending position.
        length: tokens, at most what the table's pages hold.
        dtype: the least precision of what 8 bits are widened to; other pages are returned as they are.
    """
    block_size = pages.shape[3]
    mine = pages_to_wide(pages, table[: -(-length // block_size)].long(), dtype)
    kv = mine.permute(1, 2, 0, 3, 4).flatten(2, 3)[:, :, :length]
    return kv[0], kv[-1]


def _made(made: Workspace, table: torch.Tensor, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return K [K, length, D + T] and V [K, length, W] of the first tokens of a run in a workspace."""
    first = int(table[0]) * made.block_size
    k, v, turned = (each[first : first + length] for each in (made.k, made.v, made.turned))
    return torch.cat((k, turned.unsqueeze(1).expand(-1, k.shape[1], -1)), -1).transpose(0, 1), v.transpose(0, 1)
