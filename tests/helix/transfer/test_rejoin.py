"""A prefill group that was lost comes back, with real NIXL, and requests are its own again."""

from random import Random

from helix.request import Request
from helix.sampling import SamplingParams
from helix.transfer.channel import ChannelLost
from tests.helix.transfer.worlds import assert_idle, leave, make_llm

PROMPTS = [Random(3).choices(range(256), k=n) for n in (70, 33, 50)]


def generate(llm, salt=""):
    sampling = SamplingParams(max_tokens=4, ignore_eos=True)
    asked = [Request(prompt_token_ids=ids, sampling=sampling, cache_salt=salt) for ids in PROMPTS]
    return [output.token_ids for output in llm.generate(asked)]


def returning_body(ports, path, layout, _):
    """A group that ends its connections before anything is asked of it; then another, of another layout."""
    first = make_llm(path, ports[0], "prefill", layout)
    first._sender._channel.close()
    try:
        first.serve()
    except ChannelLost as problem:
        assert "closed here" in str(problem)
    second = make_llm(path, ports[0], "prefill", (layout[1], layout[0]))
    second.serve()
    assert_idle(second)


def staying_body(ports, path, _, layout):
    llm = make_llm(path, ports[0], "decode", layout, chunk=16)
    expected = generate(llm)
    lost = llm._receiver.counters.retried
    while llm.trouble:
        llm.generate([Request(prompt_token_ids=[1, 2, 3], sampling=SamplingParams(max_tokens=1))])
    outputs = generate(llm, "nothing of it is cached")
    counters = llm._receiver.counters
    figures = counters.requests, counters.retried, counters.failed
    leave(llm)
    return expected == outputs, lost, figures


def test_a_prefill_group_that_was_lost_comes_back_and_computes_prompts_again(groups, model):
    _, decoded = groups(2, 2).run(returning_body, staying_body, model, (2, 1), (2, 1))
    for equal, lost, figures in decoded:
        assert equal and lost == len(PROMPTS)
        assert figures == (len(PROMPTS), 0, 0)
