"""The draft length of a batch size: the schedule's steps, what it falls back to, and every schedule that is refused."""

from typing import Any

import pytest

from helix.speculative.schedule import DraftLenSchedule


def test_a_key_means_up_to_this_batch_size() -> None:
    schedule = DraftLenSchedule(4, {4: 4, 8: 2, 32: 1})
    lengths = {number: schedule.draft_len(number) for number in (1, 4, 5, 8, 9, 32, 33)}
    assert lengths == {1: 4, 4: 4, 5: 2, 8: 2, 9: 1, 32: 1, 33: 0}


def test_keys_are_sorted_on_load_whatever_order_they_came_in() -> None:
    schedule = DraftLenSchedule(4, {32: 1, 4: 4, 8: 2})
    assert list(schedule.lengths or {}) == [4, 8, 32]
    assert [schedule.draft_len(number) for number in (4, 5, 9, 33)] == [4, 2, 1, 0]


@pytest.mark.parametrize("number", [1, 4, 5, 33, 10_000])
def test_without_a_schedule_every_batch_size_drafts_the_most(number: int) -> None:
    assert DraftLenSchedule(3).draft_len(number) == 3
    assert DraftLenSchedule(0).draft_len(number) == 0


def test_a_length_may_be_0_between_others_and_may_rise() -> None:
    schedule = DraftLenSchedule(8, {1: 0, 2: 8, 3: 0})
    assert [schedule.draft_len(number) for number in range(1, 5)] == [0, 8, 0, 0]


@pytest.mark.parametrize(
    ("max_draft_len", "lengths", "message"),
    [
        (4, {0: 4}, "has batch size 0, must be at least 1"),
        (4, {8: 1, -3: 4}, "has batch size -3, must be at least 1"),
        (4, {4: -1}, "[4] = -1 must be at least 0 (0 drafts nothing)"),
        (2, {8: 1, 4: 3}, "[4] = 3 exceeds speculative.max_draft_len = 2; lower it or raise that"),
        (4, {}, " is empty; give batch sizes and lengths such as {4: 4, 8: 2}, or leave it out"),
        (4, 4, " = 4 must map batch sizes to draft lengths, such as {4: 4, 8: 2}"),
        (4, {4.5: 1}, "has 4.5: 1; batch sizes and draft lengths must be integers"),
        (4, {"4": 1}, "has '4': 1; batch sizes and draft lengths must be integers"),
        (4, {4: True}, "has 4: True; batch sizes and draft lengths must be integers"),
        (4, {4: None}, "has 4: None; batch sizes and draft lengths must be integers"),
    ],
)
def test_an_invalid_schedule_is_refused_by_name(max_draft_len: int, lengths: Any, message: str) -> None:
    with pytest.raises(ValueError) as refused:
        DraftLenSchedule(max_draft_len, lengths)
    assert str(refused.value).startswith("speculative.draft_len_schedule") and str(refused.value).endswith(message)


def test_the_longer_the_sequences_the_fewer_drafts_and_the_lower_limit_counts() -> None:
    schedule = DraftLenSchedule(4, {2: 4, 8: 2}, {4096: 1, 1024: 3})
    lengths = {(number, context): schedule.draft_len(number, context) for number in (2, 3) for context in (1024, 1025)}
    assert lengths == {(2, 1024): 3, (2, 1025): 1, (3, 1024): 2, (3, 1025): 1}
    assert schedule.draft_len(2, 4097) == 0 and DraftLenSchedule(4, None, {8: 1}).draft_len(99, 8) == 1
    assert schedule.reachable([1, 2, 4, 8, 16]) == [(1, 1), (1, 3), (2, 1), (2, 3), (4, 1), (4, 2), (8, 1), (8, 2)]
    with pytest.raises(ValueError, match=r"speculative.draft_len_by_context\[8\] = 5 exceeds"):
        DraftLenSchedule(4, None, {8: 5})


def test_a_negative_length_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="speculative.max_draft_len = -1 must be at least 0"):
        DraftLenSchedule(-1)


def test_a_bucket_reaches_the_lengths_of_the_batch_sizes_that_it_serves() -> None:
    buckets = [1, 2, 4, 8, 16, 32, 64]
    pairs = [(1, 4), (2, 4), (4, 4), (8, 2), (16, 1), (32, 1)]
    assert DraftLenSchedule(4, {4: 4, 8: 2, 32: 1}).reachable(buckets) == pairs
    assert DraftLenSchedule(4, {5: 4, 6: 2}).reachable(buckets) == [(1, 4), (2, 4), (4, 4), (8, 2), (8, 4)]
    assert DraftLenSchedule(3).reachable([1, 2, 3]) == [(1, 3), (2, 3), (3, 3)]
    assert DraftLenSchedule(0).reachable(buckets) == []
