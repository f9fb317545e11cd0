"""Layers with a window: transformers' tokens in every layout, and memory for the window alone."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from helix.cache.windows import WindowTable
from helix.config import (
    CacheConfig,
    DraftModelConfig,
    HelixConfig,
    ModelConfig,
    ParallelConfig,
    RuntimeConfig,
    SchedulerConfig,
    TransferConfig,
)
from helix.llm import LLM
from helix.models.families import load_spec
from helix.models.weights import part_of
from helix.plan.cost import CostModel
from helix.plan.footprint import Footprint, Storage
from helix.plan.hardware import named_hardware
from helix.sampling import SamplingParams
from helix.windows import window_control, window_pages, with_windows
from parallel.layout import Layout
from scripts.make_checkpoint import make_checkpoint
from tests.helix.eight_bits import caches_of_8_bits
from tests.helix.greedy import greedy_of, reference, require_equal
from tests.helix.speculative.world import Recorded, make_llm, use
from tests.helix.speculative.world import run as generate

WINDOW, MAX_TOKENS = 24, 40
LENGTHS = (1, 17, 24, 25, 70, 131)


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """``models(family)``: a checkpoint with windows, prompts, and transformers' tokens with the gaps to the second."""
    made = {}

    def of(family):
        if family in made:
            return made[family]
        path = tmp_path_factory.mktemp("windows") / family
        kv_heads = 2 if family == "mimo_v2_flash" else 4
        make_checkpoint(path, family=family, window=WINDOW, kv_heads=kv_heads, layers=3)
        model = reference(path)
        generator = torch.Generator().manual_seed(1)
        prompts = [torch.randint(0, 256, (n,), generator=generator).tolist() for n in LENGTHS]
        expected = [greedy_of(model, prompt, MAX_TOKENS) for prompt in prompts]
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
        llm.engine.scheduler.cache.clear()
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
        pytest.param("mistral", 2, 1, [(16, 33, 8, {})], marks=pytest.mark.slow),
        ("qwen3", 4, 1, [(1, 11, 8, {"check_ranks": True})]),
        ("qwen2", 2, 2, [(4, 20, 8, {})]),
        pytest.param("qwen3", 2, 4, [(16, 40, 8, {})], marks=pytest.mark.slow),
        pytest.param("mistral", 1, 8, [(16, 2048, 8, {})], marks=pytest.mark.slow),
        ("gpt_oss", 1, 1, [(16, 2048, 8, {}), (1, 7, 3, {})]),
        ("gpt_oss", 4, 1, [(16, 33, 4, {"check_ranks": True, "ep": 2})]),
        ("gpt_oss", 2, 2, [(4, 20, 8, {})]),
        ("gemma3", 1, 1, [(16, 2048, 8, {}), (1, 7, 3, {})]),
        ("gemma3", 2, 2, [(4, 20, 8, {"check_ranks": True})]),
        ("mixtral", 2, 1, [(16, 33, 8, {"ep": 2})]),
        ("mimo_v2_flash", 1, 1, [(16, 2048, 8, {}), (1, 7, 3, {})]),
        ("mimo_v2_flash", 2, 2, [(4, 20, 4, {"check_ranks": True, "ep": 2})]),
    ],
)
def test_tokens_equal_transformers_whatever_is_cut(ranks, models, family, kvp, tpa, runs):
    path, prompts, expected = models(family)
    results = ranks(kvp * tpa).run(generate_body, path, kvp, tpa, runs, prompts)
    assert all(result == results[0] for result in results)
    for run in results[0]:
        for prompt, tokens, (theirs, gaps) in zip(prompts, run, expected, strict=True):
            require_equal(tokens, theirs, gaps, len(prompt))


