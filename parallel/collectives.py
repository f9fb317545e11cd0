"""The collectives that a step needs, over NCCL or gloo; a group of None is a group of one and costs nothing.

Every function is collective over its group: all its ranks call it, in the same order, with tensors of the same shape
and dtype, on the stream that is current. They are safe to capture in a CUDA graph under NCCL.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

# torch 2.13 renamed it; the older name can go when 2.12 is no longer supported
_all_gather_flat = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def all_reduce_(tensor: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """Sum a contiguous tensor over the group, in place, and return it; bit-identical on every rank."""
    if group is not None:
        dist.all_reduce(tensor, group=group)
    return tensor


def all_gather(tensor: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """Return the group's tensors stacked in rank order: [N, *tensor.shape]."""
    if group is None:
        return tensor.unsqueeze(0)
    gathered = tensor.new_empty((group.size(), *tensor.shape))
    _all_gather_flat(gathered.view(-1), tensor.contiguous().view(-1), group=group)
    return gathered


def all_to_all(tensor: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Send slice ``tensor[k]`` of a contiguous [N, ...] to rank k; return what each rank sent here: [N, ...]."""
    received = torch.empty_like(tensor)
    dist.all_to_all_single(received, tensor, group=group)
    return received
