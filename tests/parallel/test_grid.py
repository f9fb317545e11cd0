import pytest
from hypothesis import given
from hypothesis import strategies as st

from parallel.grid import HelixGrid
from parallel.layout import Layout, split_evenly, split_units


@given(st.integers(0, 1000), st.integers(1, 32))
def test_even_splits_tile_and_differ_by_at_most_one(count, parts):
    ranges = [split_evenly(count, parts, index) for index in range(parts)]
    assert [start for start, _ in ranges] == [0, *(stop for _, stop in ranges[:-1])]
    assert ranges[-1][1] == count
    sizes = [stop - start for start, stop in ranges]
    assert max(sizes) - min(sizes) <= 1


def test_ffn_axes_fill_the_world_by_default():
    assert Layout(kvp=2, tpa=4).tpf == 8
    assert (Layout(kvp=2, tpa=4, ep=2).tpf, Layout(kvp=2, tpa=4, tpf=2, ep=4).ep) == (4, 4)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "layout"),
    [
        (32, 2, Layout(kvp=4, tpa=2)),
        (28, 4, Layout(kvp=2, tpa=4)),  # 7 heads a TPA slice, split 4 + 3
        (28, 4, Layout(kvp=8, tpa=1)),
        (8, 8, Layout(tpa=8)),
        (32, 2, Layout(tpa=8)),  # plain TP beyond K: KV heads duplicated
        (28, 4, Layout(tpa=8)),  # uneven and duplicated
    ],
)
def test_heads_after_the_exchange_tile_all_heads_in_rank_order(heads, kv_heads, layout):
    layout.check_heads(heads, kv_heads)
    merged = []
    for rank in range(layout.world_size):
        tpa_rank, kvp_rank = divmod(rank, layout.kvp)
        start, stop = layout.query_heads(heads, kv_heads, tpa_rank)
        first, last = layout.kv_heads(kv_heads, tpa_rank)
        group = heads // kv_heads
        assert {head // group for head in range(start, stop)} == set(range(first, last))
        assert (stop - start) % (last - first) == 0
        merged += range(*layout.merged_heads(heads, kv_heads, tpa_rank, kvp_rank))
    assert merged == list(range(heads))


@pytest.mark.parametrize(
    ("layout", "heads", "kv_heads", "message"),
    [
        (Layout(kvp=2, tpa=4), 32, 2, "parallel.tpa = 4 exceeds the model's 2 KV heads while parallel.kvp = 2 > 1"),
        (Layout(tpa=3), 32, 8, "parallel.tpa = 3 must divide the model's 8 KV heads"),
        (Layout(tpa=3), 32, 2, "parallel.tpa = 3 must be a multiple of the model's 2 KV heads"),
        (Layout(kvp=16, tpa=1), 8, 2, r"16 ranks exceed the model's 8 query heads"),
    ],
)
def test_layouts_that_do_not_fit_the_heads_are_refused(layout, heads, kv_heads, message):
    with pytest.raises(ValueError, match=message):
        layout.check_heads(heads, kv_heads)


def test_layouts_that_do_not_multiply_are_refused():
    with pytest.raises(ValueError, match=r"parallel.ep \(3\) must divide parallel.tpa \(2\) x parallel.kvp \(2\) = 4"):
        Layout(kvp=2, tpa=2, ep=3)
    with pytest.raises(ValueError, match=r"parallel.tpf \(3\) x parallel.ep \(1\) must equal"):
        Layout(kvp=2, tpa=2, tpf=3)
    with pytest.raises(ValueError, match="parallel.kvp = 0 must be at least 1"):
        Layout(kvp=0)
    message = r"parallel.kvp \(4\) x parallel.tpa \(4\) = 16 ranks but 8 started; lower one or start 16"
    with pytest.raises(ValueError, match=message):
        Layout(kvp=4, tpa=4).check_world(8)


def grid_body(layout: Layout):
    import torch

    from parallel.collectives import all_reduce_

    grid = HelixGrid.create(layout)
    tensor = torch.tensor([1 << grid.rank], device="cuda" if torch.cuda.device_count() >= layout.world_size else "cpu")
    members = int(all_reduce_(tensor, grid.kvp_group))
    return grid.rank, grid.tpa_rank, grid.kvp_rank, members


def test_kvp_groups_are_neighbours(ranks):
    assert ranks(4).run(grid_body, Layout(kvp=2, tpa=2)) == [
        (0, 0, 0, 0b0011),
        (1, 0, 1, 0b0011),
        (2, 1, 0, 0b1100),
        (3, 1, 1, 0b1100),
    ]
    assert [row[3] for row in ranks(4).run(grid_body, Layout(kvp=4))] == [0b1111] * 4
    assert [row[3] for row in ranks(4).run(grid_body, Layout(tpa=4))] == [1, 2, 4, 8]


@pytest.mark.parametrize(
    ("count", "parts", "longest", "multiple"),
    [(13696, 4, 3424, 16), (1408, 3, 512, 64), (768, 8, 96, 16), (18944, 6, 3200, 64), (72, 2, 36, 4), (3, 3, 1, 1)],
)
def test_units_are_split_where_tiles_begin(count, parts, longest, multiple):
    ranges = [split_units(count, parts, index) for index in range(parts)]
    assert [start for start, _ in ranges] == [0, *(stop for _, stop in ranges[:-1])]
    assert ranges[-1][1] == count and max(stop - start for start, stop in ranges) == longest
    assert all(start % multiple == 0 for start, _ in ranges)
