"""What settings become for a model with windows, and the pages that its layers with a window have."""

from __future__ import annotations

import logging
from dataclasses import replace

import torch

from .cache.checkpoints import interval_of
from .cache.pages import PagedCache, page_layout
from .cache.window_checkpoints import EVERY, WindowCheckpoints
from .cache.windows import WindowPages, pool_pages
from .config import HelixConfig
from .models.kinds import WINDOW
from .models.parts import Part
from .models.spec import ModelSpec

_log = logging.getLogger(__name__)


def with_windows(config: HelixConfig, spec: ModelSpec) -> HelixConfig:
    """Return the settings, with partial reuse off where a model has windows, which is said.

    Blocks may go to the host: what sequences begin behind them with, a window's pages, stays on the device.

    Raises:
        ValueError: in one line, for settings that need what has left a window, or windows elsewhere.
    """
    if not spec.window:
        return config
    if spec.states is not None:
        raise ValueError(f"{spec.family} has layers with a window beside layers of states, whose checkpoints differ")
    if config.transfer.enabled and not spec.num_cached_layers:
        raise ValueError(
            f"transfer.* brings pages of full layers, and all layers of this {spec.family} have a window; leave it out"
        )
    if config.cache.host_pages and not spec.num_cached_layers:
        raise ValueError(
            f"cache.host_pages = {config.cache.host_pages} holds pages of full layers, and all layers of this "
            f"{spec.family} have a window; use cache.host_pages=0"
        )
    if config.cache.partial_reuse and config.cache.reuse:
        _log.info("cache.partial_reuse: off, sequences of %s begin behind blocks whose windows are there", spec.family)
    return replace(config, cache=replace(config.cache, partial_reuse=False))


def span_of(spec: ModelSpec) -> int:
    """Return the tokens of a window whose pages are kept: one more where the last of a reused prefix is computed again,
    for its hidden state.
    """
    return spec.window + spec.looks_further


def num_window_pages(config: HelixConfig, spec: ModelSpec) -> int:
    """Return the pages of the second pool, on every rank; 0 without windows."""
    if not spec.window:
        return 0
    scheduler = config.scheduler
    return pool_pages(
        span_of(spec),
        config.cache.block_size,
        max_batch=scheduler.max_batch,
        max_run=max(2, 1 + config.speculative.most_drafts),  # a row that is computed and one that is launched ahead
        prefill_chunk=scheduler.prefill_chunk,
        max_len=spec.max_position,
        twice=config.cache.reuse or config.transfer.enabled,
    )


def window_control(config: HelixConfig, spec: ModelSpec) -> WindowPages | None:
    """Return who gives these pages to sequences; None without windows."""
    pages = num_window_pages(config, spec)
    return WindowPages(span_of(spec), config.cache.block_size, pages) if pages else None


def window_checkpoints(config: HelixConfig, windows: WindowPages | None) -> WindowCheckpoints | None:
    """Return the checkpoints of these pages; None without windows, or reuse."""
    if windows is None or not config.cache.reuse:
        return None
    every = interval_of(config.cache.checkpoint_every or EVERY, config.cache.block_size)
    return WindowCheckpoints(windows, every, config.cache.block_size)


def window_pages(
    config: HelixConfig, spec: ModelSpec, part: Part, *, dtype: torch.dtype, device: torch.device, in_8_bits: bool
) -> PagedCache | None:
    """Return a rank's pages of the layers with a window; None without any."""
    if not spec.window:
        return None
    first, stop = part.window_kv_heads
    layout = page_layout(spec, stop - first, config.cache.block_size, dtype, in_8_bits=in_8_bits)
    pages = num_window_pages(config, spec)
    return PagedCache(layout, num_layers=len(spec.layers_of(WINDOW)), num_pages=pages, device=device)
