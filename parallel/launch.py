"""Start and stop one rank from torchrun's environment, and let ranks agree before they act.

A process started without torchrun is a world of one, unless it is a task of a SLURM step of several. Where CUDA is
there, the default process group carries NCCL for GPU tensors and gloo for host objects, so agreement between hosts
never waits for a GPU.

A launched world may be split in two: its first ranks then are a world of their own, and so are the rest. Nothing is
collective over both, so neither waits for the other; ``Launch.store`` is how they find each other.

Whatever only one rank can see (a file, free memory, an exception) passes through ``agree``, ``from_rank0`` or
``minimum`` before anything collective depends on it: then no rank waits for another that has left.
"""

from __future__ import annotations

import logging
import os
import re
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from .collectives import all_gather
from .device import conflict, host, own_gpu
from .slurm import environment

T = TypeVar("T")
_log = logging.getLogger(__name__)
_GONE = re.compile(r"connection (was )?(closed|reset)|broken pipe", re.IGNORECASE)
DEVICES = ("auto", "cpu", "cuda")
_store: Store | None = None  # torchrun's, for as long as this process lives
_world_store: Store | None = None
_num_worlds = 0


@dataclass(frozen=True)
class Launch:
    """What the launcher's environment says of this process. Ranks and sizes count processes, of its part of a split
    world.

    Attributes:
        part: 0, or 1 for the second part of a split world.
        store: the key-value store of a split world, for both parts; else None.
    """

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    device: torch.device
    part: int = 0
    store: Store | None = None

    @property
    def speaks(self) -> bool:
        """True on the rank that prints."""
        return self.rank == 0


def start(device: str = "auto", *, timeout_s: float = 600.0, split: int = 0) -> Launch:
    """Join the world that the environment describes and pick this rank's device.

    Collective over the world. ``auto`` is CUDA when every rank of every node has a GPU of its own, else the CPU; it may
    see those of all ranks or its own alone.
    ``timeout_s`` bounds every later collective, in seconds. Calling it in a process whose default group exists
    already (a test harness) joins that one. The first ``split`` ranks become one world and the others another one;
    with 0 there is one.

    Raises:
        ValueError: on all ranks, when ``cuda`` is asked for and a rank has no GPU of its own; NotConnectedError on a
            rank that cannot meet the others.
    """
    if device not in DEVICES:
        raise ValueError(f"runtime.device = {device!r} must be one of {', '.join(DEVICES)}")
    global _store, _world_store, _num_worlds
    env = os.environ
    env.update(environment(env))
    rank, world_size = int(env.get("RANK", 0)), int(env.get("WORLD_SIZE", 1))
    local_rank, local_world_size = int(env.get("LOCAL_RANK", 0)), int(env.get("LOCAL_WORLD_SIZE", 1))
    if split and not 0 < split < world_size:
        raise ValueError(
            f"transfer.prefill_ranks = {split} must leave ranks that decode, but {world_size} started; "
            f"lower it or start more than {split}"
        )
    gpu = None if device == "cpu" else own_gpu(local_rank, local_world_size)
    shared: str | None = None
    one_host = local_world_size == world_size
    part, place = int(split > 0 and rank >= split), (rank, world_size)
    if split:
        rank, world_size = (rank - split, world_size - split) if part else (rank, split)
    if (world_size > 1 or split) and not dist.is_initialized():
        env.setdefault("NCCL_NVLS_ENABLE", "0")  # no NVLink multicast: it is not allowed everywhere
        if one_host:
            env.setdefault("GLOO_SOCKET_IFNAME", "lo")  # one host: stay on loopback, whatever its name resolves to
        if _store is None:
            _store = _meet(timeout_s)
        _num_worlds += 1
        # one of its own for each: gloo would take the addresses at which the ranks of an earlier world met
        _world_store = PrefixStore(f"world{_num_worlds}", _store)
        shared = None if device == "cpu" else conflict(gpu, _world_store, *place)
        gpu = None if shared else gpu
        if gpu is not None:
            torch.cuda.set_device(gpu)
        with _connecting(rank):
            dist.init_process_group(
                "gloo" if gpu is None else "cpu:gloo,cuda:nccl",
                store=PrefixStore(f"part{part}", _world_store),
                rank=rank,
                world_size=world_size,
                timeout=timedelta(seconds=timeout_s),
                device_id=None if gpu is None else torch.device("cuda", gpu),
            )
    all_have_gpus = minimum(int(gpu is not None)) == 1
    if not all_have_gpus and device != "cpu":
        counts = f"this node has {torch.cuda.device_count()} GPUs for {local_world_size} ranks"
        if shared is not None:
            counts = f"{shared}, and {counts}"
        reason = (
            counts if torch.version.hip is None else "Helix has no kernels for ROCm, which this PyTorch is built for"
        )
        if device == "cuda":
            raise ValueError(f"runtime.device = cuda, but {reason}; use runtime.device=cpu or fewer ranks")
        if rank == 0 and torch.cuda.is_available():
            _log.warning("runtime.device=auto: CPUs, because %s", reason)
    chosen = torch.device("cuda", gpu) if all_have_gpus and gpu is not None else torch.device("cpu")
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    return Launch(rank, world_size, local_rank, local_world_size, chosen, part, _world_store if split else None)


