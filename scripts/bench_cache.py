"""Measure the KV cache: match and claim of a cached prompt, admission of a batch, and page movements on a GPU.

    python -m scripts.bench_cache                                                 control plane; and copies on a GPU
    python -m scripts.bench_cache model=glm4_9b_1m                                also decode beside offloads

Every figure stands beside what it is compared with, measured in the same run:

 - match + claim of a prompt that is cached whole, a block, beside a look-up of the same keys in a plain dict;
 - admission of requests that share a long prefix, by how many blocks are new;
 - offload and onboard bandwidth, beside one plain pinned copy of the same bytes;
 - the time of a decode step while pages are offloaded, beside the same steps without.
"""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from itertools import pairwise
from statistics import median
from typing import Any

import numpy as np
import torch

from attention.pages import PageLayout
from helix.cache.control import CacheControl
from helix.cache.keys import BlockKeys
from helix.cache.movements import Movement, Offload, Onboard
from helix.cache.mover import PageMover
from helix.cache.pages import PagedCache
from helix.checks import check_at_least
from helix.config import HelixConfig
from helix.llm import LLM
from helix.metrics import RunMetrics
from helix.sampling import SamplingParams
from parallel.launch import set_up_logging
from parallel.placement import BlockCyclic
from scripts import cli
from scripts.timing import commit, device_name, show

VOCAB = 150_000


