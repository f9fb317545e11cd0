"""Outputs do not depend on what was cached: with and without reuse, in every way it comes, on 1 to 8 ranks.

Tokens are compared with those of a run that reuses nothing. The ranks compare their decisions at every step.
"""

from functools import cache
from random import Random

import pytest

from helix.cache.retention import Retention
from helix.config import CacheConfig, HelixConfig, ModelConfig, ParallelConfig, RuntimeConfig, SchedulerConfig
from helix.llm import LLM
from helix.request import Request
from helix.sampling import SamplingParams
from scripts.make_checkpoint import make_checkpoint

BLOCK = 4
DOCUMENT = Random(7).choices(range(256), k=40)
ENDS = [Random(end).choices(range(256), k=7) for end in range(6)]
PROMPTS = [
    DOCUMENT + ENDS[0],
    DOCUMENT + ENDS[1],
    DOCUMENT[:30] + ENDS[2],  # ends its match inside a block
    DOCUMENT,
    DOCUMENT[:32],  # cached whole, to a block's end
    ENDS[3],
    ENDS[3][:3] + ENDS[4],
    DOCUMENT + ENDS[0],
]
SAMPLING = [
    SamplingParams(max_tokens=7, ignore_eos=True),
    SamplingParams(max_tokens=7, ignore_eos=True, temperature=0.9, seed=5, top_k=50),
]
ROOMY = {"num_pages": 128}
# Each way runs on one rank or on two, and those that move pages in larger worlds too.
CHOSEN = {
    (1, 1): ("roomy", "whole blocks", "host", "preempting"),
    (2, 1): ("roomy", "one at a time", "large chunks", "tight", "small host"),
    (2, 2): ("roomy", "host"),
    (4, 1): ("tight", "preempting"),
    (8, 1): ("host",),
}
# What a run must have done, or it would not show what it is there for.
DONE = {
    ("roomy", "cold"): "blocks_reused",
    ("roomy", "warm"): "blocks_copied",
    ("tight", "warm"): "blocks_evicted",
    ("host", "cold"): "blocks_offloaded",
    ("host", "warm"): "blocks_onboarded",
    ("preempting", "cold"): "preemptions",
}


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    @cache
    def make() -> str:
        path = tmp_path_factory.mktemp("reuse") / "model"
        make_checkpoint(path, layers=2)
        return str(path)

    return make()


def make_llm(path, kvp, tpa=1, *, max_batch=4, prefill_chunk=16, block_size=BLOCK, dtype="float32", **cache):
    return LLM(
        HelixConfig(
            model=ModelConfig(path=path, dtype=dtype),
            parallel=ParallelConfig(kvp=kvp, tpa=tpa),
            cache=CacheConfig(block_size=block_size, **cache),
            scheduler=SchedulerConfig(max_batch=max_batch, prefill_chunk=prefill_chunk),
            runtime=RuntimeConfig(check_ranks=True),
        )
    )


def requests(salt=""):
    return [
        Request(prompt_token_ids=list(prompt), sampling=SAMPLING[i % 2], cache_salt=salt)
        for i, prompt in enumerate(PROMPTS)
    ]


def run(llm, asked):
    outputs = llm.generate(asked)
    cache = llm.engine.scheduler.cache
    available = [cache.num_available(rank) for rank in range(llm.layout.kvp)]
    assert available == [llm.num_pages] * llm.layout.kvp, "pages were lost"
    assert all(block.pins == 0 for block in cache.blocks.tree.walk())
    return [output.token_ids for output in outputs], [output.cached_tokens for output in outputs]