class NotConnectedError(ValueError):
    """This rank cannot meet the others, who may not know why: each node's first rank has to say so itself."""


def _meet(timeout_s: float) -> Store:
    """Return the store of all ranks, at rank 0's address.

    Who cannot reach it says so before rank 0 gives up waiting, at whose end a launcher ends all.
    """
    patience = timeout_s if os.environ["RANK"] == "0" else 0.75 * timeout_s
    address = f"MASTER_ADDR={os.environ.get('MASTER_ADDR')}, port {os.environ.get('MASTER_PORT')}"
    try:
        store: Store = next(rendezvous("env://", timeout=timedelta(seconds=patience)))[0]
    except (dist.DistError, ValueError) as error:  # torch names what is lacking in a ValueError
        raise NotConnectedError(
            f"rank {os.environ['RANK']} on {host().split()[0]} cannot reach {address}: {_first_line(error)}; give an "
            "address of rank 0's node that all nodes reach: torchrun --local-addr ADDRESS on that node, or MASTER_ADDR"
        ) from error
    store.set_timeout(timedelta(seconds=timeout_s))
    return store


@contextmanager
def _connecting(rank: int) -> Iterator[None]:
    """Say in one line what keeps ranks from connecting to each other."""
    try:
        yield
    except RuntimeError as error:
        if _GONE.search(str(error)):  # of another rank's end, which has its own words
            raise
        chosen = os.environ.get("GLOO_SOCKET_IFNAME")
        there = ", ".join(name for _, name in socket.if_nameindex())
        rule = (
            f"set GLOO_SOCKET_IFNAME to the interface of this host that the others reach ({there})"
            if chosen is None
            else f"GLOO_SOCKET_IFNAME = {chosen} must be one of this host's interfaces that the others reach ({there})"
        )
        why = _first_line(error)
        if "wait timeout" in why:
            why, rule = "they have not come in time", "their own lines say why"
        raise NotConnectedError(
            f"rank {rank} on {host().split()[0]} cannot connect to the other ranks: {why}; {rule}"
        ) from error


def _first_line(error: BaseException) -> str:
    """Return the first line of a message of torch's, which may go on with a trace of its own."""
    line = " ".join(str(error).strip().partition("\n")[0].split())
    return line if len(line) <= 200 else f"{line[:200]}..."


def stop() -> None:
    """Leave the world; the counterpart of ``start``, called by every rank, which may start another one."""
    global _world_store
    if dist.is_initialized():
        dist.destroy_process_group()
    _world_store = None


