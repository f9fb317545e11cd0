"""What a SLURM step says of this process, in torchrun's words: one task a GPU, started by srun without torchrun.

Variables of torchrun win wherever they are set. SLURM's count inside a step of several tasks alone, so that a command
in a batch script's own shell, which has them too, is a world of one and waits for nobody.

The first node of the step is where ranks meet. Its address is asked of SLURM: its name may be known to SLURM alone, and
the address of the host that started the step (SLURM_LAUNCH_NODE_IPADDR) may be a login node's.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Mapping

FIRST_PORT, NUM_PORTS = 20000, 20000  # of jobs that share a node each takes another one
TIMEOUT_S = 60.0


def environment(env: Mapping[str, str]) -> dict[str, str]:
    """Return torchrun's variables of a task of a SLURM step; none outside of one, or where torchrun has set them.

    ``MASTER_ADDR`` and ``MASTER_PORT`` that are set stay as they are. Otherwise ``scontrol`` is run.

    Raises:
        ValueError: in one line, where a variable is missing, or scontrol is, or says no address.
    """
    if "RANK" in env or int(env.get("SLURM_STEP_NUM_TASKS", "1")) < 2:
        return {}
    lacking = [name for name in _NEEDED if name not in env]
    if lacking:
        raise ValueError(
            f"{lacking[0]} is not set in a SLURM step of {env['SLURM_STEP_NUM_TASKS']} tasks; use torchrun"
        )
    counts = tasks_per_node(env["SLURM_STEP_TASKS_PER_NODE"])
    found = {
        "RANK": env["SLURM_PROCID"],
        "WORLD_SIZE": env["SLURM_STEP_NUM_TASKS"],
        "LOCAL_RANK": env["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": str(counts[int(env["SLURM_NODEID"])]),
        "MASTER_PORT": str(FIRST_PORT + (int(env["SLURM_JOB_ID"]) * 7 + int(env["SLURM_STEP_ID"])) % NUM_PORTS),
    }
    found |= {name: env[name] for name in ("MASTER_PORT", "MASTER_ADDR") if name in env}
    return found if "MASTER_ADDR" in found else found | {"MASTER_ADDR": _address(env["SLURM_STEP_NODELIST"])}


_NEEDED = [
    *"SLURM_PROCID SLURM_LOCALID SLURM_NODEID SLURM_JOB_ID".split(),
    *"SLURM_STEP_ID SLURM_STEP_NODELIST SLURM_STEP_TASKS_PER_NODE".split(),
]


def tasks_per_node(text: str) -> list[int]:
    """Return the tasks of each node as SLURM lists them: "2(x3),1" is 2, 2, 2, 1."""
    counts = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if match is None:
            raise ValueError(f"SLURM_STEP_TASKS_PER_NODE = {text} is no list such as 8(x2),4")
        counts += [int(match[1])] * int(match[2] or 1)
    return counts


def _address(nodes: str) -> str:
    """Return the address of the first of a list of nodes."""
    first = _scontrol("show", "hostnames", nodes).split()
    said = _scontrol("show", "node", first[0]) if first else ""
    match = re.search(r"\bNodeAddr=(\S+)", said)
    if match is None:
        raise ValueError(f"scontrol names no address (NodeAddr) of the first node of {nodes}; set MASTER_ADDR")
    return match[1]


def _scontrol(*arguments: str) -> str:
    line = ["scontrol", *arguments]
    try:
        done = subprocess.run(line, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    except FileNotFoundError as error:
        raise ValueError(
            "scontrol is not found, which knows the address of the step's first node: put it into the container or the "
            "PATH, or set MASTER_ADDR to an address of that node that all nodes reach"
        ) from error
    except subprocess.TimeoutExpired as error:
        raise ValueError(f"{' '.join(line)} did not answer in {TIMEOUT_S:.0f} s; set MASTER_ADDR") from error
    if done.returncode:
        raise ValueError(f"{' '.join(line)}: {' '.join(done.stderr.split())}; set MASTER_ADDR")
    return done.stdout
