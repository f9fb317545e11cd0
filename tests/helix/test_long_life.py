"""A runtime that lives for long keeps nothing of the requests that ended."""

import gc
import sys
from pathlib import Path
from random import Random

import torch

from helix import LLM, HelixConfig, SamplingParams
from helix.config import CacheConfig, ModelConfig, RuntimeConfig, SchedulerConfig
from helix.metrics import Durations
from helix.request import Chunk, Sequence
from scripts.make_checkpoint import make_checkpoint


def test_5000_requests_leave_no_sequence_and_no_memory(tmp_path: Path) -> None:
    llm = LLM(
        HelixConfig(
            model=ModelConfig(path=str(make_checkpoint(tmp_path / "model", layers=1)), dtype="float32"),
            cache=CacheConfig(block_size=4, num_pages=64),
            scheduler=SchedulerConfig(max_batch=64, prefill_chunk=512),
            runtime=RuntimeConfig(device="cpu"),
        )
    )

    def compute(chunks: list[Chunk]) -> torch.Tensor:
        """Bring the page table up to date as a forward does, and compute nothing."""
        llm.runner.tables.update(chunks)
        return torch.zeros(sum(chunk.num_choices for chunk in chunks), llm.spec.vocab_size)

    llm.runner._local_logits = compute  # type: ignore[method-assign]
    random, settings, held = Random(1), SamplingParams(max_tokens=2), []
    front = llm.engine
    for turn in range(10):
        prompts = [random.choices(range(256), k=random.randint(1, 8)) for _ in range(500)]
        ended = sum(event.output is not None for event in llm.stream(prompts, settings))
        assert ended == 500 and not front.has_work
        del prompts
        gc.collect()
        if turn:  # the first fills the cache, the buckets and the buffers
            held.append(sys.getallocatedblocks())
    assert not [each for each in gc.get_objects() if type(each) is Sequence]
    assert held[-1] - held[0] < 2_000, held


def test_durations_take_the_same_room_however_many_there_are() -> None:
    durations, random = Durations(), Random(2)
    exact = sorted(random.lognormvariate(-4, 2) for _ in range(20_000))
    for each in exact:
        durations.add(each)
    durations.add(0.0, 5_000)
    assert len(durations) == 25_000 and len(durations._counts) < 2_500
    assert abs(durations.total_s - sum(exact)) < 1e-6 * sum(exact)
    for percent in (50, 90, 99):
        expected = exact[25_000 * percent // 100 - 5_000 - 1]
        assert abs(durations.percentile_s(percent) / expected - 1) < 0.006
    assert durations.cumulative([0.0, 1e9]) == [5_000, 25_000]
