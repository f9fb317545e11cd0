"""The server from outside: OpenAI's own client and bare sockets against two ranks, and what ends it."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import msgspec
import openai
import pytest
import zmq

from helix import LLM, HelixConfig, Request, SamplingParams
from helix.config import CacheConfig, ModelConfig, RuntimeConfig
from helix.serving.config import ServingConfig
from scripts.make_checkpoint import make_checkpoint
from scripts.serve import ServeConfig, prepared
from tests.scripts.serving_walk import Walk

ROOT = Path(__file__).parents[2]
KEY = "a-key"
NUM_PAGES = 256


@dataclass
class Served:
    """A running server."""

    port: int
    process: subprocess.Popen[bytes]
    log: Path

    @cached_property
    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"http://127.0.0.1:{self.port}/v1", api_key=KEY, max_retries=0, timeout=60)

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=60)

    def ask(self, path: str, body: Any = None, *, headers: dict[str, str] | None = None) -> tuple[int, Any, Any]:
        """Return the status, the JSON and the headers of a response."""
        data = None if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
        headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"} | (headers or {})
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", data, headers)
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                text, status, found = response.read(), response.status, response.headers
        except urllib.error.HTTPError as error:
            text, status, found = error.read(), error.code, error.headers
            error.close()
        is_json = found.get("content-type", "").startswith("application/json")
        return status, json.loads(text) if is_json else text.decode(), found

    def counter(self, name: str) -> float:
        """Return the sum of a metric's values."""
        lines = self.ask("/metrics")[1].splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(f"helix:{name}{{"))

    def settle(self, name: str, value: float) -> None:
        """Wait until a metric has a value."""
        deadline = time.monotonic() + 30
        while (now := self.counter(name)) != value:
            assert time.monotonic() < deadline, f"{name} stays {now}, not {value}"
            time.sleep(0.1)


def launch(model: Path, folder: Path, *arguments: str, num_ranks: int, num_pages: int = NUM_PAGES) -> Served:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks)]
    settings = ["runtime.device=cpu", "cache.block_size=16", f"cache.num_pages={num_pages}", "parallel.tpa=1"]
    log = folder / "log"
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HELIX_API_KEY": KEY}
    with log.open("wb") as out:
        process = subprocess.Popen(
            [*command, "-m", "scripts.serve", f"model.path={model}", f"port={port}", *settings, *arguments],
            cwd=folder,
            env=env | {"CUDA_VISIBLE_DEVICES": ""},
            stdout=out,
            stderr=subprocess.STDOUT,
        )
    return Served(port, process, log)


def start(model: Path, folder: Path, *arguments: str, num_ranks: int = 2, num_pages: int = NUM_PAGES) -> Served:
    served = launch(model, folder, *arguments, num_ranks=num_ranks, num_pages=num_pages)
    deadline = time.monotonic() + 120
    while True:
        assert served.process.poll() is None and time.monotonic() < deadline, served.log.read_text()
        try:
            if served.ask("/health")[0] == 200:
                return served
        except OSError:
            pass
        time.sleep(0.2)


def pid_of(served: Served, rank: int) -> int:
    """Return the process of a rank, a child of torchrun."""
    children = Path(f"/proc/{served.process.pid}/task/{served.process.pid}/children").read_text().split()
    [found] = [int(pid) for pid in children if f"\0RANK={rank}\0".encode() in Path(f"/proc/{pid}/environ").read_bytes()]
    return found


def end(served: Served) -> None:
    if "client" in vars(served):
        served.client.close()
    if served.process.poll() is None:
        served.process.send_signal(signal.SIGTERM)
        served.process.wait(60)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("serve") / "tiny", layers=1, max_position=4096)


