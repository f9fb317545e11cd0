"""What a rank can say of itself, and what is wrong with what all of them say: the doctor's questions."""

from __future__ import annotations

import os
import platform
import socket
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version

import torch

from parallel.device import host, own_gpu, uuid_of
from parallel.launch import Launch
from scripts.timing import commit

PACKAGES = ("torch", "triton", "numpy", "transformers", "safetensors")
WATCHED = ("NCCL_", "GLOO_", "TORCH_NCCL_", "CUDA_LAUNCH_BLOCKING", "PYTORCH_")  # what must not differ between ranks
OWN = ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME", "NCCL_IB_HCA")  # of these, what may differ between hosts
BUSY = 0.1  # of a GPU's memory, in others' hands
SKEW_S = 2.0
SLOW = 2.0  # times the median of its like


@dataclass(frozen=True)
class Gpu:
    """A rank's GPU.

    Attributes:
        peers: how many of the other GPUs that this rank sees it reaches directly, and of how many.
    """

    name: str
    uuid: str
    free_bytes: int
    total_bytes: int
    peers: tuple[int, int]


@dataclass(frozen=True)
class RankFacts:
    """One rank.

    Attributes:
        node: the launcher's number of its node. gpu: None where it has none. visible: GPUs that it sees.
        versions, settings: packages, and environment variables that steer collectives.
        clock_s: seconds since 1970, taken on all ranks after a barrier.
    """

    rank: int
    host: str
    node: int
    local_rank: int
    local_world_size: int
    gpu: Gpu | None
    visible: int
    versions: Mapping[str, str]
    settings: Mapping[str, str] = field(default_factory=dict)
    clock_s: float = 0.0


def facts_of(launch: Launch) -> RankFacts:
    """Return what this rank says of itself."""
    env = os.environ
    return RankFacts(
        rank=launch.rank,
        host=host().split()[0] or socket.gethostname(),
        node=int(env.get("GROUP_RANK", env.get("SLURM_NODEID", "0"))),
        local_rank=launch.local_rank,
        local_world_size=launch.local_world_size,
        gpu=_gpu(launch),
        visible=torch.cuda.device_count(),
        versions=_versions(),
        settings={name: value for name, value in sorted(env.items()) if name.startswith(WATCHED)},
        clock_s=time.time(),
    )


