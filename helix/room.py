"""Whether what the settings ask for can be had at all: sizes of settings against the memory of device and host.

Said before any of it is taken, in one line that names the largest. What a step needs for a while is not in it but on
GPUs, whose buffers are made for the longest step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from parallel.launch import Launch

from .cache.pages import free_bytes, free_host_bytes
from .config import HelixConfig
from .plan.footprint import Footprint
from .states.checkpoints import CheckpointPlan
from .windows import num_window_pages

_PAGE_ENTRY_BYTES = 48  # of the host's list of free pages, each
_TABLE_ENTRY_BYTES = 4
_UNITS = ((10**18, "EB"), (10**9, "GB"), (10**6, "MB"))


@dataclass(frozen=True)
class Need:
    """Memory that a rank will take, in bytes: for what, as the error says it, and the way out."""

    num_bytes: int
    what: str
    way_out: str = "lower it"


def require_room(config: HelixConfig, footprint: Footprint, launch: Launch) -> None:
    """Raise ValueError where this rank's memory cannot hold what the settings ask for; local, so agree on it."""
    cache, batch, attention = config.cache, config.scheduler.max_batch, config.attention
    num_pages, max_position = cache.num_pages or 1, footprint.spec.max_position
    table = batch * -(-footprint.placement.num_blocks(max_position) // footprint.layout.kvp) * _TABLE_ENTRY_BYTES
    rows = f"scheduler.max_batch = {batch} sequences of up to {max_position} tokens"
    lower = "lower it, or model.max_position"
    made_at_once = footprint.workspace_tokens(attention.workspace_tokens)
    run = 1 + config.speculative.most_drafts
    checkpoint_bytes = CheckpointPlan.of(cache, footprint, run).page_bytes
    on_device = [
        Need(footprint.weights_bytes, "the model", "spread it over more ranks"),
        Need(num_pages * (footprint.page_bytes + checkpoint_bytes), f"cache.num_pages = {cache.num_pages}"),
        Need(table, rows, lower),
        Need(
            footprint.states_bytes(batch, run) * (2 if config.transfer.enabled else 1),  # with their records
            f"scheduler.max_batch = {batch} sequences' states",
        ),
        Need(
            num_window_pages(config, footprint.spec) * footprint.window_page_bytes,
            f"scheduler.max_batch = {batch} windows of {footprint.spec.window} tokens",
        ),
        Need(
            footprint.workspace_bytes(made_at_once if attention.expand_rows else 0),
            f"attention.workspace_tokens = {made_at_once}",
        ),
    ]
    on_host = [
        Need(cache.host_pages * (footprint.page_bytes + checkpoint_bytes), f"cache.host_pages = {cache.host_pages}"),
        Need(
            (num_pages + cache.host_pages) * footprint.layout.kvp * _PAGE_ENTRY_BYTES,
            "the lists of pages",
            "lower cache.num_pages",
        ),
        Need(table, rows, lower),
    ]
    if launch.device.type == "cuda":
        longest = config.scheduler.prefill_chunk + batch
        what = f"a step of scheduler.prefill_chunk = {config.scheduler.prefill_chunk} and scheduler.max_batch = {batch}"
        on_device.append(Need(footprint.activation_bytes(longest, workspace_tokens=0), f"{what} rows", "lower them"))
        _require(on_device, free_bytes(launch.device, 1.0, 1), "the GPU")
        on_device = []  # the host has memory of its own
    _require(on_device + on_host, free_host_bytes(launch.local_world_size), "the host")


def _require(needs: Sequence[Need], free: int, where: str) -> None:
    total = sum(need.num_bytes for need in needs)
    if total > free:
        worst = max(needs, key=lambda need: need.num_bytes)
        raise ValueError(
            f"{worst.what} needs {_size(worst.num_bytes)} of the {_size(total)} that a rank would take, "
            f"but {where} has {_size(free)} free for it; {worst.way_out}"
        )


def _size(num_bytes: int) -> str:
    unit, name = next((each for each in _UNITS if num_bytes >= each[0]), _UNITS[-1])
    return f"{num_bytes / unit:,.1f} {name}"
