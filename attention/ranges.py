"""Attention of chunks to keys and values that are made of ranges of the local shard, one range after the other.

What the cache holds is not always what many rows should read: of latents every head's keys and values have to be made,
pages of 8 bits have to be widened. For many rows it pays to do so once a chunk and layer, for all of them, into a
workspace that is much smaller than the shard. So the tokens that the runs of a step see are dealt out into fillings of
the workspace, in order; each is made, attended to by the rows that see it, and its partials are merged by log-sum-exp:

    local tokens of two runs      |------------- a: 40 pages -------------|--- b: 6 ---|
    fillings of 16 pages          |   a 0..16   |   a 16..32   | a 32..40 and b 0..6   |

A filling's rows are a step of their own, over the workspace as its pages: ``visible_len`` counts from where the range
begins, so causality is one integer a row, as everywhere. Which kernel attends, and who makes what, is the caller's.
Everything here is local to a rank: lengths differ between ranks, and so may the number of fillings.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import torch

from .merge import merge_into, merge_parts
from .partial import Partials
from .rows import Rows, Work
from .work import PIECE_FIELDS, Cutting, Ints, WorkList, cut

PAGE = 128  # tokens of a workspace's page; a range begins at one
_SETTLED = PIECE_FIELDS.index("settled")
_OF_ROWS = ("visible_len", "row_seq", "query_start", "page_table")
_OF_WORK = ("pieces", "span_start", "part_start")
_Range = tuple[int, int, int, int]  # a run's rows [first, stop), and local tokens [begin, end)


@dataclass(frozen=True)
class Filling:
    """One filling of a workspace, on the device.

    Attributes:
        first, stop: the step's rows that attend to it: whole runs, neighbours.
        tokens: [n] int32, what stands in the workspace's first n places: the slots (page * block_size + offset) of
            local tokens in the cache's pages. A range begins at a multiple of PAGE, and what is left of its last page
            repeats its last token.
        rows: rows [first, stop) as a step of their own, whose pages are the workspace's, of PAGE tokens.
    """

    first: int
    stop: int
    tokens: torch.Tensor
    rows: Rows


@dataclass(frozen=True)
class _HostFilling:
    """A filling on the host, int32; ``work`` is the work list of its rows."""

    first: int
    stop: int
    tokens: Ints
    visible_len: Ints
    row_seq: Ints
    query_start: Ints
    page_table: Ints
    work: WorkList | None


@dataclass(frozen=True)
class PlannedFillings:
    """The fillings of a step on the host; at least one, and together they hold every row.

    Attributes:
        cutting: how the rows of each were cut; None for a kernel that reads no work list.
    """

    fillings: Sequence[_HostFilling]
    cutting: Cutting | None

    @classmethod
    def of(
        cls,
        visible_len: npt.NDArray[np.integer],
        query_start: npt.NDArray[np.integer],
        row_seq: npt.NDArray[np.integer],
        page_table: npt.NDArray[np.integer],
        *,
        block_size: int,
        capacity: int,
        cutting: Cutting | None,
    ) -> PlannedFillings:
        """Deal out what the rows of a step see on this rank.

        A run begins a new filling unless what it sees fits into what is left of the one before.

        Args:
            visible_len: [R], local tokens that each row sees; rows of a run ascend.
            query_start: [C + 1], the first row of each run, then R.
            row_seq: [R], the page-table row of each row's sequence.
            page_table: [B, P], local pages of each sequence.
            block_size: tokens of such a page.
            capacity: tokens that the workspace holds, a multiple of PAGE.
            cutting: how the kernel wants the rows of a filling cut.
        """
        fillings, ranges, room = list[list[_Range]](), list[_Range](), capacity
        for first, stop in pairwise(query_start.tolist()):
            length = int(visible_len[stop - 1]) if stop > first else 0
            for begin in range(0, max(length, 1), capacity):
                end = min(length, begin + capacity)
                if ranges and _whole_pages(end - begin) > room:
                    fillings.append(ranges)
                    ranges, room = [], capacity
                ranges.append((first, stop, begin, end))
                room -= _whole_pages(end - begin)
        fillings.append(ranges)
        return cls(
            [_filling(each, visible_len, row_seq, page_table, block_size, capacity, cutting) for each in fillings],
            cutting,
        )

    @property
    def arrays(self) -> dict[str, Ints]:
        """What the device needs of them, by name."""
        arrays = dict[str, Ints]()
        for number, each in enumerate(self.fillings):
            own = {name: getattr(each, name) for name in ("tokens", *_OF_ROWS)}
            if each.work is not None:
                own |= {name: getattr(each.work, name) for name in _OF_WORK}
            arrays |= {f"{number}.{name}": array for name, array in own.items()}
        return arrays

    def on_device(self, sent: Mapping[str, torch.Tensor], rows: Rows) -> list[Filling]:
        """Return the fillings of a step's rows, whose ``arrays`` were sent to the device."""
        fillings = []
        for number, each in enumerate(self.fillings):
            visible_len, row_seq, query_start, page_table = (sent[f"{number}.{name}"] for name in _OF_ROWS)
            work = None
            if each.work is not None and self.cutting is not None:
                pieces, span_start, part_start = (sent[f"{number}.{name}"] for name in _OF_WORK)
                parts = part_start if each.work.is_split else None
                work = Work(self.cutting, pieces, span_start, parts, int(each.work.part_start[-1]))
            positions, slot = (whole[each.first : each.stop] for whole in (rows.positions, rows.slot))
            own_rows = Rows(positions, row_seq, visible_len, slot, page_table, query_start, work)
            fillings.append(Filling(each.first, each.stop, sent[f"{number}.tokens"], own_rows))
        return fillings


