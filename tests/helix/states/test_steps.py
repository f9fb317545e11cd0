"""Models with state layers in the engine: graphs, drafts, preemption and what their settings become."""

import logging
from dataclasses import replace
from random import Random

import pytest

from helix.config import CacheConfig, HelixConfig, ModelConfig
from helix.models.loading import read_spec
from helix.sampling import SamplingParams
from helix.states.settings import with_states
from scripts.make_checkpoint import make_checkpoint
from tests.helix.speculative.world import Recorded, make_llm, run, told, use

PROMPTS = [[Random(length).randrange(256) for _ in range(length)] for length in (1, 2, 9, 130, 40)]
SAMPLING = SamplingParams(max_tokens=24, ignore_eos=True)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(make_checkpoint(tmp_path_factory.mktemp("states") / "model", family="qwen3_next", layers=3))


@pytest.fixture(scope="module")
def expected(model):
    """What comes out with one prompt at a time, each computed at once."""
    llm = make_llm(model, prefill_chunk=256)
    return [run(llm, [prompt], SAMPLING)[0] for prompt in PROMPTS]


def test_graphs_and_drafts_that_are_rejected_change_no_token(model, expected):
    schedule = {"method": "ngram", "max_draft_len": 4, "draft_len_schedule": {4: 4, 8: 2}}
    llm = use(make_llm(model, graphs=True, speculative=schedule), Recorded(expected, 0.6, short=True))
    assert told(run(llm, PROMPTS, SAMPLING)) == told(expected)
    counters = llm.metrics.speculative
    assert counters.accepted > 20 and counters.drafted - counters.accepted > 10


def test_states_of_preempted_sequences_are_computed_again(model, expected):
    llm = make_llm(model, num_pages=17, look_ahead=True)
    assert told(run(llm, PROMPTS, SAMPLING)) == told(expected)
    assert llm.engine.scheduler.cache.counters.preemptions > 0


def test_later_prompts_go_on_from_checkpoints(model):
    rng = Random(0)
    prompt, other = ([rng.randrange(256) for _ in range(length)] for length in (200, 60))
    alone = make_llm(model, cache={"reuse": False})
    llm = make_llm(model, cache={"checkpoint_every": 100}, look_ahead=True)  # in fact every 128
    assert llm.engine.scheduler.cache.checkpoints.num_slots == 16
    found = []
    answer = run(alone, [prompt], SAMPLING)[0].token_ids
    # the same again, its next turn, one that leaves it early, one that leaves it before any checkpoint, and all at once
    asked = [prompt, prompt, [*prompt, *answer, *other], [*prompt[:140], *other], [*prompt[:100], *other]]
    for each in [*([one] for one in asked), asked]:
        outputs = run(llm, each, SAMPLING)
        assert told(outputs) == told(run(alone, each, SAMPLING))
        found.append([output.cached_tokens for output in outputs])
    assert found == [[0], [192], [192], [128], [0], [192, 192, 256, 192, 128]]


def test_of_prompts_with_one_beginning_the_third_begins_behind_it(model):
    """The second leaves a checkpoint where it leaves what the first one left."""
    rng = Random(4)
    beginning, *questions = ([rng.randrange(256) for _ in range(length)] for length in (150, 90, 70, 100, 80))
    llm, alone = make_llm(model, prefill_chunk=512, look_ahead=True), make_llm(model, cache={"reuse": False})
    found = []
    for question in questions:
        [output] = run(llm, [[*beginning, *question]], SAMPLING)
        assert told([output]) == told(run(alone, [[*beginning, *question]], SAMPLING))
        found.append(output.cached_tokens)
    assert found == [0, 0, 128, 128]


def test_a_next_turn_goes_on_where_the_answer_was(model):
    rng = Random(2)
    prompt, other = ([rng.randrange(256) for _ in range(length)] for length in (180, 30))
    long = SamplingParams(max_tokens=90, ignore_eos=True)
    llm, alone = make_llm(model, look_ahead=True), make_llm(model, cache={"reuse": False})
    answer = run(llm, [prompt], long)[0].token_ids
    checkpoints = llm.engine.scheduler.cache.checkpoints
    assert len(checkpoints._slots) == 2, "decoding keeps one, the last, beside the prompt's"
    turn = run(llm, [[*prompt, *answer, *other]], SAMPLING)
    assert turn[0].cached_tokens == 256 and told(turn) == told(run(alone, [[*prompt, *answer, *other]], SAMPLING))
    # drafted rows pass by as well: what waits in their rings is kept and worked in
    drafted = {"method": "ngram", "max_draft_len": 3, "draft_len_schedule": {8: 3}}
    llm = use(make_llm(model, graphs=True, speculative=drafted), Recorded(run(alone, [prompt], long), 0.7))
    outputs = run(llm, [prompt], long)
    assert outputs[0].token_ids == answer
    again = run(llm, [[*prompt, *answer, *other]], SAMPLING)
    assert again[0].cached_tokens == 256 and again[0].token_ids == turn[0].token_ids


