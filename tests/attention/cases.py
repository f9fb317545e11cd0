"""Random paged caches for the attention tests: whole sequences, sharded in a list, no process group."""

from dataclasses import dataclass

import numpy as np
import torch

from attention.merge import merge_parts
from attention.pages import PageLayout, QuantizedPages
from attention.partial import Partials
from attention.rows import Rows
from parallel.placement import BlockCyclic


@dataclass
class Case:
    """B sequences and the rows that attend to them; K and V per sequence are [K, S, D].

    With ``value_dim``, K is a latent whose first elements are V.
    """

    q: torch.Tensor
    kv: list[tuple[torch.Tensor, torch.Tensor]]
    positions: list[list[int]]  # of each sequence's rows
    place: BlockCyclic
    first_owners: list[int]
    value_dim: int | None = None
    window: int | None = None  # tokens that a row sees, its own included


def make_case(
    seed, *, lengths, num_rows, heads, kv_heads, head_dim, block_size, kvp, dtype=torch.float32, value_dim=None,
    window=None,
) -> Case:  # fmt: skip
    """Sequences of those lengths whose last ``num_rows[i]`` positions are rows."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    def keys_and_values(length):
        k = randn(kv_heads, length, head_dim)
        return k, randn(kv_heads, length, head_dim) if value_dim is None else k[..., :value_dim]

    return Case(
        q=randn(sum(num_rows), heads, head_dim),
        kv=[keys_and_values(n) for n in lengths],
        value_dim=value_dim,
        window=window,
        positions=[list(range(n - rows, n)) for n, rows in zip(lengths, num_rows, strict=True)],
        place=BlockCyclic(block_size, kvp),
        first_owners=[int(torch.randint(0, kvp, (), generator=generator)) for _ in lengths],
    )


def shard(case: Case, rank: int, device: str) -> tuple[torch.Tensor, Rows]:
    """Pages and rows of one rank; pages that nothing was written to hold NaN, as uninitialised memory may.

    With a window the page table names such a page for all pages that no row sees.
    """
    place = case.place
    kv_heads, _, head_dim = case.kv[0][0].shape
    counts = [
        place.num_local_blocks(k.shape[1], rank, first)
        for (k, _), first in zip(case.kv, case.first_owners, strict=True)
    ]
    order = torch.randperm(sum(counts) + 1, generator=torch.Generator().manual_seed(rank)).tolist()
    planes = 2 if case.value_dim is None else 1
    pages = torch.full((len(order), planes, kv_heads, place.block_size, head_dim), torch.nan, dtype=case.q.dtype)
    table = torch.full((len(counts), max(*counts, 1) + 1), 2**30, dtype=torch.int32)
    visible, seen_from, slots, row_seq = [], [], [], []
    for index, ((k, v), first) in enumerate(zip(case.kv, case.first_owners, strict=True)):
        mine = [order.pop() for _ in range(counts[index])]
        table[index, : len(mine)] = torch.tensor(mine, dtype=torch.int32)
        held = [position for position in range(k.shape[1]) if place.owner(position, first) == rank]
        for local, position in enumerate(held):
            page, offset = mine[local // place.block_size], local % place.block_size
            pages[page, 0, :, offset] = k[:, position]
            if planes == 2:
                pages[page, 1, :, offset] = v[:, position]
        for position in case.positions[index]:
            visible.append(place.local_len(position + 1, rank, first))
            least = max(position + 1 - (case.window or position + 1), 0)
            seen_from.append(place.local_len(least, rank, first))
            local = place.local_position(position)
            owned = place.owner(position, first) == rank
            slots.append(mine[local // place.block_size] * place.block_size + local % place.block_size if owned else -1)
            row_seq.append(index)
    for index, positions in enumerate(case.positions if case.window else ()):
        least = place.local_len(max(positions[0] + 1 - case.window, 0), rank, case.first_owners[index])
        table[index, : least // place.block_size] = order[0]
    counts_of_rows = [len(each) for each in case.positions]
    rows = Rows(
        positions=torch.tensor([p for each in case.positions for p in each], device=device),
        row_seq=torch.tensor(row_seq, dtype=torch.int32, device=device),
        visible_len=torch.tensor(visible, dtype=torch.int32, device=device),
        slot=torch.tensor(slots, device=device),
        page_table=table.to(device),
        query_start=torch.tensor(np.cumsum([0, *counts_of_rows]), dtype=torch.int32, device=device),
        visible_from=torch.tensor(seen_from, dtype=torch.int32, device=device) if case.window else None,
    )
    return pages.to(device), rows


def in_8_bits(pages: torch.Tensor, value_dim: int | None = None) -> QuantizedPages:
    """The same pages quantised, in a pool whose bytes are NaN before."""
    num_pages, parts, kv_heads, block_size, head_dim = pages.shape
    layout = PageLayout(kv_heads, block_size, head_dim, pages.dtype, value_dim, in_8_bits=True)
    pool = torch.full((num_pages, layout.page_bytes), 0x7F, dtype=torch.uint8, device=pages.device)
    made = layout.pages_of(layout.views(pool))
    page = torch.arange(num_pages, device=pages.device).repeat_interleave(block_size)
    offset = torch.arange(block_size, device=pages.device).repeat(num_pages)
    for part in range(parts):
        made.write(part, pages[:, part].transpose(1, 2).flatten(0, 1), page, offset)
    return made


def widened(pages: QuantizedPages, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """What pages in 8 bits mean."""
    return pages.widen(torch.arange(len(pages.values), device=pages.device), dtype)


def partials_of(backend, q, pages, rows, scale, value_dim=None) -> Partials:
    """What a back end makes of rows, cut as it asks for."""
    max_rows = int(rows.query_start.diff().max())
    window = rows.visible_from is not None
    cutting = backend.cutting(pages, q.shape[1], max_rows, value_dim=value_dim, window=window)
    return backend(q, pages, rows.cut_for(cutting, pages.shape[3]), scale, value_dim=value_dim)


def attend(backend, q, pages, rows, scale, value_dim=None, *, pdl=False) -> tuple[torch.Tensor, torch.Tensor]:
    """What a back end makes of rows, with the parts of each merged, in q's dtype: out and lse."""
    return merge_parts(partials_of(backend, q, pages, rows, scale, value_dim), q.dtype, pdl=pdl)