@pytest.fixture(scope="module")
def served(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A server of two ranks, for all tests that do not end it."""
    folder = tmp_path_factory.mktemp("log")
    events = [f"serve.kv_events=ipc://{folder}/events", f"serve.kv_events_replay=ipc://{folder}/replay"]
    served = start(model, folder, "scheduler.prefill_chunk=64", "serve.keepalive_s=0.3", *events)
    yield served
    end(served)


@pytest.fixture(scope="module")
def llm(model: Path) -> LLM:
    """The same model without a server."""
    return LLM(
        HelixConfig(
            model=ModelConfig(path=str(model)),
            cache=CacheConfig(block_size=16, num_pages=2 * NUM_PAGES),
            runtime=RuntimeConfig(device="cpu"),
        )
    )


# --- answers ----------------------------------------------------------------------------------------------------------


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


# --- other paths ------------------------------------------------------------------------------------------------------


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
    served.client.completions.create(model="tiny", prompt="count me", max_tokens=3)
    time.sleep(1.5)
    text = served.ask("/metrics")[1]
    for name in (
        'num_requests_running{model_name="tiny"}', "num_requests_waiting", "kv_cache_usage_perc", "prompt_tokens_total",
        "generation_tokens_total", "time_to_first_token_seconds_bucket", "inter_token_latency_seconds_sum",
        "e2e_request_latency_seconds_count", "request_queue_time_seconds_count", "prefix_cache_queries_total",
        "prefix_cache_hits_total", "num_preemptions_total", "request_success_total", "cache_config_info",
    ):  # fmt: skip
        assert f"helix:{name}" in text
    assert 'le="3600.0"' in text and served.counter("generation_tokens_total") > 0


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


# --- clients that leave -----------------------------------------------------------------------------------------------


def head_of(body: bytes, *, close: bool = False) -> bytes:
    return (
        f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n" + "Connection: close\r\n" * close + "\r\n"
    ).encode()


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


# --- many clients at once, and the end --------------------------------------------------------------------------------


def test_a_walk_of_clients_loses_nothing_and_changes_no_answer(served: Served, llm: LLM) -> None:
    walk(served, llm, 60, seed=1)


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("seed", range(4))
def test_ten_thousand_operations_with_drafts_few_pages_and_a_host_tier(
    model: Path, llm: LLM, tmp_path: Path, seed: int
) -> None:
    settings = ["speculative=ngram", "cache.host_pages=40", "scheduler.prefill_chunk=64"]
    served = start(model, tmp_path, *settings, num_pages=24)
    try:
        walk(served, llm, 2500, seed)
        print(served.counter("num_preemptions_total"), "preemptions,", served.counter("num_steps_total"), "steps")
    finally:
        end(served)


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_a_walk_before_two_groups(model: Path, llm: LLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prefill, served = two_groups(model, tmp_path, monkeypatch)
    try:
        walk(served, llm, 1000, seed=9)
    finally:
        end(served)
    assert prefill.process.wait(60) == 0


def walk(served: Served, llm: LLM, num_operations: int, seed: int) -> None:
    """Let clients do so much at random; every answer is that of a run alone, and nothing is left."""
    walk = Walk(head_of, served.port)
    walk.run(num_operations, 6, seed)
    assert walk.wrong == [] and len(walk.answers) > num_operations / 3
    requests = [
        Request(prompt=asked["prompt"], sampling=SamplingParams(
            max_tokens=asked["max_tokens"], temperature=asked.get("temperature", 0.0), seed=asked.get("seed")
        )) for asked, _ in walk.answers
    ]  # fmt: skip
    assert [text for _, text in walk.answers] == [output.text for output in llm.generate(requests)]
    served.settle("num_requests_running", 0)
    assert (served.counter("num_requests_waiting"), served.counter("kv_cache_usage_perc")) == (0, 0)


def long_streams(served: Served, number: int, num_tokens: int) -> list[socket.socket]:
    """Return connections whose streams have begun."""
    body = json.dumps({"prompt": "go on", "max_tokens": num_tokens, "ignore_eos": True, "stream": True}).encode()
    clients = [served.connect() for _ in range(number)]
    for client in clients:
        client.sendall(head_of(body, close=True) + body)
    for client in clients:
        while b"data: " not in client.recv(4096):
            pass
    return clients


def rest_of(client: socket.socket) -> bytes:
    received = b""
    while piece := client.recv(1 << 16):
        received += piece
    client.close()
    return received


def require_free(port: int) -> None:
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", port))


def test_a_signal_under_load_drains(served: Served) -> None:
    """The last test of the module: it ends the server."""
    clients = long_streams(served, 3, 120)
    served.process.send_signal(signal.SIGTERM)
    deadline = time.monotonic() + 10
    while (status := served.ask("/v1/completions", {"prompt": "a"})[0]) == 200 and time.monotonic() < deadline:
        pass
    assert status == 503
    for client in clients:
        received = rest_of(client)
        assert b'"finish_reason":"length"' in received and b"[DONE]" in received
    served.process.wait(60)
    require_free(served.port)
    log = served.log.read_text()
    assert "taking no more requests" in log and "rank 0 failed" not in log and "rank 1 failed" not in log


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_ends_the_world_and_every_client_hears_of_it(model: Path, tmp_path: Path, rank: int) -> None:
    served = start(model, tmp_path)
    clients = long_streams(served, 3, 3000)
    os.kill(pid_of(served, rank), signal.SIGKILL)
    for client in clients:  # long before ``runtime.timeout_s``
        assert b"world_lost" in rest_of(client)
    assert served.process.wait(60) != 0
    require_free(served.port)
    assert rank == 0 or "error: another rank has ended" in served.log.read_text()


@pytest.mark.slow
def test_a_rank_that_hangs_ends_streams_with_an_error_until_it_goes_on(model: Path, tmp_path: Path) -> None:
    served = start(model, tmp_path, "serve.stall_timeout_s=3")
    [client] = long_streams(served, 1, 3000)
    os.kill(pid_of(served, 1), signal.SIGSTOP)
    assert b'"code":"stalled"' in rest_of(client)
    assert served.ask("/health")[0] == 503
    os.kill(pid_of(served, 1), signal.SIGCONT)
    deadline = time.monotonic() + 30
    while served.ask("/health")[0] != 200:
        assert time.monotonic() < deadline
    served.settle("num_requests_running", 0)
    assert served.ask("/v1/completions", {"prompt": "again", "max_tokens": 2})[0] == 200
    end(served)


def two_groups(model: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Served, Served]:
    """Return a world that prefills, and the server that decodes."""
    monkeypatch.setenv("HELIX_TRANSFER_SECRET", "s" * 40)
    (folder / "prefill").mkdir()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"transfer.address=127.0.0.1:{probe.getsockname()[1]}"
    prefill = launch(model, folder / "prefill", address, "transfer.role=prefill", num_ranks=1)
    return prefill, start(model, folder, address, "transfer.role=decode", num_ranks=1)


@pytest.mark.slow
def test_a_killed_prefill_group_is_named_and_answers_go_on(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefill, served = two_groups(model, tmp_path, monkeypatch)
    assert served.ask("/health")[1] == {"status": "ok"}
    clients = long_streams(served, 2, 400)
    os.kill(pid_of(prefill, 0), signal.SIGKILL)
    assert served.ask("/v1/completions", {"prompt": "on and on" * 20, "max_tokens": 3})[0] == 200
    assert all(b'"finish_reason":"length"' in rest_of(client) for client in clients)
    time.sleep(1.5)
    status, health, _ = served.ask("/health")
    assert (status, health["status"]) == (200, "degraded") and "prefill group is gone" in health["trouble"]
    end(served)
    assert prefill.process.wait(60) != 0


@pytest.mark.slow
def test_without_its_http_process_the_world_ends_in_one_line(model: Path, tmp_path: Path) -> None:
    served = start(model, tmp_path)
    [http] = [
        int(folder.name)
        for folder in Path("/proc").iterdir()
        if folder.name.isdigit() and _is_http_of(folder, served.process.pid)
    ]
    os.kill(http, signal.SIGKILL)
    assert served.process.wait(60) != 0
    log = served.log.read_text()
    assert "error: the HTTP process has ended" in log and "rank 0 failed" not in log and "rank 1 failed" not in log


def _is_http_of(folder: Path, agent: int) -> bool:
    """Return whether a process is the HTTP process of a rank that an agent started."""
    try:
        if b"scripts.http_process" not in (folder / "cmdline").read_bytes():
            return False
        parent = (folder / "stat").read_text().rpartition(")")[2].split()[1]
        return Path(f"/proc/{parent}/stat").read_text().rpartition(")")[2].split()[1] == str(agent)
    except OSError:
        return False


@pytest.mark.slow
def test_a_second_signal_ends_it_at_once(model: Path, tmp_path: Path) -> None:
    served = start(model, tmp_path)
    [client] = long_streams(served, 1, 3000)
    for _ in range(2):
        os.kill(pid_of(served, 0), signal.SIGTERM)
        time.sleep(0.5)
    assert b"world_lost" in rest_of(client)  # and not its 3000 tokens
    served.process.wait(60)
    assert "error: ended by SIGTERM" in served.log.read_text()


@pytest.mark.parametrize(
    ("settings", "key", "message"),
    [
        ({"host": "0.0.0.0"}, None, "host = 0.0.0.0 serves other machines without a key"),
        ({"serve": ServingConfig(api_key_file="none")}, None, "serve.api_key_file = none cannot be read"),
        (
            {"serve": ServingConfig(api_key_file="none")},
            "k",
            "serve.api_key_file = none and HELIX_API_KEY are both set",
        ),
        ({}, "two words", "HELIX_API_KEY holds no key"),
        ({"serve": ServingConfig(response_template="none")}, None, "serve.response_template = none is no response"),
    ],
)
def test_what_cannot_be_served_is_said_before_anything_is_loaded(
    settings: dict[str, Any], key: str | None, message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HELIX_API_KEY", raising=False)
    if key is not None:
        monkeypatch.setenv("HELIX_API_KEY", key)
    with pytest.raises(ValueError, match=f"^{message}"):
        prepared(ServeConfig(**{"port": 0} | settings))


def test_a_port_that_is_taken_is_named() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(ValueError, match=f"^host = 127.0.0.1, port = {port} cannot be listened on"):
            prepared(ServeConfig(port=port))
