"""Work lists: what a step's attention has to do, cut into pieces and dealt out to the programs of a kernel.

A piece is some rows of one sequence (a tile) and a range of that sequence's local tokens; its result is one partial a
row. Persistent programs take a span of pieces each, so that all end at about the same time, whatever the lengths are:

    tokens of three sequences, in units       |------- a -------|--- b ---|---------------- c ----------------|
    spans of four programs, equally long      |   program 0    |   program 1    |   program 2    |  program 3 |
    pieces                                    |       a0       |a1|---b---|-c0--|       c1       |     c2     |

Where cutting every sequence into equally many parts is about as good, that is done instead: it makes fewer pieces.
Programs that are not persistent take one piece each, the longest first.

The host knows every length before a step, so lists are made here, in NumPy, and are data: no launch depends on them.
All KV heads of a rank share one list. (The idea is stream-K's, arXiv 2301.03598, for attention.)
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

PIECE_FIELDS = ("first", "stop", "begin", "end", "part", "settled", "seq")
"""Of a piece: its rows [first, stop) and tokens [begin, end), which of its rows' partials it makes, how many tokens of
the sequence are older than the step, and the sequence's row of the page table."""
Ints = npt.NDArray[np.int32]
WORKSPACE_TOKENS, WORKSPACE_BYTES = 16384, 1 << 25
"""A workspace of keys and values (``ranges``) holds so many tokens, or as many as take so many bytes where those are
more, unless a setting says otherwise."""


