"""Time what a KV transfer costs: the descriptors of a request, the bytes, and what is left of it after the prefill.

    torchrun --standalone --nproc-per-node 2 -m scripts.bench_transfer                               (CPUs)
    torchrun --standalone --nproc-per-node 4 -m scripts.bench_transfer model=glm4_9b_1m \
        transfer.prefill_ranks=2 transfer.prefill.kvp=2 transfer.prefill.tpa=1 parallel.kvp=1 parallel.tpa=2     (GPUs)

prepare: from the page tables of a request to arrays that NIXL takes, beside plain Python lists of the same regions.
bandwidth: pages written from rank 0 to rank 1, through NIXL and by a kernel where that can be, beside a plain copy of
as many bytes in one piece between the same two processes, in turn: the kernel's own (process_vm_writev) on CPUs, peer
to peer on GPUs.
overlap: from the end of the prefill to the first decode step, beside the same with all blocks written after the
prefill.
"""

from __future__ import annotations

import ctypes
import json
import os
import secrets
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.multiprocessing.reductions import reduce_tensor

from attention.pages import PageLayout
from helix.cache.pages import PagedCache
from helix.config import HelixConfig
from helix.engine import Engine
from helix.llm import LLM, enter
from helix.sampling import SamplingParams
from helix.transfer.mapped_peer import MappedPeer
from helix.transfer.protocol import DONE, RUNNING
from helix.transfer.regions import CacheMap, Side, build_regions, shared_blocks
from helix.transfer.sender import Sender, Sending
from helix.transfer.transport import Transport
from parallel.launch import start, stop
from parallel.layout import Layout
from scripts import cli
from scripts.timing import report, show

HEADS, HEAD_DIM, BLOCK, LAYERS = 8, 128, 32, 16  # of the pools that bandwidth is measured with


@dataclass(kw_only=True, slots=True)
class BenchTransferConfig(HelixConfig):
    """What to measure.

    Attributes:
        lengths: tokens of the requests whose preparation is timed.
        layers: of the model there.
        block: tokens a page there.
        sizes_mib: bytes of a transfer, in MiB.
        context: the prompt whose handover is timed, in tokens.
        prompts: prompts to take the median of, in each of the two ways.
        repeats: times to take the median of, elsewhere.
    """

    lengths: list[int] = field(default_factory=lambda: [2048, 4096, 8192, 16384, 32768])
    layers: int = 94
    block: int = 32
    sizes_mib: list[int] = field(default_factory=lambda: [16, 64, 256])
    context: int = 32768
    prompts: int = 2
    repeats: int = 15


def medians_s(*works: Callable[[], object], repeats: int) -> list[float]:
    """Return the median time of each piece of work, in seconds, done in turn, after one turn that does not count."""
    times: list[list[float]] = [[] for _ in works]
    for turn in range(repeats + 1):
        for work, taken in zip(works, times, strict=True):
            began = time.perf_counter()
            work()
            taken += [time.perf_counter() - began] if turn else []
    return [statistics.median(taken) for taken in times]


# --- preparation ------------------------------------------------------------------------------------------------------


def plain_lists(source: CacheMap, target: CacheMap, pages: list[list[int]]) -> list[tuple[int, int, int]]:
    """Return the regions of whole blocks in the straightforward way: a Python loop over layers, blocks, K and V."""
    regions = []
    for layer in range(len(source.layers)):
        for source_page, target_page in zip(*pages, strict=True):
            for kv in range(2):
                src = int(source.layers[layer]) + source_page * source.page_bytes + int(source.arrays[kv, 0])
                dst = int(target.layers[layer]) + target_page * target.page_bytes + int(target.arrays[kv, 0])
                regions.append((src, dst, int(target.arrays[1, 0])))
    return regions


