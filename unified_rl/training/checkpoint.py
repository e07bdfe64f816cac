"""Checkpoints: written aside, sealed by a manifest and renamed, so that a crash never costs the previous one."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from unified_rl.errors import CheckpointError, DamageError
from unified_rl.files import MANIFEST, Manifest, flush
from unified_rl.protocols import Store
from unified_rl.stopping import say
from unified_rl.training.state import load_state, save_state
from unified_rl.training.stored import FOLDER as PIECES
from unified_rl.untrusted import refuse_links

FORMAT = 3
STATE_FILES = ("state.json", "state.safetensors")
FOLDER = "checkpoints"
NEWEST = "newest_checkpoint"
"""Note of a run's manifest: the name of the newest checkpoint; two while the second is being written."""
NONE = ""
"""Stands in that note for the checkpoint before the first one."""
BEST = "best"
"""Folder of the checkpoint with the best value of the metric that ``keep_best`` names, and word for it."""
EXTENSION = "extension"
"""Folder of the checkpoint that a run with stale rows is extended from."""
_NAME = re.compile(r"step_(\d{12,})")
_REPLACED = ".replaced-"
_WRITING = ".writing_"
"""Begins the name of a folder that is half written or half removed, and is cleared away."""


def checkpoint_name(step: int) -> str:
    """``step_000000000400`` for 400 updates."""
    return f"step_{step:012d}"


def write_checkpoint(
    folder: Path,
    step: int,
    state: dict[str, Any],
    replay: Store | None = None,
    keep: int = 2,
    pieces: Callable[[Path, dict[str, Any]], None] = lambda aside, state: None,
) -> Path:
    """Writes one checkpoint atomically and drops the oldest beyond ``keep``.

    Its ``MANIFEST.json`` lists size and SHA-256 of every file and is written last.

    Args:
        folder: the run's ``checkpoints`` folder.
        step: the step in the checkpoint's name.
        state: nested tensors and plain values.
        replay: stored beside the state.
        keep: how many checkpoints stay.
        pieces: writes the pieces of the state's tensors that this and other processes hold into the folder.

    Raises:
        CheckpointError: the disk is full or not writable; earlier checkpoints are intact.
    """
    target, aside = folder / checkpoint_name(step), folder / f"{_WRITING}{step:012d}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tidy(folder)
        _write_aside(aside, {"format": FORMAT, **state}, replay, pieces)
        _put(aside, target)
    except BaseException as error:
        shutil.rmtree(aside, ignore_errors=True)
        if not isinstance(error, OSError | RuntimeError | SafetensorError):
            raise
        raise CheckpointError(
            f"cannot write the checkpoint {target} ({error}); earlier checkpoints are intact"
        ) from error
    with suppress(OSError):  # the new one is there, and the next one finds what stays
        for old in checkpoints(folder)[: -max(keep, 1)]:
            remove_checkpoint(old)
    return target


def remove_checkpoint(path: Path) -> None:
    """Removes a checkpoint by way of a name that none has, so that no kill leaves a half of it under its own."""
    aside = path.with_name(f"{_WRITING}{path.name}")
    shutil.rmtree(aside, ignore_errors=True)
    os.replace(path, aside)
    shutil.rmtree(aside, ignore_errors=True)


def adopt(path: Path, folder: Path) -> Path:
    """Makes a checkpoint one of a run's own by copying it into ``folder``, where there is none of its name.

    Raises:
        CheckpointError: the disk is full.
    """
    target, aside = folder / path.name, folder / f"{_WRITING}{path.name}"
    if target.is_dir():
        return target
    try:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(aside, ignore_errors=True)
        shutil.copytree(path, aside)
        _put(aside, target)
    except OSError as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise CheckpointError(f"{path} could not be copied to {target}: {error}") from error
    return target


def _write_aside(
    aside: Path, state: dict[str, Any], replay: Store | None, pieces: Callable[[Path, dict[str, Any]], None]
) -> None:
    aside.mkdir()
    pieces(aside, state)
    save_state(aside, state)
    if replay is not None:
        replay.dumps(aside / "replay")
    files = [path for path in aside.rglob("*") if path.is_file()]
    for path in files:
        flush(path)
    for path in {file.parent for file in files}:
        flush(path)
    Manifest.of(aside, [path.relative_to(aside).as_posix() for path in files]).write()


