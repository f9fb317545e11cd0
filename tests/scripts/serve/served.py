"""A server in processes of its own, as its tests start, ask and end it."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import openai

from helix import LLM, Request, SamplingParams
from tests.scripts.serve.serving_walk import Walk

ROOT = Path(__file__).parents[3]

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


def head_of(body: bytes, *, close: bool = False) -> bytes:
    return (
        f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n" + "Connection: close\r\n" * close + "\r\n"
    ).encode()


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
