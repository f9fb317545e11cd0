"""Where pages or batch slots are short, requests wait or begin again, and none is lost."""

from pathlib import Path

from helix import LLM, Request
from tests.helix.llm.small import BLOCK, PROMPTS, assert_idle, drawn, greedy, make_llm, told


def test_running_out_of_pages_preempts_and_changes_no_result(llm: LLM, path: Path) -> None:
    requests = [Request(prompt_token_ids=p, sampling=drawn(40, i, logprobs=0)) for i, p in enumerate(PROMPTS)]
    expected = llm.generate(requests)
    tight = make_llm(path, num_pages=6)
    outputs = tight.generate(requests)
    assert tight.metrics.as_dict()["preemptions"] > 0
    assert told(outputs) == told(expected)
    assert [len(output.logprobs or []) for output in outputs] == [40] * len(PROMPTS)
    assert len(tight.metrics.ttft_s) == len(PROMPTS)
    assert_idle(tight)


def test_requests_wait_for_pages_and_batch_slots_and_lose_nothing(llm: LLM, path: Path) -> None:
    prompts = [[token] * 30 for token in range(7)]
    expected = told(llm.generate(prompts, greedy(2)))
    for few in ({"num_pages": 2}, {"max_batch": 1}, {"num_pages": 5, "max_batch": 2}):
        tight = make_llm(path, **few)
        assert told(tight.generate(prompts, greedy(2))) == expected
        assert tight.metrics.as_dict()["preemptions"] == 0
        assert_idle(tight)


def test_a_request_that_can_never_fit_fails_alone(llm: LLM, path: Path) -> None:
    tight = make_llm(path, num_pages=3)
    exact = Request(prompt_token_ids=PROMPTS[0], sampling=greedy(3 * BLOCK - 40 + 1))  # its last token takes no room
    beyond = Request(prompt_token_ids=PROMPTS[0], sampling=greedy(3 * BLOCK - 40 + 2), id="big")
    outputs = tight.generate([exact, beyond, [5]], greedy(4))
    assert [output.finish_reason for output in outputs] == ["length", "error", "length"]
    assert outputs[1].error == (
        "40 prompt tokens and sampling.max_tokens = 10 need more than the 48 tokens "
        "that cache.num_pages = 3 pages a rank hold"
    )
    assert (outputs[1].id, outputs[1].token_ids) == ("big", [])
    assert told([outputs[0], outputs[2]]) == told(llm.generate([exact, [5]], greedy(4)))
