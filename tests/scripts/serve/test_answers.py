"""A running server from outside: OpenAI's own client and bare sockets against two ranks."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zmq

from helix import LLM, Request, SamplingParams
from tests.scripts.serve.served import KEY, ROOT, Served, head_of, walk


def test_completions_are_what_generate_makes_streamed_or_not(served: Served, llm: LLM) -> None:
    settings: dict[str, Any] = {"max_tokens": 24, "temperature": 0.8, "seed": 7}
    prompts = ["once upon", "a time"]
    expected = llm.generate([Request(prompt=each) for each in prompts], SamplingParams(**settings))
    whole = served.client.completions.create(model="tiny", prompt=prompts, **settings)
    assert [each.text for each in whole.choices] == [each.text for each in expected]
    assert [each.finish_reason for each in whole.choices] == [each.finish_reason for each in expected]
    assert whole.usage is not None
    assert whole.usage.prompt_tokens == sum(each.prompt_tokens for each in expected)
    assert whole.usage.completion_tokens == sum(len(each.token_ids) for each in expected)

    texts, reasons = ["", ""], dict[int, str]()
    options: Any = {"include_usage": True}
    stream = served.client.completions.create(
        model="tiny", prompt=prompts, stream=True, stream_options=options, **settings
    )
    chunks = list(stream)
    for chunk in chunks:
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            if choice.finish_reason:
                reasons[choice.index] = choice.finish_reason
    assert texts == [each.text for each in expected] and reasons == {0: "length", 1: "length"}
    assert chunks[-1].choices == [] and chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert chunks[-1].usage.prompt_tokens_details is not None


def test_chats_are_what_generate_makes_streamed_or_not(served: Served, llm: LLM) -> None:
    messages: Any = [{"role": "user", "content": [{"type": "text", "text": "hello"}]}]
    [expected] = llm.generate(Request(messages=messages), SamplingParams(max_tokens=20))
    whole = served.client.chat.completions.create(model="tiny", messages=messages, max_completion_tokens=20)
    assert whole.choices[0].message.content == expected.text
    assert whole.choices[0].message.role == "assistant"
    chunks = list(served.client.chat.completions.create(model="tiny", messages=messages, max_tokens=20, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(each.choices[0].delta.content or "" for each in chunks) == expected.text
    assert chunks[-1].choices[0].finish_reason == expected.finish_reason


def test_a_chat_without_a_length_may_fill_what_the_model_takes(served: Served) -> None:
    with served.client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "on"}], stream=True, extra_body={"ignore_eos": True}
    ) as stream:
        assert sum(1 for _, _ in zip(range(40), stream, strict=False)) == 40  # it went on after 16 tokens


def test_a_stop_string_never_shows_not_even_its_beginning(served: Served, llm: LLM) -> None:
    [free] = llm.generate("stop here", SamplingParams(max_tokens=30))
    stop = free.text[8:11]
    [expected] = llm.generate("stop here", SamplingParams(max_tokens=30, stop=[stop]))
    stream = served.client.completions.create(model="tiny", prompt="stop here", max_tokens=30, stop=stop, stream=True)
    pieces = [choice for chunk in stream for choice in chunk.choices]
    assert "".join(each.text for each in pieces) == expected.text
    assert pieces[-1].finish_reason == "stop" and pieces[-1].model_dump()["stop_reason"] == stop


def test_n_answers_have_seeds_of_their_own(served: Served, llm: LLM) -> None:
    settings: dict[str, Any] = {"max_tokens": 12, "temperature": 1.0}
    expected = [llm.generate("dice", SamplingParams(seed=5 + number, **settings))[0].text for number in range(3)]
    answer = served.client.completions.create(model="tiny", prompt="dice", n=3, seed=5, **settings)
    assert [each.text for each in answer.choices] == expected
    assert answer.usage is not None and answer.usage.prompt_tokens == len("dice")


def test_structured_answers_are_what_generate_makes(served: Served, llm: LLM) -> None:
    schema: Any = {"type": "object", "properties": {"n": {"type": "integer", "maximum": 99}, "s": {"enum": ["a", "b"]}},
                   "required": ["n", "s"]}  # fmt: skip
    settings: dict[str, Any] = {"max_tokens": 400, "temperature": 1.0, "seed": 3}
    structured = SamplingParams(**settings, structured_outputs={"json": schema})
    messages: Any = [{"role": "user", "content": "form"}]
    [expected] = llm.generate(Request(messages=messages), structured)
    form: Any = {"type": "json_schema", "json_schema": {"name": "form", "schema": schema}}
    answer = served.client.chat.completions.create(
        model="tiny", messages=messages, response_format=form, n=2, **settings
    )
    assert answer.choices[0].message.content == expected.text
    for choice in answer.choices:
        assert choice.finish_reason == "stop" and set(json.loads(choice.message.content or "")) == {"n", "s"}


def test_logprobs_come_with_text_and_bytes_in_both_forms(served: Served, llm: LLM) -> None:
    [expected] = llm.generate("odds", SamplingParams(max_tokens=6, logprobs=3))
    assert expected.logprobs is not None
    old = served.client.completions.create(model="tiny", prompt="odds", max_tokens=6, logprobs=3).choices[0].logprobs
    assert old is not None and old.token_logprobs is not None
    assert old.token_logprobs == pytest.approx([each.logprob for each in expected.logprobs], abs=1e-5)
    messages: Any = [{"role": "user", "content": "odds"}]
    for stream in (False, True):
        made: Any = served.client.chat.completions.create(
            model="tiny", messages=messages, max_tokens=6, logprobs=True, top_logprobs=2, stream=stream
        )
        chunks = [chunk.choices[0].logprobs for chunk in made] if stream else [made.choices[0].logprobs]
        tokens = [token for chunk in chunks if chunk is not None for token in chunk.content]
        assert len(tokens) == 6
        assert all(len(each.top_logprobs) == 2 and each.logprob <= 0 for each in tokens)
        assert all(bytes(each.bytes).decode("utf-8", "replace") == each.token for each in tokens)


def test_echo_and_token_ids_are_given_back(served: Served) -> None:
    status, answer, _ = served.ask(
        "/v1/completions",
        {"prompt": "abc", "max_tokens": 3, "echo": True, "return_token_ids": True, "ignore_eos": True},
    )
    [choice] = answer["choices"]
    assert status == 200 and choice["text"].startswith("abc") and len(choice["token_ids"]) == 3
    assert choice["prompt_token_ids"] == [97, 98, 99]


def test_what_lm_eval_sums_up_of_an_echo_is_what_transformers_says(served: Served, model: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    context = [7 * i % 250 for i in range(150)]
    prompts = [[*context, 5, 6, 7], [*context, 8], context[:40]]
    oracle = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    body = {"model": "tiny", "prompt": prompts, "temperature": 0, "logprobs": 1, "seed": 1234, "echo": True}
    for max_tokens, behind in ((1, -1), (0, None)):  # lm_eval 0.4.13 asks for a token, and leaves it out
        status, answer, _ = served.ask("/v1/completions", body | {"max_tokens": max_tokens})
        assert status == 200 and answer["usage"]["completion_tokens"] == max_tokens * len(prompts)
        for prompt, choice, start in zip(prompts, answer["choices"], (150, 149, 20), strict=True):
            with torch.inference_mode():
                expected = oracle(torch.tensor([prompt])).logits[0].log_softmax(-1)
            told = choice["logprobs"]
            found, tops = told["token_logprobs"][start:behind], told["top_logprobs"][start:behind]
            wanted = [expected[at - 1, prompt[at]].item() for at in range(start, len(prompt))]
            assert sum(found) == pytest.approx(sum(wanted), abs=1e-3) and len(found) == len(wanted)
            is_greedy = [expected[at - 1].argmax().item() == prompt[at] for at in range(start, len(prompt))]
            assert [one == max(top.values()) for one, top in zip(found, tops, strict=True)] == is_greedy
            assert told["token_logprobs"][0] is told["top_logprobs"][0] is None
    streamed = served.client.completions.create(
        model="tiny", prompt=prompts[2], max_tokens=1, echo=True, logprobs=1, stream=True, temperature=0
    )
    chunks = [chunk.choices[0].logprobs for chunk in streamed if chunk.choices[0].logprobs is not None]
    assert sum(sum(chunk.token_logprobs[chunk.token_logprobs[0] is None :]) for chunk in chunks) < 0
    assert sum(len(chunk.tokens) for chunk in chunks) == len(prompts[2]) + 1


def test_prompt_logprobs_come_by_token_id(served: Served) -> None:
    asked = {"max_tokens": 1, "prompt_logprobs": 2}
    [choice] = served.ask("/v1/completions", asked | {"prompt": "abc"})[1]["choices"]
    chat = served.ask("/v1/chat/completions", asked | {"messages": [{"role": "user", "content": "abc"}]})[1]
    for found, token in ((choice["prompt_logprobs"], "99"), (chat["prompt_logprobs"], "97")):
        assert found[0] is None and all(2 <= len(each) <= 3 for each in found[1:])
        assert any(token in each and each[token]["decoded_token"] for each in found[1:])


def test_a_repeated_prompt_is_found_in_the_cache(served: Served) -> None:
    prompt = "the same words over and over " * 8
    usages = [served.client.completions.create(model="tiny", prompt=prompt, max_tokens=1).usage for _ in range(2)]
    assert usages[1] is not None and usages[1].prompt_tokens_details is not None
    assert usages[1].prompt_tokens_details.cached_tokens == len(prompt) - 1


def test_a_router_that_comes_late_hears_of_cached_blocks(served: Served) -> None:
    prompt = "what routers look for".ljust(32)
    assert served.ask("/v1/completions", {"prompt": prompt, "max_tokens": 1})[0] == 200
    with zmq.Context() as context, context.socket(zmq.DEALER) as sock:
        sock.connect(f"ipc://{served.log.parent}/replay")
        sock.send_multipart((b"", bytes(8)))
        events: list[dict[str, Any]] = []
        while data := sock.recv_multipart()[2]:
            events += msgspec.msgpack.decode(data)[1]
    stored = {tuple(event["token_ids"]) for event in events if event["type"] == "BlockStored"}
    assert {tuple(prompt[:16].encode()), tuple(prompt[16:].encode())} <= stored


USAGE = {"include_usage": True}

PARTS = [{"role": "user", "content": [{"type": "text", "text": "measure me"}]}]


@pytest.mark.parametrize(
    ("path", "body"),
    [  # what vLLM's bench client, guidellm 0.8.1 (two) and aiperf 0.13.0 send
        ("completions", {"prompt": "measure me", "temperature": 0.0, "repetition_penalty": 1.0, "max_tokens": 9,
                         "logprobs": None, "stream_options": USAGE, "ignore_eos": True}),
        ("completions", {"prompt": "measure me", "stream_options": {**USAGE, "continuous_usage_stats": True},
                         "max_tokens": 9, "stop": None, "ignore_eos": True}),
        ("chat/completions", {"stream_options": {**USAGE, "continuous_usage_stats": True}, "stop": None,
                              "max_completion_tokens": 9, "ignore_eos": True, "messages": PARTS}),
        ("chat/completions", {"messages": [{"role": "user", "name": "", "content": "measure me"}],
                              "max_completion_tokens": 9, "stream_options": USAGE, "ignore_eos": True}),
    ],
)  # fmt: skip
def test_what_benchmark_clients_send_is_answered_as_they_count(served: Served, path: str, body: dict[str, Any]) -> None:
    status, text, _ = served.ask(f"/v1/{path}", body | {"model": "tiny", "stream": True})
    events = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
    chunks = [json.loads(event) for event in events[:-1]]
    assert status == 200 and events[-1] == "[DONE]"
    assert chunks[-1]["choices"] == [] and chunks[-1]["usage"]["completion_tokens"] == 9
    if body["stream_options"].get("continuous_usage_stats"):
        assert [each["usage"]["completion_tokens"] for each in chunks] == sorted(
            each["usage"]["completion_tokens"] for each in chunks
        )
    assert chunks[-2]["choices"][0]["finish_reason"] == "length"


def test_the_examples_run(served: Served) -> None:
    url = f"http://127.0.0.1:{served.port}"
    for command in ([sys.executable, "examples/chat.py", url], ["bash", "examples/completions.sh", url]):
        ran = subprocess.run(
            command, cwd=ROOT, env={**os.environ, "HELIX_API_KEY": KEY}, capture_output=True, timeout=60
        )
        assert ran.returncode == 0 and ran.stdout, ran.stderr


def test_models_versions_and_tokens_are_told(served: Served) -> None:
    [model] = served.client.models.list().data
    assert model.id == "tiny" and model.model_dump()["max_model_len"] == 4096
    assert served.client.models.retrieve("tiny").id == "tiny"
    assert served.ask("/version")[1].keys() == {"version"}
    tokens = served.ask("/tokenize", {"prompt": "añ", "return_token_strs": True})[1]
    assert tokens["tokens"] == list("añ".encode()) and tokens["count"] == 3
    assert served.ask("/detokenize", {"tokens": tokens["tokens"]})[1] == {"prompt": "añ"}
    chat = served.ask("/tokenize", {"messages": [{"role": "user", "content": "a"}]})[1]["tokens"]
    assert len(chat) == 5  # bos, user, a, eos, assistant


def test_metrics_have_what_routers_read(served: Served) -> None:
    """And count the last request that ran as soon as its answer is there."""
    served.settle("num_requests_running", 0)
    made = served.counter("generation_tokens_total")
    for number in (1, 2, 3):
        served.client.completions.create(model="tiny", prompt="count me", max_tokens=3)
        assert served.counter("generation_tokens_total") == made + 3 * number
        assert served.counter("num_requests_running") == served.counter("num_requests_waiting") == 0
    text = served.ask("/metrics")[1]
    for name in (
        'num_requests_running{model_name="tiny"}', "num_requests_waiting", "kv_cache_usage_perc", "prompt_tokens_total",
        "generation_tokens_total", "time_to_first_token_seconds_bucket", "inter_token_latency_seconds_sum",
        "e2e_request_latency_seconds_count", "request_queue_time_seconds_count", "prefix_cache_queries_total",
        "prefix_cache_hits_total", "num_preemptions_total", "request_success_total", "cache_config_info",
    ):  # fmt: skip
        assert f"helix:{name}" in text
    assert 'le="3600.0"' in text


@pytest.mark.parametrize(
    ("path", "body", "status", "param", "message"),
    [
        ("/v1/completions", b"{", 400, None, "the body is not JSON"),
        ("/v1/completions", b"[1]", 400, None, "the body is a list"),
        ("/v1/completions", {"prompt": "a", "model": "other"}, 404, "model", "'other' is not served here"),
        ("/v1/completions", {}, 400, "prompt", "prompt must be"),
        ("/v1/completions", {"prompt": [999999]}, 400, "prompt", "outside the vocabulary"),
        ("/v1/completions", {"prompt": "a", "temperature": -1}, 400, "temperature", "temperature = -1"),
        ("/v1/completions", {"prompt": "a", "logprobs": 21}, 400, "logprobs", "scheduler.max_logprobs"),
        ("/v1/completions", {"prompt": "a", "best_of": 2}, 400, "best_of", "best_of = 2"),
        ("/v1/completions", {"prompt": "a", "guided_json": {}}, 400, "guided_json", "use structured_outputs"),
        ("/v1/completions", {"prompt": "a", "max_tokens": 5000}, 400, "max_tokens", "5000 and a prompt of 1 tokens"),
        ("/v1/completions", {"prompt": "a", "retention": {"priority": 90}}, 400, "retention", "serve.max_retention_s"),
        ("/v1/chat/completions", {"messages": [{"role": "user"}]}, 400, "messages", "has no content"),
        ("/v1/chat/completions", {"messages": "hi"}, 400, "messages", "messages must be"),
        (
            *("/v1/completions", {"prompt": "a", "structured_outputs": {"regex": "(a"}}),
            *(400, "structured_outputs", "parenthesis is not closed"),
        ),
        ("/v1/nothing", {}, 404, None, "not answered here"),
        ("/v1/models/other", None, 404, "model", "not served"),
    ],
)
def test_bad_requests_get_openais_errors(
    served: Served, path: str, body: Any, status: int, param: str | None, message: str
) -> None:
    code, answer, headers = served.ask(path, body, headers={"X-Request-Id": "mine"})
    assert (code, answer["error"]["param"]) == (status, param)
    assert message in answer["error"]["message"] and headers["x-request-id"] == "mine"


def test_a_key_is_needed_everywhere_but_for_health(served: Served) -> None:
    for path, body in (("/v1/models", None), ("/metrics", None), ("/v1/completions", {"prompt": "a"}), ("/no", None)):
        for wrong in ("", "Bearer ", "Bearer another", KEY, f"Basic {KEY}"):
            assert served.ask(path, body, headers={"Authorization": wrong})[0] == 401
    assert served.ask("/health", headers={"Authorization": ""})[0] == 200


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("when", ["before the first token", "after it"])
def test_a_client_that_leaves_ends_its_request_on_all_ranks(served: Served, stream: bool, when: str) -> None:
    aborted = sum_of(served, "abort")
    prompt = "x" * 3000 if when == "before the first token" else "y"
    body = json.dumps({"prompt": prompt, "max_tokens": 1000, "ignore_eos": True, "stream": stream}).encode()
    with served.connect() as client:
        client.sendall(head_of(body) + body)
        if stream:
            received = b""
            while b"data: " not in received and not (when != "after it" and b": " in received):
                received += client.recv(4096)
        else:
            time.sleep(0.3)
    served.settle("num_requests_running", 0)
    assert sum_of(served, "abort") == aborted + 1
    assert served.ask("/v1/completions", {"prompt": "still there?", "max_tokens": 2})[0] == 200


def sum_of(served: Served, reason: str) -> float:
    """Return how many requests have ended for a reason, when the counters have come that hold them all."""
    time.sleep(1.2)
    lines = served.ask("/metrics")[1].splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if f'finished_reason="{reason}"' in line)


def test_a_long_prefill_is_told_in_comments_that_clients_pass_over(served: Served) -> None:
    body = json.dumps({"prompt": "z" * 4000, "max_tokens": 2, "stream": True}).encode()
    with served.connect() as client:
        client.sendall(head_of(body) + body)
        received = b""
        while b"[DONE]" not in received:
            received += client.recv(4096)
    comments = [line for line in received.splitlines() if line.startswith(b": ")]
    assert comments and all(line[2:].split()[0] in (b"waiting", b"prefill") for line in comments)
    stream = served.client.completions.create(model="tiny", prompt="w" * 4000, max_tokens=2, stream=True)
    assert [choice.finish_reason for chunk in stream for choice in chunk.choices][-1] in ("length", "stop")


def test_a_walk_of_clients_loses_nothing_and_changes_no_answer(served: Served, llm: LLM) -> None:
    walk(served, llm, 60, seed=1)
