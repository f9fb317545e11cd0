"""The model of cost before a run: the layout that it would choose, for the constants of the machine.

Constants are looked up by the GPU's name, or named by ``runtime.hardware``. Only rank 0 looks: what it finds is logged
or broadcast, so no rank decides by a file of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from parallel.layout import Layout

from .config import HelixConfig
from .models.spec import ModelSpec
from .plan.footprint import Storage
from .plan.hardware import Hardware, hardware_of, named_hardware
from .plan.planner import Plan, Setup
from .prompts import Prompt, PromptReader, as_request

WORTH_SAYING = 1.1  # a layout that is faster by this factor is named
PROBED = 64


def storage_of(spec: ModelSpec, dtype: torch.dtype, *, in_8_bits: bool) -> Storage:
    """Return how the plan counts weights and cache of a model that is run with a dtype, its cache perhaps in 8 bits."""
    name = "fp32" if dtype == torch.float32 else "bf16"
    return Storage(name if spec.quantization is None else "fp8", "fp8" if in_8_bits else name)


def find_hardware(config: HelixConfig, device: torch.device) -> Hardware | None:
    """Return the constants that the settings name, or those of this rank's GPU; None where there are none.

    Raises:
        ValueError: when ``runtime.hardware`` names what is not there.
    """
    if config.runtime.hardware is not None:
        return named_hardware(config.runtime.hardware)
    return hardware_of(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


@dataclass(frozen=True)
class Case:
    """What a run is going to do: tokens of its longest sequence, and sequences at once."""

    context: int
    batch: int


def case_of(config: HelixConfig, spec: ModelSpec, reader: PromptReader, prompts: Sequence[Prompt]) -> Case:
    """Return the case of known prompts, of which the first are read; without any the longest at the most at once."""
    lengths = []
    for request in map(as_request, prompts[:PROBED]):
        try:
            more = (request.sampling or config.sampling).max_tokens
            lengths.append(len(reader.token_ids(request)) + (spec.max_position if more is None else more))
        except ValueError:  # it fails alone, and says so when it is run
            continue
    if not lengths:
        return Case(spec.max_position, config.scheduler.max_batch)
    return Case(min(max(lengths), spec.max_position), min(len(prompts), config.scheduler.max_batch))


def planned_layout(config: HelixConfig, hardware: Hardware | None, setup: tuple[ModelSpec, Storage], ranks: int,
                   case: Case) -> Layout:  # fmt: skip
    """Return the layout of the lowest predicted TTL.

    Raises:
        ValueError: where there are no constants to plan with, or no layout holds the case.
    """
    if hardware is None:
        raise ValueError(
            "parallel.planned = true needs constants of this machine: name them by runtime.hardware=NAME or FILE.yaml, "
            "which scripts.calibrate writes, or give parallel.kvp and parallel.tpa"
        )
    plan = Plan(_setup(config, hardware, *setup), ranks)
    layout = plan.fastest(case.context, case.batch)
    if layout is None:
        why = plan.refused[0].why if plan.refused and not plan.costs else "their caches are too small"
        raise ValueError(
            f"parallel.planned = true: no layout of {ranks} ranks holds {case.batch} sequences of {case.context} "
            f"tokens: {why}"
        )
    return layout


def advise(config: HelixConfig, hardware: Hardware, spec: ModelSpec, storage: Storage, chosen: Layout,
           case: Case) -> str | None:  # fmt: skip
    """Return a line that names a layout predicted to be more than a tenth faster; None where there is none."""
    plan = Plan(_setup(config, hardware, spec, storage), chosen.world_size)
    rows = [row for row in plan.rows([case.context], [case.batch]) if row.fits]
    ours = next((row for row in rows if row.layout == chosen), None)
    best = next((row for row in rows if row.best), None)
    if ours is None or best is None or ours.ttl.us <= WORTH_SAYING * best.ttl.us:
        return None
    layout = best.layout
    return (
        f"parallel.kvp={layout.kvp} parallel.tpa={layout.tpa} parallel.ep={layout.ep} is predicted to take "
        f"{best.ttl.us / 1e3:.2f} ms a token instead of {ours.ttl.us / 1e3:.2f} for {case.batch} sequences of "
        f"{case.context} tokens ({hardware.name}, {hardware.source})"
    )


def _setup(config: HelixConfig, hardware: Hardware, spec: ModelSpec, storage: Storage) -> Setup:
    return Setup(
        spec,
        hardware,
        storage,
        block_size=config.cache.block_size,
        memory_fraction=config.cache.memory_fraction,
        prefill_chunk=config.scheduler.prefill_chunk,
    )
