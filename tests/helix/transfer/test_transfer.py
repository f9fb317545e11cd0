"""Tokens after a transfer are those of a run that computes everything itself: real NIXL between two groups of ranks."""

import itertools
from random import Random

import pytest

from helix.request import Request
from helix.sampling import SamplingParams
from scripts.make_checkpoint import make_checkpoint
from tests.helix.transfer.worlds import assert_idle, leave, make_llm

LAYOUTS = [(1, 1), (2, 1), (1, 2), (2, 2), (4, 1)]
# By default: each layout once on either side, with other splits opposite; which bytes go where is tested for all pairs
# without ranks, in test_regions.py.
FEW = [((1, 1), (2, 2)), ((2, 1), (1, 2)), ((1, 2), (2, 1)), ((2, 2), (4, 1)), ((4, 1), (1, 1))]
PAIRS = [
    pytest.param(*pair, marks=[] if pair in FEW else [pytest.mark.slow]) for pair in itertools.product(LAYOUTS, LAYOUTS)
]
BLOCK_SIZES = (1, 16, 64)
GREEDY = SamplingParams(max_tokens=5, ignore_eos=True)
DRAWN = SamplingParams(max_tokens=5, ignore_eos=True, temperature=0.9, seed=11, repetition_penalty=1.2, logprobs=2)


def prompts_for(block_size):
    """A first batch, with a partial last block, a full one and a short prompt; and one that finds much of it cached."""
    random = Random(block_size)
    long, full = random.choices(range(256), k=70), random.choices(range(256), k=64)
    cold = [(long, GREEDY), (full, DRAWN), ([random.randrange(256)], GREEDY), (long[:9], DRAWN)]
    warm = [(long, GREEDY), (long[:50] + full[:7], DRAWN), (full + long[:3], GREEDY)]
    return [cold, warm]


def told(outputs):
    """Tokens, and log-probabilities as far as float32 on another layout gives the same."""
    return [
        (
            o.token_ids,
            o.finish_reason,
            o.error,
            [[e.token_id, sorted(e.top)] for e in o.logprobs or []],
            o.prompt_tokens,
        )
        for o in outputs
    ], [[e.logprob for e in o.logprobs or []] for o in outputs]


def generate(llm, batches):
    results = []
    for batch in batches:
        outputs = llm.generate([Request(prompt_token_ids=list(ids), sampling=sampling) for ids, sampling in batch])
        results.append((*told(outputs), [o.cached_tokens for o in outputs]))
    return results