def _put(aside: Path, target: Path) -> None:
    """Renames ``aside`` to ``target``; one that stands there is complete under another name until the new one does."""
    replaced = target.with_name(_REPLACED + target.name)
    if target.exists():
        os.replace(target, replaced)
    os.replace(aside, target)
    flush(target.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def tidy(folder: Path) -> None:
    """Removes what a killed process left half done; a checkpoint that it was about to replace gets its name back."""
    for replaced in folder.glob(f"{_REPLACED}*"):
        target = folder / replaced.name.removeprefix(_REPLACED)
        if target.exists():
            shutil.rmtree(replaced, ignore_errors=True)
        else:
            os.replace(replaced, target)
    for aside in folder.glob(f"{_WRITING}*"):
        shutil.rmtree(aside, ignore_errors=True)


def checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first; other names in the folder are not looked at."""
    if not folder.is_dir():
        return []
    found = {path.name: path for path in folder.iterdir() if _NAME.fullmatch(path.name) and path.is_dir()}
    for path in folder.glob(f"{_REPLACED}*"):  # left by a process that was killed between two renames
        found.setdefault(path.name.removeprefix(_REPLACED), path)
    return [found[name] for name in sorted(found, key=lambda name: (len(name), name))]


def step_of(path: Path) -> int:
    """The step in a checkpoint's name."""
    match = _NAME.fullmatch(path.name.removeprefix(_REPLACED))
    assert match is not None
    return int(match[1])


def read_checkpoint(path: Path, replay: bool = True, whole: bool = True) -> dict[str, Any]:
    """The state of one checkpoint, checked against its manifest.

    Args:
        path: its folder.
        replay: also check the files of its replay.
        whole: see :func:`~unified_rl.training.state.load_state`.

    Raises:
        CheckpointError: missing, or of another format.
        DamageError: a file is missing or altered; the message names it.
    """
    if not path.is_dir():
        raise CheckpointError(f"there is no checkpoint at {path}")
    if not (path / MANIFEST).exists():
        _refuse_other_format(path, _format(path))
    for name in STATE_FILES:
        if not (path / name).is_file():
            raise DamageError(f"{path} holds no {name}: it is not a complete checkpoint")
    manifest = Manifest.read(path)
    pieces = [name for name in manifest.files if name.startswith(f"{PIECES}/")]
    for file in sorted((path / PIECES).glob("*")):
        if f"{PIECES}/{file.name}" not in pieces:
            raise DamageError(f"{file} is not in the checkpoint's {MANIFEST}: it is none of its files")
    manifest.check(None if replay else (*STATE_FILES, *pieces))
    state = load_state(path, whole)
    _refuse_other_format(path, state.get("format"))
    return state


def _format(path: Path) -> Any:
    """The format in a ``state.json`` that no manifest covers; this version's where it cannot be read."""
    try:
        return json.loads((path / "state.json").read_text())["format"]
    except (OSError, ValueError, KeyError, TypeError):
        return FORMAT


def _refuse_other_format(path: Path, found: Any) -> None:
    if found != FORMAT:
        raise CheckpointError(f"{path} has format {found}, this version reads format {FORMAT}")


def latest_checkpoint(run: Path) -> Path:
    """The newest complete checkpoint of a run, not yet checked for damage.

    Raises:
        CheckpointError: the run folder is missing or holds none.
    """
    if not run.is_dir():
        raise CheckpointError(f"there is no run folder {run}")
    found = checkpoints(run / FOLDER)
    if not found:
        for line in _lost(run):
            raise DamageError(f"{run} holds no checkpoint: {line}; put it back, or start a new run")
        raise CheckpointError(f"{run} holds no checkpoint; start the run again without resume")
    return found[-1]


def chosen_checkpoint(run: Path, choice: str | int) -> Path:
    """The folder of a checkpoint by its number of updates, its name, its path, or the word ``best``.

    Raises:
        CheckpointError: there is none; the message lists what the run holds.
    """
    text = str(choice)
    if text == BEST:
        if not (kept := checkpoints(run / BEST)):
            raise CheckpointError(f"{run} keeps no best checkpoint; a run does with keep_best=eval/accuracy")
        return kept[-1]
    if text.isdecimal():
        text = checkpoint_name(int(text))
    found = {path.name.removeprefix(_REPLACED): path for path in checkpoints(run / FOLDER)}
    for path in (found.get(text), run / FOLDER / text, Path(text)):
        if path is not None and path.is_dir():
            return path
    held = ", ".join(str(step_of(path)) for path in found.values()) or "none"
    raise CheckpointError(f"{run} has no checkpoint {choice}; it holds {held}")


def intact_checkpoint(
    run: Path, choice: str | int | None = None, replay: bool = True, whole: bool = True
) -> tuple[Path, dict[str, Any]]:
    """The checkpoint of choice, or the newest one that is intact; says which ones were passed over.

    Args:
        run: the run folder.
        choice: the number of updates behind it, its name, its path or ``best``; damage is then an error.
        replay: also check the files of its replay.
        whole: see :func:`~unified_rl.training.state.load_state`.

    Returns:
        Its folder and its state.

    Raises:
        CheckpointError: there is no checkpoint, or one of another format.
        DamageError: the chosen one, or all of them, are damaged; the message names a file.
    """
    if choice is not None:
        path = chosen_checkpoint(run, choice)
        return path, read_checkpoint(path, replay, whole)
    latest_checkpoint(run)
    damage = _lost(run)
    for path in reversed(checkpoints(run / FOLDER)):
        try:
            state = read_checkpoint(path, replay, whole)
        except DamageError as error:
            damage.append(str(error))
            continue
        for line in damage:
            say(f"{line}; going back to {path}")
        return path, state
    raise DamageError(f"no checkpoint of {run} is intact: {damage[0]}")


def wrote_checkpoint(run: Path) -> bool:
    """Whether the run's manifest says that it wrote a checkpoint, and not only that it began one."""
    listed = _listed(run)
    return bool(listed) and NONE not in listed


def _listed(run: Path) -> list[str]:
    """Names of which one is the newest checkpoint that the run wrote, as its manifest says; none before the first."""
    manifest = Manifest.find(run)
    return [] if manifest is None else list(manifest.notes.get(NEWEST, []))


def _lost(run: Path) -> list[str]:
    """A line where the newest checkpoint that the run wrote is not there."""
    listed = _listed(run)
    if (
        not listed
        or NONE in listed
        or any(path.name.removeprefix(_REPLACED) in listed for path in checkpoints(run / FOLDER))
    ):
        return []
    return [f"{run / FOLDER / listed[-1]} is missing"]


def set_aside_newer(folder: Path, step: int) -> None:
    """Renames checkpoints beyond ``step``, so that they never pass for the future of a run that went back to it.

    Raises:
        CheckpointError: the folder is not writable.
    """
    for path in reversed([path for path in checkpoints(folder) if step_of(path) > step]):
        name = f"set_aside_{checkpoint_name(step_of(path))}"
        free = next(folder / (name + end) for end in _suffixes() if not (folder / (name + end)).exists())
        try:
            os.replace(path, free)
            flush(folder)
        except OSError as error:
            raise CheckpointError(f"{path} could not be renamed: {error}") from error
        say(
            f"the run goes on from update {step}; the rows of metrics behind it are made again, "
            f"and the later checkpoint {path.name} is now {free}"
        )


def _suffixes() -> Iterator[str]:
    yield ""
    yield from (f"-{number}" for number in count(2))


@contextmanager
def lock_run(run: Path) -> Iterator[None]:
    """Holds the run folder for this process.

    Raises:
        CheckpointError: another process holds it, it cannot be written, or it holds a link to somewhere else.
    """
    try:
        run.mkdir(parents=True, exist_ok=True)
        refuse_links(run)
        handle = open(run / ".lock", "w")  # noqa: SIM115 (held until the end of the block)
    except OSError as error:
        raise CheckpointError(f"{run} cannot be a run folder: {error}") from error
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise CheckpointError(f"{run} is in use by another process; wait for it or choose another name=") from error
        yield
