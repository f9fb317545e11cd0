"""Prompt look-up finds what a scan of the whole sequence would, as the sequence grows, and reads few tokens."""

from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helix.request import RequestOutput, Sequence
from helix.sampling import SamplingParams
from helix.speculative import ngram
from helix.speculative.ngram import NgramDrafter, NgramIndex


def scan(ids: list[int], ngram_min: int, ngram_max: int, limit: int) -> list[int]:
    """The definition: try the longest suffix first, and the last place before the end first."""
    for n in range(ngram_max, ngram_min - 1, -1):
        for end in range(len(ids) - 1, n - 1, -1):
            if ids[end - n : end] == ids[-n:]:
                return repeat(ids, end, limit)
    return []


def repeat(ids: list[int], end: int, limit: int) -> list[int]:
    grown = list(ids)
    for _ in range(limit):
        grown.append(grown[len(grown) - (len(ids) - end)])
    return grown[len(ids) :]


def sequence(token_ids: list[int]) -> Sequence:
    return Sequence(
        index=0, token_ids=token_ids, prompt_len=len(token_ids), sampling=SamplingParams(), seed=0, max_len=1 << 30,
        output=RequestOutput(None),
    )  # fmt: skip


@given(
    st.lists(st.integers(0, 3), min_size=1, max_size=40),
    st.lists(st.integers(0, 3), max_size=20),
    st.integers(1, 4),
    st.integers(0, 3),
    st.integers(1, 8),
)
def test_a_look_up_finds_what_a_scan_of_all_tokens_finds_at_every_length(
    start: list[int], more: list[int], ngram_min: int, extra: int, limit: int
) -> None:
    ids = list(start)
    index = NgramIndex(ids, ngram_min, ngram_min + extra)
    assert index.find(limit) == scan(ids, ngram_min, ngram_min + extra, limit)
    for token in more:
        ids.append(token)
        if len(ids) % 3:  # drafts are not asked for at every step
            assert index.find(limit) == scan(ids, ngram_min, ngram_min + extra, limit)


def test_the_longest_suffix_wins_over_a_later_shorter_one_and_the_latest_of_equals() -> None:
    assert NgramIndex([1, 2, 3, 9, 2, 3, 8, 1, 2, 3], 1, 3).find(1) == [9]
    assert NgramIndex([1, 2, 3, 9, 2, 3, 8, 1, 2, 3], 1, 2).find(1) == [8]
    assert NgramIndex([3, 9, 3, 8, 3], 1, 1).find(2) == [8, 3]


def test_shorter_suffixes_than_the_shortest_are_not_looked_for() -> None:
    assert NgramIndex([1, 2, 3, 4, 9, 3], 2, 4).find(4) == []
    assert NgramIndex([1, 2, 3, 4, 9, 3], 1, 4).find(4) == [4, 9, 3, 4]


def test_what_repeats_goes_on_repeating_past_the_end() -> None:
    assert NgramIndex([7, 7, 7], 1, 3).find(4) == [7, 7, 7, 7]
    assert NgramIndex([1, 2, 3, 1, 2, 3, 1, 2], 2, 3).find(5) == [3, 1, 2, 3, 1]


@pytest.mark.parametrize("ids", [[], [5], [1, 2]])
def test_short_sequences_have_no_drafts(ids: list[int]) -> None:
    assert NgramIndex(ids, 1, 4).find(4) == []


def test_each_sequence_has_its_own_index_until_it_is_dropped() -> None:
    drafter = NgramDrafter(1, 3)
    one, other = sequence([1, 2, 1]), sequence([1, 3, 1])
    assert drafter.draft([one, other], [2, 1]) == [[2, 1], [3]]
    assert drafter.draft([other, one], [0, 1]) == [[], [2]]
    one.token_ids.append(3)
    assert drafter.draft([one], [4]) == [[]]
    drafter.drop(one)
    drafter.drop(one)
    assert drafter.draft([one, other], [1, 1]) == [[], [3]]
    assert set(drafter._indices) == {one, other}


def test_runs_of_equal_hashes_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ngram, "_MULTIPLIER", 0)
    rng = Random(2)
    for _ in range(100):
        ids = rng.choices(range(3), k=rng.randint(1, 40))
        assert NgramIndex(ids, 1, 3).find(4) == scan(ids, 1, 3, 4)


class Counted(list[int]):
    """A list that counts the tokens that are read from it."""

    num_read = 0

    def __getitem__(self, at: Any) -> Any:
        found = super().__getitem__(at)
        self.num_read += len(found) if isinstance(at, slice) else 1
        return found


def test_a_look_up_among_a_hundred_thousand_tokens_reads_a_few() -> None:
    rng = Random(1)
    ids = Counted(rng.choices(range(150_000), k=100_000))
    index = NgramIndex(ids, 2, 4)
    steps = 200
    for kind in ("nothing found", "found in the prompt"):
        ids.num_read = 0
        for step in range(steps):
            ids.append(rng.randrange(150_000) if kind == "nothing found" else ids[1000 + step])
            found = index.find(4)
        assert ids.num_read < 40 * steps, kind
    assert found == ids[1000 + steps : 1004 + steps]
