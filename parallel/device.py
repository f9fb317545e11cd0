"""What a GPU is and whether it is this rank's own.

PyTorch calls AMD's GPUs "cuda" too and gives them capabilities that look like NVIDIA's; kernels with PTX, or for
Hopper's units, ask here instead.
"""

from __future__ import annotations

import socket
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch.distributed.distributed_c10d import Store

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def capability(device: torch.device) -> tuple[int, int]:
    """Return the compute capability of an NVIDIA GPU; (0, 0) for any other device."""
    if device.type != "cuda" or torch.version.hip is not None:
        return (0, 0)
    return torch.cuda.get_device_capability(device)


def early(pdl: bool) -> dict[str, bool]:
    """Return what a Triton kernel with a constant PDL is launched with: where ``pdl``, before the one before it ends.

    The kernel then waits itself (``gdc_wait``) for what that one writes. Triton's interpreter knows no such launch.
    """
    return {"PDL": True, "launch_pdl": True} if pdl else {"PDL": False}


def own_gpu(local_rank: int, local_world_size: int) -> int | None:
    """Return the index of the GPU that a rank of so many on its host would take; None where there are too few.

    Launchers show a rank either all GPUs of the host or its own alone, as SLURM does with --gpus-per-task=1: with one
    visible, ``conflict`` says whether it is another one for each rank.
    """
    if torch.version.hip is not None or not torch.cuda.is_available():
        return None
    count = torch.cuda.device_count()
    return local_rank if count >= local_world_size else 0 if count == 1 else None


def conflict(gpu: int | None, store: Store, rank: int, world_size: int) -> str | None:
    """Return in words why not every rank has a GPU of its own, alike on all ranks; None where each has.

    Collective over the ranks that share ``store``, which holds one key of each afterwards; no process group is needed.
    """
    store.set(f"gpu{rank}", f"{host().split()[0]} {'' if gpu is None else uuid_of(gpu)}")
    owners: dict[str, int] = {}
    for each in range(world_size):
        name, uuid = store.get(f"gpu{each}").decode().split(" ")
        if not uuid:
            return f"rank {each} on {name} has no GPU of its own"
        if uuid in owners:
            return f"ranks {owners[uuid]} and {each} on {name} have the same GPU ({uuid})"
        owners[uuid] = each
    return None


@cache
def host() -> str:
    """Return what names this host among others, also those whose containers have equal host names."""
    return f"{socket.gethostname()} {BOOT_ID.read_text().strip() if BOOT_ID.is_file() else ''}"


def uuid_of(gpu: int) -> str:
    """Return what names a GPU among all others."""
    properties: Any = torch.cuda.get_device_properties(gpu)  # torch declares some of its attributes only
    return str(properties.uuid)
