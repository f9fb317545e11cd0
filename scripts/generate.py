"""The main job: decode prompts with a Hugging Face checkpoint on the world's ranks.

    torchrun --standalone --nproc-per-node 4 -m scripts.generate model.path=DIR parallel.kvp=2 parallel.tpa=2 \
        prompts=in.jsonl output=out.jsonl metrics=metrics.json sampling.max_tokens=64 cache.block_size=16

With transfer.prefill_ranks=2 (and transfer.prefill.kvp, transfer.prefill.tpa) the first 2 ranks compute prompts and the
others decode; with transfer.role and transfer.address two worlds do (docs/transfer.md).

An input line is {"prompt": text}, {"prompt_token_ids": [...]} or {"messages": [...]}, or one of OpenAI's batch API
(scripts/prompt_file.py), with an optional "id", "sampling" (settings for that line), "cache_salt" (a string; lines
share cached blocks with lines of the same salt only) and "retention" ({"start": 0, "end": 1000, "priority": 80,
"duration_s": 60}, or a list of such ranges). A bad line fails alone, with finish_reason "error". Where no line can run,
the exit code is 2 and nothing is loaded.

``output`` grows by a line when a request ends, and has the order of the input in the end. What is done is kept whatever
ends the run, and resume=true goes on with the rest. What cannot be written, since the disk is full by then, is printed
instead, and the exit code is 1 (exit codes: scripts/ending.py).
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from helix.config import HelixConfig
from helix.llm import LLM, enter
from helix.models.generation_config import with_models_sampling
from helix.predicted import predicted
from helix.prepare import Prepared
from helix.request import Request, RequestOutput
from parallel.launch import Launch, from_rank0, gather_values, set_up_logging, stop
from scripts import cli, ending
from scripts.outputs import EventFile, GrowingFile, PrintedLines, check_writable, output_lines, save
from scripts.progress import RunProgress
from scripts.prompt_file import name_of, read_requests
from scripts.resume import done_lines, hashes_of

_log = logging.getLogger(__name__)


@dataclass(kw_only=True, slots=True)
class GenerateConfig(HelixConfig):
    """The settings of the command.

    Attributes:
        prompts: a JSON-lines file of requests.
        prompt: one prompt, instead of a file; on the command line the text as it is, commas, braces and all.
        output: the JSON-lines file to write; None prints the lines.
        metrics: the JSON file to write measurements to.
        resume: go on with the output file of a run that was interrupted: only lines that it lacks are made.
    """

    prompts: str | None = None
    prompt: str | None = None
    output: str | None = None
    metrics: str | None = None
    resume: bool = False

    def __post_init__(self) -> None:
        self.speculative.check_used()
        if self.transfer.role == "prefill":
            theirs = {name: getattr(self, name) for name in ("prompts", "prompt", "output", "metrics")}
            for name, value in (theirs | {"cache.events": self.cache.events}).items():
                if value is not None:
                    raise ValueError(
                        f"{name} = {value} belongs to the decode group: a world of transfer.role=prefill takes its "
                        "prompts from there; leave it out"
                    )
            return
        if (self.prompts is None) == (self.prompt is None):
            raise ValueError("give one of prompts (a JSON-lines file) and prompt (one string)")
        if self.resume and self.output is None:
            raise ValueError("resume = true needs output=FILE, which it goes on with")


def output_line(output: RequestOutput, index: int, asked: str) -> str:
    """Return the JSON of one output; a request without an id gets its index. ``asked`` is the request's hash."""
    item: dict[str, Any] = {
        "id": name_of(output.id, index),
        "token_ids": output.token_ids,
        "text": output.text,
        "finish_reason": output.finish_reason,
        **({} if output.stop_reason is None else {"stop_reason": output.stop_reason}),
        "prompt_tokens": output.prompt_tokens,
        "cached_tokens": output.cached_tokens,
    }
    for name, found in (("prompt_logprobs", output.prompt_logprobs), ("logprobs", output.logprobs)):
        if found is not None:
            item[name] = [each and asdict(each) for each in found]
    item |= {"hash": asked} if output.error is None else {"error": output.error}
    line = json.dumps(item, ensure_ascii=False)
    return line.encode("utf-8", "backslashreplace").decode()  # an id may hold a lone surrogate, \ud800


def metrics_of(llm: LLM) -> dict[str, Any]:
    """Return the content of metrics.json. Collective over the world."""
    layout = llm.layout
    per_kvp_rank = llm.metrics.tokens_per_rank
    return {
        "world_size": layout.world_size,
        "layout": {"kvp": layout.kvp, "tpa": layout.tpa, "tpf": layout.tpf, "ep": layout.ep},
        "device": llm.launch.device.type,
        "dtype": str(llm.dtype).removeprefix("torch."),
        "block_size": llm.placement.block_size,
        "num_pages_per_rank": llm.num_pages,
        "tokens_per_rank": [per_kvp_rank[rank % layout.kvp] for rank in range(layout.world_size)],
        "layer_weight_bytes_per_rank": gather_values(llm.runner.decoder.layer_bytes),
        **llm.metrics.as_dict(),
        "predicted": predicted(llm) if llm.launch.speaks else None,
    }


@dataclass(frozen=True, slots=True)
class Work:
    """What a run has to do: those of its requests that are not done, and their indices among all."""

    requests: list[Request]
    indices: list[int]
    num_lines: int