@pytest.mark.parametrize("dtype", ["fp32", "fp8"])
def test_what_windows_take_is_what_is_planned_and_the_plan_knows_them(models, dtype):
    spec, layout = load_spec(models("qwen3")[0]), Layout(kvp=4, tpa=2)
    config = HelixConfig(scheduler=SchedulerConfig(max_batch=6, prefill_chunk=512), cache=CacheConfig(block_size=16))
    cache = window_pages(
        config, spec, part_of(spec, layout, 0), dtype=torch.float32, device=torch.device("cpu"),
        in_8_bits=dtype == "fp8",
    )  # fmt: skip
    foot = Footprint(spec, layout, Storage("fp32", dtype), 16)
    layers = cache.layers
    planes = [layer if isinstance(layer, torch.Tensor) else (layer.values, layer.scales) for layer in layers]
    taken = sum(each.nbytes for plane in planes for each in (plane if isinstance(plane, tuple) else (plane,)))
    planned = foot.windows_bytes(6, prefill_chunk=512)
    assert len(layers) == len(spec.layers_of("window")) == 2 and planned == pytest.approx(taken, rel=0.01)
    hardware = named_hardware("h200")

    def steps(spec):
        model = CostModel(Footprint(spec, Layout(), Storage("bf16", "bf16")), hardware, 4096)
        return [model.decode(context, 8).us for context in (32, 60_000)]

    (short, long), (_, full) = steps(spec), steps(replace(spec, kinds=()))
    cached = 8 * 60_000 * 2 * spec.num_kv_heads * spec.head_dim * 2 / hardware.read_bytes_per_us  # of one layer
    assert long - short == pytest.approx(cached, rel=0.05) and full - long == pytest.approx(2 * cached, rel=0.05)


def test_what_cannot_be_with_windows_is_refused_in_one_line(models):
    spec = load_spec(models("qwen3")[0])
    assert with_windows(HelixConfig(), replace(spec, kinds=())) == HelixConfig()
    assert not with_windows(HelixConfig(), spec).cache.partial_reuse
    offloads = HelixConfig(cache=CacheConfig(host_pages=4))
    assert with_windows(offloads, spec).cache.host_pages == 4
    with pytest.raises(ValueError, match="transfer.* all layers of this qwen3 have a window; leave it out$"):
        with_windows(
            HelixConfig(transfer=TransferConfig(prefill_ranks=1)),
            replace(spec, kinds=(spec.kind_of(0),) * spec.num_layers),
        )
    with pytest.raises(ValueError, match="host_pages = 4 holds pages of full layers, and all layers of .*=0$"):
        with_windows(offloads, replace(spec, kinds=(spec.kind_of(0),) * spec.num_layers))


@pytest.mark.parametrize("has_head", [False, True])
def test_a_window_is_kept_for_the_first_row_that_is_computed(models, has_head):
    """Behind 48 cached tokens that is row 48, or 47 where drafts need its hidden state."""
    spec = replace(load_spec(models("qwen3")[0]), has_head=has_head)
    windows, table = window_control(HelixConfig(cache=CacheConfig(block_size=1)), spec), WindowTable()
    windows.extend(table, 60)
    assert len(windows.before(table, 48)) == 48 - (48 - has_head - WINDOW + 1)


def reuse_body(path, kvp, conversations, others, host_pages):
    """What each turn makes and found cached, with reuse and without; ``others`` come in between.

    With ``host_pages`` the cache holds little more than what runs, and what is found again has been on the host.
    """
    results = []
    for reuse in (True, False):
        config = HelixConfig(
            model=ModelConfig(path=path, dtype="float32"),
            parallel=ParallelConfig(kvp=kvp),
            cache=CacheConfig(
                block_size=16,
                num_pages=30 // kvp if host_pages else 256,
                host_pages=host_pages if reuse else 0,
                reuse=reuse,
                checkpoint_every=64 if reuse else None,
            ),
            scheduler=SchedulerConfig(max_batch=2, prefill_chunk=50),
            runtime=RuntimeConfig(check_ranks=True),
        )
        llm = LLM(config)
        settings = SamplingParams(max_tokens=MAX_TOKENS, ignore_eos=True)
        total, turns, onboarded = llm.engine.scheduler.windows.num_free, [], 0
        for prompt in conversations:
            made = llm.generate([prompt], settings)[0]
            onboarded += llm.metrics.cache.blocks_onboarded
            again = llm.generate([prompt + made.token_ids + [7] * 5, prompt], settings)
            onboarded += llm.metrics.cache.blocks_onboarded
            llm.generate(others, settings)
            turns.append([(each.token_ids, each.cached_tokens) for each in (made, *again)])
        llm.engine.scheduler.cache.clear()
        assert llm.engine.scheduler.windows.num_free == total
        assert (onboarded > 0) == bool(reuse and host_pages)
        results.append(turns)
    return results


