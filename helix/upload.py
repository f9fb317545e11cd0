"""Arrays that travel to the device as one: a step's inputs in one buffer, so that they cost one copy."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import torch

from attention.work import PIECE_FIELDS, Cutting, WorkList

Shapes = Mapping[str, tuple[type[np.generic], tuple[int, ...]]]
Arrays = Mapping[str, npt.NDArray[np.generic]]
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


def upload(arrays: Arrays, device: torch.device) -> dict[str, torch.Tensor]:
    """Copy arrays of 32 and 64 bits to the device in stream order, by one copy that the host does not wait for."""
    packing = Packing({name: (array.dtype.type, array.shape) for name, array in arrays.items()})
    on_gpu = device.type == "cuda"
    host = torch.empty(packing.num_bytes, dtype=torch.uint8, pin_memory=on_gpu)
    for name, view in packing.arrays(host).items():
        view[...] = arrays[name]
    return packing.tensors(host.to(device, non_blocking=True) if on_gpu else host)


def work_shapes(cutting: Cutting, runs: int, run_len: int) -> Shapes:
    """Return what the work list of any step of so many runs of so many rows needs."""
    most = cutting.most_pieces(runs, run_len)
    return {
        "pieces": (np.int32, (most, len(PIECE_FIELDS))),
        "span_start": (np.int32, ((cutting.programs if cutting.persistent else most) + 1,)),
        "part_start": (np.int32, (runs * run_len + 1,)),
    }


def fill_work(inputs: Arrays, work: WorkList) -> None:
    """Write a work list into inputs of ``work_shapes``; programs that it has no piece for get empty spans."""
    num_pieces, num_spans = len(work.pieces), len(work.span_start)
    inputs["pieces"][:num_pieces] = work.pieces
    inputs["span_start"][:num_spans] = work.span_start
    inputs["span_start"][num_spans:] = num_pieces
    inputs["part_start"][...] = work.part_start
