"""The collectives that a step needs, over NCCL or gloo; a group of None is a group of one and costs nothing.

Every function is collective over its group: all its ranks call it, in the same order, with tensors of the same shape
and dtype, on the stream that is current. They are safe to capture in a CUDA graph under NCCL.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

# torch 2.13 renamed it; the older name can go when 2.12 is no longer supported
_all_gather_flat = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

# On the CPU a small message goes from everyone to everyone: one hop, where gloo's rings take N - 1 or twice as many (8
# ranks on two cores: all-reduce 17 -> 5 ms, all-gather 10 -> 5 ms). N times the bytes travel, so only small ones do.
_DIRECT_BYTES = 1 << 16


def all_reduce_(tensor: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """Sum a contiguous tensor over the group, in place, and return it; bit-identical on every rank."""
    if group is not None:
        if _goes_direct(tensor):
            torch.sum(_from_everyone(tensor, group), 0, out=tensor)
        else:
            dist.all_reduce(tensor, group=group)
    return tensor


def all_gather(tensor: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """Return the group's tensors stacked in rank order: [N, *tensor.shape]."""
    if group is None:
        return tensor.unsqueeze(0)
    if _goes_direct(tensor):
        return _from_everyone(tensor, group)
    gathered = tensor.new_empty((group.size(), *tensor.shape))
    _all_gather_flat(gathered.view(-1), tensor.contiguous().view(-1), group=group)
    return gathered


def all_to_all(tensor: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Send slice ``tensor[k]`` of a contiguous [N, ...] to rank k; return what each rank sent here: [N, ...]."""
    received = torch.empty_like(tensor)
    dist.all_to_all_single(received, tensor, group=group)
    return received


def _goes_direct(tensor: torch.Tensor) -> bool:
    return not tensor.is_cuda and tensor.nbytes <= _DIRECT_BYTES


def _from_everyone(tensor: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    return all_to_all(tensor.expand(group.size(), *tensor.shape).contiguous(), group)
