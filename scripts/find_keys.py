"""Whether attention reads every shard: keys in long texts are found over a layout, and lost with the block of one.

    torchrun --standalone --nproc-per-node 2 -m scripts.find_keys parallel.kvp=2 lengths='[65536,262144,1048576]'

The model is made by hand (scripts/passkey_model.py), so what it answers is known at any length; it is tiny, and one
that answers right has read the key's block, wherever that is. Keys stand at the text's ends, across the border of two
blocks, and between, on each KVP rank in turn. Then a key's block is emptied in the last layer of the rank that holds
it, and the key must be lost. Ends with exit code 1 where an answer is wrong, or right without its block.
"""

from __future__ import annotations

import gc
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from helix.config import (
    CacheConfig,
    HelixConfig,
    ModelConfig,
    ParallelConfig,
    RuntimeConfig,
    SchedulerConfig,
    check_at_least,
)
from helix.graphs import PendingTokens
from helix.llm import LLM
from helix.request import Chunk
from helix.sampling import SamplingParams
from parallel.launch import Launch, from_rank0, set_up_logging, start, stop
from scripts import cli
from scripts.dummy_weights import BenchCache
from scripts.ending import RunFailed
from scripts.make_checkpoint import make_checkpoint
from scripts.passkey_model import prompt_with_key
from scripts.timing import report

LONGEST = 1 << 21  # tokens, up to which the model tells positions apart
KEY_LEN, NUM_DIGITS = 6, 5  # the mark and its digits
NUM_EMPTIED = 2


