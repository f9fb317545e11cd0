"""Layers with a window: transformers' tokens in every layout, and memory for the window alone."""

import pytest
import torch

from helix.cache.windows import WindowPages, WindowTable, pages_for
from helix.config import CacheConfig, HelixConfig, ModelConfig, ParallelConfig, RuntimeConfig, SchedulerConfig
from helix.llm import LLM
from helix.sampling import SamplingParams
from scripts.make_checkpoint import make_checkpoint

WINDOW, MAX_TOKENS = 24, 40
LENGTHS = (1, 17, 24, 25, 70, 131)
TIE = 2e-3


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """``models(family)``: a checkpoint with windows, prompts, and transformers' tokens with the gaps to the second."""
    from transformers import AutoModelForCausalLM

    made = {}

    def of(family):
        if family in made:
            return made[family]
        path = tmp_path_factory.mktemp("windows") / family
        make_checkpoint(path, family=family, window=WINDOW, kv_heads=4, layers=3)
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        generator = torch.Generator().manual_seed(1)
        prompts = [torch.randint(0, 256, (n,), generator=generator).tolist() for n in LENGTHS]
        expected = []
        for prompt in prompts:
            ids = torch.tensor([prompt])
            out = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=MAX_TOKENS, do_sample=False,
                eos_token_id=None, pad_token_id=0, return_dict_in_generate=True, output_logits=True,
            )  # fmt: skip
            best = torch.stack(out.logits)[:, 0].topk(2, -1).values
            gaps = (best[:, 0] - best[:, 1]).tolist()
            expected.append((out.sequences[0, len(prompt) :].tolist(), gaps))
        made[family] = str(path), prompts, expected
        return made[family]

    return of


def generate_body(path, kvp, tpa, runs, prompts):
    outputs = []
    for block_size, prefill_chunk, max_batch, more in runs:
        config = HelixConfig(
            model=ModelConfig(path=path, dtype="float32"),
            parallel=ParallelConfig(kvp=kvp, tpa=tpa, ep=more.get("ep", 1)),
            cache=CacheConfig(block_size=block_size, num_pages=more.get("num_pages", 2048 // block_size)),
            scheduler=SchedulerConfig(max_batch=max_batch, prefill_chunk=prefill_chunk),
            runtime=RuntimeConfig(check_ranks=more.get("check_ranks", False)),
        )
        llm = LLM(config)
        windows = llm.engine.scheduler.windows
        total = windows.num_free
        made = llm.generate([list(p) for p in prompts], SamplingParams(max_tokens=MAX_TOKENS, ignore_eos=True))
        assert windows.num_free == total, f"window pages were lost: {windows.num_free} of {total}"
        if "num_pages" in more:
            assert llm.metrics.cache.preemptions
        outputs.append([output.token_ids for output in made])
    return outputs


@pytest.mark.parametrize(
    ("family", "kvp", "tpa", "runs"),
    [
        ("mistral", 1, 1, [(16, 2048, 8, {}), (1, 7, 3, {})]),
        ("qwen3", 1, 1, [(64, 50, 4, {}), (4, 9, 8, {"num_pages": 60})]),
        ("mistral", 2, 1, [(16, 33, 8, {})]),
        ("qwen3", 4, 1, [(16, 33, 4, {"check_ranks": True}), (1, 11, 8, {})]),
        ("qwen2", 2, 2, [(4, 20, 8, {})]),
        ("qwen3", 2, 4, [(16, 40, 8, {})]),
        ("mistral", 1, 8, [(16, 2048, 8, {})]),
        ("gpt_oss", 1, 1, [(16, 2048, 8, {}), (1, 7, 3, {})]),
        ("gpt_oss", 4, 1, [(16, 33, 4, {"check_ranks": True, "ep": 2})]),
        ("gpt_oss", 2, 2, [(4, 20, 8, {})]),
    ],
)
def test_tokens_equal_transformers_whatever_is_cut(ranks, models, family, kvp, tpa, runs):
    path, prompts, expected = models(family)
    results = ranks(kvp * tpa).run(generate_body, path, kvp, tpa, runs, prompts)
    assert all(result == results[0] for result in results)
    for run in results[0]:
        for prompt, tokens, (theirs, gaps) in zip(prompts, run, expected, strict=True):
            assert len(tokens) == MAX_TOKENS
            first = next((at for at in range(MAX_TOKENS) if tokens[at] != theirs[at]), None)
            assert first is None or gaps[first] < TIE, f"prompt of {len(prompt)}: token {first}, gap {gaps[first]}"


@pytest.mark.parametrize(("window", "block_size", "chunk"), [(24, 16, 33), (128, 64, 2048), (5, 1, 3), (1, 64, 64)])
def test_a_long_sequence_holds_pages_of_its_window_and_a_chunk_alone(window, block_size, chunk):
    most = pages_for(window, block_size, max_batch=1, max_run=2, prefill_chunk=chunk)
    pages, table, held = WindowPages(window, block_size, most), WindowTable(), 0
    for start in range(0, 100_000, chunk):
        pages.extend(table, start + chunk)
        held = max(held, len(table.pages))
        assert table.first * block_size <= max(start + 1 - window, 0)  # what the chunk's first row sees has pages
        pages.trim(table, start + chunk)
    assert held <= (window + chunk) // block_size + 2
    pages.release(table)
    assert pages.num_free == most and table.stop == table.first
