"""Runs with settings drawn at random have the tokens, text and ends of a plain run, one request at a time.

The suite takes a few draws; ``pytest -m slow`` takes as many as HELIX_RANDOM_RUNS says, 40 unless it does.
"""

import os
from collections.abc import Callable
from functools import cache
from random import Random
from typing import Any

import pytest

from helix.cache.retention import Retention
from helix.config import DraftModelConfig
from helix.llm import LLM
from helix.request import Request, RequestOutput
from helix.sampling import SamplingParams
from scripts.make_checkpoint import make_checkpoint
from tests.helix.speculative.world import VOCAB, make_llm

SLOW_RUNS = int(os.environ.get("HELIX_RANDOM_RUNS", "40"))
BOUNDED = ("gemma3", "qwen3_next", "gpt_oss", "qwen3_5", "mistral")  # windows and states, which begin at checkpoints
Plain = Callable[[Request], RequestOutput]


@pytest.fixture(scope="session")
def model_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """A small model of a family; "draft" is one to draft for others."""
    folder = tmp_path_factory.mktemp("random_runs")

    @cache
    def make(name: str) -> str:
        sizes: dict[str, Any] = {"layers": 2, "family": name} if name in BOUNDED else {"layers": 1}
        sizes |= {"window": 40} if name in ("gemma3", "gpt_oss", "mistral") else {}
        return str(make_checkpoint(folder / name, seed=int(name == "draft"), **sizes))

    return make


@pytest.fixture(scope="session")
def plain_of(model_of: Callable[[str], str]) -> Callable[[str], Plain]:
    """Answer one request at a time by a model, without anything that a run may add."""

    @cache
    def plain(name: str) -> Plain:
        llm = make_llm(model_of(name), look_ahead=False, max_batch=1, prefill_chunk=256, cache={"reuse": False})
        return lambda request: llm.generate([request])[0]

    return plain


def draw_settings(rng: Random, draft_model: str, longest: int) -> dict[str, Any]:
    block_size = rng.choice([1, 2, 4, 8, 16, 32])
    speculative: dict[str, Any] = {}
    if rng.random() < 0.6:
        speculative["method"] = rng.choice(["ngram", "draft_model"])
        speculative["max_draft_len"] = rng.randint(1, 4)
        if speculative["method"] == "draft_model":
            speculative["model"] = DraftModelConfig(path=draft_model)
        if rng.random() < 0.5:
            most = speculative["max_draft_len"]
            speculative["draft_len_schedule"] = {1: most, 2: rng.randint(1, most), 4: 1}
    return {
        "block_size": block_size,
        "num_pages": -(-longest // block_size) + rng.randint(0, 2 * longest // block_size),
        "max_batch": rng.randint(1, 6),
        "prefill_chunk": rng.randint(1, 64),
        "graphs": rng.random() < 0.5,
        "look_ahead": rng.random() < 0.7,
        "speculative": speculative,
        "cache": {
            "reuse": (reuse := rng.random() < 0.8),
            "partial_reuse": rng.random() < 0.7,
            "host_pages": rng.choice([0, 8, 64]) if reuse else 0,
            "checkpoint_every": rng.choice([None, 64, 128]),
        },
    }


def draw_retention(rng: Random) -> tuple[Retention, ...]:
    if rng.random() < 0.7:
        return ()
    return (
        Retention(
            start=0, end=rng.choice([5, None]), priority=rng.choice([0, 80]), duration_s=rng.choice([None, 0.01])
        ),
    )


def draw_requests(rng: Random, longest: int) -> list[Request]:
    beginnings = [[rng.randrange(256) for _ in range(rng.randint(1, longest - 70))] for _ in range(3)]
    requests = []
    for index in range(rng.randint(4, 14)):
        own = [rng.randrange(256) for _ in range(rng.randint(1, 30))]
        if rng.random() < 0.4:  # something to look up
            own = own[:5] * 4
        sampling: dict[str, Any] = {"max_tokens": rng.randint(1, 30), "ignore_eos": rng.random() < 0.5}
        if rng.random() < 0.5:
            sampling |= {"temperature": rng.choice([0.5, 1.0, 1.5]), "seed": index}
            sampling |= rng.choice([{}, {"top_p": 0.8}, {"top_k": 20}, {"min_p": 0.05}, {"top_k": 50, "top_p": 0.9}])
        if rng.random() < 0.3:
            sampling |= {"frequency_penalty": 0.7, "presence_penalty": 0.2, "repetition_penalty": 1.3}
        if rng.random() < 0.3:
            sampling |= rng.choice(
                [{"stop": ["a", "e "]}, {"stop_token_ids": [rng.randrange(VOCAB) for _ in range(9)]}]
            )
        if rng.random() < 0.2:
            sampling["logprobs"] = 2
        requests.append(
            Request(
                prompt_token_ids=rng.choice(beginnings) + own,
                sampling=SamplingParams(**sampling),
                cache_salt=rng.choice(["", "", "other"]),
                retention=draw_retention(rng),
            )
        )
    return requests


def told(output: RequestOutput) -> tuple[Any, ...]:
    tops = None if output.logprobs is None else [sorted(each.top) for each in output.logprobs]
    return output.token_ids, output.text, output.finish_reason, output.error, tops


def compare(seed: int, name: str, model_of: Callable[[str], str], plain: Plain) -> None:
    rng, bounded = Random(seed), name in BOUNDED
    longest = 240 if bounded else 120  # tokens of a request
    settings, requests = draw_settings(rng, model_of("draft"), longest), draw_requests(rng, longest)
    if not (bounded and settings["cache"]["reuse"]):  # nothing keeps any
        settings["cache"]["checkpoint_every"] = None
    if name == "mistral":  # no page of full layers that the host could hold
        settings["cache"]["host_pages"] = 0
    llm: LLM = make_llm(model_of(name), **settings)
    for _ in range(1 + bounded):  # the second finds what the first left
        if rng.random() < 0.4:  # one that is left early, at any moment
            stream = llm.stream(requests)
            for _ in range(rng.randint(1, 12)):
                next(stream, None)
            stream.close()
        outputs = llm.generate(requests)
        for request, output in zip(requests, outputs, strict=True):
            assert told(output) == told(plain(request)), (seed, settings, request)
    control = llm.engine.scheduler.cache
    assert control.num_available(0) == llm.num_pages
    assert all(block.pins == 0 for block in control.blocks.tree.walk())


@pytest.mark.parametrize("seed", range(4))
def test_settings_change_no_token(seed: int, model_of: Any, plain_of: Any) -> None:
    compare(seed, "llama", model_of, plain_of("llama"))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4, 4 + SLOW_RUNS))
def test_many_settings_change_no_token(seed: int, model_of: Any, plain_of: Any) -> None:
    name = ("llama", *BOUNDED)[seed % (1 + len(BOUNDED))]
    compare(seed, name, model_of, plain_of(name))
