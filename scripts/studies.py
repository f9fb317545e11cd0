"""The studies of docs/layouts.md, by prediction alone: where KVP overtakes plain TP, and the Helix paper's comparisons.

    python -m scripts.studies output=docs

Prints the page's tables as they stand there; with ``output`` draws its pictures into that folder. The paper
(arXiv 2507.07120) compares by simulation: 1,048,576 tokens, FP4, 1 to 64 GPUs of a GB200 NVL72. Here each layout that
Helix has (any kvp, tpa, ep) stands beside plain TP and beside attention that is data-parallel with experts spread over
all ranks, worlds of 1 to 64 GPUs each, smaller worlds as replicas.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import yaml

from helix.config import ModelConfig
from helix.models.loading import read_spec
from helix.models.spec import ModelSpec
from helix.plan.data_parallel import DataParallel
from helix.plan.footprint import Storage
from helix.plan.hardware import Hardware, named_hardware
from helix.plan.planner import Plan, Setup
from helix.plan.sizes import short
from scripts import cli
from scripts.pareto import Point, draw_frontiers, draw_pareto, require_matplotlib
from scripts.plan import name_of, points_of

MILLION = 1 << 20
GPUS = 64
WORLDS = (1, 2, 4, 8, 16, 32, 64)
AT_ONCE = (1, 8, 64)
HELIX, TP, DP = "Helix", "plain TP", "data-parallel attention"
OURS = (HELIX, TP)  # what Helix runs
# What the paper's abstract and conclusions claim: the lowest TTL, and sequences within the same TTL.
MODELS = {"deepseek_r1": ("DeepSeek-R1", 1.5, 32.0), "llama3_405b": ("Llama-405B", 1.13, 4.0)}
AS_FILED = "as filed"
CROSSOVERS = (("glm4_9b_1m", 4), ("glm4_9b_1m", 8), ("qwen2_5_7b_1m", 8), ("qwen3_30b_a3b", 8), ("llama3_405b", 16))
PICTURED = (1, 2, 4, 8, 16, 32, 64)


@dataclass(kw_only=True, slots=True)
class StudiesConfig:
    """What to do beside printing.

    Attributes:
        output: the folder that gets the pictures.
    """

    output: str | None = None


@dataclass(frozen=True)
class World:
    """A layout of some GPUs: the TTL in microseconds of a batch, and the most sequences that it holds."""

    family: str
    label: str
    gpus: int
    most: int
    ttl_us: Callable[[int], float]

    @cached_property
    def curve(self) -> list[tuple[float, float]]:
        """(TTL in microseconds, sequences a GPU) of batches, each a tenth larger than the one before."""
        return [(self.ttl_us(batch), batch / self.gpus) for batch in _batches(self.most)]

    def at_once(self, sequences: int) -> float | None:
        """Return the TTL of sequences over all GPUs, shared out to replicas of this world; None where they are many."""
        batch = -(-sequences // (GPUS // self.gpus))
        return self.ttl_us(batch) if batch <= self.most else None


@dataclass(frozen=True)
class Gain:
    """What Helix gains on others: in the lowest TTL, and in sequences a GPU within the same TTL, where that is most."""

    lowest: float
    sequences: float
    ttl_ms: float


def preset(name: str) -> ModelSpec:
    """Return the shape of a file in conf/model/."""
    return read_spec(ModelConfig(**yaml.safe_load((cli.CONF / "model" / f"{name}.yaml").read_text("utf-8"))))


def worlds_of(spec: ModelSpec, hardware: Hardware) -> list[World]:
    """Return every layout of every family and size that holds a sequence of a million tokens."""
    setup = Setup(spec, hardware, Storage("fp4", "fp4"))
    found = [world for gpus in WORLDS for world in (*_helix(setup, gpus), *_data_parallel(setup, gpus))]
    return [world for world in found if world.most]


def _helix(setup: Setup, gpus: int) -> Iterator[World]:
    for cost, _ in Plan(setup, gpus).costs:
        layout = cost.footprint.layout
        yield World(
            TP if layout.kvp == 1 else HELIX,
            name_of(layout) if layout.kvp > 1 else f"TP {gpus}" + (f", ep {layout.ep}" if layout.ep > 1 else ""),
            gpus,
            setup.max_sequences(cost.footprint, MILLION),
            lambda batch, cost=cost: cost.decode(MILLION, batch).us,
        )


def _data_parallel(setup: Setup, gpus: int) -> Iterator[World]:
    for tpa in (size for size in WORLDS if size < gpus):  # one group of all ranks is plain TP
        cost = DataParallel(setup, gpus, tpa)
        try:
            most = cost.most(MILLION)
        except ValueError:  # the sizes do not fit the model, or its weights the memory
            continue
        label = f"{cost.groups} groups of TP {tpa}"
        yield World(DP, label, gpus, most, lambda batch, cost=cost: cost.decode(MILLION, batch).us)


def gain(worlds: Sequence[World], others: Sequence[str]) -> Gain:
    """Return what all layouts of Helix gain on those of some families."""
    ours = [point for world in worlds if world.family in OURS for point in world.curve]
    theirs = [point for world in worlds if world.family in others for point in world.curve]
    best, at = 0.0, 0.0
    for ttl, _ in theirs:
        held = max(each for us, each in theirs if us <= ttl)
        ratio = max((each for us, each in ours if us <= ttl), default=0.0) / held
        if ratio > best:
            best, at = ratio, ttl
    return Gain(min(theirs)[0] / min(ours)[0], best, at / 1e3)


def crossovers() -> list[str]:
    """Return the table of contexts from which on KVP is faster than plain TP, on H200."""
    lines = [*_head(["model", "KV heads", "GPUs", *(f"batch {batch}" for batch in (1, 8, 32))])]
    for name, gpus in CROSSOVERS:
        spec = preset(name)
        plan = Plan(Setup(spec, named_hardware("h200")), gpus)
        at = [plan.crossover(batch) for batch in (1, 8, 32)]
        lines.append(_line([name, spec.num_kv_heads, gpus, *("-" if each is None else f"{each:,}" for each in at)]))
    return lines


def at_once(worlds: Sequence[World]) -> list[str]:
    """Return the table of TTL on 64 GPUs, by sequences that decode at once."""
    lines = [*_head(["sequences at once", *(f"{family} ms" for family in (TP, DP, HELIX)), "x"])]
    for sequences in AT_ONCE:
        cells, times = [], {}
        for family in (TP, DP, HELIX):
            timed = [
                (us, world)
                for world in worlds
                if world.family == family and (us := world.at_once(sequences)) is not None
            ]
            if timed:
                us, world = min(timed, key=lambda each: each[0])
                times[family] = us
                cells.append(f"{us / 1e3:.2f} ({world.label}" + (f" on {world.gpus})" if world.gpus < GPUS else ")"))
            else:
                cells.append("does not fit")
        best = min((times[family] for family in (TP, DP) if family in times), default=None)
        lines.append(_line([sequences, *cells, "-" if best is None else f"{best / times[HELIX]:.2f}"]))
    return lines


def paper(results: Sequence[tuple[str, str, Sequence[World]]]) -> list[str]:
    """Return the table of gains beside the paper's, for each model and variant of the constants."""
    lines = [
        *_head(
            [
                "model",
                "constants",
                "on",
                "lowest TTL, x",
                "the paper's",
                "sequences a GPU within a TTL, x",
                "the paper's",
            ]
        )
    ]
    for name, constants, worlds in results:
        title, faster, more = MODELS[name]
        for others in ((TP,), (TP, DP)):
            found = gain(worlds, others)
            lines.append(
                _line(
                    [
                        title,
                        constants,
                        " and ".join(others),
                        f"{found.lowest:.2f}",
                        faster,
                        f"{found.sequences:.1f} (at {found.ttl_ms:.1f} ms)",
                        f"{more:g}",
                    ]
                )
            )
    return lines


