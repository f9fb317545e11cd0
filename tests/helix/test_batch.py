"""Rows of a step in NumPy: what ranks share, what each sees, and who projects which."""

from types import SimpleNamespace

import numpy as np

from attention.work import Cutting, cut
from helix.batch import LocalRows, SharedRows, StepRows, WindowRows
from helix.request import Chunk
from parallel.placement import BlockCyclic


def chunk(start, stop, *, slot, first_owner=0, num_reused=0, drafts=(), length=None):
    seq = SimpleNamespace(
        token_ids=list(range(100, 100 + (stop if length is None else length))), batch_slot=slot,
        blocks=SimpleNamespace(first_owner=first_owner, num_reused=num_reused),
    )  # fmt: skip
    return Chunk(seq, start, stop, drafts)


CHUNKS = [chunk(6, 7, slot=2, drafts=(8, 9)), chunk(0, 5, slot=0, first_owner=1), chunk(3, 4, slot=1, length=3)]


def test_rows_of_a_chunk_are_neighbours_and_drafts_follow():
    rows = StepRows.of(CHUNKS)
    assert rows.token_ids.tolist() == [106, 8, 9, 100, 101, 102, 103, 104, -1]  # the last is not known yet
    assert rows.positions.tolist() == [6, 7, 8, 0, 1, 2, 3, 4, 3]
    assert rows.row_seq.tolist() == [2] * 3 + [0] * 5 + [1]
    assert rows.query_start.tolist() == [0, 3, 8, 9] and rows.counts.tolist() == [3, 5, 1]


def test_each_row_is_stored_by_one_rank_and_seen_by_those_that_hold_something_before_it():
    rows, place = StepRows.of(CHUNKS), BlockCyclic(2, 3)
    table = np.arange(12, dtype=np.int32).reshape(3, 4)
    ranks = [LocalRows.of(rows, place, rank, table) for rank in range(3)]
    assert (np.stack([each.slot >= 0 for each in ranks]).sum(0) == 1).all()
    assert np.stack([each.visible for each in ranks]).sum(0).tolist() == (rows.positions + 1).tolist()
    owner = place.owner(rows.positions, rows.first_owner)
    for row in range(rows.num_rows):
        slot = ranks[owner[row]].slot[row]
        local = place.local_position(rows.positions[row])
        assert slot == table[rows.row_seq[row], local // 2] * 2 + local % 2


def test_shared_rows_return_to_their_order():
    rows, place = StepRows.of(CHUNKS), BlockCyclic(2, 3)
    ranks = [SharedRows.of(rows, place, rank) for rank in range(3)]
    gathered = np.concatenate([each.mine for each in ranks])
    assert gathered[ranks[0].order].tolist() == list(range(rows.num_rows))
    assert sum(each.num_mine for each in ranks) == rows.num_rows


def test_rows_of_reused_tokens_see_what_is_cached_and_are_not_written():
    rows = StepRows.of([chunk(5, 9, slot=0, num_reused=7)])
    local = LocalRows.of(rows, BlockCyclic(4, 1), 0, np.array([[3, 5, 6]], np.int32))
    assert local.slot.tolist() == [-1, -1, 5 * 4 + 3, 6 * 4]
    assert local.visible.tolist() == [6, 7, 8, 9]


def test_rows_for_nobody_are_cut_into_parts_where_those_of_prompts_are():
    window, block_size = 128, 64
    cutting = Cutting("many_rows", 16, 128, 16, persistent=False)

    def is_split(rows):
        start = np.array([0, len(rows.visible_len)])
        seqs = np.zeros(start[1], np.int64)
        return cut(rows.visible_len, start, seqs, cutting, rows.visible_from, block_size).is_split

    for num_rows in (1, 16, 65, 128, 129, 1024):
        prompt = WindowRows.at(np.arange(1000, 1000 + num_rows), window, np.full(num_rows, -1))
        nobody = LocalRows.for_nobody(num_rows, visible=65536, window=window).window
        assert is_split(prompt) == is_split(nobody)
    assert not is_split(LocalRows.for_nobody(65, visible=1, window=window).window)