def aggregated_body(path, runs):
    return [
        generate(make_llm(path, None, None, (1, 1), block_size=size, num_pages=1024 // size), prompts_for(size))
        for size in runs
    ]


def prefill_body(ports, path, prefill, decode, runs):
    for port, size in zip(ports, runs, strict=True):
        llm = make_llm(path, port, "prefill", prefill, block_size=size, num_pages=1024 // size)
        llm.serve()
        assert_idle(llm)
    return True


def decode_body(ports, path, prefill, decode, runs):
    results = []
    for port, size in zip(ports, runs, strict=True):
        llm = make_llm(path, port, "decode", decode, block_size=size, num_pages=1024 // size)
        results.append((generate(llm, prompts_for(size)), llm.metrics.as_dict()["transfer"]))
        leave(llm)
    return results


@pytest.fixture(scope="module")
def expected(model, rank_pools):
    """What a run that transfers nothing gives, by block size."""
    from tests.ranks import RankPool

    pool = rank_pools.setdefault(1, RankPool(1))
    return dict(zip(BLOCK_SIZES, pool.run(aggregated_body, model, BLOCK_SIZES)[0], strict=True))


@pytest.mark.parametrize(("prefill", "decode"), PAIRS, ids=str)
def test_tokens_equal_those_of_the_aggregated_run(groups, model, expected, prefill, decode):
    pools = groups(prefill[0] * prefill[1], decode[0] * decode[1])
    served, results = pools.run(prefill_body, decode_body, model, prefill, decode, BLOCK_SIZES)
    assert served == [True] * (prefill[0] * prefill[1])
    for result in results:
        for size, (batches, counters) in zip(BLOCK_SIZES, result, strict=True):
            for (tokens, logprobs, _), (wanted, wanted_logprobs, _) in zip(batches, expected[size], strict=True):
                assert tokens == wanted and all(error is None for _, _, error, *_ in tokens)
                for ours, theirs in zip(logprobs, wanted_logprobs, strict=True):
                    assert ours == pytest.approx(theirs, abs=1e-4)
            found = batches[1][2]
            assert found[0] == 69 and found[1] >= 50, "the second batch finds the first one's blocks"
            assert counters["requests"] == 3 and counters["retried"] == counters["failed"] == 0
            assert counters["tokens_received"] == 70 + 57 + 67 - sum(found)


@pytest.mark.parametrize(("prefill", "decode"), [((2, 1), (1, 2)), ((1, 1), (2, 1))], ids=str)
def test_latents_arrive_as_keys_and_values_do(groups, ranks, tmp_path, prefill, decode):
    path, sizes = str(make_checkpoint(tmp_path / "model", family="deepseek_v3")), BLOCK_SIZES
    [wanted] = ranks(1).run(aggregated_body, path, sizes)
    pools = groups(prefill[0] * prefill[1], decode[0] * decode[1])
    _, results = pools.run(prefill_body, decode_body, path, prefill, decode, sizes)
    for result in results:
        for (batches, counters), expected_batches in zip(result, wanted, strict=True):
            assert [tokens for tokens, _, _ in batches] == [tokens for tokens, _, _ in expected_batches]
            assert counters["tokens_received"] > 0 and counters["failed"] == 0


@pytest.mark.parametrize(
    ("prefill", "decode"), [((2, 1), (3, 1)), pytest.param((1, 1), (1, 2), marks=pytest.mark.slow)], ids=str
)
def test_states_arrive_with_keys_and_values(groups, ranks, tmp_path, prefill, decode):
    path, sizes = str(make_checkpoint(tmp_path / "model", family="qwen3_next", layers=3)), BLOCK_SIZES
    [wanted] = ranks(1).run(aggregated_body, path, sizes)
    pools = groups(prefill[0] * prefill[1], decode[0] * decode[1])
    _, results = pools.run(prefill_body, decode_body, path, prefill, decode, sizes)
    for result in results:
        for size, (batches, counters), expected_batches in zip(sizes, result, wanted, strict=True):
            assert [tokens for tokens, _, _ in batches] == [tokens for tokens, _, _ in expected_batches]
            assert batches[1][2][0] == 69 // size * size, "where a sequence could not begin to be computed"
            assert counters["requests"] == 3 and counters["retried"] == counters["failed"] == 0


CONSTRAINED = [([97, 98] * 24, SamplingParams(max_tokens=12, structured_outputs={"regex": "(ab){3}[c-e]{3}"}))]


def windows_expected_body(path, runs):
    return [
        generate(make_llm(path, None, None, (1, 1), block_size=size, num_pages=1024 // size), windows_batches(size))
        for size in runs
    ]


def windows_batches(size):
    """The last one ends where a block does; its last row is computed again, whose window begins a block before."""
    return [*prompts_for(size), CONSTRAINED]


def windows_prefill_body(ports, path, prefill, decode, runs):
    for port, size in zip(ports, runs, strict=False):
        llm = make_llm(path, port, "prefill", prefill, block_size=size, num_pages=1024 // size)
        total = llm.engine.scheduler.windows.num_free
        llm.serve()
        assert_idle(llm)
        llm.engine.scheduler.cache.clear()
        assert llm.engine.scheduler.windows.num_free == total


def windows_decode_body(ports, path, prefill, decode, runs):
    results = []
    for port, size in zip(ports, runs, strict=False):
        llm = make_llm(path, port, "decode", decode, block_size=size, num_pages=1024 // size)
        total = llm.engine.scheduler.windows.num_free
        results.append((generate(llm, windows_batches(size)), llm.metrics.as_dict()["transfer"]))
        leave(llm)
        llm.engine.scheduler.cache.clear()
        assert llm.engine.scheduler.windows.num_free == total
    return results


@pytest.mark.parametrize(
    ("family", "prefill", "decode"),
    [
        ("gpt_oss", (2, 1), (1, 2)),
        ("mimo_v2_flash", (2, 2), (1, 1)),  # other KV heads in windows, values narrower than keys
        pytest.param("qwen3", (1, 1), (4, 1), marks=pytest.mark.slow),  # two ranks of four have each KV head
    ],
    ids=str,
)
def test_windows_arrive_with_keys_and_values(groups, ranks, tmp_path, family, prefill, decode):
    path, sizes = (
        str(make_checkpoint(tmp_path / "model", family=family, window=24, kv_heads=2, layers=3)),
        BLOCK_SIZES[:2],
    )
    [wanted] = ranks(1).run(windows_expected_body, path, sizes)
    pools = groups(prefill[0] * prefill[1], decode[0] * decode[1])
    _, results = pools.run(windows_prefill_body, windows_decode_body, path, prefill, decode, sizes)
    for result in results:
        for size, (batches, counters), expected_batches in zip(sizes, result, wanted, strict=True):
            assert [tokens for tokens, _, _ in batches] == [tokens for tokens, _, _ in expected_batches]
            assert batches[1][2][0] == 69 // size * size, "where no window is"
            assert counters["requests"] == 1 and counters["retried"] == counters["failed"] == 0


TIGHT = [(Random(n).choices(range(256), k=n), SamplingParams(max_tokens=30, ignore_eos=True)) for n in (90, 70, 80, 33)]


def tight_prefill_body(ports, path, prefill, decode):
    """Two prompts at most fit at once, and pages that are still being written cannot be had."""
    llm = make_llm(path, ports[0], "prefill", prefill, num_pages=7)
    llm.serve()
    assert_idle(llm)


def tight_decode_body(ports, path, prefill, decode):
    """Sequences wait for pages, and grow out of them: some are preempted and computed again here."""
    llm = make_llm(path, ports[0], "decode", decode, num_pages=14 // decode[0])
    results = generate(llm, [TIGHT, TIGHT])
    counters = llm.metrics.as_dict()
    leave(llm)
    return results, counters["transfer"], counters["preemptions"]


def tight_expected_body(path):
    return generate(make_llm(path, None, None, (1, 1)), [TIGHT, TIGHT])


def test_tight_pools_make_requests_wait_and_change_no_token(groups, model, rank_pools, expected):
    wanted = rank_pools[1].run(tight_expected_body, model)[0]
    _, decoded = groups(1, 2).run(tight_prefill_body, tight_decode_body, model, (1, 1), (2, 1))
    for results, counters, preemptions in decoded:
        assert [tokens for tokens, _, _ in results] == [tokens for tokens, _, _ in wanted]
        assert counters["requests"] == len(TIGHT) and counters["retried"] == 0
        assert preemptions > 0


REPEATED = [(part * 5, SamplingParams(max_tokens=20, ignore_eos=True)) for part in ([7, 8, 9, 10, 11], [50, 60, 70])]
STRUCTURED = [([97, 98] * 8, SamplingParams(max_tokens=20, structured_outputs={"regex": "(ab){6}[c-e]{3}"}))]


def drafting_body(ports, path, prefill, decode):
    llm = make_llm(path, ports[0], "decode", decode, speculative="ngram")
    results = generate(llm, [REPEATED + STRUCTURED])
    figures = llm.metrics.as_dict()
    leave(llm)
    return results[0][0], figures["transfer"]["requests"], figures["speculative"]


def drafting_prefill_body(ports, path, prefill, decode):
    llm = make_llm(path, ports[0], "prefill", prefill, speculative="ngram")
    llm.serve()
    assert_idle(llm)


def plain_repeated_body(path):
    return generate(make_llm(path, None, None, (1, 1)), [REPEATED + STRUCTURED])[0][0]


def test_a_decode_group_that_drafts_gives_the_same_tokens(groups, model, rank_pools, expected):
    wanted = rank_pools[1].run(plain_repeated_body, model)[0]
    assert wanted[-1][0][:12] == [97, 98] * 6
    _, decoded = groups(1, 2).run(drafting_prefill_body, drafting_body, model, (1, 1), (2, 1))
    for tokens, requests, speculative in decoded:
        assert (tokens, requests) == (wanted, len(REPEATED + STRUCTURED))
        assert speculative is not None
