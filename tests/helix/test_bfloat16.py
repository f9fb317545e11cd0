"""In bfloat16 the logits are as close to float32 transformers as bfloat16 transformers is, within a factor of two."""

import pytest
import torch
import torch.distributed as dist

from helix.config import CacheConfig, HelixConfig, ModelConfig, ParallelConfig, SchedulerConfig
from helix.llm import LLM
from helix.sampling import SamplingParams
from scripts.make_checkpoint import FAMILIES, make_checkpoint

NUM_TOKENS = 6
LATENT = ("deepseek_v2", "deepseek_v3")
CASES = [
    (family, kvp, tpa)
    for family in FAMILIES
    if family != "qwen3_moe"  # rounding may choose another expert; those with latents have none here
    for kvp, tpa in ((1, 1), (2, 1), (1, 2), (4, 1), (2, 2), (1, 4))
    if not (family in LATENT and kvp > 1 and tpa > 1)  # a latent is one head
]


def logits_body(path, kvp, tpa, block_size, prompts):
    """Logits of each prompt's first tokens: ours, transformers' in bfloat16 and in float32, on this rank's GPU.

    Both of transformers read the tokens that ours chose.
    """
    from transformers import AutoModelForCausalLM

    config = HelixConfig(
        model=ModelConfig(path=path, dtype="bfloat16"),
        parallel=ParallelConfig(kvp=kvp, tpa=tpa),
        cache=CacheConfig(block_size=block_size, num_pages=256),
        scheduler=SchedulerConfig(prefill_chunk=100),
    )
    llm = LLM(config)
    ours = []
    sampler = llm.runner.sampler
    choose = sampler.choose

    def choose_and_keep(local, choices):
        ours.extend(llm.runner.decoder.gather_logits(local).float().cpu())
        return choose(local, choices)

    sampler.choose = choose_and_keep
    sampling = SamplingParams(max_tokens=NUM_TOKENS, ignore_eos=True, logprobs=0)  # log-probabilities need the logits
    outputs = [llm.generate([prompt], sampling)[0].token_ids for prompt in prompts]
    if dist.get_rank() != 0:
        return ours, None, None
    theirs = {}
    for dtype in (torch.bfloat16, torch.float32):
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).to(llm.launch.device)
        with torch.no_grad():
            read = [[*prompt, *output[:-1]] for prompt, output in zip(prompts, outputs, strict=True)]
            logits = [model(torch.tensor([ids], device=llm.launch.device)).logits[0] for ids in read]
            theirs[dtype] = [row for each in logits for row in each[-NUM_TOKENS:].float().cpu()]
    return ours, theirs[torch.bfloat16], theirs[torch.float32]


@pytest.mark.gpu
@pytest.mark.parametrize(("head_dim", "block_size"), [(16, 16), (64, 64)])  # the second is the streaming kernel's
@pytest.mark.parametrize(("family", "kvp", "tpa"), CASES)
def test_bfloat16_logits_obey_the_tolerance_rule(ranks, tmp_path, family, head_dim, block_size, kvp, tpa):
    experts = {"experts": 0} if family in LATENT else {}
    kv_heads = 2 if family == "glm" else 4
    make_checkpoint(tmp_path / family, family=family, kv_heads=kv_heads, head_dim=head_dim, **experts)
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(0, 256, (n,), generator=generator).tolist() for n in (1, 16, 17, 70, 333)]
    results = ranks(kvp * tpa).run(logits_body, str(tmp_path / family), kvp, tpa, block_size, prompts)
    ours, plain, exact = results[0]
    for rank, (others, _, _) in enumerate(results):
        assert all(torch.equal(mine, his) for mine, his in zip(ours, others, strict=True)), f"rank {rank} differs"
    error = torch.stack([(a - e).abs().max() for a, e in zip(ours, exact, strict=True)])
    allowed = torch.stack([(p - e).abs().max() for p, e in zip(plain, exact, strict=True)])
    scale = torch.stack(exact).abs().max()
    assert error.max() <= 2 * allowed.max() + 2e-2 * scale, f"{error.tolist()} against {allowed.tolist()}"
