"""What the machine at hand has, against what settings ask for: memory, disk, cores, devices."""

from __future__ import annotations

import math
import os
import shutil
from pathlib import Path

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
