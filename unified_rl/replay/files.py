"""Small files that are either old or new, never in between."""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path
from typing import Any, TextIO

from unified_rl.errors import CheckpointError

FORMAT = 1
"""Version of everything a replay writes to disk."""


def write_atomically(path: Path, data: bytes) -> None:
    """Replaces a file in one step; the old one stays intact if the disk is full."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise CheckpointError(f"{path} could not be written: {error}") from error


def read_meta(path: Path) -> dict[str, Any]:
    """Reads a JSON file of this format.

    Raises:
        CheckpointError: missing, not JSON, or of another version.
    """
    try:
        meta = json.loads(path.read_text())
        version = meta["format"]
    except FileNotFoundError:
        raise CheckpointError(f"{path.parent} holds no complete replay: {path.name} is missing") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged: {error!r}") from error
    if version != FORMAT:
        raise CheckpointError(f"{path} is of format {version}; this version of the package reads format {FORMAT}")
    return dict(meta)


def lock(path: Path) -> TextIO:
    """Takes a file lock that the operating system drops when this process ends, however it ends.

    Raises:
        CheckpointError: if another process holds it.
    """
    file = open(path, "a")  # noqa: SIM115 (the lock lives as long as the file is open)
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise CheckpointError(f"the replay at {path.parent} is in use by another process") from None
    return file
