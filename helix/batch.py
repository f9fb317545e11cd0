"""The rows of a step on the host: what the scheduler's chunks are to a rank, in NumPy, before anything is uploaded.

Rows of a chunk are neighbours and ascend in position. What all ranks share (``StepRows``) comes from the chunks alone,
what one rank sees of them (``LocalRows``) from the placement and its page table, and who projects which
(``SharedRows``) from the placement.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from parallel.placement import BlockCyclic, IntArray

from .request import Chunk


@dataclass(frozen=True)
class StepRows:
    """The R rows of C chunks; equal on all ranks, int64.

    Attributes:
        token_ids: [R]; -1 is the token that the device chose last for the row's batch slot, -2 its first draft, and
            so on.
        positions: [R], global.
        row_seq: [R], the batch slot of each row's sequence.
        first_owner: [R], where the sequence's first block lives.
        reused: [R], leading tokens of the sequence that were cached: rows of them are computed, and not written.
        query_start: [C + 1], the first row of each chunk, then R.
    """

    token_ids: IntArray
    positions: IntArray
    row_seq: IntArray
    first_owner: IntArray
    reused: IntArray
    query_start: IntArray

    @classmethod
    def of(cls, chunks: Sequence[Chunk]) -> StepRows:
        """Return the rows of chunks, drafts included."""
        tokens: list[int] = []
        for chunk in chunks:
            tokens += chunk.seq.token_ids[chunk.start : chunk.stop] or [-1]  # -1: not known yet
            tokens += chunk.drafts
        return cls.at(chunks, np.array(tokens))

    @classmethod
    def at(cls, chunks: Sequence[Chunk], token_ids: IntArray) -> StepRows:
        """Return the rows of chunks with the tokens that are given instead of their own."""
        starts = np.array([chunk.start for chunk in chunks])
        counts = np.array([chunk.num_rows for chunk in chunks])
        query_start = np.concatenate(([0], counts.cumsum()))
        return cls(
            token_ids=token_ids,
            positions=np.arange(len(token_ids)) + np.repeat(starts - query_start[:-1], counts),
            row_seq=np.repeat(np.array([chunk.seq.batch_slot for chunk in chunks]), counts),
            first_owner=np.repeat(np.array([chunk.seq.blocks.first_owner for chunk in chunks]), counts),
            reused=np.repeat(np.array([chunk.seq.blocks.num_reused for chunk in chunks]), counts),
            query_start=query_start,
        )

    @classmethod
    def for_nobody(cls, num_rows: int) -> StepRows:
        """Return one run of rows of token 0."""
        zeros = np.zeros(num_rows, np.int64)
        return cls(zeros, zeros, zeros, zeros, zeros, np.array([0, num_rows]))

    def only(self, index: IntArray) -> StepRows:
        """Return some of the rows, ascending, at least one."""
        row_seq = self.row_seq[index]
        return StepRows(
            self.token_ids[index],
            self.positions[index],
            row_seq,
            self.first_owner[index],
            self.reused[index],
            query_start=np.append(np.flatnonzero(np.diff(row_seq, prepend=-1)), len(index)),
        )

    @property
    def num_rows(self) -> int:
        """R."""
        return len(self.positions)

    @property
    def counts(self) -> IntArray:
        """The rows of each chunk, [C]."""
        return np.diff(self.query_start)


@dataclass(frozen=True)
class WindowRows:
    """What layers with a window see of a step's rows, int64 [R], every rank the same, for its own heads: the tokens
    [visible_from, visible_len) of each, whose own goes to ``slot``.
    """

    visible_len: IntArray
    visible_from: IntArray
    slot: IntArray

    @classmethod
    def at(cls, visible_len: IntArray, window: int, slot: IntArray) -> WindowRows:
        """Return rows that see the last ``window`` of so many tokens."""
        return cls(visible_len, np.maximum(visible_len - window, 0), slot)

    @property
    def arrays(self) -> dict[str, npt.NDArray[np.generic]]:
        """What the device needs of them, by the names of its inputs."""
        return {
            "window.slot": self.slot,
            "window.visible_len": self.visible_len.astype(np.int32),
            "window.visible_from": self.visible_from.astype(np.int32),
        }


@dataclass(frozen=True)
class LocalRows:
    """What one rank alone sees of a step's rows, int64 [R]: local tokens seen, and the slot of owned rows or -1; and
    what it sees in layers with a window, None where the model has none.
    """

    visible: IntArray
    slot: IntArray
    window: WindowRows | None = None

    @classmethod
    def of(cls, rows: StepRows, placement: BlockCyclic, kvp_rank: int, page_table: npt.NDArray[np.int32]) -> LocalRows:
        """Return what a KVP rank sees, whose page table is [B, P]."""
        at = placement.local_position(rows.positions)
        mine = (placement.owner(rows.positions, rows.first_owner) == kvp_rank) & (rows.positions >= rows.reused)
        page = page_table[rows.row_seq, np.where(mine, at // placement.block_size, 0)].astype(np.int64)
        return cls(
            visible=placement.local_len(rows.positions + 1, kvp_rank, rows.first_owner),
            slot=np.where(mine, page * placement.block_size + at % placement.block_size, -1),
        )

    def only(self, index: IntArray) -> LocalRows:
        """Return what it sees of some of the rows."""
        window = self.window
        if window is not None:
            window = WindowRows(window.visible_len[index], window.visible_from[index], window.slot[index])
        return LocalRows(self.visible[index], self.slot[index], window)

    @classmethod
    def for_nobody(cls, num_rows: int, *, visible: int = 0, window: int = 0) -> LocalRows:
        """Return rows that store nothing and see so many tokens.

        In layers with a window each sees what all rows of such a run would see together, and one token more, for
        windows rarely begin where pages do: so work is cut into parts as that of real rows is.
        """
        seen, slot = np.full(num_rows, visible, np.int64), np.full(num_rows, -1, np.int64)
        return cls(seen, slot, WindowRows.at(seen, window + num_rows, slot) if window else None)


@dataclass(frozen=True)
class SharedRows:
    """A step's rows divided by owner, so that each KVP rank projects its own.

    Attributes:
        mine: [M] int64, the rows that this rank owns, then row 0 again; M is equal on all KVP ranks.
        num_mine: how many of them are real.
        order: [R] int64, where each row stands among the KVP * M of all ranks.
    """

    mine: IntArray
    num_mine: int
    order: IntArray

    @classmethod
    def of(cls, rows: StepRows, placement: BlockCyclic, kvp_rank: int) -> SharedRows:
        """Divide rows; every rank gets the same ``order``."""
        owner, kvp = placement.owner(rows.positions, rows.first_owner), placement.kvp
        counts = np.bincount(owner, minlength=kvp)
        longest = int(counts.max())
        by_owner = np.argsort(owner, kind="stable")
        starts = np.cumsum(counts) - counts
        order = np.empty(rows.num_rows, np.int64)
        places = np.arange(rows.num_rows) - np.repeat(starts, counts) + np.repeat(np.arange(kvp) * longest, counts)
        order[by_owner] = places
        num_mine = int(counts[kvp_rank])
        mine = np.zeros(longest, np.int64)
        mine[:num_mine] = by_owner[starts[kvp_rank] : starts[kvp_rank] + num_mine]
        return cls(mine, num_mine, order)