def studies() -> tuple[list[str], dict[str, Sequence[World]]]:
    """Return the lines of all tables, and each model's worlds with the constants as they are."""
    as_filed = named_hardware("gb200")
    no_peers = replace(as_filed, exchange_peer_us=0.0, all_reduce_peer_us=0.0)
    variants = {
        AS_FILED: as_filed,
        "no latency per peer": no_peers,
        "that, and attention in FP4": replace(no_peers, attention_flops_per_us=as_filed.fp4_matmul_flops_per_us),
    }
    worlds = {name: {label: worlds_of(preset(name), hw) for label, hw in variants.items()} for name in MODELS}
    as_is = {name: each[AS_FILED] for name, each in worlds.items()}
    lines = [
        *crossovers(),
        "",
        *paper([(name, label, each) for name in MODELS for label, each in worlds[name].items()]),
    ]
    for name, each in as_is.items():
        lines += ["", f"{MODELS[name][0]}, {GPUS} GPUs:", "", *at_once(each)]
    return lines, as_is


def draw(folder: Path, worlds: dict[str, Sequence[World]]) -> list[str]:
    """Draw the page's pictures, and return their files."""
    frames = {}
    for name, each in worlds.items():
        families = {
            f"{HELIX}, all layouts": [world for world in each if world.family in OURS],
            TP: [world for world in each if world.family == TP],
            DP: [world for world in each if world.family == DP],
        }
        frames[MODELS[name][0]] = {
            label: [Point(world.label, MILLION, round(seqs * world.gpus), 1e6 / us, seqs * 1e6 / us, False)
                    for world in some for us, seqs in world.curve]
            for label, some in families.items()
        }  # fmt: skip
    files = [str(folder / "layouts-paper.png"), str(folder / "layouts.png")]
    draw_frontiers(
        frames, files[0], title=f"{short(MILLION)} tokens, FP4, 1 to {GPUS} GPUs of a GB200 NVL72, predicted"
    )
    hardware = named_hardware("h200")
    rows = Plan(Setup(preset("glm4_9b_1m"), hardware), 8).rows([1 << 17, MILLION], PICTURED)
    draw_pareto(
        points_of(rows), files[1], title=f"GLM-4-9B-1M on 8 GPUs, predicted ({hardware.name}: {hardware.source})"
    )
    return files


def run(config: StudiesConfig) -> None:
    """Print the tables, and draw."""
    folder = None if config.output is None else Path(config.output)
    if folder is not None:
        require_matplotlib("output", str(folder))
        if not folder.is_dir():
            raise ValueError(f"output = {folder} is no folder; give one that exists, such as docs")
    lines, worlds = studies()
    for line in lines:
        cli.say(line)
    if folder is not None:
        for file in draw(folder, worlds):
            cli.say(f"drew {file}")


def _batches(most: int) -> Iterator[int]:
    batch = 1
    while batch < most:
        yield batch
        batch = max(batch + 1, int(batch * 1.1))
    if most:
        yield most


def _head(columns: Sequence[str]) -> tuple[str, str]:
    return _line(columns), "|" + "---|" * len(columns)


def _line(cells: Sequence[object]) -> str:
    return f"| {' | '.join(map(str, cells))} |"


if __name__ == "__main__":
    cli.main("studies", StudiesConfig, run)
