"""Greedy tokens in float32 equal transformers' own, for every family, layout, block size, prompt length and chunk size.

The same bodies run over gloo on CPUs and over NCCL with the Triton back end where every rank has a GPU.
"""

import itertools
from functools import cache

import pytest
import torch

from helix.config import (
    AttentionConfig,
    CacheConfig,
    HelixConfig,
    ModelConfig,
    ParallelConfig,
    RuntimeConfig,
    SchedulerConfig,
)
from helix.llm import LLM
from helix.sampling import SamplingParams
from scripts.make_checkpoint import FAMILIES, HYBRIDS, make_checkpoint
from tests.helix.greedy import TIE, greedy_of, require_equal

BLOCK_SIZES = (1, 16, 64)
WHOLE = 2048  # a prefill chunk that holds every prompt
KV_HEADS = {"glm": 2, "glm4": 2, "mimo_v2_flash": 2, "qwen3_5": 2, "qwen3_5_moe": 2, "qwen3_next": 2}


def layouts(family: str) -> list[tuple[int, int]]:
    """Every (kvp, tpa) of 1, 2, 4 and 8 ranks: tpa divides the KV heads, or kvp is 1 and they are duplicated."""
    kv_heads = KV_HEADS.get(family, 4)
    pairs = itertools.product((1, 2, 4, 8), repeat=2)
    return [(kvp, tpa) for kvp, tpa in pairs if kvp * tpa <= 8 and (kvp == 1 or tpa <= kv_heads)]


DENSE_FAMILIES = [family for family in FAMILIES if family not in ("deepseek_v2", "deepseek_v3", "qwen3_moe")]
# By default every layout runs with one family or two, and every family in three layouts or four.
ALL_LAYOUTS = [
    pytest.param(family, *layout, marks=[pytest.mark.slow] if (turn + place) % 3 else [])
    for turn, family in enumerate(DENSE_FAMILIES)
    for place, layout in enumerate(layouts(family))
]


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """The folder of a tiny checkpoint of a family, made once; "short" is a llama of one layer."""

    @cache
    def make(family: str) -> str:
        path = tmp_path_factory.mktemp("checkpoint") / family
        if family == "short":
            make_checkpoint(path, family="llama", layers=1)
        else:
            layers = 4 if family in HYBRIDS else 2
            biased = family == "qwen3_moe"
            make_checkpoint(path, family=family, kv_heads=KV_HEADS.get(family, 4), layers=layers, attention_bias=biased)
        return str(path)

    return make


@pytest.fixture(scope="session")
def reference(checkpoint):
    """``reference(family, prompt, num_tokens)``: transformers' greedy tokens, and the gap of its two best logits."""
    from transformers import AutoModelForCausalLM

    @cache
    def model(family: str):
        return AutoModelForCausalLM.from_pretrained(checkpoint(family), dtype=torch.float32)

    @cache
    def generate(family: str, prompt: tuple[int, ...], num_tokens: int) -> tuple[list[int], list[float]]:
        return greedy_of(model(family), prompt, num_tokens)

    return generate


def prompts_for(block_size: int) -> list[tuple[int, ...]]:
    """Prompts of 1 token, about one block, and several blocks."""
    lengths = sorted({1, max(block_size - 1, 2), block_size, block_size + 1, 3 * block_size + 5})
    generator = torch.Generator().manual_seed(block_size)
    return [tuple(torch.randint(0, 256, (n,), generator=generator).tolist()) for n in lengths]


