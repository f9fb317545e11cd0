"""What the runtime adds to the cache: a failed step leaves nothing behind, and listeners come and go."""

import pytest

from helix.cache.events import CacheEvent
from helix.config import CacheConfig, HelixConfig, ModelConfig, RuntimeConfig
from helix.llm import LLM
from helix.sampling import SamplingParams
from scripts.make_checkpoint import make_checkpoint

PROMPT = list(range(40))
SAMPLING = SamplingParams(max_tokens=4, ignore_eos=True)


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    path = make_checkpoint(tmp_path_factory.mktemp("engine") / "model", layers=1)
    return LLM(
        HelixConfig(
            model=ModelConfig(path=str(path)),
            cache=CacheConfig(block_size=8, num_pages=32),
            runtime=RuntimeConfig(device="cpu"),
        )
    )


def test_after_a_step_that_failed_nothing_is_cached(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = llm.generate([PROMPT], SAMPLING)[0].token_ids
    [output] = llm.generate([PROMPT], SAMPLING)
    assert (output.cached_tokens, output.token_ids) == (39, expected)

    def fail(*_: object) -> None:
        raise RuntimeError("the device is gone")

    with monkeypatch.context() as patch:
        patch.setattr(llm.runner, "run", fail)
        patch.setattr(llm.runner, "launch", fail)
        with pytest.raises(RuntimeError, match="the device is gone"):
            llm.generate([PROMPT], SAMPLING)
    cache = llm.engine.scheduler.cache
    assert cache.occupancy() == [{"free": 32, "cached": 0, "held": 0, "host": 0}]
    [output] = llm.generate([PROMPT], SAMPLING)
    assert (output.cached_tokens, output.token_ids) == (0, expected)


def test_a_stream_that_is_left_early_keeps_what_it_computed(llm: LLM) -> None:
    prompt = PROMPT[::-1]
    stream = llm.stream([prompt], SAMPLING)
    next(stream)
    stream.close()
    assert llm.generate([prompt], SAMPLING)[0].cached_tokens == 39


def test_listeners_hear_what_is_there_first_and_nothing_after_they_left(llm: LLM) -> None:
    llm.generate([PROMPT], SAMPLING)
    early: list[CacheEvent] = []
    llm.listen(early.append)
    known = {event.hash for event in early}
    assert {event.event for event in early} == {"stored"} and len(known) == len(early)
    llm.generate([[7] * 20], SAMPLING)
    late: list[CacheEvent] = []
    llm.listen(late.append)
    assert {event.hash for event in early} == {event.hash for event in late} > known
    for listener in (early.append, late.append):
        llm.unlisten(listener)
    count = len(early)
    llm.generate([[9] * 20], SAMPLING)
    assert len(early) == count


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"host_pages": -1}, "cache.host_pages = -1 must be at least 0"),
        ({"host_pages": 4, "reuse": False}, "cache.host_pages = 4 needs cache.reuse=true; set it, or host_pages=0"),
        (
            {"checkpoint_every": 64, "reuse": False},
            "cache.checkpoint_every = 64 needs cache.reuse=true; set it, or leave",
        ),
        ({"offload_min_priority": 101}, "cache.offload_min_priority = 101 must lie in 0..100"),
    ],
)
def test_cache_settings_that_cannot_be_are_refused(settings: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CacheConfig(**settings)  # type: ignore[arg-type]