def test_samples_of_one_prompt_wait_for_its_checkpoint_and_for_nothing_else(model):
    prompt, steps = [Random(1).randrange(256) for _ in range(220)], []
    llm = make_llm(model, prefill_chunk=512, look_ahead=True)
    launched = llm.engine._launched

    def noted(step):
        steps.append([(chunk.start, chunk.stop) for chunk in step.chunks if chunk.stop <= len(prompt)])
        return launched(step)

    llm.engine._launched = noted
    outputs = run(llm, [prompt] * 3, SAMPLING)
    assert [output.cached_tokens for output in outputs] == [0, 192, 192]
    assert [step for step in steps if step] == [[(0, 220)], [(192, 220)] * 2], "kept while the prompt went on"


def test_a_structured_request_leaves_its_prompts_states(model):
    pytest.importorskip("xgrammar")
    prompt = [Random(3).randrange(256) for _ in range(200)]
    llm, alone = make_llm(model, prefill_chunk=256), make_llm(model, cache={"reuse": False})
    run(llm, [prompt], SamplingParams(max_tokens=4, structured_outputs={"regex": "[ab]{9}"}))
    again = run(llm, [prompt], SAMPLING)
    assert again[0].cached_tokens == 192 and told(again) == told(run(alone, [prompt], SAMPLING))
    llm.preparer.grammars.close()


def test_checkpoints_give_way_to_later_ones(model):
    prompts = [[Random(seed).randrange(256) for _ in range(80)] for seed in range(4)]
    llm = make_llm(model, num_pages=16, cache={"checkpoint_every": 128}, max_batch=1, look_ahead=True)
    expected = [run(llm, [prompt], SAMPLING)[0].token_ids for prompt in prompts]
    again = [run(llm, [prompt], SAMPLING)[0] for prompt in reversed(prompts)]
    assert [each.token_ids for each in reversed(again)] == expected
    assert [each.cached_tokens for each in again] == [64, 64, 0, 0]  # two slots, taken by the last two


def test_checkpoints_that_give_way_go_to_the_host_and_come_back(model):
    prompts = [[Random(seed).randrange(256) for _ in range(80)] for seed in range(5)]
    cache = {"checkpoint_every": 128, "host_pages": 16}  # two slots here, two there
    llm = make_llm(model, num_pages=16, cache=cache, max_batch=1, look_ahead=True)
    expected = [run(llm, [prompt], SAMPLING)[0].token_ids for prompt in prompts]
    again = [run(llm, [prompt], SAMPLING)[0] for prompt in reversed(prompts)]
    assert [each.token_ids for each in reversed(again)] == expected
    assert [each.cached_tokens for each in again] == [64, 64, 64, 64, 0]


def on_two_ranks(path):
    """Tokens of prompts that preempt each other, then of the same, whose blocks and states went to the host."""
    llm = make_llm(path, kvp=2, num_pages=7, cache={"checkpoint_every": 64, "host_pages": 24})
    first, again = (run(llm, PROMPTS[2:], SAMPLING) for _ in range(2))
    tokens = [[output.token_ids for output in outputs] for outputs in (first, again)]
    return *tokens, [each.cached_tokens for each in again], llm.engine.scheduler.cache.counters.preemptions


def test_ranks_preempt_and_go_on_alike(ranks, model, expected):
    for first, again, cached, preemptions in ranks(2).run(on_two_ranks, model):
        assert first == again == [output.token_ids for output in expected[2:]]
        assert cached == [0, 128, 0] and preemptions > 0


def test_checkpoints_of_models_that_need_none_are_refused(model):
    asked = HelixConfig(cache=CacheConfig(checkpoint_every=64))
    spec = read_spec(ModelConfig(path=model))
    assert with_states(asked, spec).cache.checkpoint_every == 64
    with pytest.raises(
        ValueError, match="cache.checkpoint_every = 64 is for models with .*, and this qwen3_next has nei"
    ):
        with_states(asked, replace(spec, kinds=(), states=None))


def test_parts_of_blocks_are_not_reused_which_is_said(model, caplog):
    settings, spec = HelixConfig(model=ModelConfig(path=model)), read_spec(ModelConfig(path=model))
    with caplog.at_level(logging.INFO, logger="helix"):
        assert not with_states(settings, spec).cache.partial_reuse
    assert "cache.partial_reuse: off" in caplog.text
