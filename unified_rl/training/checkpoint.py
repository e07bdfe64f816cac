"""Run folders and checkpoints: written aside and renamed, so that a crash never costs the previous one."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from unified_rl.errors import CheckpointError
from unified_rl.protocols import Store
from unified_rl.training.state import load_state, save_state

FORMAT = 2


def write_checkpoint(
    folder: Path, step: int, state: dict[str, Any], replay: Store | None = None, keep: int = 2
) -> Path:
    """Writes one checkpoint atomically and drops the oldest beyond ``keep``.

    Args:
        folder: the run's ``checkpoints`` folder.
        step: the step in the checkpoint's name.
        state: nested tensors and plain values.
        replay: stored beside the state.
        keep: how many checkpoints stay.

    Raises:
        CheckpointError: the disk is full or not writable; earlier checkpoints are intact.
    """
    folder.mkdir(parents=True, exist_ok=True)
    target, aside = folder / f"step_{step:012d}", folder / f".writing_{step:012d}"
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir()
        save_state(aside, {"format": FORMAT, **state})
        if replay is not None:
            replay.dumps(aside / "replay")
        _flush(aside)
        if target.exists():
            shutil.rmtree(target)
        os.replace(aside, target)
        _flush(folder)
    except (OSError, RuntimeError) as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise CheckpointError(
            f"cannot write the checkpoint {target} ({error}); earlier checkpoints are intact"
        ) from error
    for old in checkpoints(folder)[: -max(keep, 1)]:
        shutil.rmtree(old, ignore_errors=True)
    return target


def checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(folder.glob("step_*")) if folder.is_dir() else []


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The state of one checkpoint.

    Raises:
        CheckpointError: missing, damaged, or of another format.
    """
    if not path.is_dir():
        raise CheckpointError(f"there is no checkpoint at {path}")
    state = load_state(path)
    if state.get("format") != FORMAT:
        raise CheckpointError(f"{path} has format {state.get('format')}, this version reads format {FORMAT}")
    return state


def latest_checkpoint(run: Path) -> Path:
    """The newest complete checkpoint of a run.

    Raises:
        CheckpointError: the run folder is missing or holds none.
    """
    if not run.is_dir():
        raise CheckpointError(f"there is no run folder {run}")
    found = checkpoints(run / "checkpoints")
    if not found:
        raise CheckpointError(f"{run} holds no checkpoint; start the run again without resume")
    return found[-1]


@contextmanager
def lock_run(run: Path) -> Iterator[None]:
    """Holds the run folder for this process.

    Raises:
        CheckpointError: another process holds it.
    """
    run.mkdir(parents=True, exist_ok=True)
    with open(run / ".lock", "w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise CheckpointError(f"{run} is in use by another process; wait for it or choose another name=") from error
        yield


def write_json(path: Path, value: Any) -> None:
    """Writes JSON aside and renames it."""
    aside = path.with_name(f".{path.name}.writing")
    aside.write_text(json.dumps(value, indent=1, sort_keys=False))
    os.replace(aside, path)


def _flush(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