def set_up_logging(rank: int, name: str = "rank") -> None:
    """Send log records to standard error: from INFO on rank 0, from WARNING elsewhere, tagged with the rank."""
    logging.basicConfig(
        level=logging.INFO if rank == 0 else logging.WARNING,
        format=f"%(asctime)s {name} {rank} %(levelname)s %(message)s",
        datefmt="%H:%M:%S",
        force=True,
    )


@dataclass(frozen=True)
class _Problem:
    """Why a step failed on a rank: bad input, or a defect."""

    message: str
    is_input: bool

    @classmethod
    def of(cls, error: Exception) -> _Problem:
        return cls(str(error) or repr(error), isinstance(error, (ValueError, OSError)))

    def throw(self, rank: int, own: Exception | None) -> NoReturn:
        """Raise it on this rank, whose ``own`` exception it is, or None; a defect keeps its traceback there."""
        if self.is_input:
            raise ValueError(self.message) from own
        raise own or RuntimeError(f"rank {rank} failed: {self.message}")


def agree(step: Callable[[], T]) -> T:
    """Run ``step`` on every rank and return this rank's result, if it succeeded on all of them.

    Raises:
        ValueError: on all ranks, with the lowest failed rank's message, when it raised ValueError or OSError.
        RuntimeError: on the others, when the lowest rank that failed raised something else; there that is raised.
    """
    result, problem, own = None, None, None
    try:
        result = step()
    except Exception as error:
        problem, own = _Problem.of(error), error
    problems = [problem]
    if dist.is_initialized():
        problems = [None] * dist.get_world_size()
        dist.all_gather_object(problems, problem, group=host_group())
    for rank, found in enumerate(problems):
        if found is not None:
            found.throw(rank, own)
    return result  # type: ignore[return-value]


def from_rank0(step: Callable[[], T]) -> T:
    """Run ``step`` on rank 0 alone and return its (picklable) result on every rank.

    Raises:
        ValueError: on all ranks, with its message, when ``step`` raised ValueError or OSError.
        RuntimeError: on the others, when it raised something else, which is raised on rank 0.
    """
    outcome: tuple[T | None, _Problem | None] = None, None
    own = None
    if not dist.is_initialized() or dist.get_rank() == 0:
        try:
            outcome = step(), None
        except Exception as error:
            outcome, own = (None, _Problem.of(error)), error
    if dist.is_initialized():
        box = [outcome]
        dist.broadcast_object_list(box, src=0, group=host_group(), device=torch.device("cpu"))
        outcome = box[0]
    result, problem = outcome
    if problem is not None:
        problem.throw(0, own)
    return result  # type: ignore[return-value]


def minimum(value: int) -> int:
    """Return the smallest of the ranks' values, on every rank."""
    return min(gather_values(value))


def minimums(values: Sequence[int]) -> list[int]:
    """Return the smallest of the ranks' values at each place, on every rank; equally many values on all of them."""
    if not dist.is_initialized():
        return list(values)
    least: list[int] = all_gather(torch.tensor(values, dtype=torch.int64), host_group()).amin(0).tolist()
    return least


def gather_values(value: int) -> list[int]:
    """Return every rank's value (one that fits int64), in rank order, on every rank."""
    if not dist.is_initialized():
        return [value]
    gathered: list[int] = all_gather(torch.tensor(value, dtype=torch.int64), host_group()).tolist()
    return gathered


_host_group: tuple[dist.ProcessGroup, dist.ProcessGroup] | None = None


def host_group() -> dist.ProcessGroup | None:
    """Return a group that carries host tensors: the default one, or a gloo group beside an NCCL-only default.

    Collective the first time it is called after the default group was made.
    """
    global _host_group
    world = dist.group.WORLD
    if world is None or not dist.is_initialized():
        return None
    if "gloo" in dist.get_backend_config(world):
        return world
    if _host_group is None or _host_group[0] is not world:
        _host_group = (world, dist.new_group(backend="gloo"))
    return _host_group[1]