@dataclass(frozen=True)
class Cutting:
    """How a kernel wants the attention of a step to be cut.

    Attributes:
        kernel: its name.
        tile_rows: rows of a piece at most.
        unit: tokens; pieces begin at multiples of it from a tile's first one on.
        programs: how many run at once for each KV head.
        persistent: a program takes a span of pieces, and there are always ``programs``; else it takes one.
    """

    kernel: str
    tile_rows: int
    unit: int
    programs: int
    persistent: bool = True

    def most_pieces(self, runs: int, run_len: int) -> int:
        """Return how many pieces persistent programs could get for so many runs of so many rows."""
        return self.programs + runs * -(-run_len // self.tile_rows)


@dataclass(frozen=True)
class WorkList:
    """A step's pieces.

    Attributes:
        pieces: [N, 7] int32, of ``PIECE_FIELDS``.
        span_start: [programs + 1] int32, the first piece of each program, then N.
        part_start: [R + 1] int32; the partials of row r are part_start[r] to part_start[r + 1]. Row r's part of a piece
            is part_start[r] + the piece's ``part``.
    """

    pieces: Ints
    span_start: Ints
    part_start: Ints

    @property
    def is_split(self) -> bool:
        """False where every row has exactly one partial: row r's is r."""
        return not np.array_equal(self.part_start, np.arange(len(self.part_start)))


def cut(
    visible_len: npt.NDArray[np.integer],
    query_start: npt.NDArray[np.integer],
    row_seq: npt.NDArray[np.integer],
    cutting: Cutting,
    visible_from: npt.NDArray[np.integer] | None = None,
    block_size: int = 1,
) -> WorkList:
    """Return the work list of a step.

    Args:
        visible_len: [R], local tokens that each row sees; rows of a run ascend.
        query_start: [C + 1], the first row of each run, then R.
        row_seq: [R], the page-table row of each row's sequence.
        cutting: what the kernel asks for.
        visible_from: [R], the first local token that each row sees; rows of a run ascend. None: all see the first. The
            tokens before the page of a tile's first one are in no piece.
        block_size: tokens of a page; read only with ``visible_from``.
    """
    if cutting.persistent and visible_from is None and len(query_start) == 2 and len(visible_len) <= cutting.tile_rows:
        return _cut_one_tile(visible_len, row_seq, cutting)
    return _cut_any(visible_len, query_start, row_seq, cutting, visible_from, block_size)


def _cut_one_tile(visible_len: npt.NDArray[np.integer], row_seq: npt.NDArray[np.integer], cutting: Cutting) -> WorkList:
    """Return what ``_cut_any`` does for persistent programs and one tile, in a fifth of its time: steps wait for it."""
    rows = len(visible_len)
    seen = int(visible_len[-1]) if rows else 0
    units = -(-seen // cutting.unit)
    size = max(-(-units // cutting.programs), 1)
    parts = -(-units // size)
    number = np.arange(max(rows, parts, cutting.programs) + 1, dtype=np.int32)
    pieces = np.empty((parts, len(PIECE_FIELDS)), np.int32)
    if parts:
        pieces[:] = (0, rows, 0, 0, 0, max(seen - rows, 0), row_seq[0])
    pieces[:, 2] = number[:parts] * (size * cutting.unit)
    pieces[:, 3] = np.minimum(pieces[:, 2] + size * cutting.unit, seen)
    pieces[:, 4] = number[:parts]
    return WorkList(pieces, np.minimum(number[: cutting.programs + 1], parts), number[: rows + 1] * parts)


def _cut_any(
    visible_len: npt.NDArray[np.integer],
    query_start: npt.NDArray[np.integer],
    row_seq: npt.NDArray[np.integer],
    cutting: Cutting,
    visible_from: npt.NDArray[np.integer] | None,
    block_size: int,
) -> WorkList:
    first, stop = query_start[:-1], query_start[1:]
    tiles_of_run = -(-(stop - first) // cutting.tile_rows)
    run = np.repeat(np.arange(len(first)), tiles_of_run)
    tile_first = first[run] + _counted(tiles_of_run) * cutting.tile_rows
    tile_stop = np.minimum(tile_first + cutting.tile_rows, stop[run])
    seen = visible_len[tile_stop - 1]
    settled = np.maximum(visible_len[stop[run] - 1] - (stop - first)[run], 0)  # a row appends one token at most
    base = np.zeros_like(seen)
    if visible_from is not None:
        step = min(cutting.unit, block_size)  # of a page that is no longer than a turn the whole one is read
        base = np.minimum(visible_from[tile_first], seen) // step * step
    units = -(-(seen - base) // cutting.unit)
    share = max(1, -(-int(units.sum()) // cutting.programs))
    if cutting.persistent:
        tile, part, begin, end, program = _spans(units, share, cutting.programs)
        span_start = np.searchsorted(program, np.arange(cutting.programs + 1))
        order = np.arange(len(tile))
    else:
        tile, part, begin, end = _parts(units, np.maximum(units // share, 1), at_least=1)
        order = np.argsort(begin - end, kind="stable")
        span_start = np.arange(len(tile) + 1)
    pieces = np.stack(
        (
            tile_first[tile],
            tile_stop[tile],
            base[tile] + begin * cutting.unit,
            np.minimum(base[tile] + end * cutting.unit, seen[tile]),
            part,
            settled[tile],
            row_seq[tile_first[tile]],
        ),
        1,
    )
    parts_of_tile = np.bincount(tile, minlength=len(run))
    part_start = np.concatenate(([0], np.cumsum(np.repeat(parts_of_tile, tile_stop - tile_first))))
    return WorkList(pieces[order].astype(np.int32), span_start.astype(np.int32), part_start.astype(np.int32))


def _spans(units: npt.NDArray[np.integer], share: int, programs: int) -> tuple[npt.NDArray[np.integer], ...]:
    """Deal tiles out in equal spans: each piece's tile, part, first and last unit, and program."""
    even = programs // max(len(units), 1)
    if even and -(-int(units.max(initial=0)) // even) <= share + max(1, share // 24):
        tile, part, begin, end = _parts(units, np.full(len(units), even), at_least=0)
        return tile, part, begin, end, np.arange(len(tile))
    start = np.cumsum(units) - units
    first_program = start // share
    pieces = np.where(units > 0, (start + units - 1) // share - first_program + 1, 0)
    tile, part = np.repeat(np.arange(len(units)), pieces), _counted(pieces)
    program = first_program[tile] + part
    begin = np.maximum(program * share - start[tile], 0)
    end = np.minimum((program + 1) * share - start[tile], units[tile])
    return tile, part, begin, end, program


def _parts(
    units: npt.NDArray[np.integer], wanted: npt.NDArray[np.integer], *, at_least: int
) -> tuple[npt.NDArray[np.integer], ...]:
    """Cut each tile into at most so many equal parts: each piece's tile, part, and first and last unit."""
    size = np.maximum(-(-units // wanted), 1)
    parts = np.maximum(-(-units // size), at_least)
    tile, part = np.repeat(np.arange(len(units)), parts), _counted(parts)
    begin = part * size[tile]
    return tile, part, begin, np.minimum(begin + size[tile], units[tile])


def _counted(counts: npt.NDArray[np.integer]) -> npt.NDArray[np.integer]:
    """Return 0, 1, ... for each of the counts: [2, 3] gives [0, 1, 0, 1, 2]."""
    return np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
