"""Block-FP8 models on kernels: the tokens that a float32 run of what their weights mean is sure of.

Prompts are of up to 64 tokens: rows of longer ones are quantised, which moves logits of such small models by more.
"""

import pytest
import torch
import torch.distributed as dist

from helix.config import CacheConfig, HelixConfig, ModelConfig, ParallelConfig, SchedulerConfig
from helix.llm import LLM
from helix.sampling import SamplingParams
from scripts.make_checkpoint import make_checkpoint
from tests.helix.eight_bits import caches_of_8_bits
from tests.helix.test_fp8 import widen_checkpoint

NUM_TOKENS = 8
SIZES = {"hidden": 256, "ffn": 512, "expert_ffn": 256, "heads": 4, "head_dim": 64}
TIE, CACHED_TIE = 0.1, 0.3  # of the logits' spread: rounding may choose another expert, or a key's neighbour in 8 bits


def body(narrow, wide, prompts, layout=(1, 1, 1), cache="auto"):
    """Tokens of each prompt, and the float32 logits of a model that read them, on rank 0."""
    from transformers import AutoModelForCausalLM

    kvp, tpa, ep = layout
    config = HelixConfig(
        model=ModelConfig(path=narrow, dtype="bfloat16"),
        parallel=ParallelConfig(kvp=kvp, tpa=tpa, ep=ep),
        cache=CacheConfig(block_size=16, num_pages=64, dtype=cache),
        scheduler=SchedulerConfig(prefill_chunk=100),
    )
    llm = LLM(config)
    sampling = SamplingParams(max_tokens=NUM_TOKENS, ignore_eos=True)
    chosen = [llm.generate([prompt], sampling)[0].token_ids for prompt in prompts]
    if dist.is_initialized() and dist.get_rank() != 0:
        return chosen, None
    model = AutoModelForCausalLM.from_pretrained(wide, dtype=torch.float32).to(llm.launch.device)
    with torch.no_grad():
        read = [[*prompt, *tokens[:-1]] for prompt, tokens in zip(prompts, chosen, strict=True)]
        make_cache = caches_of_8_bits(model) if cache == "fp8_e4m3" else lambda: None
        logits = [
            model(torch.tensor([ids], device=llm.launch.device), past_key_values=make_cache()).logits[0, -NUM_TOKENS:]
            for ids in read
        ]
    return chosen, torch.cat(logits).float().cpu()


def check(ranks, tmp_path, family, layout=(1, 1, 1), cache="auto"):
    make_checkpoint(tmp_path / "plain", family=family, kv_heads=4 if family == "deepseek_v3" else 2, **SIZES)
    widen_checkpoint(tmp_path, head=True)
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(0, 256, (n,), generator=generator).tolist() for n in (1, 17, 40, 64)]
    pool = ranks(layout[0] * layout[1])
    results = pool.run(body, str(tmp_path / "fp8"), str(tmp_path / "wide"), prompts, layout, cache)
    chosen, logits = results[0]
    assert all(tokens == chosen for tokens, _ in results)
    tokens = torch.tensor(chosen).flatten()
    best, second = logits.topk(2).values.unbind(-1)
    tie, least = (TIE, 0.5) if cache == "auto" else (CACHED_TIE, 0.25)
    tie *= logits.std()
    sure = best - second > tie
    assert sure.float().mean() > least
    assert torch.equal(tokens[sure], logits.argmax(-1)[sure])
    assert (best - logits[torch.arange(len(tokens)), tokens] <= tie).all()


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
def test_tokens_are_those_of_the_widened_weights_where_these_are_sure(ranks, tmp_path, family):
    check(ranks, tmp_path, family)


@pytest.mark.gpu
@pytest.mark.ranks(2)
@pytest.mark.parametrize(
    ("family", "layout"),
    [
        ("glm", (2, 1, 1)),
        ("glm", (1, 2, 1)),
        ("qwen3_moe", (2, 1, 2)),
        ("qwen3_moe", (1, 2, 1)),
        ("deepseek_v3", (2, 1, 2)),
    ],
)
def test_tokens_over_two_gpus_with_8_bits_in_the_cache_too(ranks, tmp_path, family, layout):
    check(ranks, tmp_path, family, layout, "fp8_e4m3")