@dataclass(kw_only=True, slots=True)
class BenchCacheConfig(HelixConfig):
    """The settings of the benchmark.

    Attributes:
        tokens: the cached prompt, in tokens.
        kvp: simulated ranks of the control plane.
        requests: how many are admitted with a shared prefix.
        shared_tokens: the length of that prefix.
        layers, kv_heads, head_dim: the shape of the pages that move.
        pages: how many move at once.
        repeats: of every measurement.
        decode_steps: steps timed with and without offloads.
        offload_pages: pages offloaded at each of these steps.
        context: tokens of the prompt that decode reads.
    """

    tokens: int = 1 << 20
    kvp: int = 8
    requests: int = 256
    shared_tokens: int = 1 << 17
    layers: int = 40
    kv_heads: int = 2
    head_dim: int = 128
    pages: int = 256
    repeats: int = 15
    decode_steps: int = 200
    offload_pages: int = 4
    context: int = 16384

    def __post_init__(self) -> None:
        HelixConfig.__post_init__(self)
        for each in fields(BenchCacheConfig):
            if each.type == "int":
                check_at_least(each.name, getattr(self, each.name), 1)


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Return the seconds that work takes, and its result."""
    began = time.perf_counter()
    result = work()
    return time.perf_counter() - began, result


def prompt_of(num_tokens: int) -> list[int]:
    """Return random token ids, the same every time."""
    return np.random.default_rng(0).integers(0, VOCAB, num_tokens).tolist()


def cached(config: BenchCacheConfig, tokens: list[int], spare_pages: int) -> CacheControl:
    """Return a control plane that has a prompt cached."""
    place = BlockCyclic(config.cache.block_size, config.kvp)
    cache = CacheControl(place, -(-place.num_blocks(len(tokens)) // config.kvp) + spare_pages)
    table = cache.admit(cache.claim(BlockKeys(tokens, config.cache.block_size)), len(tokens))
    assert table is not None
    cache.release(table, len(tokens))
    return cache


def bench_match(config: BenchCacheConfig) -> dict[str, Any]:
    """Time match + claim of a prompt that is cached whole, beside a plain dict of the same keys.

    Keys are cut anew for each repeat, so that both sides find no hash computed, and neither side's keys are the very
    objects that are stored. Then both try again, as a request does that waits, with the hashes that Python has kept.
    """
    tokens = prompt_of(config.tokens)
    cache = cached(config, tokens, spare_pages=1)
    plain = {key: block for block, key in enumerate(BlockKeys(tokens, config.cache.block_size).full)}
    num_blocks = len(plain)
    assert num_blocks == config.tokens // config.cache.block_size, "blocks repeat"

    def look_up(keys: list[bytes]) -> None:
        for key in keys:
            plain[key]

    ratios, again_ratios, claims_ns, plain_ns, keys_ns = [], [], [], [], []
    gc.collect()
    gc.disable()
    for _ in range(config.repeats):
        again = [*tokens, 0]
        keys_s, keys = timed(lambda again=again: BlockKeys(again, config.cache.block_size))  # type: ignore[misc]
        others = BlockKeys(again, config.cache.block_size).full
        plain_s, _ = timed(lambda others=others: look_up(others))  # type: ignore[misc]
        claim_s, claim = timed(lambda keys=keys: cache.claim(keys))  # type: ignore[misc]
        assert claim.num_tokens == len(tokens)
        cache.drop(claim)
        plain_again_s, _ = timed(lambda others=others: look_up(others))  # type: ignore[misc]
        claim_again_s, claim = timed(lambda keys=keys: cache.claim(keys))  # type: ignore[misc]
        cache.drop(claim)
        again_ratios.append(claim_again_s / plain_again_s)
        for seconds, into in ((claim_s, claims_ns), (plain_s, plain_ns), (keys_s, keys_ns)):
            into.append(seconds / num_blocks * 1e9)
        ratios.append(claim_s / plain_s)
    gc.enable()
    return {
        "tokens": config.tokens,
        "blocks": num_blocks,
        "kvp": config.kvp,
        "claim_ns_per_block": median(claims_ns),
        "dict_ns_per_block": median(plain_ns),
        "cutting_keys_ns_per_block": median(keys_ns),
        "ratio": median(ratios),
        "ratio_min_max": [min(ratios), max(ratios)],
        "ratio_when_tried_again": median(again_ratios),
    }


def bench_admission(config: BenchCacheConfig) -> list[dict[str, Any]]:
    """Time the admission of a batch that shares a prefix, for several numbers of new blocks and prefix lengths."""
    size = config.cache.block_size
    rows = []
    for shared, new_blocks in (
        (config.shared_tokens // 4, 8),
        (config.shared_tokens, 2),
        (config.shared_tokens, 8),
        (config.shared_tokens, 32),
    ):
        prefix = prompt_of(shared)
        spare = -(-config.requests * (new_blocks + 1) // config.kvp) + config.requests
        claims_us, admits_us = [], []
        for _ in range(max(3, config.repeats // 5)):
            cache = cached(config, prefix, spare)
            prompts = [[*prefix, *([VOCAB + number] * (new_blocks * size))] for number in range(config.requests)]
            keys = [BlockKeys(prompt, size) for prompt in prompts]
            gc.collect()
            gc.disable()
            claim_s, claims = timed(lambda cache=cache, keys=keys: [cache.claim(each) for each in keys])  # type: ignore[misc]
            admit_s, tables = timed(
                lambda cache=cache, claims=claims, prompts=prompts: [  # type: ignore[misc]
                    cache.admit(claim, len(prompt)) for claim, prompt in zip(claims, prompts, strict=True)
                ]
            )
            gc.enable()
            assert all(table is not None and table.num_reused == shared for table in tables)
            claims_us.append(claim_s / config.requests * 1e6)
            admits_us.append(admit_s / config.requests * 1e6)
        rows.append(
            {
                "requests": config.requests,
                "shared_tokens": shared,
                "new_blocks": new_blocks,
                "claim_us_per_request": median(claims_us),
                "admit_us_per_request": median(admits_us),
            }
        )
    return rows


def bench_copies(config: BenchCacheConfig) -> dict[str, Any]:
    """Time offload and onboard of many pages on a GPU, beside one pinned copy of the same bytes each way."""
    device = torch.device("cuda")
    cache = PagedCache(
        PageLayout(config.kv_heads, config.cache.block_size, config.head_dim, torch.bfloat16),
        num_layers=config.layers,
        num_pages=config.pages,
        device=device,
    )
    cache.pages.zero_()
    mover = PageMover(cache, config.pages, 0)
    plain = torch.empty(cache.pages.nbytes, dtype=torch.uint8, device=device)
    pinned = torch.empty(cache.pages.nbytes, dtype=torch.uint8, pin_memory=True)
    pages = range(config.pages)
    offload: list[Movement] = [Offload(0, page, page) for page in pages]
    onboard: list[Movement] = [Onboard(0, page, page) for page in pages]

    def seconds(work: Callable[[], Any]) -> float:
        times = []
        for _ in range(config.repeats + 2):
            torch.cuda.synchronize()
            times.append(timed(lambda: (work(), torch.cuda.synchronize()))[0])
        return median(times[2:])

    out_s, in_s = seconds(lambda: mover.execute(offload)), seconds(lambda: mover.execute(onboard))
    plain_out_s = seconds(lambda: pinned.copy_(plain, non_blocking=True))
    plain_in_s = seconds(lambda: plain.copy_(pinned, non_blocking=True))
    gigabytes = cache.pages.nbytes / 1e9
    return {
        "pages": config.pages,
        "page_bytes": cache.pages.nbytes // config.pages,
        "offload_gb_per_s": gigabytes / out_s,
        "plain_out_gb_per_s": gigabytes / plain_out_s,
        "offload_of_plain": plain_out_s / out_s,
        "onboard_gb_per_s": gigabytes / in_s,
        "plain_in_gb_per_s": gigabytes / plain_in_s,
        "onboard_of_plain": plain_in_s / in_s,
    }


def bench_decode(config: BenchCacheConfig) -> dict[str, Any]:
    """Time decode steps of one sequence with and without offloads of other pages at every step."""
    llm = LLM(config)
    control, mover = llm.engine.scheduler.cache, llm.engine.mover
    host_pages = config.cache.host_pages
    prompt = prompt_of(config.context)
    prompt = [token % llm.spec.vocab_size for token in prompt]
    sampling = SamplingParams(max_tokens=config.decode_steps, ignore_eos=True)
    number = 0

    def offload(_: RunMetrics) -> None:
        """Offload pages that no sequence holds; what they hold does not matter."""
        nonlocal number
        free = control.blocks.device.free_pages(mover.rank)[-config.offload_pages :]
        mover.execute([Offload(mover.rank, page, (number + i) % host_pages) for i, page in enumerate(free)])
        number += len(free)

    def ttl(on_step: Callable[[RunMetrics], None] | None) -> list[float]:
        stream = llm.stream([prompt], sampling, on_step=on_step)
        times = [time.perf_counter() for event in stream for _ in event.token_ids]
        return [after - before for before, after in pairwise(times)][10:]

    ttl(None)
    without, beside = [], []
    for _ in range(3):
        without += ttl(None)
        beside += ttl(offload)
    llm.close()
    return {
        "context": config.context,
        "offload_pages_per_step": config.offload_pages,
        "ttl_ms": median(without) * 1e3,
        "ttl_beside_offload_ms": median(beside) * 1e3,
        "ratio": median(beside) / median(without),
    }


def run(config: BenchCacheConfig) -> None:
    """Run what the machine can, print tables, and one JSON line last."""
    set_up_logging(cli.rank())
    on_gpu = torch.cuda.is_available()
    match, admission = bench_match(config), bench_admission(config)
    figures: dict[str, Any] = {
        "benchmark": "cache",
        "device": device_name(),
        "commit": commit(),
        "block_size": config.cache.block_size,
        "repeats": config.repeats,
        "match": match,
        "admission": admission,
    }
    show("match + claim of a cached prompt", [match])
    show("admission with a shared prefix", admission)
    if on_gpu:
        figures["copies"] = bench_copies(config)
        show("page movements", [figures["copies"]])
    if config.model.path or config.model.config:
        figures["decode"] = bench_decode(config)
        show("decode beside offloads", [figures["decode"]])
    cli.say(json.dumps(figures))


if __name__ == "__main__":
    cli.main("bench_cache", BenchCacheConfig, run)
