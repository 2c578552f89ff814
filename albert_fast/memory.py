"""How much memory this process holds, has held, and may still have, in bytes; not the GPU's, of which PyTorch tells."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

_PROC = Path("/proc")
_CGROUPS = Path("/sys/fs/cgroup")


def resident_bytes() -> int | None:
    """What this process holds now; None where the system does not tell."""
    with contextlib.suppress(OSError):
        return int((_PROC / "self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return None


def peak_resident_bytes() -> int | None:
    """The most memory that this process has held; None where the system does not tell.

    On Linux that is VmHWM: getrusage's figure survives exec, so that a child would begin with its parent's.
    """
    status = _PROC / "self/status"
    if status.exists():
        line = next((line for line in status.read_text().splitlines() if line.startswith("VmHWM:")), None)
        return None if line is None else int(line.split()[1]) * 1024
    try:
        import resource
    except ImportError:  # Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def reset_peak() -> None:
    """Lets `peak_resident_bytes` begin anew, where the system allows that."""
    with contextlib.suppress(OSError):
        (_PROC / "self/clear_refs").write_text("5")


def available_bytes() -> int | None:
    """What this process can have besides before the system, or its container, runs out; None where nobody tells.

    Caches of files, which give way, count as free.
    """
    rooms = list(_rooms_of_cgroups())
    with contextlib.suppress(OSError, StopIteration):
        lines = (_PROC / "meminfo").read_text().splitlines()
        rooms.append(int(next(line for line in lines if line.startswith("MemAvailable:")).split()[1]) * 1024)
    return max(0, min(rooms)) if rooms else None


def _rooms_of_cgroups() -> Iterator[int]:
    """The limit less what is used, of each cgroup that this process is in: its own and those around it."""
    try:
        lines = (_PROC / "self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":  # version 2
            root, limit, usage, cache = _CGROUPS, "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            root, cache = _CGROUPS / "memory", "total_inactive_file"
            limit, usage = "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        directory = root / path.lstrip("/")
        # A container may see the path that the host has for it, and only the root of it.
        for folder in (directory, *(parent for parent in directory.parents if parent.is_relative_to(root))):
            with contextlib.suppress(OSError, ValueError):  # "max" is no number, and no limit
                room = int((folder / limit).read_text()) - int((folder / usage).read_text())
                fields = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
                yield room + int(fields.get(cache, 0))