def _gpu(launch: Launch) -> Gpu | None:
    index = own_gpu(launch.local_rank, launch.local_world_size)
    if index is None and torch.cuda.is_available() and torch.version.hip is None:
        index = launch.local_rank % torch.cuda.device_count()  # the one it would share
    if index is None:
        return None
    free, total = torch.cuda.mem_get_info(index)
    others = [each for each in range(torch.cuda.device_count()) if each != index]
    reached = sum(torch.cuda.can_device_access_peer(index, each) for each in others)
    return Gpu(torch.cuda.get_device_name(index), uuid_of(index), free, total, (reached, len(others)))


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "helix": commit() or "unknown"}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "missing"
    if torch.cuda.is_available():
        found["CUDA"] = str(torch.version.cuda)
        found["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
    return found


def problems_of(facts: Sequence[RankFacts]) -> list[str]:
    """Return what is wrong, each in a line that says what to do, the gravest first."""
    return [line for check in _CHECKS for line in check(facts)]


def _shared_gpus(facts: Sequence[RankFacts]) -> Iterator[str]:
    for uuid, ranks in _by(facts, lambda each: each.gpu.uuid if each.gpu else None).items():
        if uuid is not None and len(ranks) > 1:
            yield (
                f"ranks {_ranks(ranks)} on {ranks[0].host} have the same GPU ({uuid}); start one rank a GPU "
                "(--nproc-per-node, --gpus-per-task=1), or show each its own (CUDA_VISIBLE_DEVICES)"
            )


def _lacking_gpus(facts: Sequence[RankFacts]) -> Iterator[str]:
    for name, ranks in _by(facts, lambda each: each.host).items():
        seen, tasks = max(each.visible for each in ranks), ranks[0].local_world_size
        if 1 < seen < tasks:
            yield f"{name} has {seen} GPUs for {tasks} ranks; start {seen} there (--nproc-per-node, --ntasks-per-node)"
    without = [each for each in facts if each.gpu is None]
    if without and len(without) < len(facts):
        hosts = ", ".join(dict.fromkeys(each.host for each in without))
        yield (
            f"ranks {_ranks(without)} see no GPU ({hosts}), others do; "
            "ask the scheduler for GPUs on each node (--gpus-per-node), or check nvidia-smi there"
        )


def _uneven_nodes(facts: Sequence[RankFacts]) -> Iterator[str]:
    counts = {node: len(ranks) for node, ranks in _by(facts, lambda each: each.node).items()}
    if len(set(counts.values())) > 1:
        listed = ", ".join(f"{count} on node {node}" for node, count in counts.items())
        yield f"nodes have unequal numbers of ranks ({listed}); start equally many on each"


def _different_gpus(facts: Sequence[RankFacts]) -> Iterator[str]:
    names = _by([each for each in facts if each.gpu], lambda each: each.gpu.name if each.gpu else None)
    if len(names) > 1:
        listed = "; ".join(f"{name} on ranks {_ranks(ranks)}" for name, ranks in names.items())
        yield f"GPUs differ ({listed}): every step takes as long as the slowest; use equal ones"


def _busy_gpus(facts: Sequence[RankFacts]) -> Iterator[str]:
    for each in facts:
        if each.gpu and (taken := 1 - each.gpu.free_bytes / each.gpu.total_bytes) > BUSY:
            yield (
                f"rank {each.rank} on {each.host}: {taken:.0%} of its GPU's memory is taken already ({each.gpu.uuid}); "
                "end what holds it (nvidia-smi names it), or lower cache.memory_fraction"
            )


def _unreached_peers(facts: Sequence[RankFacts]) -> Iterator[str]:
    cut_off = [each for each in facts if each.gpu and each.gpu.peers[0] < each.gpu.peers[1]]
    if cut_off:
        yield (
            f"ranks {_ranks(cut_off)} do not reach all GPUs of their node directly; fused exchange and all-reduce give "
            "way to NCCL: check the NVLink fabric (nvidia-smi topo -m, fabric manager)"
        )


def _different_versions(facts: Sequence[RankFacts]) -> Iterator[str]:
    for name in dict.fromkeys(name for each in facts for name in each.versions):
        values = _by(facts, lambda each, name=name: each.versions.get(name, "missing"))  # type: ignore[misc]
        if len(values) > 1:
            listed = ", ".join(f"{value} on ranks {_ranks(ranks)}" for value, ranks in values.items())
            yield f"{name} differs: {listed}; install one version on all nodes"


def _different_settings(facts: Sequence[RankFacts]) -> Iterator[str]:
    for name in dict.fromkeys(name for each in facts for name in each.settings if name not in OWN):
        values = _by(facts, lambda each, name=name: each.settings.get(name))  # type: ignore[misc]
        if len(values) > 1:
            listed = ", ".join(f"{value or 'unset'} on ranks {_ranks(ranks)}" for value, ranks in values.items())
            yield f"{name} differs: {listed}; export one value on all nodes"


def _clocks(facts: Sequence[RankFacts]) -> Iterator[str]:
    first, last = (pick(facts, key=lambda each: each.clock_s) for pick in (min, max))
    if (skew := last.clock_s - first.clock_s) > SKEW_S:
        yield f"clocks of {first.host} and {last.host} are {skew:.1f} s apart: logs mislead; synchronise them (NTP)"


_CHECKS = (
    *(_shared_gpus, _lacking_gpus, _uneven_nodes, _different_versions, _different_settings),
    *(_different_gpus, _busy_gpus, _unreached_peers, _clocks),
)


def slow_groups(what: str, us: Mapping[str, float]) -> list[str]:
    """Return which of several like groups takes far longer than their median, by the group's name."""
    middle = statistics.median(us.values())
    return [
        f"{what} of {name} takes {each / middle:.1f} times the median ({each:.0f} us, {middle:.0f} us); look at its "
        "links and at what else runs there"
        for name, each in us.items()
        if len(us) > 2 and each > SLOW * middle
    ]


def _by(facts: Sequence[RankFacts], key: Callable[[RankFacts], object]) -> dict[object, list[RankFacts]]:
    found: dict[object, list[RankFacts]] = {}
    for each in facts:
        found.setdefault(key(each), []).append(each)
    return found


def _ranks(facts: Sequence[RankFacts]) -> str:
    """Return ranks in short: 0-3, 8."""
    numbers, parts = sorted(each.rank for each in facts), list[list[int]]()
    for number in numbers:
        if parts and parts[-1][1] == number - 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in parts)
