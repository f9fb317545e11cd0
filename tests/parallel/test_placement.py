import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from parallel.placement import BlockCyclic

placements = st.builds(BlockCyclic, st.sampled_from([1, 2, 4, 16, 64]), st.integers(1, 16))


def held_by_counting(place: BlockCyclic, length: int, rank: int, first_owner: int) -> list[int]:
    """The tokens of a rank, found one position at a time."""
    return [p for p in range(length) if (p // place.block_size + first_owner) % place.kvp == rank]


def test_worked_example_token_by_token():
    """Blocks of 100 on 4 ranks, a prompt of 400 tokens, 400 decoded; 100 is not a power of two, so blocks of 4 x 25."""
    place = BlockCyclic(4, 4)
    scale = 25  # every token of the small case stands for 25 neighbours of the example
    held: list[list[int]] = [[], [], [], []]
    for position in range(16):  # the prompt, at once
        held[place.owner(position)].append(position)
    for position in range(16, 32):  # decode, one at a time; each rank's length is a closed form at every step
        held[place.owner(position)].append(position)
        assert [place.local_len(position + 1, rank) for rank in range(4)] == [len(h) for h in held]
        assert place.local_position(position) == len(held[place.owner(position)]) - 1
    ranges = [(0, 100, 400, 500), (100, 200, 500, 600), (200, 300, 600, 700), (300, 400, 700, 800)]
    for rank, (a, b, c, d) in enumerate(ranges):
        expected = [*range(a // scale, b // scale), *range(c // scale, d // scale)]
        assert held[rank] == expected


@given(placements, st.integers(0, 500), st.integers(0, 15), st.integers(0, 15))
def test_closed_forms_agree_with_counting(place, length, rank, first_owner):
    rank, first_owner = rank % place.kvp, first_owner % place.kvp
    held = held_by_counting(place, length, rank, first_owner)
    assert place.local_len(length, rank, first_owner) == len(held)
    assert place.num_local_blocks(length, rank, first_owner) == len({p // place.block_size for p in held})
    assert [place.local_position(p) for p in held] == list(range(len(held)))


@given(placements, st.lists(st.integers(0, 10**7), min_size=1, max_size=20), st.integers(0, 15))
def test_arrays_and_integers_agree(place, lengths, first_owner):
    array = np.array(lengths, np.int64)
    for rank in range(place.kvp):
        local = place.local_len(array, rank, first_owner)
        assert local.tolist() == [place.local_len(n, rank, first_owner) for n in lengths]
    assert place.owner(array, first_owner).tolist() == [place.owner(p, first_owner) for p in lengths]
    assert place.local_position(array).tolist() == [place.local_position(p) for p in lengths]


@given(placements, st.integers(0, 10**7), st.integers(0, 15))
def test_lengths_add_up_and_stay_within_a_block(place, length, first_owner):
    local = [place.local_len(length, rank, first_owner) for rank in range(place.kvp)]
    assert sum(local) == length
    assert max(local) - min(local) <= place.block_size


def test_more_ranks_than_blocks_leaves_shards_empty():
    assert [BlockCyclic(16, 8).local_len(20, rank) for rank in range(8)] == [16, 4, 0, 0, 0, 0, 0, 0]


@pytest.mark.parametrize("block_size", [0, 3, 100, 512, -1])
def test_block_sizes_that_are_no_power_of_two_are_refused(block_size):
    with pytest.raises(ValueError, match=f"cache.block_size = {block_size} must be a power of two"):
        BlockCyclic(block_size, 2)


def test_kvp_below_one_is_refused():
    with pytest.raises(ValueError, match="parallel.kvp = 0 must be at least 1"):
        BlockCyclic(16, 0)
