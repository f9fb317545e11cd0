"""What ranks, GPUs and links a launch has, how fast they are, and what is wrong with them, each in a line.

    torchrun --standalone --nproc-per-node 8 -m scripts.doctor
    sbatch --nodes=2 --gpus-per-node=8 scripts/launch/torchrun.sbatch scripts.doctor

Needs no model, and works on CPUs too (gloo). Times all-reduce and exchange inside each node and between nodes, small
ones for latency and large ones for rate. Ends with exit code 1 where something is wrong. Where stdout is no terminal
the last line is all of it as JSON.
"""

from __future__ import annotations

import statistics
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from helix.config import RuntimeConfig, check_at_least
from parallel.collectives import all_reduce_, all_to_all
from parallel.device import own_gpu
from parallel.launch import Launch, set_up_logging, start, stop
from scripts import cli
from scripts.rank_facts import RankFacts, facts_of, problems_of, slow_groups
from scripts.timing import show

T = TypeVar("T")
SMALL = 8 << 10
LARGE = {"cpu": 4 << 20, "cuda": 64 << 20}
RED, PLAIN = "\033[31m", "\033[0m"


@dataclass(kw_only=True, slots=True)
class DoctorConfig:
    """How to look.

    Attributes:
        timeout_s: how long ranks wait for each other, in seconds; a run waits for runtime.timeout_s.
        repeats: collectives to take the median of.
    """

    timeout_s: float = 60.0
    repeats: int = 10

    def __post_init__(self) -> None:
        check_at_least("timeout_s", self.timeout_s, 1)
        check_at_least("repeats", self.repeats, 1)


@dataclass(frozen=True)
class Scope:
    """Groups that are alike: which ranks each has, and what they are together."""

    what: str
    groups: Sequence[Sequence[int]]


def scopes_of(facts: Sequence[RankFacts]) -> list[Scope]:
    """Return the groups that are timed: the ranks of each node, and of each place on a node one from every node."""
    nodes: dict[int, list[int]] = {}
    for each in facts:
        nodes.setdefault(each.node, []).append(each.rank)
    ranks, found = list(nodes.values()), list[Scope]()
    if all(len(each) > 1 for each in ranks):
        found.append(Scope("inside a node", ranks))
    if len(ranks) > 1 and len({len(each) for each in ranks}) == 1:
        found.append(Scope("between nodes", [list(each) for each in zip(*ranks, strict=True)]))
    return found