def stacked(part_SRQD: torch.Tensor, lse_SRQ: torch.Tensor) -> Partials:
    """Partials of rows that all have S parts, from [S, R, Q, D] and [S, R, Q]; one part is a row's own."""
    parts, rows = lse_SRQ.shape[:2]
    if parts == 1:
        return Partials(part_SRQD[0], lse_SRQ[0])
    starts = torch.arange(0, parts * rows + 1, parts, dtype=torch.int32, device=lse_SRQ.device)
    cells = (part_SRQD.transpose(0, 1).flatten(0, 1), lse_SRQ.transpose(0, 1).flatten(0, 1))
    return Partials(*(each.contiguous() for each in cells), starts, parts)


def full_attention(case: Case, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    """Causal attention over whole sequences, from its definition: out [R, Q, D] and lse [R, Q]."""
    outs, lses, row = [], [], 0
    for (k, v), positions in zip(case.kv, case.positions, strict=True):
        group = case.q.shape[1] // k.shape[0]
        for position in positions:
            least = max(position + 1 - (case.window or position + 1), 0)
            keys = k[:, least : position + 1].to(dtype).repeat_interleave(group, 0)
            values = v[:, least : position + 1].to(dtype).repeat_interleave(group, 0)
            scores = torch.einsum("qd,qsd->qs", case.q[row].to(dtype), keys) * case.q.shape[-1] ** -0.5
            outs.append(torch.einsum("qs,qsd->qd", scores.softmax(-1), values))
            lses.append(scores.logsumexp(-1))
            row += 1
    return torch.stack(outs), torch.stack(lses)
