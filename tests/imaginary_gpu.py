"""A GPU that is not there: tensors that hold nothing and say they are on it, kernels that are noted and not launched.

What a kernel is compiled for depends on types, alignment and constants alone, so whether one is left to compile while
requests run is seen on any machine. It replaces much of PyTorch and Triton: for processes of their own.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import triton
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction, compute_cache_key

import helix.upload

DEVICE = torch.device("cuda", 0)
PROPERTIES = SimpleNamespace(multi_processor_count=132, shared_memory_per_block_optin=232448)


class Idle:
    """A stream, an event or a graph of a device that has nothing to do and has done it."""

    def __init__(self, *args: Any, **named: Any) -> None: ...

    def __getattr__(self, name: str) -> Callable[..., Idle]:
        return lambda *args, **named: self


class Driver:
    """What Triton asks of a GPU before it compiles for it."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


class Launches:
    """The kernels that were launched, each once for every way it would be compiled: their names, by when."""

    def __init__(self) -> None:
        self.seen: set[Any] = set()
        self.new: list[str] = []

    def note(self, kernel: Any, *args: Any, warmup: bool, grid: Any, **named: Any) -> None:
        _, known, _, _, bind = kernel.device_caches[0]
        _, specialization, options = bind(*args, debug=None, **named)
        key = kernel.__name__, compute_cache_key(known, specialization, options)
        if key not in self.seen:
            self.seen.add(key)
            self.new.append(kernel.__name__)


def install() -> tuple[FakeTensorMode, Launches]:
    """Put the GPU in; return the mode to run in, and what is launched from now on."""
    launches = Launches()
    triton.runtime.driver.set_active(Driver())
    JITFunction.run = lambda kernel, *args, **named: launches.note(kernel, *args, **named)
    cuda: Any = torch.cuda
    cuda.get_device_properties, cuda.get_device_capability = lambda device: PROPERTIES, lambda device: (9, 0)
    cuda.get_device_name = lambda device: "NVIDIA H200"
    cuda.set_device, cuda.synchronize = lambda device: None, lambda device=None: None
    cuda.mem_get_info = lambda device: (1 << 37, 1 << 37)
    cuda.memory_reserved, cuda.memory_allocated = lambda device: 0, lambda device: 0
    cuda.graph_pool_handle = lambda: None
    cuda.Stream = cuda.Event = cuda.CUDAGraph = Idle
    cuda.current_stream = Idle
    cuda.stream, cuda.graph = lambda stream: nullcontext(), lambda graph, pool: nullcontext()
    for name in ("empty", "zeros"):
        setattr(torch, name, _real_on_the_host(getattr(torch, name)))
    tensor: Any = FakeTensor
    tensor.data_ptr = lambda self: 0
    tensor.__getitem__, tensor.__setitem__ = _at, lambda self, index, value: None
    tensor.__invert__, tensor.__bool__ = lambda self: torch.ops.aten.bitwise_not(self), lambda self: True
    tensor.T = property(lambda self: self.permute(*reversed(range(self.dim()))))
    tensor.contiguous = lambda self: self.clone(memory_format=torch.contiguous_format)
    torch.nn.functional.pad = lambda x, room, value=0.0: torch.ops.aten.constant_pad_nd(x, list(room), value)
    tensor.copy_ = lambda self, other, non_blocking=False: self
    packing: Any = helix.upload.Packing
    packing.arrays = lambda self, buffer: {
        name: np.zeros(shape, kind) for name, (kind, shape, *_) in self._places.items()
    }
    return FakeTensorMode(allow_non_fake_inputs=True), launches


def upload(arrays: helix.upload.Arrays, device: torch.device) -> dict[str, torch.Tensor]:
    """Stand for the function of this name."""
    kinds = helix.upload._DTYPES
    return {
        name: torch.empty(array.shape, dtype=kinds[array.dtype.type], device=device) for name, array in arrays.items()
    }


def _real_on_the_host(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Let what is made on the host hold something, and be pinned for nobody."""

    def made(*args: Any, pin_memory: bool = False, **named: Any) -> torch.Tensor:
        if torch.device(named.get("device") or "cpu").type == "cpu":
            with unset_fake_temporarily():
                return make(*args, **named)
        return make(*args, **named)

    return made


def _at(self: torch.Tensor, index: Any) -> torch.Tensor:
    """Index as Python does, by operations that ask for no device."""
    given = index if isinstance(index, tuple) else (index,)
    taken = sum(each is not None and each is not Ellipsis for each in given)
    whole = [slice(None)] * (self.dim() - taken)
    out, dim, gathered = self, 0, dict[int, torch.Tensor]()
    for each in [one for part in given for one in (whole if part is Ellipsis else [part])]:
        if each is None:
            out = torch.ops.aten.unsqueeze(out, dim)
        elif isinstance(each, slice):
            if each != slice(None):
                out = torch.ops.aten.slice.Tensor(out, dim, each.start, each.stop, each.step or 1)
        elif isinstance(each, (int, np.integer)):
            out, dim = torch.ops.aten.select.int(out, dim, int(each)), dim - 1
        else:
            gathered[dim] = torch.as_tensor(each)
        dim += 1
    if gathered:
        out = torch.ops.aten.index.Tensor(out, [gathered.get(at) for at in range(max(gathered) + 1)])
    return out
