"""Measure a machine's constants, of which plans are made: conf/hardware/NAME.yaml, in about two minutes.

    torchrun --standalone --nproc-per-node 8 -m scripts.calibrate name=mine
    torchrun ... -m scripts.calibrate name=mine output=mine.yaml      # any file; plans take hardware.file=mine.yaml

Micro-benchmarks alone: no constant comes from the time of a step. What these ranks cannot show (the exchange and the
all-reduce on one GPU, the network on one node) is taken from the constants named by ``base``, and each line of the file
says whence it is. The file says "measured" only where base does, too, or nothing is taken from it.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import torch

from helix.plan.hardware import FOLDER, Hardware, hardware_of, named_hardware
from parallel.device import host
from parallel.launch import Launch, from_rank0, set_up_logging, stop
from scripts import cli, constants
from scripts.outputs import check_writable, write_text
from scripts.timing import commit, show, start_on_gpu

TEXTS = ("name", "gpu", "source")


@dataclass(kw_only=True, slots=True)
class CalibrateConfig:
    """What to write.

    Attributes:
        name: what plans call the machine: hardware=NAME.
        output: the file; null is conf/hardware/NAME.yaml.
        base: whence constants come that cannot be measured here: a name of conf/hardware/ or a file. auto is the file
            of the same GPU, or h200.
        repeats: replays to take the median of.
    """

    name: str = ""
    output: str | None = None
    base: str = "auto"
    repeats: int = 10

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z][\w-]*", self.name):
            raise ValueError(f"name = {self.name!r} must be letters, digits, - and _: plans call the machine by it")
        if self.repeats < 2:
            raise ValueError(f"repeats = {self.repeats} must be at least 2")

    @property
    def file(self) -> Path:
        """Where the constants go."""
        return FOLDER / f"{self.name}.yaml" if self.output is None else Path(self.output)


@dataclass(frozen=True)
class Found:
    """Constants that were measured, by name: the value, and how it was measured."""

    value: float
    how: str


def steps_of(launch: Launch, nodes: int) -> list[Callable[[constants.Machine], constants.Constants]]:
    """Return the micro-benchmarks that these ranks can run."""
    steps = [constants.memory, constants.products, constants.attention, constants.experts]
    if launch.local_world_size > 1:
        steps += [constants.exchange, constants.all_reduces, constants.collectives]
    if nodes > 1:
        steps += [constants.network]
    return [*steps, constants.between_steps]


def measure(launch: Launch, repeats: int, nodes: int) -> dict[str, Found]:
    """Run the micro-benchmarks one after the other. Collective over the world."""
    machine, found, began = constants.Machine(launch, repeats), dict[str, Found](), time.monotonic()
    steps = steps_of(launch, nodes)
    with torch.inference_mode():
        for number, step in enumerate(steps, 1):
            how = " ".join((step.__doc__ or "").split()).rstrip(".")
            values = step(machine)
            found |= {name: Found(value, how) for name, value in values.items()}
            torch.cuda.empty_cache()
            said = ", ".join(f"{name} {_number(value)}" for name, value in values.items())
            cli.say(f"{number} of {len(steps)}, {time.monotonic() - began:.0f} s: {said}")
    return found


def merged(base: Hardware, found: Mapping[str, Found], *, name: str, gpu: str, gpus_per_node: int) -> Hardware:
    """Return the constants: those found, and the base's for the rest."""
    domain = gpus_per_node if gpus_per_node > 1 else base.domain
    values = {key: each.value for key, each in found.items()}
    whole = not asdict(base).keys() - found.keys() - {*TEXTS, "domain"}
    source = "measured" if whole or base.is_measured else base.source
    return replace(base, **values, name=name, gpu=gpu, source=source, domain=domain)


def as_yaml(hardware: Hardware, found: Mapping[str, Found], base: Hardware, when: str) -> str:
    """Return a file of constants, each line with its origin."""
    lines = [f"# {hardware.gpu}: {when}"]
    for key, value in asdict(hardware).items():
        if key in (*TEXTS, "domain"):
            lines.append(f"{key}: {value}")
        else:
            how = f"measured: {found[key].how}" if key in found else f"not measured here; of {base.name}: {base.source}"
            lines.append(f"{key}: {_number(value)}  # {how}")
    return "\n".join(lines) + "\n"


def _number(value: float) -> str:
    """Return four figures, as YAML 1.1 reads numbers: an exponent has a point and a sign."""
    if value < 1e5:
        return f"{value:.4g}"
    digits, _, exponent = f"{value:.3e}".partition("e")
    return f"{digits}e+{int(exponent)}"


def run(config: CalibrateConfig) -> None:
    """Measure on all ranks, and write on rank 0."""
    launch = start_on_gpu(timeout_s=120.0)
    set_up_logging(launch.rank)
    gpu = torch.cuda.get_device_name(launch.device)

    def prepared() -> Hardware:
        check_writable(str(config.file))
        return named_hardware(config.base) if config.base != "auto" else hardware_of(gpu) or named_hardware("h200")

    base = from_rank0(prepared)
    nodes = launch.world_size // launch.local_world_size
    found = measure(launch, config.repeats, nodes)
    hardware = merged(base, found, name=config.name, gpu=gpu, gpus_per_node=launch.local_world_size)
    day = datetime.now(UTC).date()
    when = f"scripts.calibrate on {launch.world_size} GPUs of {nodes} nodes, {day}, commit {commit()}"
    text = as_yaml(hardware, found, base, when)
    from_rank0(lambda: write_text(str(config.file), text))
    rows = []
    for key in (key for key in asdict(hardware) if key not in TEXTS):
        here, there = (_number(getattr(each, key)) for each in (hardware, base))
        rows.append({"constant": key, "here": here, base.name: there, "": "" if key in found else "not measured here"})
    show(f"{gpu} on {host().split()[0]}, beside {base.name}", rows)
    cli.say(f"wrote {config.file}")
    cli.say(json.dumps(asdict(hardware) | {"measured": sorted(found)}))
    stop()


if __name__ == "__main__":
    cli.main("calibrate", CalibrateConfig, run)
