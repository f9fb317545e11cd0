"""Whether attention reads every shard: keys in long texts are found over a layout, and lost with the block of one.

    torchrun --standalone --nproc-per-node 2 -m scripts.find_keys parallel.kvp=2 lengths='[65536,262144,1048576]'

The model is made by hand (scripts/passkey_model.py), so what it answers is known at any length; it is tiny, and one
that answers right has read the key's block, wherever that is. Keys stand at the text's ends, across the border of two
blocks, and between, on each KVP rank in turn. All stand in one text, which is computed once: the prompts that ask for
them, one after the other, find it in the cache. Then the block of each key between is emptied in the last layer of the
rank that holds it, and the key must be lost; and, that block being whole again, the one behind it, which must not
matter. Ends with exit code 1 where an answer is wrong, or right without its block.
"""

from __future__ import annotations

import gc
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Self

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
from helix.request import Chunk, RequestOutput
from helix.sampling import SamplingParams
from parallel.launch import Launch, from_rank0, set_up_logging, start, stop
from scripts import cli
from scripts.dummy_weights import BenchCache
from scripts.ending import RunFailed
from scripts.make_checkpoint import make_checkpoint
from scripts.passkey_model import KEY_LEN, MOST_KEYS, text_with_keys
from scripts.progress import RunProgress
from scripts.timing import report

LONGEST = 1 << 21  # tokens, up to which the model tells positions apart
DEFAULTS = [65536, 262144, 1 << 20], 8192  # lengths and chunk where none are named
CPU_DEFAULTS = [4096], 1024  # attention takes minutes of 65,536 tokens there
NUM_OTHERS = 3  # keys at the ends and across a border


