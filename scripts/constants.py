"""The micro-benchmarks that a machine's constants are made of: each measures one of them, and none a whole step.

Every function is collective over the world and returns constants by their names in ``helix.plan.hardware.Hardware``,
alike on all ranks: a time is that of the slowest rank. Two ranks at least are needed for what travels between them.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import torch
import torch.distributed as dist
import yaml

from attention.backends import select_backend
from attention.exchange import Heads, make_exchange
from attention.merge import merge_parts
from helix import LLM
from helix.config import CacheConfig, HelixConfig, ModelConfig, ParallelConfig
from helix.models.experts import mixture
from helix.models.linear import gated_linear, linear, split_linear
from helix.models.quantized import Matrix, quantize
from helix.models.routing import route
from helix.plan.cost import ONE_SHOT_BYTES, STREAMED_ROWS
from parallel.all_reduce_norm import AllReduceNorm
from parallel.collectives import all_reduce_
from parallel.launch import Launch, gather_values, minimum
from parallel.symmetric import Faults, can_launch_dependently, shares_memory
from scripts import cli
from scripts.attention_peers import Shape
from scripts.bench_attention import Bench, BenchAttentionConfig
from scripts.bench_decode import Meter, Stamps, measure
from scripts.bench_experts import BenchExpertsConfig, make_weights
from scripts.timing import graph_us, read_bytes_per_us

Constants = dict[str, float]
HIDDEN = 4096
MANY_ROWS, LASTING_S = 8192, 1.0
SMALL, LARGE = 8 << 10, (1 << 20, 4 << 20)
"""Bytes of the all-reduces that are timed, beside the size from which on they take two flights."""
LONG = 8 << 20, 64 << 20
NETWORK_BYTES = 64 << 20


@dataclass(frozen=True)
class Machine:
    """This rank's GPU, and how often things are timed."""

    launch: Launch
    repeats: int = 10

    @property
    def device(self) -> torch.device:
        """The GPU."""
        return self.launch.device

    @cached_property
    def pdl(self) -> bool:
        """Whether kernels launch dependently, as in the runtime."""
        return can_launch_dependently(self.device)

    @cached_property
    def rate(self) -> float:
        """What a streaming read reaches on the slowest rank, in bytes a microsecond."""
        return float(minimum(int(read_bytes_per_us())))

    def us(self, calls: Sequence[Callable[[], object]], iterations: int = 12) -> float:
        """Return the median time of one of the calls, inside a graph."""
        return graph_us(calls, repeats=self.repeats, iterations=iterations)[0]

    def lasting_us(self, call: Callable[[], object]) -> float:
        """Return the mean time of a call that is repeated for LASTING_S: a GPU's power bounds what lasts longer."""
        call()
        torch.cuda.synchronize()
        began, count = time.perf_counter(), 0
        while (took := time.perf_counter() - began) < LASTING_S:
            for _ in range(4):
                call()
            torch.cuda.synchronize()
            count += 4
        return max(gather_values(int(took / count * 1e9))) / 1e3


def memory(machine: Machine) -> Constants:
    """The smallest GPU's memory, and the slowest one's streaming read of 2 GiB."""
    _, total = torch.cuda.mem_get_info(machine.device)
    return {"memory_bytes": float(minimum(total)), "read_bytes_per_us": machine.rate}


def products(machine: Machine) -> Constants:
    """Projections of GLM-4-9B: of one row beyond their bytes, and in 8 bits by rate; of 8,192 rows, for a second."""
    launches = []
    for parts in (1, 4):
        layers = [_projections(parts, machine.device) for _ in range(3)]
        took = machine.us([partial(_project, layer, 1, machine.pdl) for layer in layers])
        launches.append((took - _bytes_of(layers[0]) / machine.rate) / len(layers[0]))
    launch = max(0.0, statistics.mean(launches))
    layers = [_projections(1, machine.device) for _ in range(3)]
    in_8_bits = [{role: quantize(w) for role, w in layer.items()} for layer in layers]
    took = machine.us([partial(_project, layer, 1, machine.pdl) for layer in in_8_bits])
    flops = 2 * MANY_ROWS * sum(w.numel() for w in layers[0].values())
    wide, narrow = (
        flops / machine.lasting_us(partial(_multiply, layer, MANY_ROWS)) for layer in (layers[0], in_8_bits[0])
    )
    return {
        "launch_us": launch,
        "fp8_read_bytes_per_us": _bytes_of(in_8_bits[0]) / (took - len(in_8_bits[0]) * launch),
        "matmul_flops_per_us": wide,
        "fp8_matmul_flops_per_us": narrow,
        "fp4_matmul_flops_per_us": narrow,  # there are no 4-bit products: as 8 bits
    }


