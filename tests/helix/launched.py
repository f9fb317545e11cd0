"""Runs with and without the look-ahead: requests, and everything of them that a caller can see."""

from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

from helix import LLM, HelixConfig, Request, RequestOutput, SamplingParams
from helix.config import CacheConfig, ModelConfig, ParallelConfig, RuntimeConfig, SchedulerConfig
from helix.scheduler import Step

PROMPTS = [Random(index).choices(range(256), k=3 + 5 * index) for index in range(6)]
MAX_TOKENS = 24


def make_llm(
    path: Path, look_ahead: bool, *, kvp: int = 1, block_size: int = 4, num_pages: int = 256, max_batch: int = 8,
    prefill_chunk: int = 64, max_position: int | None = None, check_ranks: bool = False, device: str = "cpu",
    **cache: Any,
) -> LLM:  # fmt: skip
    return LLM(
        HelixConfig(
            model=ModelConfig(path=str(path), dtype="float32", max_position=max_position),
            parallel=ParallelConfig(kvp=kvp),
            cache=CacheConfig(block_size=block_size, num_pages=num_pages, **cache),
            scheduler=SchedulerConfig(max_batch=max_batch, prefill_chunk=prefill_chunk),
            runtime=RuntimeConfig(device=device, look_ahead=look_ahead, check_ranks=check_ranks),
        )
    )


def request(prompt: Sequence[int], num_tokens: int = MAX_TOKENS, **sampling: Any) -> Request:
    settings = {"ignore_eos": True, **sampling}
    return Request(prompt_token_ids=list(prompt), sampling=SamplingParams(max_tokens=num_tokens, **settings))


def stopping_requests(plain: Sequence[list[int]], texts: Sequence[str]) -> list[Request]:
    """Requests that all stop elsewhere, given what each prompt makes when nothing stops it."""
    text = texts[1]
    at = next(at for at in range(2, len(text) - 1) if text[at : at + 2].isascii())
    return [
        request(PROMPTS[0]),
        request(PROMPTS[1], stop=[text[at : at + 2]]),
        request(PROMPTS[2], stop_token_ids=[plain[2][3]]),
        request(PROMPTS[3], 1),
        request(PROMPTS[4], 9),
        request(PROMPTS[5], stop_token_ids=[plain[5][0], plain[5][12]]),
        request(PROMPTS[2], stop_token_ids=[plain[2][17]]),
    ]


def texts_of(llm: LLM, outputs: Sequence[RequestOutput]) -> list[str]:
    """The outputs' text, on any rank."""
    return [llm.tokenizer.decode(output.token_ids, skip_special_tokens=True) for output in outputs]


def first_new(token_ids: Sequence[int], least: int) -> int:
    """The first index, at least so large, of a token that does not come before it."""
    return next(at for at in range(least, len(token_ids)) if token_ids[at] not in token_ids[:at])


def events_of(llm: LLM, requests: Sequence[Request]) -> list[tuple[Any, ...]]:
    """Everything that a caller sees, in its order, and that nothing is held afterwards."""
    seen = []
    for event in llm.stream(requests):
        output = event.output
        end = None if output is None else (output.token_ids, output.text, output.finish_reason, output.cached_tokens)
        seen.append((event.index, event.token_ids, event.text, end))
    assert_idle(llm)
    return seen


def assert_idle(llm: LLM) -> None:
    cache = llm.engine.scheduler.cache
    assert not llm.engine.scheduler.has_work
    assert [cache.num_available(rank) for rank in range(llm.layout.kvp)] == [llm.num_pages] * llm.layout.kvp
    assert all(block.pins == 0 for block in cache.blocks.tree.walk())


def counters(llm: LLM) -> dict[str, Any]:
    """The metrics that are no times, and not how full graphs were: a row that is dropped later is no padding."""
    times = ("elapsed_s", "output_tokens_per_s", "ttft_ms", "ttl_ms", "padding_rows")
    metrics = llm.metrics
    counted = {name: value for name, value in metrics.as_dict().items() if name not in times}
    return counted | {"times": (len(metrics.ttft_s), len(metrics.ttl_s))}


def by_request(events: Sequence[tuple[Any, ...]]) -> list[list[tuple[Any, ...]]]:
    """The events of each request, in their order; what was cached is left out."""
    return [
        [(*event[:3], event[3] and event[3][:3]) for event in events if event[0] == index]
        for index in sorted({event[0] for event in events})
    ]


def note_ahead(llm: LLM) -> list[Step]:
    """The steps that are launched ahead from now on."""
    original, ahead = llm.engine.scheduler.look_ahead, []

    def look_ahead(launched: Step, **how: bool) -> Step | None:
        step = original(launched, **how)
        if step is not None:
            ahead.append(step)
        return step

    llm.engine.scheduler.look_ahead = look_ahead  # type: ignore[method-assign]
    return ahead
