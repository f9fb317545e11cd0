"""What the bodies of the transfer tests share: the LLM of either group, and what must hold of it afterwards."""

import os
from typing import Any

from helix.config import (
    CacheConfig,
    HelixConfig,
    ModelConfig,
    ParallelConfig,
    RuntimeConfig,
    SchedulerConfig,
    SpeculativeConfig,
    TransferConfig,
)
from helix.llm import LLM

SECRET = "the tests' own secret"


def make_llm(
    path: str,
    port: int | None,
    role: str | None,
    layout: tuple[int, int],
    *,
    block_size: int = 16,
    num_pages: int = 64,
    chunk: int = 24,
    max_batch: int = 4,
    check_ranks: bool = True,
    dtype: str = "float32",
    speculative: str = "none",
    secret: str = SECRET,
    **transfer: Any,
) -> LLM:
    """Return an LLM of one group, or of none."""
    os.environ["HELIX_TRANSFER_SECRET"] = secret
    if role is not None:
        transfer = {"role": role, "address": f"127.0.0.1:{port}", "connect_timeout_s": 60.0, **transfer}
    return LLM(
        HelixConfig(
            model=ModelConfig(path=path, dtype=dtype),
            parallel=ParallelConfig(kvp=layout[0], tpa=layout[1]),
            cache=CacheConfig(block_size=block_size, num_pages=num_pages),
            scheduler=SchedulerConfig(max_batch=max_batch, prefill_chunk=chunk),
            speculative=SpeculativeConfig(method=speculative),
            runtime=RuntimeConfig(check_ranks=check_ranks),
            transfer=TransferConfig(**{"min_tokens": 0} | transfer),
        )
    )


def leave(llm: LLM) -> None:
    """End an LLM's part in a transfer, but not the process group, which is the test harness's."""
    if llm._receiver is not None:
        llm._receiver.close()
    assert_idle(llm)


def assert_idle(llm: LLM) -> None:
    """No page is lost and nothing is pinned."""
    cache = llm.engine.scheduler.cache
    free = [cache.num_available(rank) for rank in range(llm.layout.kvp)]
    assert free == [llm.num_pages] * llm.layout.kvp, f"pages were lost: {free} of {llm.num_pages} are free"
    assert all(block.pins == 0 for block in cache.blocks.tree.walk())
    assert not llm.engine.has_work
    assert not llm.engine._live and len(llm.engine.scheduler._free_slots) == llm.config.scheduler.max_batch