def bench_prepare(config: BenchTransferConfig) -> list[list[Any]]:
    """Time the preparation of requests between ranks of 4 and of 2 KV heads, whose pages are scattered."""
    num_pages, rows = 4 * max(config.lengths) // config.block, []

    def cache_map(heads: int) -> CacheMap:
        pages = PageLayout(heads, config.block, HEAD_DIM, torch.bfloat16)
        layers = (1 << 40) + np.arange(config.layers, dtype=np.int64) * num_pages * pages.page_bytes
        return CacheMap.of(pages, layers, (0, heads))

    maps = cache_map(4), cache_map(2)
    sides = Side(Layout(), config.block), Side(Layout(kvp=1, tpa=2), config.block)
    random = np.random.default_rng(0)
    for length in config.lengths:
        tables = [random.permutation(num_pages)[: length // config.block].tolist() for _ in range(2)]

        def regions(length: int = length, tables: list[list[int]] = tables) -> np.ndarray[Any, Any]:
            """Return what a sender gives to NIXL of a request for one receiver."""
            blocks = shared_blocks(sides[0], 0, sides[1], 0, (0, length))
            source, target = (np.array(table, np.int64)[blocks] for table in tables)
            return build_regions(*maps, blocks, source, target, (0, length))

        count = len(regions())
        assert regions().tolist() == [list(each) for each in plain_lists(*maps, tables)]
        ours, plain = medians_s(regions, lambda tables=tables: plain_lists(*maps, tables), repeats=config.repeats)
        rows.append([length, count, ours * 1e3, plain * 1e3, plain / ours, ours / count * 1e9])
    return rows


# --- bandwidth --------------------------------------------------------------------------------------------------------


class _Piece(ctypes.Structure):
    _fields_ = [("address", ctypes.c_void_p), ("num_bytes", ctypes.c_size_t)]


def write_memory(pid: int, address: int, source: torch.Tensor) -> None:
    """Let the kernel copy a CPU tensor to an address of another process."""
    libc = ctypes.CDLL(None, use_errno=True)
    done, total = 0, source.nbytes
    while done < total:
        here, there = _Piece(source.data_ptr() + done, total - done), _Piece(address + done, total - done)
        count = libc.process_vm_writev(pid, ctypes.byref(here), 1, ctypes.byref(there), 1, 0)
        if count < 0:
            raise OSError(ctypes.get_errno(), "process_vm_writev")
        done += count


def copy(source: torch.Tensor, target: torch.Tensor) -> None:
    """Copy a tensor within this process, and wait for it."""
    target.copy_(source)
    if source.is_cuda:
        torch.cuda.synchronize()


def share(mine: Any) -> list[Any]:
    """Return what every rank gives."""
    box = [None] * dist.get_world_size()
    dist.all_gather_object(box, mine)
    return box


def bench_bandwidth(config: BenchTransferConfig, device: torch.device) -> list[list[Any]]:
    """Time writes of whole pages from rank 0 to rank 1. Collective over the world; rows on rank 0."""
    rank = dist.get_rank()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    page = LAYERS * 2 * HEADS * BLOCK * HEAD_DIM * dtype.itemsize
    num_pages = (max(config.sizes_mib) << 20) // page
    cache = PagedCache(PageLayout(HEADS, BLOCK, HEAD_DIM, dtype), num_layers=LAYERS, num_pages=num_pages, device=device)
    cache.pages.zero_()
    transport = Transport(f"bench-{rank}-{secrets.token_hex(4)}", cache.pages)
    shared = reduce_tensor(cache.pages) if device.type == "cuda" and rank == 1 else None
    pools = share((transport.pool, os.getpid(), shared))
    rows: list[list[Any]] = []
    if rank != 1:
        rows = _send_pages(config, transport, cache, pools[1]) if rank == 0 else []
        dist.barrier()
    else:
        work = dist.barrier(async_op=True)
        while not work.is_completed():
            transport.progress()
            time.sleep(0.001)
    transport.close()
    return rows


def _send_pages(
    config: BenchTransferConfig, transport: Transport, cache: PagedCache, receiver: tuple[Any, int, Any]
) -> list[list[Any]]:
    pool, pid, shared = receiver
    maps = [CacheMap.of(cache.layout, each.layers, (0, HEADS)) for each in (transport.pool, pool)]
    peers: dict[str, Any] = {"NIXL": transport.connect_by_nixl(pool, maps[0], maps[1], rank=1)}
    if isinstance(peer := transport.connect(pool, maps[0], maps[1], rank=1), MappedPeer):
        peers["a kernel"] = peer
    theirs = None if shared is None else shared[0](*shared[1])
    page = cache.pages[:, 0].numel() * cache.pages.element_size()
    random, rows = np.random.default_rng(0), []
    for mib in config.sizes_mib:
        count = (mib << 20) // page
        flat = cache.pages.view(torch.uint8).view(-1)[: count * page]

        def plain(flat: torch.Tensor = flat) -> None:
            if theirs is not None:
                copy(flat, theirs.view(torch.uint8).view(-1)[: len(flat)])
            else:
                write_memory(pid, int(pool.layers[0]), flat)

        blocks, other = np.arange(count, dtype=np.int64), torch.empty_like(flat)
        scattered = [random.permutation(cache.pages.shape[1])[:count].astype(np.int64) for _ in range(2)]

        def write(peer: Any, pages: list[Any], blocks: Any = blocks, count: int = count) -> None:
            made = peer.write(blocks, pages[0], pages[1], (0, count * BLOCK))
            while (state := made.poll()) == RUNNING:
                pass
            assert state == DONE, made.reason

        ways = {
            f"{name}, {order}": (lambda peer=peer, pages=pages, write=write: write(peer, pages))
            for name, peer in peers.items()
            for order, pages in (("in order", [blocks, blocks]), ("scattered", scattered))
        }
        *taken, plain_s, local_s = medians_s(
            *ways.values(),
            plain,
            lambda flat=flat, other=other: copy(flat, other),
            repeats=config.repeats,
        )
        for way, taken_s in zip(ways, taken, strict=True):
            speeds = [count * page / 1e9 / each for each in (taken_s, plain_s, local_s)]
            rows.append([mib, way, speeds[0], speeds[1], plain_s / taken_s, speeds[2]])
    for peer in peers.values():
        peer.close()
    return rows


# --- overlap ----------------------------------------------------------------------------------------------------------


def bench_overlap(config: BenchTransferConfig) -> list[list[Any]]:
    """Time the handover of one prompt, with blocks written as they fill and with all written at the end.

    Collective over both parts of the split world; rows on every rank.
    """
    launch = enter(config)
    store = launch.store
    assert store is not None
    llm = LLM(config)
    if llm.prefills:
        _note_prefill_ends(store, launch.rank)
        llm.serve()
    else:
        started: list[int] = []
        plain = Engine.go_on

        def go_on(engine: Engine, *args: Any) -> Any:
            started.append(time.monotonic_ns())
            return plain(engine, *args)

        Engine.go_on = go_on
        sampling = SamplingParams(max_tokens=2, ignore_eos=True)
        for turn in range(2 * config.prompts):
            prompt = [token % llm.spec.vocab_size for token in Random(turn).choices(range(1 << 20), k=config.context)]
            (output,) = llm.generate([prompt], sampling)
            assert output.error is None and llm.metrics.as_dict()["transfer"]["requests"] == 1
        llm.close()
        if launch.rank == 0:
            store.set("bench/started", json.dumps(started))
        stop()
    ended = json.loads(store.get("bench/ended"))
    began = json.loads(store.get("bench/started"))
    left = [(b - e) / 1e6 for b, e in zip(began, ended, strict=True)]
    overlapped, whole = left[0::2], left[1::2]
    num_bytes = llm.runner.cache.page_bytes // llm.config.cache.block_size  # of a token
    ours, theirs = statistics.median(overlapped), statistics.median(whole)
    return [[config.context, config.context * num_bytes / (1 << 20), ours, theirs, ours / theirs]]


def _note_prefill_ends(store: Any, rank: int) -> None:
    """Note when each prompt is computed, and hold back the blocks of every second one until then."""
    ended: list[int] = []
    tell, computed, run = Sender._tell_first, Sender._computed, Sender.run

    def tell_first(sender: Sender, events: Any) -> None:
        ended.extend(time.monotonic_ns() for _ in events)
        tell(sender, events)

    def held_back(sender: Sender, sending: Sending) -> int:
        done = computed(sender, sending)
        return done if done == len(sending.ask.token_ids) or sending.ask.id % 2 == 0 else 0

    def run_and_tell(sender: Sender) -> None:
        run(sender)
        if rank == 0:
            store.set("bench/ended", json.dumps(ended))

    Sender._tell_first, Sender._computed, Sender.run = tell_first, held_back, run_and_tell


def run(config: BenchTransferConfig) -> None:
    """Run the benchmark on this rank."""
    launch = start(config.runtime.device, timeout_s=config.runtime.timeout_s)
    if launch.world_size < 2:
        raise ValueError("bench_transfer needs at least 2 ranks: start it with torchrun")
    prepared = bench_prepare(config) if launch.rank == 0 else []
    dist.barrier()
    moved = bench_bandwidth(config, launch.device)
    stop()
    overlap = bench_overlap(config)
    if cli.rank() != 0:
        return
    tables = {
        "prepare": ["tokens", "regions", "ours ms", "Python lists ms", "lists/ours", "ns a region"],
        "bandwidth": ["MiB", "pages", "GB/s", "plain copy GB/s", "of plain", "within one process GB/s"],
    }
    facts = {}
    for (name, columns), rows in zip(tables.items(), (prepared, moved), strict=True):
        facts[name] = [dict(zip(columns, row, strict=True)) for row in rows]
        show(name, facts[name])
    columns = ["tokens", "MiB", "after prefill ms", "all after prefill ms", "ratio"]
    report("transfer", columns, overlap, dtype=config.model.dtype, repeats=config.repeats, **facts)


if __name__ == "__main__":
    cli.main("bench_transfer", BenchTransferConfig, run)
