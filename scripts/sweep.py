"""Many layouts and cases one after another, each measured in a process of its own or predicted: a table, a picture.

    python -m scripts.sweep model=glm4_9b_1m parallel.kvp=1,2,4 parallel.tpa=1,2,4 batch=1,8 context=128K,1M output=DIR
    python -m scripts.sweep ... mode=plan gpus=8 hardware=h200

Every key of ``scripts.generate`` may stand here; lists are swept, and all combinations are points. What the plan
refuses is skipped, its reason in the table. A point that fails, or takes longer than ``timeout_s``, fails alone.
Started again, a sweep goes on where it stopped. DIR gets points.jsonl, table.txt, pareto.png and a log of each point.

A measured point is ``launch`` (``{ranks}`` stands for how many) with scripts.bench_decode where there are GPUs, and
with scripts.generate on random prompts elsewhere. ``launch='srun --ntasks {ranks} python -m'`` takes a cluster's
launcher.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch

from helix.config import check_at_least, check_choice
from helix.models.loading import read_spec
from helix.models.spec import ModelSpec
from helix.plan.hardware import named_hardware, read_hardware
from helix.plan.planner import Setup
from helix.plan.sizes import parse_size, parse_sizes, short
from parallel.layout import Layout
from scripts import cli
from scripts.generate import GenerateConfig
from scripts.outputs import write_text
from scripts.pareto import Point, draw_pareto, require_matplotlib
from scripts.plan import PlanHardware, name_of, prepared, storage_of
from scripts.timing import show

MODES = ("measure", "plan")
DONE = ("ok", "refused")
PAGES = ("cache.dtype=", "cache.block_size=")  # what scripts.bench_decode takes of the cache's keys
AXES = ("parallel.kvp", "parallel.tpa", "parallel.ep")


@dataclass(kw_only=True, slots=True)
class SweepConfig:
    """What the sweep itself is told; the other keys are those of scripts.generate.

    Attributes:
        output: the folder.
        batch: sequences that decode together, a list.
        context: tokens of a sequence, a list.
        mode: measure, or plan: predict.
        gpus: how many there are; layouts that need more are refused.
        launch: what starts a measured point.
        timeout_s: the longest that a point may take, in seconds.
        tokens: what each sequence of a measured point decodes.
        retry: run points again that failed.
    """

    hardware: PlanHardware = field(default_factory=PlanHardware)
    output: str = ""
    batch: str = "1,8"
    context: str = "128K"
    mode: str = "measure"
    gpus: str = "8"
    launch: str = "torchrun --standalone --nproc-per-node {ranks} -m"
    timeout_s: float = 900.0
    tokens: int = 32
    retry: bool = False

    def __post_init__(self) -> None:
        check_choice("mode", self.mode, MODES)
        check_at_least("timeout_s", self.timeout_s, 1)
        check_at_least("tokens", self.tokens, 2)
        if not self.output:
            raise ValueError("output is empty: give the folder that gets the points, the table and the picture")
        if self.mode == "measure" and "{ranks}" not in self.launch:
            raise ValueError(f"launch = {self.launch} must say where the number of ranks goes: {{ranks}}")


@dataclass(frozen=True)
class Case:
    """One point: the arguments of its run, those that are swept beside its layout, and what is decoded."""

    arguments: tuple[str, ...]
    swept: str
    kvp: int
    tpa: int
    ep: int
    context: int
    batch: int

    @property
    def key(self) -> str:
        """What tells it from other points."""
        return json.dumps([*self.arguments, self.context, self.batch])

    @property
    def layout(self) -> Layout:
        """Its layout; ValueError where it is none."""
        return Layout(kvp=self.kvp, tpa=self.tpa, ep=self.ep)


def cases_of(config: SweepConfig, arguments: Sequence[str]) -> list[Case]:
    """Return all combinations of what is listed.

    Raises:
        ValueError: in one line, for a key that there is not or a value that does not fit.
    """
    lists = []
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not equals:
            raise ValueError(f"{argument} is not KEY=VALUE")
        lists.append([f"{key}={each}" for each in value.split(",")] if "[" not in value else [argument])
    cases = []
    for each in product(*lists, parse_sizes("context", config.context), parse_sizes("batch", config.batch)):
        taken, context, batch = [str(part) for part in each[:-2]], int(each[-2]), int(each[-1])
        values = dict(argument.split("=", 1) for argument in taken)
        kvp, tpa, ep = (parse_size(axis, values.get(axis, "1")) for axis in AXES)
        given = [*taken, *(f"{axis}=1" for axis in AXES[:2] if axis not in values)]
        swept = " ".join(one for one, of in zip(taken, lists, strict=True) if len(of) > 1 and not one.startswith(AXES))
        cases.append(Case(tuple(given), swept, kvp, tpa, ep, context, batch))
    return cases


class Sweep:
    """The points of a folder."""

    def __init__(self, config: SweepConfig, cases: Sequence[Case]) -> None:
        self.config, self.cases = config, cases
        self.folder = Path(config.output)
        try:
            (self.folder / "logs").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"output = {self.folder} cannot be a folder: {error.strerror}") from error
        self._file = self.folder / "points.jsonl"
        hardware = config.hardware
        self._hardware = named_hardware(hardware.name) if hardware.file is None else read_hardware(hardware.file)
        self._specs: dict[str, ModelSpec] = {}
        self.done: dict[str, dict[str, Any]] = {}
        text = self._file.read_text("utf-8") if self._file.exists() else ""
        whole = text[: text.rfind("\n") + 1]
        if whole != text:  # an interruption cut the last line
            write_text(str(self._file), whole)
        for line in whole.splitlines():
            point = json.loads(line)
            if point["status"] in DONE or not config.retry:
                self.done[point["key"]] = {"swept": ""} | point

    @property
    def title(self) -> str:
        """How the points came about."""
        return (
            f"predicted ({self._hardware.name}: {self._hardware.source})" if self.config.mode == "plan" else "measured"
        )

    def run(self) -> list[dict[str, Any]]:
        """Run what is not done, and return all points in order."""
        left, began = [case for case in self.cases if self._key(case) not in self.done], time.monotonic()
        for number, case in enumerate(left, 1):
            point = self._point(case)
            with self._file.open("a", encoding="utf-8") as file:
                file.write(json.dumps(point) + "\n")
            self.done[point["key"]] = point
            seconds = (time.monotonic() - began) / number * (len(left) - number)
            done = len(self.cases) - len(left) + number
            line = f"{done} of {len(self.cases)}: {_said(point)}; about {seconds:.0f} s left"
            print(line, file=sys.stderr, flush=True)
        return [self.done[self._key(case)] for case in self.cases]

    def _key(self, case: Case) -> str:
        machine = self._hardware.name if self.config.mode == "plan" else self.config.launch
        return f"{self.config.mode} {machine} {case.key}"

    def _point(self, case: Case) -> dict[str, Any]:
        facts = {name: value for name, value in asdict(case).items() if name != "arguments"}
        point: dict[str, Any] = {"key": self._key(case), "mode": self.config.mode, **facts, "status": "ok", "why": ""}
        try:
            setup = self._setup(case)
            cost = setup.cost_of(case.layout)
            if (gpus := parse_size("gpus", self.config.gpus)) < case.layout.world_size:
                raise ValueError(f"kvp {case.kvp} x tpa {case.tpa} needs {case.layout.world_size} of gpus = {gpus}")
            if self.config.mode == "plan":
                setup.num_pages(cost.footprint)  # raises where not one fits
                most = setup.max_sequences(cost.footprint, case.context)
                if most < case.batch:
                    raise ValueError(f"the caches hold {most} of {case.batch} sequences of {case.context} tokens")
        except ValueError as refusal:
            return point | {"status": "refused", "why": str(refusal)}
        if self.config.mode == "plan":
            decode, prefill = cost.decode(case.context, case.batch), cost.prefill(case.context)
            figures = {"ttl_ms": decode.us / 1e3, "ttft_s": prefill.us / 1e6, "source": self._hardware.source}
        else:
            try:
                figures = self._measure(case, setup.spec)
            except PointFailed as failure:
                return point | {"status": "failed", "why": str(failure)}
        per_user = 1e3 / figures["ttl_ms"]
        per_gpu = per_user * case.batch / case.layout.world_size
        return point | figures | {"tokens_per_s_user": per_user, "tokens_per_s_gpu": per_gpu}

    def _setup(self, case: Case) -> Setup:
        config = cli.check("generate", GenerateConfig, [*case.arguments, "prompt=none"])
        key = json.dumps([argument for argument in case.arguments if argument.startswith("model")])
        if key not in self._specs:
            self._specs[key] = read_spec(replace(config.model, load="dummy"))
        spec, cache = self._specs[key], config.cache
        dtype = torch.float32 if config.model.dtype == "float32" else torch.bfloat16
        storage = storage_of(spec, dtype, cache.dtype)
        chunk = config.scheduler.prefill_chunk
        return Setup(spec, self._hardware, storage, cache.block_size, cache.memory_fraction, chunk)

    def _measure(self, case: Case, spec: ModelSpec) -> dict[str, float]:
        name = f"kvp{case.kvp}-tpa{case.tpa}-ep{case.ep}-{case.context}-{case.batch} {case.swept}".strip()
        log = self.folder / "logs" / f"{re.sub(r'[^-.=_a-zA-Z0-9]+', '-', name)[:200]}.log"
        start = shlex.split(self.config.launch.format(ranks=case.layout.world_size))
        if torch.cuda.is_available():
            model = [each for each in case.arguments if each.startswith(("model", "runtime"))]
            model += [each.replace("cache.block", "block") for each in case.arguments if each.startswith(PAGES)]
            layout = [f"layouts=[[{case.kvp},{case.tpa}]]", f"cases=[[{case.context},{case.batch}]]", f"ep={case.ep}"]
            _start([*start, "scripts.bench_decode", *model, *layout, "profile=false"], log, self.config.timeout_s)
            bench = json.loads(_lines(log)[-1])
            return {"ttl_ms": bench["rows"][0]["TTL ms"]}
        with _prompts(self.folder, case, spec, self.config.tokens) as prompts:
            metrics = prompts.with_suffix(".metrics.json")
            files = [f"prompts={prompts}", f"output={os.devnull}", f"metrics={metrics}"]
            decode = [f"sampling.max_tokens={self.config.tokens}", "sampling.ignore_eos=true"]
            line = [*start, "scripts.generate", *case.arguments, *files, *decode, f"scheduler.max_batch={case.batch}"]
            _start(line, log, self.config.timeout_s)
            measured = json.loads(metrics.read_text("utf-8"))
            metrics.unlink()
        return {"ttl_ms": measured["ttl_ms"]["p50"], "ttft_s": measured["ttft_ms"]["p50"] / 1e3}


class PointFailed(Exception):
    """A measured point that gave no figures; the message is its log's last word."""


