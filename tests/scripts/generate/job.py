"""The main job's command line: how tests run it, and what they read of its end."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[3]
SMALL = ("runtime.device=cpu", "cache.block_size=16", "cache.num_pages=16")


def torchrun(num_ranks: int, *arguments: str, folder: Path, gpus: bool = False) -> subprocess.CompletedProcess[str]:
    """Run the command in a folder, on CPUs unless ``gpus``."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks)]
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    env = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"} | ({} if gpus else {"CUDA_VISIBLE_DEVICES": ""})
    return subprocess.run(
        [*command, "-m", "scripts.generate", *arguments],
        cwd=folder,
        env=env,
        capture_output=True,
        text=True,
        timeout=240,
    )


@dataclass(frozen=True)
class Ended:
    """How a command ended (code None: it returned) and what it printed."""

    code: int | None
    out: str
    err: str


Command = Callable[..., Ended]


def refusal(ended: Ended) -> str:
    """The message of a command that was refused as it should be; log lines may stand before it."""
    assert ended.code == 2
    (line,) = [line for line in ended.err.splitlines() if " INFO " not in line]
    assert line.startswith("error: ")
    return line.removeprefix("error: ")


def outputs_in(text: str) -> list[dict[str, Any]]:
    """The output lines of a text; one may hold U+2028, where splitlines() would cut it."""
    *lines, end = text.split("\n")
    assert end == ""
    return [json.loads(line) for line in lines]


def write_lines(file: Path, *items: Any) -> Path:
    file.write_text("".join((item if isinstance(item, str) else json.dumps(item)) + "\n" for item in items), "utf-8")
    return file
