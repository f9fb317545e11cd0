"""Which layout: what each needs and how fast it is, by the model of cost in helix/plan; a config.json is enough.

    python -m scripts.plan model.path=DIR gpus=8 context=1M batch=1,8 hardware=h200
    python -m scripts.plan model=glm4_9b_1m gpus=8 context=128K,1M batch=auto ttl_ms=20 hardware=h200 plot=plan.png

Needs no GPU. Lists are split at their commas; K is 1,024 and M 1,048,576. Prints a line for each layout in each case,
the best of a case marked, the context at which KVP overtakes plain TP, refused layouts, and the command to paste; and
last, where stdout is no terminal, all of it as JSON on one line. ``batch=auto`` takes the largest batch within
``ttl_ms`` for each layout, of smaller worlds too.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from helix.config import ModelConfig, SchedulerConfig, check_at_least
from helix.models.loading import read_spec
from helix.models.spec import ModelSpec
from helix.plan.footprint import FORMATS, Storage
from helix.plan.hardware import Hardware, named_hardware, read_hardware
from helix.plan.planner import Fleet, Plan, Row, Setup
from helix.plan.sizes import parse_size, parse_sizes, short
from helix.prediction import storage_of as storage_of_run
from parallel.layout import Layout
from scripts import cli
from scripts.pareto import Point, check_picture, draw_pareto
from scripts.timing import show

GPUS_PER_NODE = 8
CACHES = {"float32": "fp32", "bfloat16": "bf16", "float16": "bf16", "fp8_e4m3": "fp8", "fp4": "fp4"}


@dataclass(kw_only=True, slots=True)
class PlanHardware:
    """The machine, by its constants.

    Attributes:
        name: a file of conf/hardware/ without its ending; hardware=NAME says the same.
        file: a file of constants instead, such as those of conf/hardware/.
    """

    name: str = "h200"
    file: str | None = None


@dataclass(kw_only=True, slots=True)
class PlanCache:
    """The paged KV cache of each rank.

    Attributes:
        dtype: as cache.dtype of a run: auto (the file's, else the model's), float32, bfloat16, float16 or fp8_e4m3; or
            fp4, which is planned alone.
        block_size: tokens a page.
        memory_fraction: the part of a GPU's memory that weights, activations and cache may fill together.
    """

    dtype: str = "auto"
    block_size: int = 64
    memory_fraction: float = 0.9


@dataclass(kw_only=True, slots=True)
class PlanConfig:
    """What to plan for.

    Attributes:
        gpus: how many there are.
        context: tokens of a sequence, a list.
        batch: sequences that decode together, a list, or auto: the most within ttl_ms.
        ttl_ms: the limit of batch=auto: milliseconds from token to token.
        weights: auto (as the model's), fp32, bf16, fp8 or fp4.
        prefill_chunk: prompt tokens a step, as scheduler.prefill_chunk.
        plot: a file for the picture: tokens a second of a user against those of a GPU.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    hardware: PlanHardware = field(default_factory=PlanHardware)
    cache: PlanCache = field(default_factory=PlanCache)
    gpus: str = "8"
    context: str = "128K,1M"
    batch: str = "1,8"
    ttl_ms: float | None = None
    weights: str = "auto"
    prefill_chunk: str = "2048"
    plot: str | None = None

    def __post_init__(self) -> None:
        if (self.batch == "auto") != (self.ttl_ms is not None):
            raise ValueError(
                f"batch = {self.batch} and ttl_ms = {self.ttl_ms}: a limit goes with batch=auto and batch=auto with a "
                "limit, such as ttl_ms=20"
            )
        if self.ttl_ms is not None:
            check_at_least("ttl_ms", self.ttl_ms, 0.001)


def setup_of(config: PlanConfig) -> Setup:
    """Return what the settings describe.

    Raises:
        ValueError: in one line, for a model or a machine that cannot be read, and for a value that does not fit.
    """
    hardware = config.hardware
    constants = named_hardware(hardware.name) if hardware.file is None else read_hardware(hardware.file)
    if config.weights not in ("auto", *FORMATS):
        raise ValueError(f"weights = {config.weights} must be one of auto, {', '.join(FORMATS)}")
    spec = read_spec(replace(config.model, load="dummy"))  # weights need not be there
    dtype = torch.float32 if config.weights == "fp32" else torch.bfloat16
    storage = storage_of(spec, dtype, config.cache.dtype, config.weights)
    if not 0.0 < config.cache.memory_fraction <= 1.0:
        raise ValueError(f"cache.memory_fraction = {config.cache.memory_fraction} must lie in (0, 1]")
    return Setup(
        spec,
        constants,
        storage,
        block_size=config.cache.block_size,
        memory_fraction=config.cache.memory_fraction,
        prefill_chunk=parse_size("prefill_chunk", config.prefill_chunk),
    )


def storage_of(spec: ModelSpec, dtype: torch.dtype, cache_dtype: str, weights: str = "auto") -> Storage:
    """Return how weights and cache are counted of a model that is run with a dtype.

    cache_dtype: the ``cache.dtype`` of a run, or fp4. weights: a format, or auto for those of a run.

    Raises:
        ValueError: for another ``cache_dtype``.
    """
    if cache_dtype not in ("auto", *CACHES):
        raise ValueError(f"cache.dtype = {cache_dtype} must be one of auto, {', '.join(CACHES)}")
    own = storage_of_run(spec, dtype, in_8_bits=spec.caches_in_8_bits)
    return Storage(own.weights if weights == "auto" else weights, CACHES.get(cache_dtype, own.cache))


def json_row(row: Row) -> dict[str, Any]:
    """Return a row's part of the JSON line."""
    layout = row.layout
    return {
        "kvp": layout.kvp,
        "tpa": layout.tpa,
        "tpf": layout.tpf,
        "ep": layout.ep,
        "context": row.context,
        "batch": row.batch,
        "weights_bytes": row.weights_bytes,
        "cache_bytes_per_token": row.cache_bytes_per_token,
        "max_tokens": row.max_tokens,
        "max_sequences": row.max_sequences,
        "ttl_ms": row.ttl.us / 1e3,
        "ttft_s": row.ttft.us / 1e6,
        "bound_by": row.ttl.bound_by,
        "best": row.best,
    }


def name_of(layout: Layout) -> str:
    """Return a layout in short."""
    return f"kvp {layout.kvp} x tpa {layout.tpa}" + (f", ep {layout.ep}" if layout.ep > 1 else "")


def table_row(row: Row, gpus: int, hardware: Hardware) -> dict[str, Any]:
    """Return a row's line of the table."""
    replicas = gpus // row.layout.world_size
    remarks = ["best"] if row.best else [] if row.fits else ["too many"]
    return {
        "context x batch": f"{short(row.context)} x {row.batch}",
        "kvp x tpa": name_of(row.layout).replace("kvp ", "").replace("tpa ", ""),
        "worlds": replicas,
        "weights GB": row.weights_bytes / 1e9,
        "KB a token": row.cache_bytes_per_token / 1e3,
        "most tokens": short(row.max_tokens),
        "most seqs": row.max_sequences,
        "TTL ms": row.ttl.us / 1e3,
        "bound by": row.ttl.bound_by,
        "TTFT s": row.ttft.us / 1e6,
        "bound by ": row.ttft.bound_by,
        "tok/s user": round(row.tokens_per_s_user),
        "tok/s GPU": round(row.tokens_per_s_gpu),
        "": ", ".join(remarks + ([] if hardware.is_measured else [hardware.source])),
    }


def points_of(rows: Sequence[Row]) -> list[Point]:
    """Return what a picture shows of rows: those that fit."""
    return [
        Point(
            name_of(row.layout),
            row.context,
            row.batch,
            row.tokens_per_s_user,
            row.tokens_per_s_gpu,
            row.layout.kvp == 1,
        )
        for row in rows
        if row.fits
    ]


def command(row: Row, setup: Setup, given: Sequence[str]) -> str:
    """Return the line that runs a row's layout; ``given`` are the arguments that name the model and its cache."""
    layout, size = row.layout, row.layout.world_size
    keys = [*given, f"parallel.kvp={layout.kvp}", f"parallel.tpa={layout.tpa}"]
    if layout.ep > 1:
        keys.append(f"parallel.ep={layout.ep}")
    if row.context > setup.spec.max_position:
        keys.append(f"model.max_position={row.context}")
    if row.batch > 64:
        keys.append(f"scheduler.max_batch={row.batch}")
    if setup.prefill_chunk != SchedulerConfig().prefill_chunk:
        keys.append(f"scheduler.prefill_chunk={setup.prefill_chunk}")
    keys += ["prompts=in.jsonl", "output=out.jsonl"]
    if size > GPUS_PER_NODE:
        nodes = -(-size // GPUS_PER_NODE)
        start = (
            f"torchrun --nnodes {nodes} --nproc-per-node {size // nodes} --rdzv-backend c10d --rdzv-endpoint HEAD:29500"
            " --rdzv-id plan -m scripts.generate"
        )
    else:
        start = f"torchrun --standalone --nproc-per-node {size} -m scripts.generate"
    return f"{start} {shlex.join(keys)}"


def notes(plan: Plan, rows: Sequence[Row], given: Sequence[str]) -> list[str]:
    """Return what is to be said below the table."""
    setup, lines = plan.setup, []
    hardware, storage = setup.hardware, setup.storage
    for batch in sorted({row.batch for row in rows if row.layout.world_size == plan.gpus}):
        at = plan.crossover(batch)
        if at is not None:
            lines.append(f"batch {batch}: KVP overtakes plain TP from about {at:,} tokens of context")
        elif plan.costs and not any(cost.footprint.layout.kvp == 1 for cost, _ in plan.costs):
            lines.append(f"batch {batch}: plain TP cannot be; see what is refused")
        elif len(plan.costs) > 1:
            lines.append(f"batch {batch}: plain TP is not overtaken up to 16M tokens of context")
    if not hardware.is_measured:
        lines.append(f"hardware = {hardware.name}: constants of a data sheet, none was measured")
    over = max((row.context for row in rows), default=0)
    if over > setup.spec.max_position:
        lines.append(f"the model takes {setup.spec.max_position:,} tokens; more need model.max_position={over}")
    if storage.weights == "fp4" or storage.cache == "fp4":
        lines.append("fp4 is planned for comparison; Helix does not run it")
    if storage.weights == "fp8" and setup.spec.quantization is None:
        lines.append("the model has no weights of 8 bits: python -m scripts.quantize writes a folder with them to run")
    lines += [f"run {row.context:,} x {row.batch}: {command(row, setup, given)}" for row in rows if row.best]
    return lines


def plan_rows(config: PlanConfig, setup: Setup) -> tuple[Plan, list[Row]]:
    """Return the plan of all GPUs, and the rows of all cases."""
    gpus, contexts = parse_size("gpus", config.gpus), parse_sizes("context", config.context)
    if config.batch == "auto":
        assert config.ttl_ms is not None
        fleet = Fleet(setup, gpus)
        return fleet.plans[0], fleet.rows(contexts, config.ttl_ms)
    plan = Plan(setup, gpus)
    return plan, plan.rows(contexts, parse_sizes("batch", config.batch))


def run(config: PlanConfig, given: Sequence[str]) -> None:
    """Plan, and say it."""
    if config.plot is not None:
        check_picture("plot", config.plot)
    parse_sizes("context", config.context)
    setup = setup_of(config)
    plan, rows = plan_rows(config, setup)
    constants = f"constants of {setup.hardware.name}: {setup.hardware.source}"
    if rows:
        show(
            f"{setup.spec.family}, {plan.gpus} GPUs, predicted ({constants})",
            [table_row(row, plan.gpus, setup.hardware) for row in rows],
        )
    else:
        cli.say(f"no layout of {plan.gpus} GPUs fits" + (" within ttl_ms" if config.ttl_ms else ""))
    for line in notes(plan, rows, given):
        cli.say(line)
    for each in plan.refused:
        cli.say(f"refused: kvp {each.kvp} x tpa {each.tpa}: {each.why}")
    if config.plot is not None:
        draw_pareto(points_of(rows), config.plot, title=f"predicted, {setup.hardware.name} ({setup.hardware.source})")
        cli.say(f"drew {config.plot}")
    cli.say_json(
        {
            "layouts": [json_row(row) for row in rows],
            "refused": [{"kvp": each.kvp, "tpa": each.tpa, "why": each.why} for each in plan.refused],
        }
    )


def prepared(arguments: Sequence[str]) -> list[str]:
    """Return a command line in which hardware is named by its key: its files hold no settings."""
    return [
        f"hardware.name={argument.removeprefix('hardware=')}" if argument.startswith("hardware=") else argument
        for argument in arguments
    ]


def naming(arguments: Sequence[str]) -> list[str]:
    """Return the arguments that name the model and its cache."""
    return [each for each in arguments if each.partition("=")[0].partition(".")[0] in ("model", "cache")]


if __name__ == "__main__":
    _given = naming(sys.argv[1:])
    sys.argv[1:] = prepared(sys.argv[1:])
    cli.main("plan", PlanConfig, lambda config: run(config, _given))
