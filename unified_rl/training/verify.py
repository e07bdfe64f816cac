"""``unified-rl verify FOLDER``: every file against the manifest or the digest that was written with it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from unified_rl.errors import ConfigError, DamageError
from unified_rl.files import Manifest
from unified_rl.replay.persist import Saved
from unified_rl.replay.store import verify_memmap
from unified_rl.training.checkpoint import (
    BEST,
    EXTENSION,
    FOLDER,
    checkpoints,
    latest_checkpoint,
    lock_run,
    read_checkpoint,
)
from unified_rl.training.metrics import RECORD, list_finished
from unified_rl.training.provenance import CONFIG, META, check_run


def verify_folder(folder: str | Path, accept: bool = False) -> list[str]:
    """Checks a run, a study's runs, a saved replay, a dataset, or the folder of a memory-mapped replay.

    Args:
        folder: the folder.
        accept: first write a run's manifest anew, so that its configuration, ``meta.json`` and metrics count as whole
            as they are now. Checkpoints and replays are never accepted.

    Returns:
        A line for each thing that was checked.

    Raises:
        ConfigError: the folder holds nothing of that kind.
        CheckpointError: it cannot be checked, being in use or of another version.
        DamageError: what is damaged, a line for each thing; the lines name the files.
    """
    path = Path(folder)
    if accept:
        _accept(path)
    parts = list(_parts(path))
    if not parts:
        raise ConfigError(f"{path} holds no run, study, checkpoint or replay to verify")
    lines, damage = [], []
    for part, check in parts:
        try:
            check(part)
            lines.append(f"intact: {part}")
        except DamageError as error:
            damage.append(str(error))
    if damage:
        raise DamageError("\n".join(damage))
    return lines


Check = Callable[[Path], object]


def _parts(path: Path) -> Iterator[tuple[Path, Check]]:
    """What a folder holds, each with the function that checks it."""
    if (path / CONFIG).exists() or (path / META).exists():
        yield path, _check_run
        for place in (FOLDER, EXTENSION, BEST):
            yield from ((checkpoint, read_checkpoint) for checkpoint in checkpoints(path / place))
    elif (path / "state.json").exists():
        yield path, read_checkpoint
    elif (path / "journal.bin").exists() or (path / "rows").is_dir():
        yield path, verify_memmap
    elif (path / "replay.json").exists() or any(path.glob("rows-*.safetensors")):
        yield path, Saved
    elif (path / "study.yaml").exists():
        for run in sorted((path / "runs").glob("*")):
            yield from _parts(run)


def _check_run(run: Path) -> None:
    check_run(run)
    if (run / FOLDER).is_dir():
        latest_checkpoint(run)


def _accept(run: Path) -> None:
    if not (run / CONFIG).exists():
        raise ConfigError(f"{run} is not a run folder: --accept takes the files of a run as they are")
    with lock_run(run):
        manifest = Manifest.of(run, [name for name in (CONFIG, META) if (run / name).exists()])
        if (run / RECORD).exists():
            list_finished(manifest)
        manifest.write()
