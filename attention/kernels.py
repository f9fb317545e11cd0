"""The Triton back end: which kernel attends, by GPU, rows, heads, head size and pages.

| kernel                   | GPU    | rows x heads of one head | head size    | pages of           | programs       |
|--------------------------|--------|--------------------------|--------------|--------------------|----------------|
| many_rows                | Hopper | any, of a workspace      | 128 + 64     | 2 bytes            | one a piece    |
| stream_kv                | Hopper | 64 (32 if 256 wide)      | 64, 128, 256 | 16 to 256, 2 bytes | persist        |
| stream_eight_bits        | Hopper | 64                       | 128          | 16 to 256, 1 byte  | persist        |
| many_rows                | Hopper | any                      | 64, 128, 256 | 16 to 256, 2 bytes | one a piece    |
| split_kv                 | any    | any                      | any          | any                | persist if few |
| stream_latent            | Hopper | any, all of one latent   | 512 + 64     | 16 to 256, 2 bytes | persist if few |
| stream_latent_bytes      | Hopper | 16                       | 512 + 64     | 16 to 256, 1 byte  | persist        |
| stream_latent_eight_bits | Hopper | any, all of one latent   | 512 + 64     | 16 to 256, 1 byte  | persist if few |
| latent_kv                | any    | any, all of one latent   | any          | any                | persist if few |

The choice is made once a step, when its work is cut, and travels with the list. Windows are masked by stream_kv,
many_rows and split_kv.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton

from . import (
    latent_kv,
    many_rows,
    split_kv,
    stream_eight_bits,
    stream_kv,
    stream_latent,
    stream_latent_bytes,
    stream_latent_eight_bits,
)
from .pages import Pages, QuantizedPages
from .partial import Partials, Workspace
from .rows import Rows
from .work import Cutting

_KERNELS: dict[str, Callable[..., None]] = {
    "stream_kv": stream_kv.attend,
    "many_rows": many_rows.attend,
    "stream_eight_bits": stream_eight_bits.attend,
    "split_kv": split_kv.attend,
    "latent_kv": latent_kv.attend,
    "stream_latent": stream_latent.attend,
    "stream_latent_bytes": stream_latent_bytes.attend,
    "stream_latent_eight_bits": stream_latent_eight_bits.attend,
}
_WINDOWS = ("stream_kv", "many_rows", "split_kv")
_INTERPRETED_PROCESSORS = 8


def can_run(device: torch.device) -> bool:
    """Return whether Triton kernels run on this device: CUDA, or anywhere under Triton's interpreter."""
    return device.type == "cuda" or bool(triton.knobs.runtime.interpret)


class TritonAttention:
    """The Triton back end; see ``PartialAttention`` for what its methods take and return.

    Q and the pages share one dtype: float32 (products in full precision), float16 or bfloat16.

    Args:
        device: where it runs.
        pdl: launch programmatically dependent; every kernel before and after it on the stream must allow it.
    """

    def __init__(self, device: torch.device, *, pdl: bool = False) -> None:
        self._pdl = pdl
        self._processors = (
            torch.cuda.get_device_properties(device).multi_processor_count
            if device.type == "cuda"
            else _INTERPRETED_PROCESSORS
        )

    def cutting(
        self,
        pages: Pages | Workspace,
        num_heads: int,
        max_rows: int,
        *,
        value_dim: int | None = None,
        window: bool = False,
    ) -> Cutting:
        """Choose the kernel for steps whose longest run has so many rows, and say how it wants them cut."""
        num_kv_heads = pages.k.shape[1] if isinstance(pages, Workspace) else pages.shape[2]
        group = num_heads // num_kv_heads
        programs = max(1, self._processors // num_kv_heads)
        if isinstance(pages, Workspace):
            if many_rows.can_read(pages):
                return many_rows.cutting(group, max_rows, programs, head_dim=pages.k.shape[2])
            return split_kv.cutting(pages, group, max_rows, programs)
        if value_dim is not None:
            if isinstance(pages, QuantizedPages) and stream_latent_eight_bits.supports(pages, value_dim):
                if max_rows * num_heads <= stream_latent_bytes.MAX_COLUMNS:
                    return stream_latent_bytes.cutting(max_rows, self._processors)
                return stream_latent_eight_bits.cutting(num_heads, max_rows, self._processors)
            if stream_latent.supports(pages, value_dim):
                return stream_latent.cutting(num_heads, max_rows, self._processors)
            return latent_kv.cutting(num_heads, max_rows, self._processors, wide=pages.dtype.itemsize > 2)
        if isinstance(pages, QuantizedPages):
            if not window and stream_eight_bits.supports(pages, max_rows * group):
                programs = max(1, stream_eight_bits.PROGRAMS * self._processors // num_kv_heads)
                return Cutting("stream_eight_bits", max_rows, stream_eight_bits.TURN, programs)
            return split_kv.cutting(pages, group, max_rows, programs)
        if stream_kv.supports(pages, max_rows * group):
            return Cutting("stream_kv", max_rows, stream_kv.TILE, programs)
        if many_rows.supports(pages, group):
            return many_rows.cutting(group, max_rows, programs, head_dim=pages.shape[4])
        return split_kv.cutting(pages, group, max_rows, programs)

    def __call__(
        self,
        q_RQD: torch.Tensor,
        pages: Pages | Workspace,
        rows: Rows,
        scale: float,
        *,
        value_dim: int | None = None,
    ) -> Partials:
        """Attend rows to the local shard, by the kernel that their work was cut for."""
        work = rows.work
        if work is None:
            raise ValueError("rows.work = None: the Triton back end needs the work list of a step")
        if rows.visible_from is not None and work.cutting.kernel not in _WINDOWS:
            raise ValueError(f"the work of rows with a window was cut for {work.cutting.kernel}, which masks none")
        num_rows, num_heads, head_dim = q_RQD.shape
        split = work.part_start is not None
        shape = (work.num_parts if split else num_rows, num_heads)
        width = pages.v.shape[2] if isinstance(pages, Workspace) else value_dim or head_dim
        partials = Partials(
            torch.empty((*shape, width), dtype=torch.float32 if split else q_RQD.dtype,
                        device=q_RQD.device),
            torch.empty(shape, dtype=torch.float32, device=q_RQD.device),
            work.part_start,
            work.cutting.programs,
        )  # fmt: skip
        if num_rows:
            _KERNELS[work.cutting.kernel](q_RQD, pages, rows, work, partials, scale, pdl=self._pdl)
        return partials
