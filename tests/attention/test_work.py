"""Work lists: every row sees each of its tokens in exactly one piece, and no program has much more than another."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from attention.work import Cutting, _cut_any, cut

CUTTINGS = st.builds(
    Cutting,
    kernel=st.just("any"),
    tile_rows=st.integers(1, 9),
    unit=st.sampled_from([1, 16, 64]),
    programs=st.integers(1, 70),
    persistent=st.booleans(),
)
RUNS = st.lists(st.tuples(st.integers(0, 30), st.sampled_from([0, 1, 2, 63, 64, 65, 500, 20_000])), max_size=20)


def rows_of(runs):
    """The visible lengths of runs of (rows, tokens that the last sees), and where each run begins."""
    visible = [max(0, tokens - rows + 1 + i) for rows, tokens in runs for i in range(rows)]
    return np.array(visible, np.int64), np.cumsum([0, *(rows for rows, _ in runs)])


@given(RUNS, CUTTINGS)
def test_each_row_sees_each_of_its_tokens_once(runs, cutting):
    visible, query_start = rows_of(runs)
    run_of_row = np.repeat(np.arange(len(runs)), np.diff(query_start))
    work = cut(visible, query_start, run_of_row, cutting)
    seen = [dict() for _ in visible]
    for first, stop, begin, end, part, settled, seq in work.pieces.tolist():
        assert 0 < stop - first <= cutting.tile_rows and set(run_of_row[first:stop]) == {seq}
        assert begin % cutting.unit == 0 and (begin < end or not cutting.persistent)
        assert settled == max(0, visible[query_start[run_of_row[first] + 1] - 1] - runs[run_of_row[first]][0])
        for row in range(first, stop):
            assert part not in seen[row]
            seen[row][part] = (begin, end)
    for row, parts in enumerate(seen):
        assert sorted(parts) == list(range(work.part_start[row + 1] - work.part_start[row]))
        edges = [parts[part] for part in sorted(parts)]
        assert all(end == begin for (_, end), (begin, _) in pairwise(edges))
        assert (edges[0][0] if edges else 0) == 0 and (edges[-1][1] if edges else 0) >= visible[row]
        assert len(parts) <= cutting.programs
    assert sorted(range(len(work.pieces))) == [
        piece for begin, end in pairwise(work.span_start) for piece in range(begin, end)
    ]
    assert len(work.pieces) <= cutting.most_pieces(1, 0) + sum(-(-rows // cutting.tile_rows) for rows, _ in runs)


@given(RUNS, CUTTINGS, st.sampled_from([1, 50, 130]), st.sampled_from([1, 16, 64, 256]))
def test_what_is_before_every_window_of_a_tile_is_in_no_piece(runs, cutting, window, block_size):
    visible, query_start = rows_of(runs)
    run_of_row = np.repeat(np.arange(len(runs)), np.diff(query_start))
    seen_from = np.maximum(visible - window, 0)
    work = cut(visible, query_start, run_of_row, cutting, seen_from, block_size)
    step, tokens = min(cutting.unit, block_size), [set() for _ in visible]
    for first, stop, begin, end, *_ in work.pieces.tolist():
        assert begin % step == 0 and begin + step > seen_from[first]
        for row in range(first, stop):
            assert not tokens[row] & set(range(begin, end))
            tokens[row] |= set(range(begin, end))
    for row, its in enumerate(tokens):
        assert its >= set(range(seen_from[row], visible[row]))


@given(st.lists(st.integers(1, 200_000), min_size=1, max_size=80), st.integers(1, 132))
def test_persistent_programs_have_about_equally_much(lengths, programs):
    cutting = Cutting("any", 1, 64, programs)
    visible = np.array(lengths)
    work = cut(visible, np.arange(len(lengths) + 1), np.arange(len(lengths)), cutting)
    units = -(-visible // 64)
    share = -(-units.sum() // programs)
    per_piece = -(-(work.pieces[:, 3] - work.pieces[:, 2]) // 64)
    spans = [per_piece[begin:end].sum() for begin, end in pairwise(work.span_start)]
    assert max(spans) <= share + max(1, share // 24)


@pytest.mark.parametrize(("batch", "pieces"), [(1, 132), (8, 128), (32, 128), (66, 132), (132, 132), (264, 264)])
def test_equal_lengths_are_cut_evenly(batch, pieces):
    work = cut(np.full(batch, 65_536), np.arange(batch + 1), np.arange(batch), Cutting("any", 1, 64, 132))
    assert len(work.pieces) <= pieces
    assert len(set(np.diff(work.part_start).tolist())) == 1


def test_a_step_without_rows_that_see_anything_has_no_work():
    work = cut(np.zeros(3, np.int64), np.arange(4), np.arange(3), Cutting("any", 1, 64, 8))
    assert len(work.pieces) == 0 and work.part_start.tolist() == [0] * 4 and work.span_start.tolist() == [0] * 9


@given(st.integers(0, 9), st.sampled_from([0, 1, 63, 64, 65, 500, 20_000, 1_000_000]), CUTTINGS)
def test_one_tile_alone_is_cut_like_any(rows, tokens, cutting):
    visible, query_start = rows_of([(rows, tokens)])
    given_rows = visible, query_start, np.full(rows, 3), cutting
    one, other = cut(*given_rows), _cut_any(*given_rows, None, 1)
    for name in ("pieces", "span_start", "part_start"):
        assert np.array_equal(getattr(one, name), getattr(other, name)) and getattr(one, name).dtype == np.int32
