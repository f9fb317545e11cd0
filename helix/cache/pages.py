"""The pages themselves: what this rank caches in all layers, and how many pages fit."""

from __future__ import annotations

import torch

from attention.pages import PageLayout

from ..host_memory import available_host_bytes, available_process_bytes
from ..models.spec import ModelSpec

HOST_FRACTION = 0.5
_WORDS = (torch.int64, torch.int32, torch.int16)


class PagedCache:
    """This rank's pages.

    Attributes:
        layout: what a page of a layer is made of.
        pages: [L, P, words], the bytes of all layers in one tensor, as the largest integers that a page is a whole
            number of; for those who move them. Never read before it is written: pages start uninitialised.
        planes: of the pages, each [L, P, K and V, KV heads, block_size, ...] in its dtype.
        layers: one layer's pages each, for those who compute.
    """

    def __init__(self, layout: PageLayout, *, num_layers: int, num_pages: int, device: torch.device) -> None:
        self.layout = layout
        pool = torch.empty((num_layers, num_pages, layout.page_bytes), dtype=torch.uint8, device=device)
        word = next((each for each in _WORDS if layout.page_bytes % each.itemsize == 0), torch.uint8)
        self.pages = pool.view(word)
        self.planes = layout.views(pool)
        self.layers = [
            layout.pages_of(views) for views in zip(*(plane.unbind(0) for plane in self.planes), strict=True)
        ]

    @property
    def page_bytes(self) -> int:
        """The bytes of one page, all layers."""
        return self.pages[:, 0].nbytes


def page_layout(
    spec: ModelSpec, num_kv_heads: int, block_size: int, dtype: torch.dtype, *, in_8_bits: bool = False
) -> PageLayout:
    """Return what the pages of a model's layers are made of, for so many KV heads."""
    rank = None if spec.latent is None else spec.latent.rank
    return PageLayout(num_kv_heads, block_size, spec.head_dim, dtype, rank, in_8_bits)


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
