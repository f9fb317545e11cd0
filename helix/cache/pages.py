"""The pages themselves: this rank's K and V of all layers, and how many of them fit."""

from __future__ import annotations

import torch

from ..host_memory import available_host_bytes, available_process_bytes

HOST_FRACTION = 0.5


class PagedCache:
    """This rank's pages.

    Attributes:
        pages: [L, P, 2, K, block_size, D], all layers in one tensor; 1 instead of 2 where latents are K and V.
        layers: one tensor [P, 2, K, block_size, D] a layer, K before V, of the model's dtype. Never read before it is
            written: pages start uninitialised.
    """

    def __init__(
        self,
        *,
        num_layers: int,
        num_pages: int,
        num_kv_heads: int,
        block_size: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
        planes: int = 2,
    ) -> None:
        shape = (num_layers, num_pages, planes, num_kv_heads, block_size, head_dim)
        self.pages = torch.empty(shape, dtype=dtype, device=device)
        self.layers = list(self.pages.unbind(0))

    @property
    def page_bytes(self) -> int:
        """The bytes of one page, all layers."""
        return self.pages[:, 0].nbytes


def free_bytes(device: torch.device, fraction: float, local_world_size: int) -> int:
    """Return the bytes that this rank's cache may take now; local to the rank, so reduce it before use.

    On CUDA ``fraction`` bounds the device's memory in use; what the allocator holds free counts as free. A CPU rank
    takes its share of HOST_FRACTION of what the host, its container and ``ulimit -v`` leave.
    """
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        idle = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(free + idle - total * (1.0 - fraction))
    return int(free_host_bytes(local_world_size) * HOST_FRACTION)


def free_host_bytes(local_world_size: int) -> int:
    """Return the bytes of host memory that this rank may take, of those that the host's ranks share."""
    return min(available_host_bytes() // local_world_size, available_process_bytes())
