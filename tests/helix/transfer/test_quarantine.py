"""What a lost writer may still write keeps nobody from running: one rank alone, told what a prefill group would say."""

from itertools import islice
from random import Random

import pytest

from helix.config import TransferConfig
from helix.feed import PromptFeed
from helix.prompts import as_prompts
from helix.sampling import SamplingParams
from helix.states.records import StateRecords
from helix.transfer.hearing import Ended, Joined, Lost
from helix.transfer.protocol import Ask
from helix.transfer.receiver import Receiver
from scripts.make_checkpoint import make_checkpoint
from tests.helix.speculative.world import make_llm, told

PROMPTS = [Random(seed).choices(range(256), k=70) for seed in range(3)]
SAMPLING = SamplingParams(max_tokens=6, ignore_eos=True)


class Said:
    """A hearing that says what it is given, once something is asked for."""

    def __init__(self, news):
        self.news, self.asked = news, []

    def tell(self, message):
        self.asked += [message.record] if isinstance(message, Ask) else []

    def begin_to_wait(self):
        pass

    def listen(self, awaited, **flags):
        told, self.news = (self.news, []) if self.asked else ([], self.news)
        return told


@pytest.fixture(scope="module", params=["states", "windows"])
def model(request, tmp_path_factory):
    family = {"family": "qwen3_next"} if request.param == "states" else {"family": "gpt_oss", "window": 24}
    return str(make_checkpoint(tmp_path_factory.mktemp(request.param) / "model", layers=3, **family))


def receiver_of(llm, hearing, **settings):
    """The front of a decode group whose prefill group has one rank."""
    states = llm.runner.decoder.states
    if states is not None:
        states.records = StateRecords(states.heads, states.tensors)
    config = TransferConfig(role="decode", address="127.0.0.1:1", min_tokens=0, **settings)
    return Receiver(llm.engine, config, num_writers=1, hearing=hearing, transports=[], speaks=True)


def generate(llm, receiver):
    """What all prompts make through it; where some do not end in a few turns they would wait for ever."""
    llm._receiver = receiver
    feed = PromptFeed(as_prompts(PROMPTS), SAMPLING, llm.preparer, receiver, len(PROMPTS))
    events = [event for turn in islice(llm.turns(feed), 60) for event in turn]
    outputs = {event.index: event.output for event in events if event.output is not None}
    return [outputs[index] for index in range(len(PROMPTS))]


@pytest.mark.parametrize("rejoins", [False, True])
def test_the_only_batch_slot_is_free_when_its_writer_is_lost(model, rejoins, caplog):
    """Even where another group joins: nothing may arrive, so nothing is asked of it."""
    llm = make_llm(model, max_batch=1)
    windows = llm.engine.scheduler.windows
    total = 0 if windows is None else windows.num_free
    expected = llm.generate(PROMPTS, SAMPLING)
    hearing = Said([Lost(0, "gone"), *([Joined(1, 1)] if rejoins else [])])
    receiver = receiver_of(llm, hearing)
    assert told(generate(llm, receiver)) == told(expected)
    assert hearing.asked == [0] and receiver.counters.retried == 3
    assert ("of scheduler.max_batch = 1 sequences: every further request" in caplog.text) == rejoins
    assert llm.engine.scheduler._free_slots == [0]
    llm.engine.scheduler.cache.clear()
    assert windows is None or windows.num_free == total - 3, "tokens 41 to 69 are in three blocks"
    receiver._act(Ended(0))  # that is known now
    assert receiver._arrivals.num_free == 1 and bool(receiver.trouble) != rejoins
    assert windows is None or windows.num_free == total


def test_without_retry_requests_fail_at_once_where_no_record_is_left(model):
    llm = make_llm(model, max_batch=1)
    receiver = receiver_of(llm, Said([Lost(0, "gone"), Joined(1, 1)]), retry=False)
    first, *others = generate(llm, receiver)
    assert first.error == "the transfer of its prompt failed: prefill rank 0 is lost: gone"
    assert {each.error for each in others} == {
        f"the transfer of its prompt failed: a lost prefill rank may still write the {receiver._arrivals.what} of "
        "scheduler.max_batch = 1 sequences"
    }