@contextlib.contextmanager
def _prompts(folder: Path, case: Case, spec: ModelSpec, tokens: int) -> Iterator[Path]:
    """Give a file of a batch of random prompts, which share no beginning, so long that decoding reaches the context."""
    file = folder / f".prompts-{os.getpid()}.jsonl"
    draw, length = random.Random(case.key), max(1, case.context - tokens)
    lines = [{"prompt_token_ids": [draw.randrange(spec.vocab_size) for _ in range(length)]} for _ in range(case.batch)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    try:
        yield file
    finally:
        file.unlink(missing_ok=True)


def _start(line: Sequence[str], log: Path, timeout_s: float) -> None:
    """Run a process to its end, with all that it starts; PointFailed where that is no good one."""
    with log.open("w", encoding="utf-8") as output:
        process = subprocess.Popen(line, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            code = process.wait(timeout_s)
        except BaseException as problem:
            os.killpg(process.pid, signal.SIGKILL)  # its own session: nothing that others started
            process.wait()
            if isinstance(problem, subprocess.TimeoutExpired):
                raise PointFailed(f"no end within timeout_s = {timeout_s}; see {log}") from problem
            raise
    if code:
        said = [text for text in _lines(log) if text.startswith(("error", "RuntimeError", "ValueError"))]
        raise PointFailed(f"{said[0] if said else f'exit code {code}'}; see {log}")


def _lines(log: Path) -> list[str]:
    return [line for line in log.read_text("utf-8", errors="replace").splitlines() if line.strip()]


def _said(point: dict[str, Any]) -> str:
    case = f"kvp {point['kvp']} x tpa {point['tpa']}, {short(point['context'])} x {point['batch']}"
    case += f", {point['swept']}" if point["swept"] else ""
    return (
        f"{case}: {point['ttl_ms']:.2f} ms" if point["status"] == "ok" else f"{case}: {point['status']}, {point['why']}"
    )


def table(points: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the lines of the table; what is swept beside layouts and cases has a column where there is any."""
    swept = [{"swept": point["swept"]} if any(each["swept"] for each in points) else {} for point in points]
    return [
        more
        | {
            "kvp x tpa": f"{point['kvp']} x {point['tpa']}" + (f", ep {point['ep']}" if point["ep"] > 1 else ""),
            "context x batch": f"{short(point['context'])} x {point['batch']}",
            "TTL ms": point.get("ttl_ms"),
            "TTFT s": point.get("ttft_s"),
            "tok/s user": point.get("tokens_per_s_user"),
            "tok/s GPU": point.get("tokens_per_s_gpu"),
            "": point["why"] or ("predicted" if point["mode"] == "plan" else "measured"),
        }
        for more, point in zip(swept, points, strict=True)
    ]


def run(config: SweepConfig, arguments: Sequence[str]) -> None:
    """Run the sweep, and write the table and the picture."""
    require_matplotlib("output", config.output)
    cases = cases_of(config, arguments)
    for case in cases:
        cli.check("generate", GenerateConfig, [*case.arguments, "prompt=none"])
    sweep = Sweep(config, cases)
    points = sweep.run()
    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        show(f"{len(points)} points, {sweep.title}", table(points))
    cli.say(text.getvalue().rstrip())
    write_text(str(sweep.folder / "table.txt"), text.getvalue())
    drawn = [
        Point(
            " ".join([name_of(Layout(kvp=point["kvp"], tpa=point["tpa"], ep=point["ep"])), point["swept"]]).strip(),
            point["context"],
            point["batch"],
            point["tokens_per_s_user"],
            point["tokens_per_s_gpu"],
            point["kvp"] == 1,
        )
        for point in points
        if point["status"] == "ok"
    ]
    if drawn:
        draw_pareto(drawn, str(sweep.folder / "pareto.png"), title=sweep.title)
    failed = [point for point in points if point["status"] == "failed"]
    counts = {status: sum(point["status"] == status for point in points) for status in ("ok", "refused", "failed")}
    cli.say(json.dumps({"folder": config.output, **counts}))
    if failed:
        raise cli.RunFailed(f"{len(failed)} of {len(points)} points failed: {failed[0]['why']}")


def divided(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return what is the sweep's own on a command line, and the keys of its runs."""
    own = {*SweepConfig.__dataclass_fields__}
    mine = [each for each in arguments if each.startswith("-") or each.partition("=")[0].partition(".")[0] in own]
    return mine, [each for each in arguments if each not in mine]


if __name__ == "__main__":
    _own, _swept = divided(sys.argv[1:])
    sys.argv[1:] = prepared(_own)
    cli.main("sweep", SweepConfig, lambda config: run(config, _swept))
