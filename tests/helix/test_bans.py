"""Which tokens min_tokens and bad words rule out."""

from typing import Any

import pytest

from helix.bans import banned as banned_of
from helix.request import Chunk, RequestOutput, Sequence
from helix.sampling import SamplingParams


def sequence(output: list[int], bad: tuple[tuple[int, ...], ...] = (), **settings: Any) -> Sequence:
    params = SamplingParams(bad_words=["x"] * bool(bad), **settings)
    return Sequence(
        index=0, token_ids=[1, 2, 3, *output], prompt_len=3, sampling=params, seed=0, max_len=99,
        output=RequestOutput(None), bad_word_ids=bad,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("output", "drafts", "banned"),
    [([], (), [7, 9]), ([4], (), [7, 9]), ([4], (5,), []), ([4, 5], (), []), ([4, 5, 6], (), [])],
)
def test_what_ends_a_sequence_is_ruled_out_before_min_tokens(
    output: list[int], drafts: tuple[int, ...], banned: list[int]
) -> None:
    seq = sequence(output, min_tokens=2, stop_token_ids=[9], logit_bias={9: 5.0, 4: -1.0})
    chunk = Chunk(seq, 2 + len(output), 3 + len(output), drafts)
    assert banned_of(chunk, len(drafts), [7]) == [(token, -1) for token in banned]


@pytest.mark.parametrize(
    ("output", "drafts", "banned"),
    [([], (), [8]), ([5], (), [6, 8]), ([5, 6], (), [7, 8]), ([5], (6,), [7, 8]), ([4, 6], (), [8]), ([6], (), [8])],
)
def test_the_last_token_of_a_bad_word_is_ruled_out_behind_the_others(
    output: list[int], drafts: tuple[int, ...], banned: list[int]
) -> None:
    """The prompt's tokens 1, 2, 3 count for nothing."""
    seq = sequence(output, ((5, 6), (5, 6, 7), (8,), (3, 4)))
    chunk = Chunk(seq, 2 + len(output), 3 + len(output), drafts)
    assert banned_of(chunk, len(drafts), ()) == [(token, -1) for token in banned]


@pytest.mark.parametrize(
    ("output", "banned"),
    [([], [(6, 5), (8, -1)]), ([5], [(6, 5), (7, 6), (8, -1)]), ([4], [(6, 5), (8, -1)])],
)
def test_what_bad_words_need_of_the_last_token_is_left_to_the_device(
    output: list[int], banned: list[tuple[int, int]]
) -> None:
    seq = sequence(output, ((5, 6), (5, 6, 7), (8,), (3, 4)))
    ahead = Chunk(seq, 3 + len(output), 4 + len(output))
    assert sorted(banned_of(ahead, 0, ())) == sorted([*banned, (4, 3)])
