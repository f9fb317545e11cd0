"""How much memory of the host may still be taken: what the machine has, within the limits of container and shell."""

from __future__ import annotations

import resource
from contextlib import suppress
from pathlib import Path

_CGROUPS = (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes"))


def available_host_bytes(root: Path = Path("/")) -> int:
    """Return the bytes that all processes of this host, or of its container, can take before one of them is killed."""
    meminfo = _table(root / "proc/meminfo")
    bounds = [meminfo["MemAvailable:"] * 1024] if "MemAvailable:" in meminfo else []
    for folder in _cgroups(root):
        for limit, used in _CGROUPS:
            with suppress(OSError, ValueError):  # no such file, or the limit is "max"
                free = int((folder / limit).read_text()) - int((folder / used).read_text())
                bounds.append(free + _table(folder / "memory.stat").get("inactive_file", 0))
    return max(0, min(bounds, default=1 << 62))


def available_process_bytes(root: Path = Path("/")) -> int:
    """Return the bytes that this process may still map by ``ulimit -v``; a large number where there is no limit."""
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit == resource.RLIM_INFINITY:
        return 1 << 62
    return max(0, limit - _table(root / "proc/self/status").get("VmSize:", 0) * 1024)


def _cgroups(root: Path) -> list[Path]:
    """Return where the limits of this process's cgroup may stand: of version 2 and 1, seen from outside and inside."""
    top, paths = root / "sys/fs/cgroup", {""}
    with suppress(OSError):
        paths |= {line.split(":", 2)[2].strip("/") for line in (root / "proc/self/cgroup").read_text().splitlines()}
    return [base / path for base in (top, top / "memory") for path in sorted(paths)]


def _table(file: Path) -> dict[str, int]:
    """Return the numbers of a file whose lines are a name and a number."""
    table: dict[str, int] = {}
    with suppress(OSError):
        for line in file.read_text().splitlines():
            name, *values = line.split()
            if values and values[0].isdigit():
                table[name] = int(values[0])
    return table