def generate(llm: LLM, work: Work, hashes: Sequence[str], lines: GrowingFile | PrintedLines | None) -> list[str]:
    """Run requests with a progress display, keep each line as it ends, and return the errors of those that failed.

    Collective over the world; rank 0 has the lines.

    Raises:
        RuntimeError: for an OSError on the way: what the run was given has been read, so it is no bad input.
    """
    default, errors = llm.config.sampling, list[str]()
    most = [(request.sampling or default).max_tokens for request in work.requests if not request.error]
    wanted = sum(llm.spec.max_position if each is None else each for each in most)
    try:
        with RunProgress(llm.launch.speaks, wanted, prints=isinstance(lines, PrintedLines)) as progress:
            for event in llm.stream(work.requests, on_step=progress.update):
                if event.output is not None:
                    errors += [event.output.error] if event.output.error is not None else []
                    if lines is not None:
                        index = work.indices[event.index]
                        lines.add(index, output_line(event.output, index, hashes[event.index]))
    except OSError as error:
        raise RuntimeError(f"the run broke off: {error}") from error
    return errors


@contextmanager
def cache_events(llm: LLM, path: str | None) -> Iterator[EventFile | None]:
    """Write what enters, leaves and moves in the cache to a file, on rank 0."""
    if path is None or not llm.launch.speaks:
        yield None
        return
    file = EventFile(path)
    llm.listen(file.write)
    try:
        yield file
    finally:
        llm.unlisten(file.write)
        file.close()


def plan(config: GenerateConfig) -> None:
    """Find what ``run`` would refuse, and take no memory: settings, files, and whether any prompt can run.

    Raises:
        ValueError: as ``run`` would.
    """
    launch = enter(config)
    ending.enter_part(launch)
    Prepared(
        config, launch, prompts=[] if config.transfer.prefills(launch.part) else checked_first(read_input(config)[0])
    )
    stop()


def run(config: GenerateConfig) -> None:
    """Run the command on this rank: serve in a prefill group, else generate."""
    launch = enter(config)
    ending.enter_part(launch)
    prefills = config.transfer.prefills(launch.part)
    set_up_logging(launch.rank, "prefill rank" if prefills else "rank")
    if prefills:
        llm = LLM(config)
        try:
            llm.serve()
        except OSError as error:
            raise ending.RunFailed(str(error)) from error
        llm.close()
    else:
        run_requests(config, launch)


def read_input(config: GenerateConfig) -> tuple[Work, dict[int, str]]:
    """Return what there is to do, and on rank 0 the lines of output that are done. Collective over the world.

    Raises:
        ValueError: when the prompts cannot be read, or what comes of them cannot be written.
    """
    done: dict[int, str] = {}

    def read() -> Work:
        check_writable(config.output, config.metrics, config.cache.events, read=[config.prompts])
        requests = [Request(prompt=config.prompt)]
        if config.prompts is not None:
            requests = read_requests(config.prompts, config.sampling)
        if config.output is not None and Path(config.output).is_file():
            names = [name_of(request.id, index) for index, request in enumerate(requests)]
            done.update(done_lines(config.output, names, hashes_of(requests, config), resume=config.resume))
            say_what_becomes_of(config.output, f"{len(done)} of {len(requests)} lines" if config.resume else None)
        todo = [index for index in range(len(requests)) if index not in done]
        return Work([requests[index] for index in todo], todo, len(requests))

    return from_rank0(read), done


def say_what_becomes_of(output: str, kept: str | None) -> None:
    """Log that a file that is there is gone on with, what of it is kept, or that the run replaces it."""
    if kept is not None:
        _log.info("output = %s has %s, which are kept", output, kept)
    elif Path(output).stat().st_size:
        _log.info("output = %s is there already and is replaced; resume=true keeps lines that are done", output)


def run_requests(config: GenerateConfig, launch: Launch) -> None:
    """Read the requests, generate, and write what came of them."""
    config = with_models_sampling(config)
    work, done = read_input(config)
    llm = LLM(config, prompts=checked_first(work))
    hashes = from_rank0(lambda: hashes_of(work.requests, config))
    lines = output_lines(config.output, work.num_lines, done) if launch.speaks else None
    with ending.last_words(lines.keep) if lines is not None else nullcontext():
        with cache_events(llm, config.cache.events) as events:
            errors = generate(llm, work, hashes, lines)
        metrics = json.dumps(metrics_of(llm), indent=2) + "\n"

    def write() -> list[str]:
        problems = [events.problem] if events is not None else []
        problems += [lines.finish()] if lines is not None else []
        if config.metrics is not None:
            problems.append(save("metrics", config.metrics, metrics, sys.stderr))
        return [problem for problem in problems if problem is not None]

    problems = from_rank0(write)
    llm.close()
    if problems:
        raise ending.RunFailed("; ".join(problems))
    if errors and len(errors) == work.num_lines:
        raise ValueError(errors[0] if len(errors) == 1 else f"all {len(errors)} prompts failed: {errors[0]}")
    if errors and launch.speaks:
        print(f"{len(errors)} of {work.num_lines} prompts failed: {errors[0]}", file=sys.stderr)


def checked_first(work: Work) -> list[Request]:
    """Return the requests of which one at least must be able to run: none where a run goes on, which has lines."""
    return work.requests if len(work.requests) == work.num_lines else []


if __name__ == "__main__":
    cli.main("generate", GenerateConfig, run, plan=plan)
