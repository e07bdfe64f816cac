"""What the machine at hand has, against what settings ask for: memory, disk, cores, devices."""

from __future__ import annotations

import math
import os
import shutil
from pathlib import Path
from typing import Any

from unified_rl.errors import ConfigError

LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
OVERSUBSCRIBED = 4
"""Threads a core that are still taken as meant: a run may move to a smaller machine."""


def memory() -> int:
    """Bytes of main memory, or of what the container may use of it."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for path in map(Path, LIMITS):
        text = path.read_text().strip() if path.is_file() else ""
        total = min(total, int(text)) if text.isdigit() else total
    return total


def available(device: Any = "cpu") -> int | None:
    """Bytes that can still be allocated on a device; None where nobody knows.

    Of main memory: what the kernel says is available, within what the container may still use. Of a CUDA device: what
    is free, and what torch has reserved and does not use.
    """
    import torch

    device = torch.device(device)
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
        return int(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))
    if device.type != "cpu":
        return None
    info = Path("/proc/meminfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    found = [1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
    return min([*found, *_left_in_container()], default=None)


def _left_in_container(folder: Path = Path("/sys/fs/cgroup")) -> list[int]:
    """What a container's limit leaves, the cache of files not counted; empty where there is no limit."""
    limit, used, stat = (folder / name for name in ("memory.max", "memory.current", "memory.stat"))
    text = limit.read_text().strip() if limit.is_file() and used.is_file() else ""
    if not text.isdigit():
        return []
    lines = stat.read_text().splitlines() if stat.is_file() else []
    cached = sum(int(line.split()[1]) for line in lines if line.startswith(("inactive_file ", "active_file ")))
    return [max(0, int(text) - int(used.read_text()) + cached)]


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def readable(size: float) -> str:
    """A number of bytes as one reads it, ``3.2 GB``."""
    power = min(6, max(0, int(math.log(max(size, 1), 1000))))
    return f"{size / 1000**power:.3g} {('bytes', 'kB', 'MB', 'GB', 'TB', 'PB', 'EB')[power]}"


def require_memory(size: float, what: str) -> None:
    """Refuses what cannot fit, before it is allocated.

    Args:
        size: bytes at least.
        what: names the settings and what they ask for.

    Raises:
        ConfigError: more than the machine has; gives both numbers.
    """
    if size > memory():
        raise ConfigError(f"{what} would take {readable(size)} at least, and this machine has {readable(memory())}")


def require_disk(size: float, folder: Path, what: str) -> None:
    """As :func:`require_memory`, for files in ``folder``, which may not exist yet."""
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    total = shutil.disk_usage(there).total
    if size > total:
        raise ConfigError(f"{what} would take {readable(size)} at least, and the disk of {there} has {readable(total)}")


def require_cores(threads: int, setting: str) -> None:
    """Refuses many more threads than cores.

    Raises:
        ConfigError: names the setting and the number of cores.
    """
    if threads > OVERSUBSCRIBED * cores():
        raise ConfigError(
            f"{setting}={threads} is far above the {cores()} cores of this machine; set {cores()} or less"
        )
