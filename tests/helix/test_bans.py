"""Which tokens min_tokens and bad words rule out."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from helix.bans import banned as banned_of
from helix.request import Chunk, RequestOutput, Sequence
from helix.sampler import Sampler
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


@pytest.mark.parametrize("settings", [{"min_tokens": 3}, {"logit_bias": {3: -1.0}}, {"min_tokens": 3, "top_p": 0.5}])
def test_logits_have_one_dtype_on_ranks_with_and_without_the_tokens_in_question(settings: dict[str, Any]) -> None:
    """Else ranks would gather slices of different sizes."""
    seq = sequence([4], temperature=1.0, **settings)
    seq.batch_slot = 0
    logits = torch.zeros((1, 10), dtype=torch.bfloat16)
    changed = []
    for vocab in ((0, 10), (10, 20)):
        decoder: Any = SimpleNamespace(
            part=SimpleNamespace(vocab=vocab), spec=SimpleNamespace(vocab_size=20),
            grid=SimpleNamespace(world_group=None, world_size=2), device=torch.device("cpu"),
        )  # fmt: skip
        sampler = Sampler(decoder, max_batch=1, eos_token_ids=[3])
        choices = sampler.prepare([Chunk(seq, 3, 4)], torch.zeros(1, dtype=torch.int64))
        changed.append(sampler._adjusted(logits, choices))
    assert changed[0].dtype == changed[1].dtype == torch.float32
    assert changed[0][0].tolist() == [0, 0, 0, -math.inf if "min_tokens" in settings else -1, *[0] * 6]
    assert changed[1][0].tolist() == [0] * 10