@dataclass(kw_only=True, slots=True)
class FindKeysConfig:
    """What to look for, and where.

    Attributes:
        lengths: of the texts, in tokens.
        keys: how many a length has between its ends, beside three at the ends and across a border.
        path: the model, a folder that scripts.make_checkpoint --family passkey has made; null makes one, on one node.
        block_size: tokens a page.
        prefill_chunk: prompt tokens a step.
        cache: its dtype, as ``cache.dtype`` of a run.
    """

    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    lengths: list[int] = field(default_factory=lambda: [65536, 262144, 1 << 20])
    keys: int = 4
    path: str | None = None
    block_size: int = 64
    prefill_chunk: int = 8192
    cache: BenchCache = field(default_factory=BenchCache)

    def __post_init__(self) -> None:
        check_at_least("keys", self.keys, NUM_EMPTIED)
        check_at_least("block_size", self.block_size, 2 * KEY_LEN)
        least = 2 * self.block_size * (self.keys + 2)
        for length in self.lengths or [0]:
            if not least <= length <= LONGEST:
                raise ValueError(f"lengths: {length} must lie from {least}, for {self.keys} keys, to {LONGEST}")

    def open(self, path: str, length: int) -> LLM:
        """Return the model with room for one text."""
        room = length + 2 * self.block_size
        ranks = self.parallel.kvp or 1
        return LLM(
            HelixConfig(
                model=ModelConfig(path=path, max_position=room),
                parallel=self.parallel,
                cache=CacheConfig(
                    block_size=self.block_size,
                    num_pages=-(-room // (self.block_size * ranks)) + 1,
                    dtype=self.cache.dtype,
                    reuse=False,
                ),
                scheduler=SchedulerConfig(max_batch=1, prefill_chunk=self.prefill_chunk),
                runtime=self.runtime,
            )
        )


def places(length: int, keys: int, block_size: int, kvp: int) -> tuple[list[int], list[int]]:
    """Return where keys begin: those within a block, of each KVP rank in turn, and the others."""
    blocks = length // block_size
    inside = []
    for index in range(keys):
        block = (index + 1) * blocks // (keys + 1) // kvp * kvp + index % kvp
        inside.append(block * block_size + block_size // 4)
    return inside, [1, blocks // 2 * block_size - KEY_LEN // 2, length - KEY_LEN - 2]


@contextmanager
def block_emptied(llm: LLM, position: int) -> Iterator[None]:
    """Inside, the block of a position is empty in the last layer, on the ranks that hold it; one sequence runs."""
    runner, block = llm.runner, position // llm.placement.block_size
    launch = runner.launch

    def emptied(chunks: list[Chunk]) -> PendingTokens:
        table, pages = chunks[0].seq.blocks, runner.cache.layers[-1]
        assert table is not None
        if llm.placement.owner(position, table.first_owner) == llm.grid.kvp_rank and block < len(table.pages):
            (pages if isinstance(pages, torch.Tensor) else pages.scales)[table.pages[block]] = 0.0
        return launch(chunks)

    runner.launch = emptied  # type: ignore[method-assign]
    try:
        yield
    finally:
        runner.launch = launch  # type: ignore[method-assign]


def right_tokens(llm: LLM, length: int, position: int) -> int:
    """Return how many digits of a key the model finds. Collective over the world, and alike on all ranks."""
    prompt, answer = prompt_with_key(length, position, seed=position)
    [output] = llm.generate([prompt], SamplingParams(max_tokens=NUM_DIGITS))
    if output.error is not None:
        raise ValueError(output.error)
    return sum(found == digit for found, digit in zip(output.token_ids, answer, strict=False))


def search(llm: LLM, length: int, keys: int) -> dict[str, Any]:
    """Look for all keys of a length; return what was found, and what was found without its block."""
    inside, others = places(length, keys, llm.placement.block_size, llm.layout.kvp)
    began, found, lost = time.perf_counter(), list[int](), list[int]()

    def look(position: int, into: list[int], of: int, which: str) -> None:
        into.append(right_tokens(llm, length, position))
        said = f"{into[-1]} of {NUM_DIGITS} tokens right, {time.perf_counter() - began:.0f} s"
        cli.say(f"{length} tokens, {which} {len(into)} of {of}, at {position}: {said}")

    for position in (*inside, *others):
        look(position, found, len(inside) + len(others), "key")
    took = time.perf_counter() - began
    for position in inside[:NUM_EMPTIED]:
        with block_emptied(llm, position):
            look(position, lost, NUM_EMPTIED, "key without its block")
    return {
        "tokens": length,
        "kvp": llm.layout.kvp,
        "tpa": llm.layout.tpa,
        "keys": len(found),
        "right": sum(found),
        "of": NUM_DIGITS * len(found),
        "right without the block": sum(lost),
        "keys without it": NUM_EMPTIED,
        "whole without it": sum(each == NUM_DIGITS for each in lost),
        "s a key": took / len(found),
    }


def model_path(config: FindKeysConfig, launch: Launch, folder: str) -> str:
    """Return the model's folder, which rank 0 makes in its own ``folder`` where none is named."""
    if config.path is not None:
        return config.path
    if launch.local_world_size != launch.world_size:
        raise ValueError(
            "path = null makes the model on one node alone; make it in a folder that all nodes see (python -m "
            "scripts.make_checkpoint DIR --family passkey --max-position 2097152 --dtype bfloat16) and name it"
        )
    return from_rank0(
        lambda: str(make_checkpoint(f"{folder}/model", family="passkey", dtype="bfloat16", max_position=LONGEST))
    )


def run(config: FindKeysConfig) -> None:
    """Search every length on this rank."""
    launch = start(config.runtime.device, timeout_s=config.runtime.timeout_s)
    set_up_logging(launch.rank)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        path = model_path(config, launch, folder)
        for length in config.lengths:
            llm = config.open(path, length)
            rows.append(search(llm, length, config.keys))
            cli.say(f"{length} tokens: {rows[-1]['right']} of {rows[-1]['of']} tokens right")
            del llm
            gc.collect()
    report("keys", list(rows[0]), [list(row.values()) for row in rows], cache=config.cache.dtype)
    stop()
    if wrong := [row for row in rows if row["right"] != row["of"] or row["whole without it"]]:
        raise RunFailed(f"keys of {wrong[0]['tokens']} tokens: {wrong[0]['right']} of {wrong[0]['of']} tokens right, "
                        f"{wrong[0]['whole without it']} keys found without their block")  # fmt: skip


if __name__ == "__main__":
    cli.main("find_keys", FindKeysConfig, run)