def generate_body(path, kvp, tpa, runs, ep=1, split_query_rows=None):
    """Outputs of several runs of one layout; a run is (block_size, prompts, max_tokens, prefill_chunk, share rows)."""
    outputs = []
    for block_size, prompts, max_tokens, prefill_chunk, share in runs:
        cuts = prefill_chunk < WHOLE  # these runs also queue sequences, and compare the ranks' decisions
        config = HelixConfig(
            model=ModelConfig(path=path, dtype="float32"),
            parallel=ParallelConfig(kvp=kvp, tpa=tpa, ep=ep),
            cache=CacheConfig(block_size=block_size, num_pages=8192 // block_size),
            attention=AttentionConfig(
                share_qkv_rows=share,
                expand_rows=8 if cuts else 256,
                workspace_tokens=128,
                split_query_rows=split_query_rows,
            ),
            scheduler=SchedulerConfig(max_batch=4 if cuts else 8, prefill_chunk=prefill_chunk),
            runtime=RuntimeConfig(check_ranks=cuts),
        )
        llm = LLM(config)
        made = llm.generate(list(prompts), SamplingParams(max_tokens=max_tokens, ignore_eos=True))
        outputs.append([(output.token_ids, output.error) for output in made])
        free = [llm.engine.scheduler.cache.num_available(rank) for rank in range(kvp)]
        assert free == [llm.num_pages] * kvp, f"pages were lost: {free} of {llm.num_pages} are free"
        held = llm.metrics.tokens_per_rank
        assert max(held) - min(held) <= block_size * len(prompts), f"unbalanced: {held}"
    return outputs


def check(results, reference, family, runs, tie=TIE):
    """Every rank's tokens are the reference's, up to its first tie."""
    assert all(result == results[0] for result in results[1:]), "ranks returned different tokens"
    for (_, prompts, max_tokens, *_), outputs in zip(runs, results[0], strict=True):
        for prompt, (tokens, error) in zip(prompts, outputs, strict=True):
            assert error is None
            require_equal(tokens, *reference(family, prompt, max_tokens), len(prompt), tie)


@pytest.mark.parametrize(("family", "kvp", "tpa"), ALL_LAYOUTS)
def test_greedy_tokens_equal_transformers_in_every_layout(ranks, checkpoint, reference, family, kvp, tpa):
    runs = [(size, prompts_for(size), 16, WHOLE, 0) for size in BLOCK_SIZES]
    results = ranks(kvp * tpa).run(generate_body, checkpoint(family), kvp, tpa, runs)
    check(results, reference, family, runs)


@pytest.mark.parametrize(
    ("family", "kvp", "tpa", "ep"),
    [
        *(("qwen3_moe", *layout) for layout in ((1, 1, 1), (2, 1, 2), (2, 2, 1), (4, 1, 4), (1, 4, 2))),
        *(("deepseek_v3", *layout) for layout in ((1, 1, 1), (2, 1, 2), (1, 2, 1), (4, 1, 1), (1, 4, 2), (8, 1, 2))),
        *(("deepseek_v2", *layout) for layout in ((1, 1, 1), (2, 1, 1), (4, 1, 2))),
        ("glm4_moe", 1, 1, 1),
        ("glm4_moe", 2, 2, 2),
        ("qwen3_next", 3, 1, 1),
        ("qwen3_5_moe", 2, 2, 2),
        pytest.param("qwen3_5", 1, 8, 1, marks=pytest.mark.slow),
    ],
)
def test_experts_latents_and_states_split_every_way_equal_transformers(
    ranks, checkpoint, reference, family, kvp, tpa, ep
):
    runs, split = [(16, prompts_for(16), 16, 33, 0)], None
    if family == "deepseek_v3":
        # ranks share the heads of all steps' queries, in the second run the rows of all steps
        runs, split = [*runs, (1, prompts_for(1), 16, 33, 1)], 100
    if family in HYBRIDS:  # chunks that cut convolutions, and prompts in between
        runs = [*runs, (1, prompts_for(16), 16, 5, 1)]
    results = ranks(kvp * tpa).run(generate_body, checkpoint(family), kvp, tpa, runs, ep=ep, split_query_rows=split)
    check(results, reference, family, runs)


@pytest.mark.parametrize(("kvp", "tpa", "block_sizes"), [(2, 1, (1, 64)), (2, 2, (16,)), (4, 1, (1, 16)), (8, 1, (1,))])
def test_decode_that_passes_every_rank_twice_equals_transformers(ranks, checkpoint, reference, kvp, tpa, block_sizes):
    runs = [(size, prompts_for(size)[-2:], 2 * kvp * size + 2, WHOLE, 0) for size in block_sizes]
    results = ranks(kvp * tpa).run(generate_body, checkpoint("llama"), kvp, tpa, runs)
    check(results, reference, "llama", runs)


@pytest.mark.slow
def test_decode_that_passes_eight_ranks_twice_with_long_blocks_equals_transformers(ranks, checkpoint, reference):
    runs = [(64, prompts_for(64)[1:2], 2 * 8 * 64 + 2, WHOLE, 0)]
    results = ranks(8).run(generate_body, checkpoint("short"), 8, 1, runs, timeout_s=250)
    check(results, reference, "short", runs)


@pytest.mark.parametrize(
    ("family", "kvp", "tpa", "share"),
    [("seed_oss", 1, 1, 0), ("qwen3", 2, 1, 0), ("glm4", 2, 2, 1), ("qwen2", 4, 1, 1)],
)
def test_chunks_that_cut_blocks_equal_transformers(ranks, checkpoint, reference, family, kvp, tpa, share):
    runs = [(size, prompts_for(16), 20, chunk, share) for size, chunk in ((16, 7), (16, 33), (4, 5))]
    results = ranks(kvp * tpa).run(generate_body, checkpoint(family), kvp, tpa, runs)
    check(results, reference, family, runs)


def test_heads_that_kvp_does_not_divide_equal_transformers(ranks, tmp_path):
    """28 query heads on 4 KV heads over 8 ranks: as kvp 8, as tpa 4 x kvp 2, and as plain TP beyond the KV heads."""
    from transformers import AutoModelForCausalLM

    path = tmp_path / "uneven"
    make_checkpoint(path, family="qwen2", heads=28, kv_heads=4, hidden=112, ffn=150, vocab=301)
    prompt = tuple(range(40, 75))
    expected, _ = greedy_of(AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32), prompt, 24)
    for kvp, tpa in ((8, 1), (2, 4), (1, 8)):
        runs = [(4, [prompt], 24, WHOLE, 0)]
        results = ranks(8).run(generate_body, str(path), kvp, tpa, runs)
        assert results == [[[(expected, None)]]] * 8
