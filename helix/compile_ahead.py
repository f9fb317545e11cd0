"""Compile what a step launches before it first runs: all its kernels at once, on several of the host's cores.

Triton compiles a kernel when it is first launched, one after the other. Here the step's Python code is run once while
nothing is launched: every launch only hands its kernel to a pool of threads, which are out of Python for most of a
compilation. Each rank compiles for itself; the kernels land in Triton's cache on disk, and the next start finds them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch
from triton import AsyncCompileMode
from triton.runtime.jit import JITFunction

NUM_THREADS = min(8, os.cpu_count() or 1)


@contextmanager
def compile_ahead(device: torch.device) -> Iterator[bool]:
    """Inside, Triton's kernels are compiled and none is launched; False, and nothing changes, where there is no GPU.

    What the kernels would have computed is left as it was allocated: the caller throws it away. PyTorch's operations,
    collectives among them, do run. Leaving waits until all is compiled, and raises what a compilation raised.
    """
    if device.type != "cuda":
        yield False
        return
    launch: Callable[..., Any] = JITFunction.run

    def only_compile(kernel: Any, *args: Any, warmup: bool, **named: Any) -> Any:
        return launch(kernel, *args, warmup=True, **named)

    with ThreadPoolExecutor(NUM_THREADS) as threads:
        try:
            JITFunction.run = only_compile
            with AsyncCompileMode(threads):
                yield True
        finally:
            JITFunction.run = launch
