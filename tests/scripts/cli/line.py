"""A command line in tests: how it is run, how it ended."""

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scripts.generate import GenerateConfig

ROOT = Path(__file__).parents[3]
GIVEN = ("model.path=DIR", "prompts=in.jsonl")


@dataclass(frozen=True)
class Ended:
    """How a command ended: what it would have run, its exit code (None: it returned) and what it printed."""

    ran: list[GenerateConfig]
    code: int | None
    out: str
    err: str


Command = Callable[..., Ended]


def torchrun(num_ranks: int, *arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a command on ranks of its own, in a folder."""
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks), *arguments],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=120,
    )


def one_line(ended: Ended) -> str:
    """The message of a command that was refused as it should be."""
    assert (ended.code, ended.ran, ended.out) == (2, [], "")
    assert ended.err.startswith("error: ")
    assert ended.err.count("\n") == 1
    return ended.err.removeprefix("error: ").rstrip("\n")


def raising(error: Exception) -> Callable[[Any], None]:
    def body(_: Any) -> None:
        raise error

    return body
