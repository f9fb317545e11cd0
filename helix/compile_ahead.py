"""Compile what a step launches before it first runs: all its kernels at once, on several of the host's cores.

Triton compiles a kernel when it is first launched, one after the other, and then its launcher, by the C compiler. Here
the step's Python code is run once while nothing is launched: every launch only hands its kernel to a pool of threads,
which are out of Python for most of a compilation, and which load it too. Each rank compiles for itself; kernels and
launchers land in Triton's cache on disk, and the next start finds them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch
from triton import AsyncCompileMode
from triton.runtime.jit import JITFunction

Compile = Callable[[], Any]

NUM_THREADS = min(8, os.cpu_count() or 1)


class Compilers(ThreadPoolExecutor):
    """Threads that compile kernels for a GPU, and leave them ready to be launched there."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(NUM_THREADS, initializer=torch.cuda.set_device, initargs=(device,))

    def submit(self, compile_kernel: Compile, /, *args: Any, **named: Any) -> Future[Any]:
        """Compile a kernel and load it."""
        return super().submit(_loaded, compile_kernel)


def _loaded(compile_kernel: Compile) -> Any:
    kernel = compile_kernel()
    kernel.run  # noqa: B018  this makes its launcher and brings it to the GPU
    return kernel


@contextmanager
def compile_ahead(device: torch.device) -> Iterator[bool]:
    """Inside, Triton's kernels are compiled and none is launched; False, and nothing changes, where there is no GPU.

    What the kernels would have computed is left as it was allocated: the caller throws it away. PyTorch's operations,
    collectives among them, do run. Leaving waits until all is compiled and loaded, and raises what that raised.
    """
    if device.type != "cuda":
        yield False
        return
    launch: Callable[..., Any] = JITFunction.run

    def only_compile(kernel: Any, *args: Any, warmup: bool, **named: Any) -> Any:
        return launch(kernel, *args, warmup=True, **named)

    with Compilers(device) as threads:
        try:
            JITFunction.run = only_compile
            with AsyncCompileMode(threads):
                yield True
        finally:
            JITFunction.run = launch
