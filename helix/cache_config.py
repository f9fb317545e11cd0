"""The settings of the cache."""

from __future__ import annotations

from dataclasses import dataclass

from parallel.placement import BlockCyclic

from .cache.retention import MAX_PRIORITY
from .checks import check_at_least, check_choice

DTYPES = ("auto", "float32", "bfloat16", "float16")
CACHE_DTYPES = (*DTYPES, "fp8_e4m3")


@dataclass(kw_only=True, slots=True)
class CacheConfig:
    """The paged KV cache of each rank.

    Attributes:
        block_size: tokens a page, a power of two from 1 to 256.
        dtype: of what is cached: auto (the model's dtype, or what the checkpoint's kv_cache_scheme says), the model's
            dtype by its name, or fp8_e4m3, with a scale for each token and KV head.
        num_pages: pages a rank; None takes what fits in memory_fraction, the least over all ranks.
        memory_fraction: the part of a device's memory that weights, activations and cache may fill together.
        reuse: keep the blocks of ended and preempted sequences for later ones with the same prefix.
        partial_reuse: also reuse the leading tokens of a block.
        checkpoint_every: tokens of a prompt between two checkpoints, where the model has state layers or windows, which
            go on from a checkpoint only; one more is near the prompt's end. None takes so many that checkpoints of
            states need at most a quarter of the bytes of keys and values; 16384 with windows.
        host_pages: pages of host memory a rank, where evicted blocks go; 0 drops them.
        offload_min_priority: blocks of a lower retention priority (0 to 100, 35 unless a request says) are dropped.
        events: a file that gets a JSON line for each block stored, removed or moved.
    """

    block_size: int = 64
    dtype: str = "auto"
    num_pages: int | None = None
    memory_fraction: float = 0.9
    reuse: bool = True
    partial_reuse: bool = True
    checkpoint_every: int | None = None
    host_pages: int = 0
    offload_min_priority: int = 30
    events: str | None = None

    def __post_init__(self) -> None:
        BlockCyclic(self.block_size, 1)
        check_choice("cache.dtype", self.dtype, CACHE_DTYPES)
        check_at_least("cache.host_pages", self.host_pages, 0)
        if self.host_pages and not self.reuse:
            raise ValueError(f"cache.host_pages = {self.host_pages} needs cache.reuse=true; set it, or host_pages=0")
        if not 0 <= self.offload_min_priority <= MAX_PRIORITY:
            raise ValueError(f"cache.offload_min_priority = {self.offload_min_priority} must lie in 0..{MAX_PRIORITY}")
        if self.checkpoint_every is not None:
            check_at_least("cache.checkpoint_every", self.checkpoint_every, 1)
            if not self.reuse:
                raise ValueError(
                    f"cache.checkpoint_every = {self.checkpoint_every} needs cache.reuse=true; set it, or leave it out"
                )
        if self.num_pages is not None:
            check_at_least("cache.num_pages", self.num_pages, 1)
        if not 0.0 < self.memory_fraction <= 1.0:
            raise ValueError(f"cache.memory_fraction = {self.memory_fraction} must lie in (0, 1]")