@dataclass(frozen=True)
class Links:
    """Times collectives of this rank's groups, on GPUs where every rank has its own, else on CPUs."""

    launch: Launch
    config: DoctorConfig
    device: torch.device

    def measure(self, scope: Scope) -> tuple[dict[str, Any], list[str]]:
        """Return one row of the table, of the slowest group, and what is wrong. Collective over the world."""
        group = self.group_of(scope)
        own = next(number for number, ranks in enumerate(scope.groups) if self.launch.rank in ranks)
        size, row, wrong = len(scope.groups[own]), dict[str, Any](), list[str]()
        for name in ("all-reduce", "exchange"):
            for length in (SMALL, LARGE[self.device.type]):
                us = self.us(name, length, group)
                times: list[tuple[int, float]] = [(0, 0.0)] * self.launch.world_size
                dist.all_gather_object(times, (own, us))
                slowest = {number: max(us for each, us in times if each == number) for number, _ in times}
                named = {f"ranks {', '.join(map(str, scope.groups[number]))}": us for number, us in slowest.items()}
                wrong += slow_groups(f"{name} of {length >> 10} KiB", named)
                worst = max(slowest.values())
                if length == SMALL:
                    row[f"{name} us"] = worst
                else:
                    sent = length * (size - 1) / size * (2 if name == "all-reduce" else 1)
                    row[f"{name} GB/s"] = sent / worst / 1e3
        head = {"where": scope.what, "groups": len(scope.groups), "ranks each": size, "over": self.backend}
        return head | row, wrong

    @property
    def backend(self) -> str:
        """What carries the messages."""
        return "NCCL" if self.device.type == "cuda" else "gloo"

    def group_of(self, scope: Scope) -> dist.ProcessGroup:
        """Return this rank's group of a scope; all ranks make all groups."""
        made = [dist.new_group(list(ranks), backend=self.backend.lower()) for ranks in scope.groups]
        own = next(group for group, ranks in zip(made, scope.groups, strict=True) if self.launch.rank in ranks)
        assert isinstance(own, dist.ProcessGroup)
        return own

    def us(self, name: str, length: int, group: dist.ProcessGroup) -> float:
        """Return the median time of a collective in which each rank has so many bytes, in microseconds."""
        size = group.size()
        x = torch.zeros(size, length // size // 4, device=self.device)
        call = partial(all_reduce_ if name == "all-reduce" else all_to_all, x, group)
        times = []
        for _ in range(self.config.repeats + 1):  # the first one connects
            began = time.perf_counter()
            call()
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            times.append((time.perf_counter() - began) * 1e6)
        return statistics.median(times[1:])


def within(seconds: float, what: str, step: Callable[[], T]) -> T:
    """Return what a step returns; ValueError where it has not ended in time, and is then still under way."""
    outcome: list[T | BaseException] = []

    def take() -> None:
        try:
            outcome.append(step())
        except BaseException as error:
            outcome.append(error)

    thread = threading.Thread(target=take, daemon=True)
    thread.start()
    thread.join(seconds)
    if not outcome:
        raise ValueError(
            f"{what} did not end within timeout_s = {seconds:g}: a link is down or blocked; check NCCL_SOCKET_IFNAME "
            "and GLOO_SOCKET_IFNAME, firewalls and the fabric manager, and see NCCL_DEBUG=INFO"
        )
    if isinstance(outcome[0], RuntimeError):
        raise ValueError(f"{what} failed: {' '.join(str(outcome[0]).split())[:300]}") from outcome[0]
    if isinstance(outcome[0], BaseException):
        raise outcome[0]
    return outcome[0]


def table_row(facts: RankFacts) -> dict[str, Any]:
    """Return a rank's line of the table."""
    gpu = facts.gpu
    return {
        "rank": facts.rank,
        "host": facts.host,
        "node": facts.node,
        "local": f"{facts.local_rank} of {facts.local_world_size}",
        "GPU": "-" if gpu is None else gpu.name,
        "UUID": "-" if gpu is None else gpu.uuid,
        "free GB": "-" if gpu is None else f"{gpu.free_bytes / 1e9:.1f} of {gpu.total_bytes / 1e9:.1f}",
        "peers": "-" if gpu is None else f"{gpu.peers[0]} of {gpu.peers[1]}",
        "torch": facts.versions["torch"],
    }


def gather(launch: Launch) -> list[RankFacts]:
    """Return what all ranks say of themselves. Collective over the world."""
    if not dist.is_initialized():
        return [facts_of(launch)]
    facts: list[Any] = [None] * launch.world_size
    dist.barrier()
    dist.all_gather_object(facts, facts_of(launch))
    return facts


def timed(launch: Launch, config: DoctorConfig, facts: Sequence[RankFacts]) -> tuple[list[dict[str, Any]], list[str]]:
    """Return the table of links, and what is wrong with them. Collective over the world."""
    on_gpus = all(each.gpu for each in facts) and len({each.gpu.uuid for each in facts if each.gpu}) == len(facts)
    device = torch.device("cpu")
    if on_gpus and launch.world_size > 1:
        device = torch.device("cuda", own_gpu(launch.local_rank, launch.local_world_size))

    def measure() -> list[tuple[dict[str, Any], list[str]]]:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        return [Links(launch, config, device).measure(scope) for scope in scopes_of(facts)]

    found = within(config.timeout_s, f"timing {'NCCL' if device.type == 'cuda' else 'gloo'}", measure)
    return [row for row, _ in found], [line for _, lines in found for line in lines]


def run(config: DoctorConfig) -> None:
    """Look, and say it on rank 0."""
    launch = start("cpu", timeout_s=config.timeout_s)
    set_up_logging(launch.rank)
    facts = gather(launch)
    show(f"{launch.world_size} ranks, hosts: {len({each.host for each in facts})}", [table_row(each) for each in facts])
    wrong = problems_of(facts)
    links, slow = timed(launch, config, facts) if launch.world_size > 1 else ([], [])
    wrong += slow
    if links:
        show("links (of the slowest group; a rank's own traffic)", links)
    runtime = RuntimeConfig()
    cli.say(
        f"time-outs: a run waits {runtime.timeout_s:g} s for another rank (runtime.timeout_s), the doctor "
        f"{config.timeout_s:g} s (timeout_s)"
    )
    for line in wrong:
        cli.say(f"{RED}wrong: {line}{PLAIN}" if sys.stdout.isatty() else f"wrong: {line}")
    if not wrong:
        cli.say("nothing is wrong")
    cli.say_json({"ranks": [asdict(each) for each in facts], "links": links, "wrong": wrong})
    stop()
    if wrong:
        raise cli.RunFailed(f"{len(wrong)} things are wrong, of which the first: {wrong[0]}")


if __name__ == "__main__":
    cli.main("doctor", DoctorConfig, run)