def _projections(parts: int, device: torch.device) -> dict[str, torch.Tensor]:
    shapes = {"qkv": (4608 // parts, 4096), "o": (4096, 4096 // parts), "gate_up": (27392 // parts, 4096)}
    shapes["down"] = (4096, 13696 // parts)
    return {role: torch.randn(shape, device=device, dtype=torch.bfloat16) for role, shape in shapes.items()}


def _bytes_of(layer: Mapping[str, Matrix]) -> int:
    return sum(w.nbytes for w in layer.values())


def _project(layer: Mapping[str, Matrix], rows: int, pdl: bool) -> None:
    for role, w in layer.items():
        product: Callable[..., torch.Tensor] = gated_linear if role == "gate_up" else split_linear
        product(_rows(rows, w), w, pdl=pdl)


def _multiply(layer: Mapping[str, Matrix], rows: int) -> None:
    for w in layer.values():
        linear(_rows(rows, w), w, chunk=True)


_kept: dict[tuple[int, int], torch.Tensor] = {}


def _rows(rows: int, w: Matrix) -> torch.Tensor:
    """Return the same random rows of a width each time."""
    size = (rows, int(w.shape[1]))
    if size not in _kept:
        _kept[size] = torch.randn(size, device="cuda", dtype=torch.bfloat16)
    return _kept[size]


def attention(machine: Machine) -> Constants:
    """Decode attention over 4,096 to 65,536 tokens beyond its bytes, its merge; a chunk of 8,192 rows for a second."""
    bench = _bench(machine)
    alone_us, merge_us = [], []
    for tokens in (4096, 16384, 65536):
        shape = Shape(1, tokens, 16, 1, 128, 64)
        alone, merged = (_attend(bench, shape, merge=merge) for merge in (False, True))
        alone_us.append(alone - bench.floor_us(shape))
        merge_us.append(merged - alone)
    chunk = Shape(1, 65536, 16, 1, 128, 64, rows=MANY_ROWS)
    return {
        "attention_us": statistics.median(alone_us),
        "merge_us": statistics.median(merge_us),
        "attention_flops_per_us": chunk.flops() / machine.lasting_us(bench.ours(bench.case(chunk), 0)),
    }


def _bench(machine: Machine) -> Bench:
    config = BenchAttentionConfig(rotated_bytes=1 << 29, repeats=machine.repeats)
    attend = select_backend("auto", machine.device, pdl=machine.pdl)
    return Bench(config, machine.device, torch.bfloat16, attend, None, machine.pdl, machine.rate)


def _attend(bench: Bench, shape: Shape, *, merge: bool) -> float:
    case = bench.case(shape)

    def merged(copy: int) -> object:
        return merge_parts(bench.ours(case, copy)(), bench.dtype, pdl=bench.pdl)[0]

    return bench.us(case, lambda copy, _: partial(merged, copy) if merge else bench.ours(case, copy))[0]


def experts(machine: Machine) -> Constants:
    """Router and experts of Qwen3-30B-A3B beyond the bytes of those in use: of one row, and what a row more adds."""
    config = BenchExpertsConfig()
    mix, beyond = config.experts(), {}
    for parts in (1, 4):
        layers = [make_weights(config, config.ffn_size // parts, machine.device) for _ in range(3)]
        for rows in (1, STREAMED_ROWS // 2, STREAMED_ROWS):
            x = torch.randn(rows, config.hidden_size, device=machine.device, dtype=torch.bfloat16)
            calls = [partial(mixture, x, *layer, experts=mix, first=0, pdl=machine.pdl) for layer in layers]
            used = statistics.mean(route(x, layer[0], mix)[1].unique().numel() for layer in layers)
            floor = used * (layers[0][1].nbytes + layers[0][2].nbytes) / config.num_experts / machine.rate
            beyond[parts, rows] = machine.us(calls) - floor
    first = statistics.mean(beyond[parts, 1] for parts in (1, 4))
    more = [(us - first) / rows for (_, rows), us in beyond.items() if rows > 1]
    return {"experts_us": first, "experts_row_us": max(0.0, statistics.mean(more))}


def exchange(machine: Machine) -> Constants:
    """Attention, exchange and merge of a layer less attention alone, in groups of two and of all ranks."""
    return fit_exchange({group.size(): _exchange_us(machine, group) for group in _groups(machine)})


def _exchange_us(machine: Machine, group: dist.ProcessGroup) -> float:
    bench, faults, beyond = _bench(machine), Faults(machine.device), []
    heads = Heads(16, 128, bench.dtype, machine.device, num_layers=2)
    exchanged = make_exchange("auto", group=group, heads=heads, faults=faults, timeout_s=20.0, pdl=bench.pdl)
    exchanged.begin_step()
    for tokens in (4096, 16384, 65536):
        shape = Shape(1, tokens, 16, 1, 128, 64)
        case = bench.case(shape)

        def whole(copy: int, slot: int, case=case) -> object:  # type: ignore[no-untyped-def]
            return exchanged(bench.ours(case, copy)(), layer=slot)

        both = bench.us(case, lambda copy, slot, whole=whole: partial(whole, copy, slot))[0]  # type: ignore[misc]
        beyond.append(both - _attend(bench, shape, merge=False))
    _check(faults)
    return statistics.median(beyond)


def fit_exchange(us: Mapping[int, float]) -> Constants:
    """Return the constants that times of an exchange by the size of its group give."""
    first, last = min(us), max(us)
    constants = {"exchange_us": us[first]} if first == 2 else {}
    if last > first:
        constants["exchange_peer_us"] = max(0.0, (us[last] - us[first]) / (last - first))
    return constants


def all_reduces(machine: Machine) -> Constants:
    """The all-reduce with residual and norm of 8 KiB to 4 MiB, in groups of two and of all ranks."""
    sizes = (SMALL, ONE_SHOT_BYTES, *LARGE)
    times = {group.size(): {size: _all_reduce_us(machine, group, size) for size in sizes} for group in _groups(machine)}
    return fit_all_reduce(times)


def _all_reduce_us(machine: Machine, group: dist.ProcessGroup, size: int) -> float:
    faults, dtype = Faults(machine.device), torch.bfloat16
    x = torch.randn(size // (2 * HIDDEN), HIDDEN, device=machine.device, dtype=dtype)
    weight, residual = torch.randn(HIDDEN, device=machine.device, dtype=dtype), torch.randn_like(x)
    fused = minimum(int(shares_memory(group, machine.device))) == 1
    reduce = AllReduceNorm(
        group, hidden_size=HIDDEN, dtype=dtype, device=machine.device, fused=fused, faults=faults, timeout_s=20.0,
        pdl=fused and machine.pdl,
    )  # fmt: skip
    us = machine.us([partial(reduce, x, residual, weight, 1e-5, index=index) for index in range(40)], iterations=40)
    _check(faults)
    return us


def fit_all_reduce(times: Mapping[int, Mapping[int, float]]) -> Constants:
    """Return the constants that times of an all-reduce, by the size of its group and its bytes, give.

    Large ones give the rate, from which on small ones give latencies: the terms of ``CostModel.all_reduce_us``.
    """
    first, last = min(times), max(times)
    (less, more), us = LARGE, times[last]
    link = 2 * (last - 1) / last * (more - less) / (us[more] - us[less])
    latency = {size: times[size][SMALL] - (size - 1) * SMALL / link for size in (first, last)}
    two_flights = us[ONE_SHOT_BYTES] - 2 * (last - 1) / last * ONE_SHOT_BYTES / link
    constants = {"link_bytes_per_us": link, "flight_us": max(0.0, two_flights - latency[last])}
    if first == 2:
        constants["all_reduce_us"] = latency[first]
    if last > first:
        constants["all_reduce_peer_us"] = max(0.0, (latency[last] - latency[first]) / (last - first))
    return constants


def collectives(machine: Machine) -> Constants:
    """NCCL's all-reduce of 8 and of 64 MiB between all ranks of a node, as a chunk's sums and exchanges take."""
    group = _groups(machine)[-1]
    times = {}
    for size in LONG:
        x = torch.zeros(size // 2, device=machine.device, dtype=torch.bfloat16)
        times[size] = machine.us([partial(all_reduce_, x, group)], iterations=8)
    return fit_collective(group.size(), times)


def fit_collective(ranks: int, us: Mapping[int, float]) -> Constants:
    """Return the constants that times of two long all-reduces, by their bytes, give."""
    (less, first), (more, last) = sorted(us.items())
    sent = 2 * (ranks - 1) / ranks
    rate = sent * (more - less) / (last - first)
    return {"collective_us": max(0.0, first - sent * less / rate), "collective_bytes_per_us": rate}


def network(machine: Machine) -> Constants:
    """NCCL's all-reduce between one rank of each node: of 8 KiB, and the rate of 64 MiB."""
    local, world = machine.launch.local_world_size, machine.launch.world_size
    nodes = world // local
    made = [dist.new_group([node * local + each for node in range(nodes)]) for each in range(local)]
    group = made[machine.launch.local_rank]
    times = []
    for size in (SMALL, NETWORK_BYTES):
        x = torch.zeros(size // 2, device=machine.device, dtype=torch.bfloat16)
        times.append(machine.us([partial(all_reduce_, x, group)], iterations=8))
    return {"network_us": times[0], "network_bytes_per_us": 2 * (nodes - 1) / nodes * NETWORK_BYTES / times[1]}


def between_steps(machine: Machine) -> Constants:
    """From the end of a step to the beginning of the next, by stamps on the device; and what is no tensor of ours."""
    preset = yaml.safe_load((cli.CONF / "model" / "glm4_9b_1m.yaml").read_text("utf-8"))
    model = ModelConfig(load="dummy", config=preset["config"] | {"num_hidden_layers": 8})
    stamps = Stamps()
    stamps.wrap()
    pages = CacheConfig(num_pages=(65536 + 8192) // 64 // machine.launch.world_size + 64)
    llm = LLM(HelixConfig(model=model, parallel=ParallelConfig(kvp=machine.launch.world_size), cache=pages))
    row = measure(llm, 65536, 1, Meter(60, False, stamps, machine.rate))
    gap = max(gather_values(int(row["between %"] * row["TTL ms"] * 1e4))) / 1e3
    free, total = torch.cuda.mem_get_info(machine.device)
    reserved = total - free - torch.cuda.memory_reserved(machine.device)
    del llm
    gc.collect()
    torch.cuda.empty_cache()
    return {"step_us": gap, "reserved_bytes": float(max(gather_values(reserved)))}


def _groups(machine: Machine) -> list[dist.ProcessGroup]:
    """Return this rank's pair, where ranks come in pairs, and the group of all of its node's ranks.

    Collective over the world, whose nodes have equally many ranks.
    """
    local, world, mine = machine.launch.local_world_size, machine.launch.world_size, machine.launch.rank
    found = []
    for size in dict.fromkeys(size for size in (2, local) if local % size == 0 and size > 1):
        for first in range(0, world, size):
            ranks = list(range(first, first + size))
            group = dist.new_group(ranks)
            if mine in ranks:
                assert isinstance(group, dist.ProcessGroup)
                found.append(group)
    return found


def _check(faults: Faults) -> None:
    if fault := Faults.decode(int(faults.word)):
        raise RuntimeError(f"gave up waiting for rank {fault.peer}")
