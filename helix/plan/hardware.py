"""The few constants of a machine that the plan's terms are made of, one YAML file a GPU (conf/hardware/).

They are measured by micro-benchmarks alone, never fitted to the times of steps, or taken from a data sheet, which the
file then says.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml

FOLDER = Path(__file__).resolve().parents[2] / "conf" / "hardware"
SOURCES = ("measured", "data sheet")


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """A GPU and its links. Times are microseconds; rates are per microsecond, so that 1e6 is 1 TB/s or 1 TFLOP/s.

    Attributes:
        name: what the plan calls it.
        gpu: its name as the driver says it; a run looks its constants up by it.
        source: ``measured``, or ``data sheet``.
        memory_bytes: of a GPU, as the driver counts it.
        reserved_bytes: of these, what driver, libraries and the buffers of collectives take.
        read_bytes_per_us: what a streaming read of memory reaches.
        fp8_read_bytes_per_us: what kernels stream that widen 8 bits, or 4, on their way.
        matmul_flops_per_us: what large matrix products of 16-bit elements reach; of 8 and 4 bits: ``fp8_``, ``fp4_``.
        attention_flops_per_us: what attention reaches in prefill.
        launch_us: what a kernel that launches dependently takes beyond its bytes.
        attention_us: what decode attention takes beyond its bytes, merge_us: what merging its splits adds.
        exchange_us, exchange_peer_us: exchange and merge of one row in a group of two, and for each further rank.
        all_reduce_us, all_reduce_peer_us: the fused all-reduce of one row between two, and for each further rank.
        flight_us: what a second flight adds where an all-reduce takes two (from 128 KiB).
        link_bytes_per_us: what a rank sends to its peers inside a domain.
        collective_us, collective_bytes_per_us: NCCL's collectives of long messages inside a domain: latency, and what a
            rank sends.
        experts_us: router and experts of few rows beyond their bytes, experts_row_us: for each row of up to 64.
        step_us: from the end of a step to the beginning of the next.
        domain: GPUs that reach each other's memory.
        network_us, network_bytes_per_us: a collective between domains: its latency, and what a rank sends.
    """

    name: str
    gpu: str
    source: str
    memory_bytes: float
    reserved_bytes: float
    read_bytes_per_us: float
    fp8_read_bytes_per_us: float
    matmul_flops_per_us: float
    fp8_matmul_flops_per_us: float
    fp4_matmul_flops_per_us: float
    attention_flops_per_us: float
    launch_us: float
    attention_us: float
    merge_us: float
    exchange_us: float
    exchange_peer_us: float
    all_reduce_us: float
    all_reduce_peer_us: float
    flight_us: float
    link_bytes_per_us: float
    collective_us: float
    collective_bytes_per_us: float
    experts_us: float
    experts_row_us: float
    step_us: float
    domain: int
    network_us: float
    network_bytes_per_us: float

    def __post_init__(self) -> None:
        if self.source not in SOURCES:
            raise ValueError(f"hardware.source = {self.source!r} must be one of {', '.join(SOURCES)}")
        for each in fields(self):
            value = getattr(self, each.name)
            if each.type != "str" and not (isinstance(value, int | float) and value >= 0):
                raise ValueError(f"hardware.{each.name} = {value!r} must be a number of at least 0")
        for name in (each.name for each in fields(self)):
            if (name.endswith("_bytes_per_us") or name in ("memory_bytes", "domain")) and not getattr(self, name):
                raise ValueError(f"hardware.{name} = {getattr(self, name)} must be positive")

    @property
    def is_measured(self) -> bool:
        """False where the constants come from a data sheet."""
        return self.source == "measured"

    def read_rate(self, *, is_narrow: bool) -> float:
        """Return the rate at which weights or cache are read, in bytes a microsecond."""
        return self.fp8_read_bytes_per_us if is_narrow else self.read_bytes_per_us

    def matmul_rate(self, weights: str) -> float:
        """Return the products' rate with weights of a format, in FLOP a microsecond."""
        return {"fp8": self.fp8_matmul_flops_per_us, "fp4": self.fp4_matmul_flops_per_us}.get(
            weights, self.matmul_flops_per_us
        )


def read_hardware(file: str | Path) -> Hardware:
    """Return the constants in a YAML file.

    Raises:
        ValueError: in one line, when the file is missing or broken, or a constant is missing, unknown or no number.
    """
    path = Path(file)
    try:
        content: Any = yaml.safe_load(path.read_text("utf-8"))
    except OSError as error:
        raise ValueError(f"hardware.file = {file} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"hardware.file = {file} is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ValueError(f"hardware.file = {file} holds {type(content).__name__}, must be constants (name: value)")
    names = {each.name for each in fields(Hardware)}
    if missing := sorted(names - content.keys()):
        raise ValueError(f"hardware.file = {file} lacks {', '.join(missing)}; see conf/hardware/h200.yaml")
    if unknown := sorted(str(key) for key in content.keys() - names):
        raise ValueError(f"hardware.file = {file}: {unknown[0]} is no constant; there are: {', '.join(sorted(names))}")
    try:
        return Hardware(**content)
    except ValueError as error:
        raise ValueError(f"hardware.file = {file}: {error}") from error


def hardware_names() -> list[str]:
    """Return the names of the files in conf/hardware/."""
    return sorted(file.stem for file in FOLDER.glob("*.yaml"))


def named_hardware(name: str) -> Hardware:
    """Return the constants of a file in conf/hardware/, or of any file that ends in .yaml.

    Raises:
        ValueError: when there is no such file, or it is broken.
    """
    if name.endswith(".yaml"):
        return read_hardware(name)
    if name not in hardware_names():
        raise ValueError(
            f"hardware = {name} is not one of {', '.join(hardware_names())}; give hardware.file=FILE for another"
        )
    return read_hardware(FOLDER / f"{name}.yaml")


def hardware_of(gpu: str) -> Hardware | None:
    """Return the measured constants of a GPU by the driver's name for it; None where there are none."""
    for name in hardware_names():
        hardware = read_hardware(FOLDER / f"{name}.yaml")
        if hardware.gpu == gpu and hardware.is_measured:
            return hardware
    return None