def _whole_pages(length: int) -> int:
    """Return the tokens that a range takes in the workspace."""
    return -(-length // PAGE) * PAGE


def _filling(
    ranges: Sequence[_Range],
    visible_len: npt.NDArray[np.integer],
    row_seq: npt.NDArray[np.integer],
    page_table: npt.NDArray[np.integer],
    block_size: int,
    capacity: int,
    cutting: Cutting | None,
) -> _HostFilling:
    first, stop = ranges[0][0], ranges[-1][1]
    tokens, seen, seqs = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    # as wide in every step: kernels are compiled for what divides a stride
    table = np.tile(np.arange(capacity // PAGE, dtype=np.int32), (len(ranges), 1))
    at = 0
    for number, (run_first, run_stop, begin, end) in enumerate(ranges):
        place = np.minimum(np.arange(begin, begin + _whole_pages(end - begin)), end - 1)
        if run_stop > run_first:
            pages = page_table[row_seq[run_first]].astype(np.int64)
            tokens.append(pages[place // block_size] * block_size + place % block_size)
        table[number] += at // PAGE
        at += len(place)
        seen.append(np.clip(visible_len[run_first:run_stop] - begin, 0, end - begin))
        seqs.append(np.full(run_stop - run_first, number))
    visible, seq = np.concatenate(seen), np.concatenate(seqs)
    starts = np.array([*(each[0] for each in ranges), stop]) - first
    work = None
    if cutting is not None:
        work = cut(visible, starts, seq, cutting)
        work.pieces[:, _SETTLED] = 0  # what a workspace holds is never older than the kernel before
    own = {"tokens": np.concatenate(tokens), "visible_len": visible, "row_seq": seq, "query_start": starts}
    return _HostFilling(
        first, stop, page_table=table, work=work, **{name: each.astype(np.int32) for name, each in own.items()}
    )


def attend_ranges(
    q_RQD: torch.Tensor,
    fillings: Sequence[Filling],
    make: Callable[[torch.Tensor], None],
    attend: Callable[[torch.Tensor, Rows], Partials],
) -> Partials:
    """Attend the rows of a step to what they see, filling by filling.

    Args:
        q_RQD: [R, Q, D], all rows of the step.
        fillings: of these rows, in order.
        make: makes keys and values of tokens, ``Filling.tokens``, into the workspace.
        attend: attends rows to the workspace.

    Returns:
        As ``PartialAttention``: one partial a row where there are several fillings, merged in float32.
    """
    if len(fillings) == 1:
        make(fillings[0].tokens)
        return attend(q_RQD, fillings[0].rows)
    out = lse = None
    for filling in fillings:
        make(filling.tokens)
        part, part_lse = merge_parts(attend(q_RQD[filling.first : filling.stop], filling.rows), q_RQD.dtype)
        if out is None or lse is None:
            wide = torch.promote_types(part.dtype, torch.float32)
            if len(part) == len(q_RQD):
                out, lse = part.to(wide), part_lse
                continue
            out = torch.empty((len(q_RQD), *part.shape[1:]), dtype=wide, device=part.device)
            lse = torch.full(out.shape[:2], -torch.inf, dtype=part_lse.dtype, device=part.device)
        merge_into(out[filling.first : filling.stop], lse[filling.first : filling.stop], part, part_lse)
    assert out is not None and lse is not None
    return Partials(out.to(q_RQD.dtype), lse)
