"""Arrays that travel to the device as one: a step's inputs in one buffer, so that they cost one copy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch

from attention.rows import Rows, Work
from attention.work import PIECE_FIELDS, Cutting, WorkList

Shapes = Mapping[str, tuple[type[np.generic], tuple[int, ...]]]
Arrays = Mapping[str, npt.NDArray[np.generic]]
WINDOW_PREFIX = "window."
"""Of the names of what layers with a window need of a step."""
_ALIGNMENT = 16  # bytes
_DTYPES: dict[type[np.generic], torch.dtype] = {
    np.int32: torch.int32,
    np.int64: torch.int64,
    np.float32: torch.float32,
    np.float64: torch.float64,
}


class Packing:
    """Where arrays of given types and shapes stand in a buffer of bytes.

    Attributes:
        num_bytes: of the buffer.
    """

    def __init__(self, shapes: Shapes) -> None:
        self._places: dict[str, tuple[type[np.generic], tuple[int, ...], int, int]] = {}
        at = 0
        for name, (kind, shape) in shapes.items():
            size = int(np.prod(shape)) * np.dtype(kind).itemsize
            self._places[name] = (kind, shape, at, size)
            at += -(-size // _ALIGNMENT) * _ALIGNMENT
        self.num_bytes = max(at, 1)

    def buffer(self, device: torch.device, *, pinned: bool = False) -> torch.Tensor:
        """Return a buffer of zeros."""
        return torch.zeros(self.num_bytes, dtype=torch.uint8, device=device, pin_memory=pinned)

    def arrays(self, buffer: torch.Tensor) -> dict[str, npt.NDArray[np.generic]]:
        """Return the arrays of a buffer on the host, as views."""
        return {name: view.numpy() for name, view in self.tensors(buffer).items()}

    def tensors(self, buffer: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the tensors of a buffer, as views."""
        return {
            name: buffer[at : at + size].view(_DTYPES[kind]).view(shape)
            for name, (kind, shape, at, size) in self._places.items()
        }


def on_its_way(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor's copy on the host, which is there once the device has come so far on the current stream."""
    if not tensor.is_cuda:
        return tensor
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)


def upload(arrays: Arrays, device: torch.device) -> dict[str, torch.Tensor]:
    """Copy arrays of 32 and 64 bits to the device in stream order, by one copy that the host does not wait for."""
    packing = Packing({name: (array.dtype.type, array.shape) for name, array in arrays.items()})
    on_gpu = device.type == "cuda"
    host = torch.empty(packing.num_bytes, dtype=torch.uint8, pin_memory=on_gpu)
    for name, view in packing.arrays(host).items():
        view[...] = arrays[name]
    return packing.tensors(host.to(device, non_blocking=True) if on_gpu else host)


def work_shapes(cutting: Cutting, runs: int, run_len: int, prefix: str = "") -> Shapes:
    """Return what the work list of any step of so many runs of so many rows needs, by names with a prefix."""
    most = cutting.most_pieces(runs, run_len)
    return {
        f"{prefix}pieces": (np.int32, (most, len(PIECE_FIELDS))),
        f"{prefix}span_start": (np.int32, ((cutting.programs if cutting.persistent else most) + 1,)),
        f"{prefix}part_start": (np.int32, (runs * run_len + 1,)),
    }


def fill_work(inputs: Arrays, work: WorkList, prefix: str = "") -> None:
    """Write a work list into inputs of ``work_shapes``; programs that it has no piece for get empty spans."""
    num_pieces, num_spans = len(work.pieces), len(work.span_start)
    span_start = inputs[f"{prefix}span_start"]
    inputs[f"{prefix}pieces"][:num_pieces] = work.pieces
    span_start[:num_spans] = work.span_start
    span_start[num_spans:] = num_pieces
    inputs[f"{prefix}part_start"][...] = work.part_start


def arrays_of_work(work: WorkList, prefix: str = "") -> dict[str, npt.NDArray[np.generic]]:
    """Return the arrays of a work list, by names with a prefix."""
    return {f"{prefix}{name}": getattr(work, name) for name in ("pieces", "span_start", "part_start")}


def sent_work(cutting: Cutting, work: WorkList, sent: Mapping[str, torch.Tensor], prefix: str = "") -> Work:
    """Return a work list whose arrays were sent."""
    pieces, span_start, part_start = (sent[f"{prefix}{name}"] for name in ("pieces", "span_start", "part_start"))
    return Work(cutting, pieces, span_start, part_start if work.is_split else None, int(work.part_start[-1]))


def window_rows(rows: Rows, inputs: Mapping[str, torch.Tensor], page_table: torch.Tensor, work: Work | None) -> Rows:
    """Return rows as layers with a window see them, of the inputs "window.slot", ".visible_len", ".visible_from"."""
    slot, visible_len, visible_from = (inputs[WINDOW_PREFIX + name] for name in ("slot", "visible_len", "visible_from"))
    return replace(
        rows, page_table=page_table, work=work, slot=slot, visible_len=visible_len, visible_from=visible_from
    )