def every_way_body(path, kvp, tpa, chosen):
    """All tokens of all runs, and what their caches did."""
    wanted, found = run(make_llm(path, kvp, tpa, reuse=False, **ROOMY), requests())
    assert found == [0] * len(PROMPTS)
    tight = max(3, -(-(len(PROMPTS[0]) + 7) // (BLOCK * kvp)) + 1)  # pages a rank: little more than one sequence
    ways = {
        "roomy": dict(ROOMY),
        "whole blocks": {"partial_reuse": False, **ROOMY},
        "one at a time": {"max_batch": 1, **ROOMY},
        "large chunks": {"prefill_chunk": 512, **ROOMY},
        "tight": {"num_pages": tight},
        "host": {"num_pages": tight, "host_pages": 64},
        "small host": {"num_pages": tight, "host_pages": 3},
        "preempting": {"num_pages": tight, "max_batch": 8, "prefill_chunk": 512},
    }
    counters = {}
    for name in chosen:
        llm = make_llm(path, kvp, tpa, **ways[name])
        for turn in ("cold", "warm"):
            tokens, found = run(llm, requests())
            assert tokens == wanted, f"{name}, {turn}: the tokens differ"
            counters[name, turn] = llm.metrics.as_dict()["cache"]
            assert llm.metrics.prefill_tokens >= sum(map(len, PROMPTS)) - sum(found)
            if name == "roomy" and turn == "warm":
                assert found == [len(prompt) - 1 for prompt in PROMPTS]
        salted, found = run(llm, [Request(prompt_token_ids=DOCUMENT, sampling=SAMPLING[1], cache_salt="other")])
        assert (salted, found) == ([wanted[3]], [0])
    return counters


@pytest.mark.parametrize(("kvp", "tpa"), CHOSEN)
def test_tokens_are_the_same_however_they_were_cached(ranks, model, kvp, tpa):
    chosen = CHOSEN[kvp, tpa]
    results = ranks(kvp * tpa).run(every_way_body, model, kvp, tpa, chosen, timeout_s=250)
    assert all(result == results[0] for result in results)
    counters = results[0]
    for run_of, name in DONE.items():
        assert run_of not in counters or counters[run_of][name] > 0, (run_of, name)
    if "roomy" in chosen:
        assert counters["roomy", "warm"]["tokens_missed"] == len(PROMPTS)


def bits_body(path, kvp):
    """Log-probabilities of a prompt, cold, reused in place, and brought back from the host. Chunks end alike in all."""
    chunk, sampling = 16, SamplingParams(max_tokens=12, ignore_eos=True, logprobs=3)
    settings = {"block_size": chunk, "prefill_chunk": chunk, "max_batch": 1, "partial_reuse": False, "dtype": "auto"}
    asked = Request(prompt_token_ids=DOCUMENT[:39], sampling=sampling)
    off = make_llm(path, kvp, reuse=False, num_pages=32, **settings)
    on = make_llm(path, kvp, num_pages=-(-51 // chunk // kvp) + 1, host_pages=32, **settings)
    outputs = [off.generate([asked])[0], on.generate([asked])[0], on.generate([asked])[0]]
    for end in range(8):
        on.generate([Request(prompt_token_ids=ENDS[end % 6] * (5 + end), sampling=SAMPLING[0])])
    outputs += on.generate([asked])
    assert [output.cached_tokens for output in outputs] == [0, 0, 32, 32]
    assert on.metrics.cache.blocks_onboarded > 0
    return [(output.token_ids, [(each.logprob, each.top) for each in output.logprobs]) for output in outputs]


@pytest.mark.parametrize("kvp", [1, 2, 4])
def test_reuse_changes_no_bit_where_chunks_end_alike(ranks, model, kvp):
    for outputs in ranks(kvp).run(bits_body, model, kvp):
        assert all(output == outputs[0] for output in outputs[1:])


def conversation_body(path, document_len, block_size, prefill_chunk, num_pages, **cache):
    """Turns over one document; each prompt is all that was said. Returns what each turn computed and had to."""
    llm = make_llm(
        path, 4, prefill_chunk=prefill_chunk, block_size=block_size, num_pages=num_pages, max_batch=2, **cache
    )
    prompt = Random(1).choices(range(256), k=document_len)
    told, expected = [], []
    for turn in range(8):
        question = Random(turn).choices(range(256), k=20)
        before = len(prompt)
        prompt += question
        [output] = llm.generate([prompt], SamplingParams(max_tokens=6, ignore_eos=True))
        metrics = llm.metrics.as_dict()
        assert metrics["prefill_tokens"] == len(prompt) - output.cached_tokens == metrics["cache"]["tokens_missed"]
        told.append((metrics["prefill_tokens"], output.cached_tokens, output.token_ids))
        expected.append(len(prompt) - before + (turn > 0))  # the last token made has no K and V yet
        prompt = prompt + output.token_ids
    return told, expected


def check_conversation(results, block_size):
    assert all(result == results[0] for result in results)
    told, expected = results[0]
    assert told[0][1] == 0
    for (computed, _, _), new in zip(told[1:], expected[1:], strict=True):
        assert new <= computed < new + block_size


@pytest.mark.ranks(4)
@pytest.mark.parametrize("partial_reuse", [True, False])
def test_each_turn_of_a_conversation_computes_its_new_tokens_and_less_than_a_block(ranks, model, partial_reuse):
    results = ranks().run(conversation_body, model, 1000, 16, 256, 64, partial_reuse=partial_reuse)
    check_conversation(results, 16)
    if partial_reuse:
        assert [computed for computed, _, _ in results[0][0][1:]] == [21] * 7, "20 new tokens and the last one made"


@pytest.mark.slow
@pytest.mark.ranks(4)
def test_each_turn_over_a_document_of_32k_tokens_computes_its_new_tokens_and_less_than_a_block(ranks, long_model):
    results = ranks().run(conversation_body, long_model, 32 * 1024, 64, 2048, 160, timeout_s=280)
    check_conversation(results, 64)


@pytest.fixture
def long_model(tmp_path):
    make_checkpoint(tmp_path / "long", layers=1, max_position=65536)
    return str(tmp_path / "long")


def retention_body(path):
    """What is left of a document of high priority after others have filled the cache, with and without it."""
    found = []
    for retention in ((), (Retention(priority=90),), (Retention(priority=90, duration_s=1e-6),)):
        llm = make_llm(path, 2, num_pages=8, max_batch=1)
        llm.generate([Request(prompt_token_ids=DOCUMENT, sampling=SAMPLING[0], retention=retention)])
        for end in range(4):
            other = Random(100 + end).choices(range(256), k=40)
            llm.generate([Request(prompt_token_ids=other, sampling=SAMPLING[0])])
        found.append(run(llm, [Request(prompt_token_ids=DOCUMENT, sampling=SAMPLING[0])])[1])
    return found


@pytest.mark.ranks(2)
def test_retention_keeps_a_document_until_its_time_ends(ranks, model):
    [found, other] = ranks().run(retention_body, model)
    assert found == other
    assert found[0] == [0] and found[2] == [0]
    assert found[1][0] > 8
