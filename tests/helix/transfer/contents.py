"""One rank of a split world that transfers a prompt and then saves what its cache holds of it; see test_contents.py.

torchrun --standalone --nproc-per-node 4 -m tests.helix.transfer.contents MODEL FOLDER
"""

import sys
from random import Random

import torch

from helix.cache.keys import BlockKeys
from helix.config import (
    CacheConfig,
    HelixConfig,
    ModelConfig,
    ParallelConfig,
    PrefillConfig,
    RuntimeConfig,
    SchedulerConfig,
    TransferConfig,
)
from helix.llm import LLM
from helix.sampling import SamplingParams

BLOCK, LENGTH = 16, 150
PROMPT = Random(2).choices(range(256), k=LENGTH)


def held(llm: LLM) -> dict[int, torch.Tensor]:
    """This rank's tokens of each block of the prompt, as bytes: [L, 2, K, tokens, values and scales], on the CPU."""
    control, (values, scales) = llm.engine.scheduler.cache, llm.runner.cache.planes
    pages = torch.cat((values.view(torch.uint8), scales.unsqueeze(-1).view(torch.uint8)), -1)
    claim = control.claim(BlockKeys([*PROMPT, 0], BLOCK))
    assert claim.num_tokens == LENGTH, f"{claim.num_tokens} tokens are cached"
    assert claim.partial is not None
    blocks = [*enumerate(claim.chain), (len(claim.chain), claim.partial)]
    mine = {
        number: pages[:, block.page, :, :, : block.num_tokens].cpu().clone()
        for number, block in blocks
        if block.rank == llm.grid.kvp_rank
    }
    control.drop(claim)
    return mine


def main(model: str, folder: str) -> None:
    """Prefill with kvp 2, decode with tpa 2, in bfloat16 over a cache of 8 bits."""
    llm = LLM(
        HelixConfig(
            model=ModelConfig(path=model, dtype="bfloat16"),
            parallel=ParallelConfig(kvp=1, tpa=2),
            cache=CacheConfig(block_size=BLOCK, num_pages=64, dtype="fp8_e4m3"),
            scheduler=SchedulerConfig(prefill_chunk=40),
            runtime=RuntimeConfig(timeout_s=60.0),
            transfer=TransferConfig(prefill_ranks=2, prefill=PrefillConfig(kvp=2, tpa=1), connect_timeout_s=50.0),
        )
    )
    if llm.prefills:
        llm.serve()
    else:
        (output,) = llm.generate([PROMPT], SamplingParams(max_tokens=1, ignore_eos=True))
        counters = llm.metrics.as_dict()["transfer"]
        assert output.error is None and counters["tokens_received"] == LENGTH, counters
    side = "prefill" if llm.prefills else "decode"
    heads = llm.layout.kv_heads(llm.spec.num_kv_heads, llm.grid.tpa_rank)
    torch.save((heads, llm.launch.device.type, held(llm)), f"{folder}/{side}{llm.launch.rank}.pt")
    llm.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
