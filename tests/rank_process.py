"""One rank of a test: a process that joins a group and then runs one body after another, reporting on each.

The counterpart of ``tests/ranks.py``, which starts it. Nothing that a body does goes unreported: a result, a skip and a
traceback are sent back, and when the process dies its pipe ends.
"""

import faulthandler
import importlib
import importlib.util
import os
import pickle
import signal
import sys
import traceback
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist

GROUP_TIMEOUT = timedelta(seconds=60)
TESTS = Path(__file__).parent


@dataclass(frozen=True)
class Place:
    """What a rank is told about itself when it starts; ``device_type`` is "cuda" or "cpu"."""

    rank: int
    world_size: int
    device_type: str
    folder: Path

    @property
    def stack_file(self) -> Path:
        """Where the rank writes its stack when it is sent SIGUSR1."""
        return self.folder / f"stack{self.rank}"


class Report(NamedTuple):
    """What became of a body in one rank: ``kind`` is "done", "skipped", "raised" or "died"."""

    kind: str
    headline: str = ""
    traceback: str = ""
    result: bytes = b""


def serve(place: Place, pipe: Connection) -> None:
    """Be one rank: join the group, then run what comes through ``pipe``, until an empty message or the end of it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for pytest, which then ends the ranks
    with suppress(EOFError), place.stack_file.open("w") as stack:
        faulthandler.register(signal.SIGUSR1, file=stack, all_threads=False)
        pipe.send(tuple(_attempt(_join, place)))
        while message := pipe.recv_bytes():
            pipe.send(tuple(_attempt(_call, message)))
        dist.destroy_process_group()


def _join(place: Place) -> None:
    torch.set_num_threads(1)
    on_gpu = place.device_type == "cuda"
    ranks = {"RANK": place.rank, "WORLD_SIZE": place.world_size}
    ranks |= {"LOCAL_RANK": place.rank, "LOCAL_WORLD_SIZE": place.world_size}
    os.environ.update({name: str(value) for name, value in ranks.items()})
    # NVLink multicast stays off: where it is not allowed it fails, and it can take a shared host's GPUs down with it.
    os.environ.update(TORCH_SYMM_MEM_DISABLE_MULTICAST="1", NCCL_NVLS_ENABLE="0", NVSHMEM_DISABLE_NVLS="1")
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo" if sys.platform == "linux" else "lo0")
    if on_gpu:
        torch.cuda.set_device(place.rank)
    else:  # fewer GPUs than ranks: hide them, so that bodies do what they do on a machine without any
        os.environ.update(CUDA_VISIBLE_DEVICES="", TRITON_INTERPRET="1")
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
        store=dist.FileStore(str(place.folder / "store"), place.world_size),  # type: ignore[attr-defined]
        rank=place.rank,
        world_size=place.world_size,
        timeout=GROUP_TIMEOUT,
        device_id=torch.device("cuda", place.rank) if on_gpu else None,
    )


def _attempt(step: Callable[[Any], Any], argument: Any) -> Report:
    try:
        return Report("done", result=pickle.dumps(step(argument)))  # pickled here, where a failure can be told
    except pytest.skip.Exception as skip:
        return Report("skipped", str(skip))
    except BaseException as error:
        trace = error.__traceback__
        while trace and trace.tb_next and trace.tb_frame.f_code.co_filename == __file__:
            trace = trace.tb_next
        first_line = traceback.format_exception_only(error)[0].strip().split("\n")[0]
        return Report("raised", first_line, "".join(traceback.format_exception(error.with_traceback(trace))))


def _call(message: bytes) -> Any:
    module_name, file, qualified_name, filters, arguments = pickle.loads(message)
    with warnings.catch_warnings():
        warnings.filters = filters
        body: Any = _module(module_name, Path(file))
        for name in qualified_name.split("."):
            body = getattr(body, name)
        args, kwargs = pickle.loads(arguments)  # after its module, whose classes may be among them
        return body(*args, **kwargs)


def _module(name: str, file: Path) -> ModuleType:
    """A test module has no importable name: load it from its file, once, under the name that it has in pytest."""
    if name in sys.modules or not file.is_relative_to(TESTS):
        return importlib.import_module(name)
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec and spec.loader, file
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
