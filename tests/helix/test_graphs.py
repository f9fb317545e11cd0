"""A captured decode step against the same step run eagerly, and against itself."""

import gc

import pytest
import torch

from helix.config import CacheConfig, HelixConfig, ModelConfig, ParallelConfig, SchedulerConfig
from helix.graphs import capture
from helix.llm import LLM
from helix.request import Chunk
from helix.sampling import SamplingParams
from scripts.make_checkpoint import make_checkpoint


def body(path, kvp, tpa, dtype):
    llm = LLM(
        HelixConfig(
            model=ModelConfig(path=path, dtype=dtype),
            parallel=ParallelConfig(kvp=kvp, tpa=tpa),
            cache=CacheConfig(block_size=64, num_pages=40),
            scheduler=SchedulerConfig(max_batch=5),
        )
    )
    engine, runner = llm.engine, llm.runner
    prompts = [list(range(3, 3 + length)) for length in (1, 70, 129, 300)]
    stream = llm.stream(prompts, SamplingParams(max_tokens=40, ignore_eos=True))
    while len(engine.scheduler.running) < len(prompts) or any(
        seq.num_computed < seq.prompt_len for seq in engine.scheduler.running
    ):
        next(stream)
    graphs = runner._graphs
    assert graphs is not None
    chunks = [Chunk(seq, len(seq.token_ids) - 1, len(seq.token_ids)) for seq in engine.scheduler.running]
    for seq in engine.scheduler.running:
        assert engine.scheduler.cache.extend(seq.blocks, len(seq.token_ids))
    results = []
    for _ in range(3):  # the same step again and again: it overwrites its own K and V
        tokens, fault = runner.launch(chunks).wait()
        results.append((tokens, graphs._last.local_logits.clone()))
        assert fault == 0
    with torch.inference_mode():
        graphs._step(graphs._last)  # eagerly, on the inputs that the replay left
    eager_tokens = graphs._last.output[: len(chunks)].tolist()
    results.append((eager_tokens, graphs._last.local_logits.clone()))
    for tokens, logits in results[1:]:
        assert tokens == results[0][0]
        assert torch.equal(logits[: len(chunks)], results[0][1][: len(chunks)])
    stream.close()
    return results[0][0]


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("family", "kvp", "tpa"),
    [
        *(
            (family, *layout)
            for family in ("llama", "qwen3_moe")
            for layout in ((1, 1), (2, 1), (2, 2), (4, 1), (1, 4))
        ),
        *(("deepseek_v3", *layout) for layout in ((1, 1), (2, 1), (4, 1), (1, 4))),
    ],
)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_replay_equals_eager_and_itself_bit_for_bit(ranks, tmp_path, family, kvp, tpa, dtype):
    pool = ranks(kvp * tpa)
    if pool.device_type != "cuda":
        pytest.skip(f"needs {kvp * tpa} GPUs")
    make_checkpoint(tmp_path / "model", family=family, head_dim=64)
    tokens = pool.run(body, str(tmp_path / "model"), kvp, tpa, dtype)
    assert all(each == tokens[0] for each in tokens)


@pytest.mark.gpu
def test_nothing_is_collected_while_a_step_is_captured():
    x, collects = torch.zeros(1, device="cuda"), []

    def step():
        collects.append(gc.isenabled())
        x.add_(1)

    capture(torch.cuda.CUDAGraph(), None, step)
    assert collects == [True, False] and gc.isenabled()
