"""Whole tiny models of each family on a GPU: transformers' tokens from graphs, prompts found cached, drafts, 8 bits."""

from types import SimpleNamespace

import pytest
import torch

from helix.sampling import SamplingParams
from scripts.make_checkpoint import BESIDE, HYBRIDS, WINDOWED, make_checkpoint
from tests.helix.eight_bits import caches_of_8_bits
from tests.helix.greedy import TIE, greedy_of, reference, require_equal
from tests.helix.speculative.world import Recorded, make_llm, run, use

WINDOW, MAX_TOKENS = 24, 32
LENGTHS = (1, 24, 70, 203)  # one row, a window, and more than a chunk: cut at 96 tokens
CACHED = [0, 0, 64, 192]  # the last multiple of 64 below a prompt's end, where windows and states go on
TIE_OF_8_BITS = 5e-2  # rounding may choose a key's neighbour in 8 bits, which is 6% away


def expected_of(path, prompts, in_8_bits):
    """Transformers' tokens on CPUs, and the gaps to the second; over keys and values that went through 8 bits."""
    model = reference(path)
    make_cache = caches_of_8_bits(model) if in_8_bits else lambda: None
    return [greedy_of(model, each, MAX_TOKENS, past_key_values=make_cache()) for each in prompts]


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("family", "in_8_bits"),
    [
        *((family, False) for family in (*BESIDE, *WINDOWED, *HYBRIDS)),
        *((family, True) for family in ("gemma3", "glm4_moe", "gpt_oss", "mimo_v2_flash")),
    ],
)
def test_tokens_equal_transformers_from_graphs_cached_and_drafted(family, in_8_bits, tmp_path):
    path = str(make_checkpoint(tmp_path / family, family=family, window=WINDOW * (family in WINDOWED), layers=4))
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(0, 256, (n,), generator=generator).tolist() for n in LENGTHS]
    expected = expected_of(path, prompts, in_8_bits)
    known = [SimpleNamespace(token_ids=tokens) for tokens, _ in expected]
    drafts = {"method": "ngram", "max_draft_len": 3, "draft_len_schedule": {8: 3}}
    for more in ({"look_ahead": True}, {"speculative": drafts}):
        llm = make_llm(
            path, graphs=True, prefill_chunk=96, cache={"dtype": "fp8_e4m3"} if in_8_bits else {}, **more
        )  # fmt: skip
        if "speculative" in more:
            use(llm, Recorded(known, 0.67, short=True))
        for cached in ([0] * len(prompts), CACHED):
            made = run(llm, prompts, SamplingParams(max_tokens=MAX_TOKENS, ignore_eos=True))
            for prompt, output, theirs in zip(prompts, made, expected, strict=True):
                require_equal(output.token_ids, *theirs, len(prompt), TIE_OF_8_BITS if in_8_bits else TIE)
            found = [output.cached_tokens for output in made]
            bounded = family in (*WINDOWED, *HYBRIDS)
            assert found == cached if bounded else all(a >= b for a, b in zip(found, cached, strict=True))
        if "speculative" in more:
            assert 0 < llm.metrics.speculative.accepted < llm.metrics.speculative.drafted