@dataclass(kw_only=True, slots=True)
class FindKeysConfig:
    """What to look for, and where.

    Attributes:
        lengths: of the texts, in tokens; null is 65,536, 262,144 and 1,048,576, without a GPU 4,096.
        keys: how many a text has between its ends, beside three at the ends and across a border.
        path: the model, a folder that scripts.make_checkpoint --family passkey has made; null makes one, on one node.
        block_size: tokens a page.
        prefill_chunk: prompt tokens a step; null is 8,192, without a GPU 1,024.
        cache: its dtype, as ``cache.dtype`` of a run.
    """

    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    lengths: list[int] | None = None
    keys: int = 4
    path: str | None = None
    block_size: int = 64
    prefill_chunk: int | None = None
    cache: BenchCache = field(default_factory=BenchCache)

    def __post_init__(self) -> None:
        if not 2 <= self.keys <= MOST_KEYS - NUM_OTHERS:
            raise ValueError(f"keys = {self.keys} must lie from 2 to {MOST_KEYS - NUM_OTHERS}")
        check_at_least("block_size", self.block_size, 2 * KEY_LEN)
        if self.prefill_chunk is not None:
            check_at_least("prefill_chunk", self.prefill_chunk, 1)
        least = 2 * self.block_size * (self.keys + 2)
        for length in (self.lengths or [0]) if self.lengths is not None else []:
            if not least <= length <= LONGEST:
                raise ValueError(f"lengths: {length} must lie from {least}, for {self.keys} keys, to {LONGEST}")

    def on(self, device: str) -> Self:
        """Return the settings on a kind of device, whose own lengths and chunk stand where none are named."""
        default_lengths, default_chunk = CPU_DEFAULTS if device == "cpu" else DEFAULTS
        lengths, chunk = self.lengths or default_lengths, self.prefill_chunk or default_chunk
        if self.lengths is None:
            cli.say(f"lengths: {lengths}" + ", since there is no GPU; lengths=[16384] names others" * (device == "cpu"))
        return replace(self, lengths=lengths, prefill_chunk=chunk)

    def open(self, path: str, length: int) -> LLM:
        """Return the model with room for one text and the ends of prompts."""
        prompts = self.keys + NUM_OTHERS
        room = length + 2 * self.block_size * prompts
        ranks = self.parallel.kvp or 1
        return LLM(
            HelixConfig(
                model=ModelConfig(path=path, max_position=length + 2 * self.block_size),
                parallel=self.parallel,
                cache=CacheConfig(
                    block_size=self.block_size,
                    num_pages=-(-room // (self.block_size * ranks)) + 1,
                    dtype=self.cache.dtype,
                ),
                scheduler=SchedulerConfig(max_batch=1, prefill_chunk=self.prefill_chunk or DEFAULTS[1]),
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
def block_emptied(llm: LLM, block: int) -> Iterator[None]:
    """Inside, a block is empty in the last layer, on the ranks that hold it; one sequence runs."""
    runner, launch = llm.runner, llm.runner.launch
    whole = list[tuple[torch.Tensor, torch.Tensor]]()

    def emptied(chunks: list[Chunk]) -> PendingTokens:
        table, pages = chunks[0].seq.blocks, runner.cache.layers[-1]
        assert table is not None
        if llm.placement.owner(block * llm.placement.block_size, table.first_owner) == llm.grid.kvp_rank:
            page = (pages if isinstance(pages, torch.Tensor) else pages.scales)[table.pages[block]]
            if not whole:
                whole.append((page, page.clone()))
            page.zero_()
        return launch(chunks)

    runner.launch = emptied  # type: ignore[method-assign]
    try:
        yield
    finally:
        runner.launch = launch  # type: ignore[method-assign]
        for page, before in whole:
            page.copy_(before)


@dataclass
class Tally:
    """What answers came to: prompts, tokens of them that are right, and answers that are right altogether."""

    prompts: int = 0
    right: int = 0
    whole: int = 0

    @property
    def of(self) -> int:
        """Tokens of all answers."""
        return self.prompts * (KEY_LEN - 1)

    def add(self, llm: LLM, text: list[int], key: list[int]) -> RequestOutput:
        """Ask for a key of a text, and show how far the first is. Collective over the world, and alike on all ranks."""
        mark, *answer = key
        with RunProgress(llm.launch.speaks and not self.prompts, len(answer)) as progress:
            sampling = SamplingParams(max_tokens=len(answer))
            [output] = llm.generate([[*text, mark]], sampling, on_step=progress.update)
        if output.error is not None:
            raise ValueError(output.error)
        self.prompts += 1
        self.right += sum(found == said for found, said in zip(output.token_ids, answer, strict=False))
        self.whole += output.token_ids == answer
        return output


def search(llm: LLM, length: int, keys: int) -> dict[str, Any]:
    """Look for all keys of a text; return what was found, and what was found without the keys' blocks."""
    block_size = llm.placement.block_size
    inside, others = places(length, keys, block_size, llm.layout.kvp)
    text, hidden = text_with_keys(length - 1, [*inside, *others], seed=length)
    found, lost, kept = Tally(), Tally(), Tally()
    began, took, cached = time.perf_counter(), 0.0, length
    cli.say(f"{length} tokens: the text is computed once, for the first key")

    def say(tally: Tally, which: str, position: int) -> None:
        right = f"{tally.right} of {tally.of} tokens right, {time.perf_counter() - began:.1f} s"
        cli.say(f"{length} tokens, {which}, {tally.prompts}, at {position}: {right}")

    for position, key in zip((*inside, *others), hidden, strict=True):
        output = found.add(llm, text, key)
        if took:
            cached = min(cached, output.cached_tokens)
        took = took or time.perf_counter() - began
        say(found, "key", position)
    for position, key in zip(inside, hidden, strict=False):
        for tally, which, block in ((lost, "its", 0), (kept, "the next", 1)):
            with block_emptied(llm, position // block_size + block):
                tally.add(llm, text, key)
            say(tally, f"key without {which} block", position)
    return {
        "tokens": length,
        "kvp": llm.layout.kvp,
        "tpa": llm.layout.tpa,
        "keys": found.prompts,
        "right": found.right,
        "of": found.of,
        "keys without their block": lost.prompts,
        "whole without it": lost.whole,
        "right without the next": kept.right,
        "of these": kept.of,
        "cached at least": cached,
        "first s": took,
        "all s": time.perf_counter() - began,
    }


def is_right(row: dict[str, Any]) -> bool:
    """Return whether a text's keys were found, lost without their blocks, and found without the ones behind these."""
    return (
        row["right"] == row["of"] and not row["whole without it"] and row["right without the next"] == row["of these"]
    )


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
    config, rows = config.on(launch.device.type), []
    with tempfile.TemporaryDirectory() as folder:
        path = model_path(config, launch, folder)
        for length in config.lengths or []:
            llm = config.open(path, length)
            rows.append(search(llm, length, config.keys))
            cli.say(f"{length} tokens: {rows[-1]['right']} of {rows[-1]['of']} tokens right")
            del llm
            gc.collect()
    report("keys", list(rows[0]), [list(row.values()) for row in rows], cache=config.cache.dtype)
    stop()
    if wrong := next((row for row in rows if not is_right(row)), None):
        raise RunFailed(
            f"keys of {wrong['tokens']} tokens: {wrong['right']} of {wrong['of']} tokens right, "
            f"{wrong['whole without it']} keys found without their block, and without the one behind it "
            f"{wrong['right without the next']} of {wrong['of these']} tokens"
        )


if __name__ == "__main__":
    cli.main("find_keys", FindKeysConfig, run)
