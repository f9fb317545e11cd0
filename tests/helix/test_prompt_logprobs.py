"""Log-probabilities of prompts: those of transformers, whatever ranks share, chunks cut, or caches hold."""

from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from helix import LLM, HelixConfig, Request, SamplingParams, prompt_logprobs
from helix.config import CacheConfig, ModelConfig, ParallelConfig, RuntimeConfig, SchedulerConfig
from scripts.make_checkpoint import make_checkpoint

SCORED = [7 * i % 250 for i in range(48)]
TOP = 110  # more than a rank's slice of the vocabulary has


def score_body(path: str):
    """A prompt that is scored while another takes its pages, then again beside its twin, then one that is not."""
    with patch.object(prompt_logprobs, "MAX_LOGITS", 300):  # of each slice of 107: two rows at a time
        return scored(path)


def scored(path: str):
    llm = LLM(
        HelixConfig(
            model=ModelConfig(path=path, dtype="float32"),
            parallel=ParallelConfig(kvp=3),
            cache=CacheConfig(block_size=4, num_pages=5),
            scheduler=SchedulerConfig(prefill_chunk=4, max_logprobs=TOP),
            runtime=RuntimeConfig(device="cpu", check_ranks=True),
        )
    )
    asks = SamplingParams(max_tokens=2, prompt_logprobs=TOP, ignore_eos=True)
    first = Request(prompt_token_ids=[9, 8, 7, 6], sampling=SamplingParams(max_tokens=36, ignore_eos=True))
    outputs = llm.generate([first, Request(prompt_token_ids=SCORED, sampling=asks)])[1:]
    preemptions = llm.metrics.as_dict()["preemptions"]
    outputs += llm.generate([SCORED] * 2, SamplingParams(max_tokens=2, prompt_logprobs=3, ignore_eos=True))
    [plain] = llm.generate([SCORED], SamplingParams(max_tokens=2, ignore_eos=True))
    [single] = llm.generate([[5]], asks)
    found = [[each and (each.token_id, each.logprob, each.top) for each in o.prompt_logprobs or ()] for o in outputs]
    cached = [output.cached_tokens for output in (*outputs, plain)]
    return found, [o.token_ids for o in (*outputs, plain)], cached, preemptions, single.prompt_logprobs


@pytest.mark.ranks(3)
def test_prompts_are_scored_as_transformers_scores_them(ranks, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    path = make_checkpoint(tmp_path / "model")
    results = ranks(3).run(score_body, str(path))
    assert all(result == results[0] for result in results[1:])
    found, tokens, cached, preemptions, single = results[0]
    assert preemptions > 0 and single == [None]
    assert cached[:3] == [0, 0, 0] and cached[3] > 0 and all(each == tokens[0] for each in tokens)
    with torch.inference_mode():
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        expected = model(torch.tensor([SCORED])).logits[0].log_softmax(-1)
    for scores, num in zip(found, (TOP, 3, 3), strict=True):
        assert len(scores) == len(SCORED) and scores[0] is None
        for (token, logprob, top), row, wanted in zip(scores[1:], expected, SCORED[1:], strict=False):
            assert token == wanted and logprob == pytest.approx(row[token].item(), abs=1e-4)
            assert list(top.values()) == pytest.approx(row.topk(num).values.tolist(), abs=1e-4)
            assert all(value == pytest.approx(row[i].item(), abs=1e-4) for i, value in top.items())
