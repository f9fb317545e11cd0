"""Pages are taken in the order in which they became free, and a table knows which of them lie on which rank."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helix.cache.control import CacheControl
from helix.cache.keys import BlockKeys
from helix.cache.pool import BlockTable, PagePool
from parallel.placement import BlockCyclic


@given(
    kvp=st.integers(1, 8),
    block_size=st.sampled_from([1, 2, 16, 256]),
    first_owner=st.integers(0, 7),
    blocks=st.integers(0, 40),
    start=st.integers(0, 3),
)
def test_local_pages_are_those_of_the_blocks_that_the_rank_owns(
    kvp: int, block_size: int, first_owner: int, blocks: int, start: int
) -> None:
    place, first_owner = BlockCyclic(block_size, kvp), first_owner % kvp
    table = BlockTable(first_owner, [1000 + block for block in range(blocks)])
    for rank in range(kvp):
        mine = [1000 + block for block in range(blocks) if place.owner(block * block_size, first_owner) == rank]
        assert table.local_pages(rank, kvp) == mine
        assert table.local_pages(rank, kvp, start=start) == mine[start:]
        assert len(mine) == place.num_local_blocks(blocks * block_size, rank, first_owner)


@given(
    kvp=st.integers(1, 8),
    block_size=st.sampled_from([1, 2, 16, 256]),
    num_pages=st.integers(1, 6),
    blocks=st.floats(0.01, 50),
)
def test_a_sequence_fits_exactly_when_empty_pools_can_hold_it(
    kvp: int, block_size: int, num_pages: int, blocks: float
) -> None:
    length = max(1, int(blocks * block_size))
    cache = CacheControl(BlockCyclic(block_size, kvp), num_pages)
    table = cache.admit(cache.claim(BlockKeys([0] * length, block_size)), length)
    assert cache.fits(length) == (table is not None)


def test_the_page_that_has_been_free_longest_is_taken_first() -> None:
    pool = PagePool(2, 3)
    assert [pool.take(1) for _ in range(3)] == [0, 1, 2]
    pool.give(1, 2)
    pool.give(1, 0)
    assert (pool.free_pages(0), pool.free_pages(1)) == ([0, 1, 2], [2, 0])
    assert (pool.num_free(1), pool.take(1)) == (2, 2)


def test_a_released_table_holds_nothing_and_gives_nothing_back_twice() -> None:
    cache = CacheControl(BlockCyclic(16, 2), 3)
    table = cache.admit(cache.claim(BlockKeys([0] * 70, 16)), 70)
    assert table is not None
    assert [cache.num_available(rank) for rank in range(2)] == [0, 1]
    for _ in range(2):
        cache.release(table, 0)
        assert (table.pages, [cache.num_available(rank) for rank in range(2)]) == ([], [3, 3])
    assert table.keys is None, "a runner keeps the last table of every slot, but not its tokens"


@pytest.mark.parametrize("kvp", [1, 2, 4, 8])
def test_growth_is_all_or_nothing(kvp: int) -> None:
    cache = CacheControl(BlockCyclic(4, kvp), 2)
    table = cache.admit(cache.claim(BlockKeys([0] * 4, 4)), 4)
    assert table is not None
    assert not cache.extend(table, 8 * kvp + 1)
    assert len(table.pages) == 1
    assert cache.extend(table, 8 * kvp)
    assert len(table.pages) == 2 * kvp
