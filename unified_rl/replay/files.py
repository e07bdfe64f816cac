"""The small JSON files of a replay, and the lock on its folder."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from unified_rl.errors import CheckpointError, DamageError
from unified_rl.files import read_sealed, write_sealed

FORMAT = 2
"""Version of everything a replay writes to disk."""


def write_meta(path: Path, meta: Mapping[str, Any]) -> None:
    """Writes JSON of this format in one step, with a digest of itself.

    Raises:
        CheckpointError: the disk is full or the folder not writable; the old file is intact.
    """
    write_sealed(path, {**meta, "format": FORMAT})


def read_meta(path: Path) -> dict[str, Any]:
    """Reads what :func:`write_meta` wrote.

    Raises:
        CheckpointError: missing, altered, or of another version.
    """
    if not path.is_file():
        raise DamageError(f"{path.parent} holds no complete replay: {path.name} is missing")
    try:
        meta = read_sealed(path)
    except DamageError:
        _refuse_other_format(path, _format(path))
        raise
    _refuse_other_format(path, meta.get("format"))
    return meta


def _format(path: Path) -> Any:
    """The format in a file that is not as this version writes it; this version's where it cannot be read."""
    try:
        return json.loads(path.read_bytes())["format"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return FORMAT


def _refuse_other_format(path: Path, version: Any) -> None:
    if version != FORMAT:
        raise CheckpointError(f"{path} is of format {version}; this version of the package reads format {FORMAT}")


def lock(path: Path) -> TextIO:
    """Takes a file lock that the operating system drops when this process ends, however it ends.

    Raises:
        CheckpointError: if another process holds it, or the folder is not writable.
    """
    try:
        file = open(path, "a")  # noqa: SIM115 (the lock lives as long as the file is open)
    except OSError as error:
        raise CheckpointError(f"{path.parent} cannot hold a replay: {error}") from error
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise CheckpointError(f"the replay at {path.parent} is in use by another process") from None
    return file