@pytest.mark.parametrize(
    ("family", "kvp", "host_pages"),
    [("qwen3", 2, 0), ("gpt_oss", 1, 200), pytest.param("mistral", 1, 0, marks=pytest.mark.slow)],
)
def test_prompts_that_come_again_and_next_turns_reuse_what_is_there(ranks, models, family, kvp, host_pages):
    path, prompts, _ = models(family)
    mine, others = [prompts[-1], prompts[-2]], [[i] * 90 for i in range(3)]
    for reused, computed in ranks(kvp).run(reuse_body, path, kvp, [*mine, mine[0]], others, host_pages):
        assert [[tokens for tokens, _ in turn] for turn in reused] == [
            [tokens for tokens, _ in turn] for turn in computed
        ]
        # 131 tokens leave a checkpoint at 128, 70 at 64; their answers one behind their last whole block
        assert [cached for _, cached in reused[0]] == [0, 160, 128]
        assert [cached for _, cached in reused[1]] == [0, 96, 64]
        assert [cached for _, cached in reused[2]] == [128, 160, 128]
        assert all(cached == 0 for turn in computed for _, cached in turn)


def test_of_prompts_with_one_beginning_the_third_begins_behind_it(models):
    path, prompts, _ = models("gpt_oss")
    beginning, settings = prompts[-1], SamplingParams(max_tokens=8, ignore_eos=True)
    llm, alone = make_llm(path, prefill_chunk=256), make_llm(path, cache={"reuse": False})
    found = []
    for ending in ([1] * 70, [2] * 90, [3] * 75):
        [made], [expected] = (generate(each, [beginning + ending], settings) for each in (llm, alone))
        assert made.token_ids == expected.token_ids
        found.append(made.cached_tokens)
    assert found == [0, 0, 128]


def test_a_draft_model_without_windows_drafts_for_one_with_them(models, tmp_path):
    """Of the same weights, so that both agree where a window holds everything and rarely beyond."""
    path, prompts, expected = models("mistral")
    draft = make_checkpoint(tmp_path / "draft", family="mistral", kv_heads=4, layers=3)
    speculative = {"method": "draft_model", "max_draft_len": 3, "model": DraftModelConfig(path=str(draft))}
    llm = make_llm(path, graphs=True, speculative=speculative | {"draft_len_schedule": {8: 3}}, max_batch=4)
    made = generate(llm, prompts, SamplingParams(max_tokens=MAX_TOKENS, ignore_eos=True))
    assert [each.token_ids for each in made] == [tokens for tokens, _ in expected]
    assert 0 < llm.metrics.speculative.accepted < llm.metrics.speculative.drafted


def test_drafts_in_graphs_over_8_bits_equal_transformers_over_what_these_mean(models):
    """Two drafts of three are right, so that windows move on by one to four tokens, and rows behind them are undone."""
    path, prompts, _ = models("gpt_oss")
    model = reference(path)
    make_cache = caches_of_8_bits(model)
    expected = [greedy_of(model, prompt, MAX_TOKENS, past_key_values=make_cache())[0] for prompt in prompts]
    speculative = {"method": "ngram", "max_draft_len": 3, "draft_len_schedule": {8: 3}}
    llm = make_llm(path, graphs=True, speculative=speculative, cache={"dtype": "fp8_e4m3"}, block_size=4)
    total = llm.engine.scheduler.windows.num_free
    drafter = Recorded([SimpleNamespace(token_ids=tokens) for tokens in expected], 0.67, short=True)
    made = generate(use(llm, drafter), prompts, SamplingParams(max_tokens=MAX_TOKENS, ignore_eos=True))
    assert [each.token_ids for each in made] == expected
    assert 0 < llm.metrics.speculative.accepted < llm.metrics.speculative.drafted
    llm.engine.scheduler.cache.clear()
    assert llm.engine.scheduler.windows.num_free == total
