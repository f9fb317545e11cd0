"""Models with state layers in the engine: graphs, drafts, preemption and what their settings become."""

import logging
from random import Random

import pytest

from helix.config import CacheConfig, HelixConfig, ModelConfig, TransferConfig
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


def test_what_needs_earlier_states_is_off_or_refused_in_one_line(model, caplog):
    settings, spec = HelixConfig(model=ModelConfig(path=model)), read_spec(ModelConfig(path=model))
    with caplog.at_level(logging.INFO, logger="helix"):
        assert not with_states(settings, spec).cache.reuse
    assert "cache.reuse: off" in caplog.text
    with pytest.raises(ValueError, match=r"^cache\.host_pages = 8 keeps .*; use cache\.host_pages=0$"):
        with_states(HelixConfig(cache=CacheConfig(host_pages=8)), spec)
    with pytest.raises(ValueError, match=r"^transfer\.\* brings keys and values, .*; leave transfer\.\* out$"):
        with_states(HelixConfig(transfer=TransferConfig(prefill_ranks=1)), spec)
