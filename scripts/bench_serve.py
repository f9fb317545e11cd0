"""What the server costs: the same requests to the engine alone and over HTTP, on the same ranks, one after the other.

    torchrun --standalone --nproc-per-node 1 -m scripts.bench_serve model=glm4_9b_1m batches='[1,64]' prompt_len=256

Prompts are random tokens, as many on their way at once as a batch holds. Alone, times are rank 0's when it has read a
step; over HTTP they are those of a client, a process of its own (``scripts/http_load.py``), when a chunk has come.
CPU time is that of rank 0's process, prefill included. The first round pays for whatever is done once.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from helix.commands import Close, encode
from helix.config import CacheConfig, HelixConfig, ModelConfig, ParallelConfig, RuntimeConfig, SchedulerConfig
from helix.inbox import Inbox
from helix.llm import LLM
from helix.sampling import SamplingParams
from helix.serving import wire
from helix.serving.clients import Clients
from helix.serving.config import ServingConfig
from parallel.launch import set_up_logging
from scripts import cli
from scripts.bench_engine import Traffic
from scripts.serve import END_S, bound, http_process
from scripts.timing import report

NAME = "bench"


@dataclass(kw_only=True, slots=True)
class BenchServeConfig:
    """What to measure.

    Attributes:
        batches: requests on their way at once, of each case.
        requests: of a case, for each place of its batch.
        prompt_len: tokens of a prompt.
        outputs: tokens a request makes.
        rounds: how often each case runs.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    batches: list[int] = field(default_factory=lambda: [1, 64])
    requests: int = 2
    prompt_len: int = 1024
    outputs: int = 128
    rounds: int = 3

    def helix(self) -> HelixConfig:
        """Return the settings of the runtime; prompts are fresh, so nothing is reused."""
        return HelixConfig(
            model=self.model,
            parallel=self.parallel,
            cache=replace(self.cache, reuse=False),
            scheduler=replace(self.scheduler, max_batch=max(self.batches)),
            runtime=self.runtime,
        )


def alone(llm: LLM, prompts: Sequence[list[int]], config: BenchServeConfig, batch: int) -> dict[str, float]:
    """Run requests through the engine; the figures are rank 0's. Collective."""
    sampling = SamplingParams(max_tokens=config.outputs, ignore_eos=True)
    traffic = Traffic(llm, prompts, [0.0] * len(prompts), sampling, batch)
    for events in llm.turns(traffic):
        traffic.note(events)
    return traffic.figures() if llm.launch.speaks else {}


def served(
    llm: LLM, clients: Clients | None, port: int, prompts: Sequence[list[int]], config: BenchServeConfig, batch: int
) -> dict[str, float]:
    """Run requests over HTTP; the figures are those of the client, which rank 0 has. Collective."""
    if clients is None:
        for _ in llm.turns(Inbox()):
            pass
        return {}
    body = {"model": NAME, "max_tokens": config.outputs, "ignore_eos": True, "stream": True, "return_token_ids": True}
    asked = json.dumps({"port": port, "batch": batch, "bodies": [body | {"prompt": each} for each in prompts]})
    said: list[str] = []

    def ask() -> None:
        command = [sys.executable, "-m", "scripts.http_load"]
        ran = subprocess.run(command, input=asked, stdout=subprocess.PIPE, text=True, check=False)
        said.append(ran.stdout)
        clients.inbox.put(encode(Close()), always=True)

    thread = threading.Thread(target=ask)
    thread.start()
    for events in llm.turns(clients.inbox):
        clients.publish(llm, events)
    thread.join()
    if not said[0]:
        raise RuntimeError("the client has failed; what it said is above")
    return json.loads(said[0])


def measure(llm: LLM, clients: Clients | None, port: int, config: BenchServeConfig) -> list[dict[str, Any]]:
    """Return a row for each case, way and round. Collective."""
    rows: list[dict[str, Any]] = []
    rng = np.random.default_rng(0)
    for batch in config.batches:
        for number in range(config.rounds):
            for way in ("alone", "served"):
                shape = (batch * config.requests, config.prompt_len)
                prompts = rng.integers(0, llm.spec.vocab_size, shape).tolist()
                began = time.process_time()
                if way == "alone":
                    figures = alone(llm, prompts, config, batch)
                else:
                    figures = served(llm, clients, port, prompts, config, batch)
                cpu_us = (time.process_time() - began) * 1e6 / (len(prompts) * config.outputs)
                rows.append({"batch": batch, "round": number, "way": way, **figures, "CPU us a token": cpu_us})
                cli.say(f"batch {batch}, round {number}, {way}: {figures.get('tokens/s', 0.0):.0f} tokens/s")
    return rows


def run(config: BenchServeConfig) -> None:
    """Run the benchmark on this rank."""
    llm = LLM(config.helix())
    set_up_logging(llm.launch.rank)
    if llm.launch.speaks:
        listener = bound("127.0.0.1", 0)
        port = listener.getsockname()[1]
        with http_process(listener) as (process, clients):
            clients.tell(wire.Setup(NAME, NAME, None, "", ServingConfig(), SamplingParams()))
            clients.open(llm, wire.Ready(llm.spec.vocab_size, llm.preparer.limits, [], llm.vocabulary.end_ids))
            rows = measure(llm, clients, port, config)
            clients.close(END_S)
            process.wait(END_S)
    else:
        rows = measure(llm, None, 0, config)
    facts = {"prompt_len": config.prompt_len, "outputs": config.outputs, "requests": config.requests}
    report(
        "serve", list(rows[0]), [list(row.values()) for row in rows], kvp=llm.layout.kvp, tpa=llm.layout.tpa, **facts
    )
    llm.close()


if __name__ == "__main__":
    cli.main("bench_serve", BenchServeConfig, run)
