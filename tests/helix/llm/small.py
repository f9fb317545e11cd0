"""A small LLM in a world of one, and what its tests say of it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from helix import LLM, HelixConfig, RequestOutput, SamplingParams
from helix.config import CacheConfig, ModelConfig, ParallelConfig, RuntimeConfig, SchedulerConfig

VOCAB = 320
BLOCK = 16
PROMPTS = [[7 * i % 256 for i in range(40)], [5], [9, 8, 7] * 4, [200, 100, 50, 25], [31] * 17]


def make_llm(
    path: Path, *, num_pages: int = 64, max_batch: int = 8, kvp: int = 1, check: bool = False, **model: Any
) -> LLM:
    """Steps are small, so that prompts come in chunks and sequences share them."""
    return LLM(
        HelixConfig(
            model=ModelConfig(path=str(path), dtype="float32", **model),
            parallel=ParallelConfig(kvp=kvp),
            cache=CacheConfig(block_size=BLOCK, num_pages=num_pages),
            scheduler=SchedulerConfig(max_batch=max_batch, prefill_chunk=32),
            runtime=RuntimeConfig(device="cpu", check_ranks=check),
        )
    )


def assert_idle(llm: LLM) -> None:
    scheduler = llm.engine.scheduler
    assert not scheduler.has_work
    kvp = llm.layout.kvp
    assert [scheduler.cache.num_available(rank) for rank in range(kvp)] == [llm.num_pages] * kvp


def greedy(num_tokens: int, **settings: Any) -> SamplingParams:
    return SamplingParams(max_tokens=num_tokens, ignore_eos=True, **settings)


def drawn(num_tokens: int, seed: int | None, **settings: Any) -> SamplingParams:
    return greedy(num_tokens, temperature=0.8, seed=seed, **settings)


def told(outputs: Sequence[RequestOutput]) -> list[tuple[Any, ...]]:
    """What a caller may rely on to the letter, whatever was in the cache."""
    return [(o.id, o.token_ids, o.text, o.finish_reason, o.prompt_tokens, o.error) for o in outputs]


def one(llm: LLM, prompt: Any, sampling: SamplingParams | None = None) -> RequestOutput:
    (output,) = llm.generate([prompt], sampling)
    return output
