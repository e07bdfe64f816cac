"""A run folder: its name, its configuration, and ``meta.json``, which tells what made it and how it ended."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib import metadata
from itertools import chain, count
from pathlib import Path
from typing import Any

from unified_rl import __version__
from unified_rl.errors import CheckpointError, ConfigError, DamageError
from unified_rl.files import MANIFEST, Manifest
from unified_rl.training.failures import RunFolder
from unified_rl.training.metrics import list_finished
from unified_rl.untrusted import MAX_NAME, check_name, read_yaml

CONFIG, META = "config.yaml", "meta.json"

PACKAGES = ("torch", "tensordict", "torchrl", "transformers", "gymnasium", "mujoco", "stable-baselines3", "numpy")
NAMED = ("env", "agent", "correction")
"""Groups whose choices a run is named after."""


def run_folder(cfg: dict[str, Any]) -> Path:
    """The folder of a run: ``run_dir``, or ``runs/name``, or a new one named after its choices, its seed and the time.

    A name that the library makes is made once: the folder is created here, so two runs never share it.

    Raises:
        ConfigError: a name that would lead out of ``runs``.
    """
    for key in ("run_dir", "runs"):
        if "\0" in str(cfg.get(key)):
            raise ConfigError(f"{key} is {cfg[key]!r}; a path has no NUL character")
    if cfg.get("run_dir"):
        return Path(cfg["run_dir"])
    runs = Path(cfg.get("runs") or "runs")
    return runs / check_name(cfg["name"], "name") if cfg.get("name") else _new_folder(runs, _name(cfg))


def _name(cfg: dict[str, Any]) -> str:
    choices = [str((cfg.get("choices") or {}).get(group) or _target(cfg, group)) for group in NAMED]
    parts = [choice for choice in choices if choice != "none"]
    name = "-".join([*parts, f"seed{cfg.get('seed', 0)}", time.strftime("%Y%m%d-%H%M%S")]).lower()
    return re.sub(r"[^\w-]", "_", name)[-MAX_NAME // 2 :]


def _target(cfg: dict[str, Any], group: str) -> str:
    """The class of a node, for configurations that were not composed."""
    return str((cfg.get(group) or {}).get("_target_", "none")).rsplit(".", 1)[-1]


def _new_folder(runs: Path, name: str) -> Path:
    for suffix in chain([""], (f"-{number}" for number in count(2))):
        folder = runs / (name + suffix)
        try:
            runs.mkdir(parents=True, exist_ok=True)
            folder.mkdir()
        except FileExistsError:
            if not runs.is_dir():
                raise CheckpointError(f"runs={runs} is not a folder") from None
            continue
        except OSError as error:
            raise CheckpointError(f"runs={runs} cannot take a run folder: {error}") from error
        return folder
    raise AssertionError


def check_run(folder: Path, names: Sequence[str] | None = None) -> None:
    """Compares the files of a run folder with its manifest: all that it lists, or those of ``names``.

    Raises:
        DamageError: a file is missing or altered; the message names it and says what to do.
    """
    try:
        _check(folder, names)
    except DamageError:
        try:
            _check(folder, names)  # once more: the run may be going on, and have replaced a file in between
        except DamageError as error:
            raise DamageError(
                f"{error}; put the file back, or if it was changed on purpose: unified-rl verify {folder} --accept"
            ) from error


def _check(folder: Path, names: Sequence[str] | None) -> None:
    manifest = Manifest.find(folder)
    if manifest is not None:
        manifest.check(names)
    elif (folder / META).exists():  # a configuration alone needs none
        raise DamageError(f"{folder / MANIFEST} is missing")


def write_run(folder: Path, contents: Mapping[str, str], ended: bool = False) -> None:
    """Writes ``config.yaml`` or ``meta.json``, or both, and lists them in the run's manifest.

    Args:
        folder: the run folder.
        contents: name to text.
        ended: also list the metrics as they are now.
    """
    manifest = Manifest.find(folder) or Manifest(folder)
    if ended:
        list_finished(manifest)
    manifest.replace(contents)


def stored_config(folder: Path) -> dict[str, Any]:
    """The resolved configuration that a run folder holds.

    Raises:
        CheckpointError: the folder is missing or is not a run.
        DamageError: the file was altered since the run wrote it.
    """
    path = folder / CONFIG
    check_run(folder, [CONFIG])
    if not path.is_file():
        raise CheckpointError(f"{folder} is not a run folder: it holds no config.yaml")
    cfg = read_yaml(path, CheckpointError)
    if not isinstance(cfg, dict):
        raise CheckpointError(f"{path} holds no settings")
    return cfg


def read_meta(folder: Path) -> dict[str, Any]:
    """What ``meta.json`` says; nothing where there is none.

    Raises:
        CheckpointError: it cannot be read.
        DamageError: it was altered since the run wrote it.
    """
    check_run(folder, [META])
    try:
        return dict(json.loads((folder / META).read_text())) if (folder / META).is_file() else {}
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{folder / META} cannot be read: {error}") from error


def read_config(folder: Path) -> dict[str, Any]:
    """The configuration of a run that can be built again from it.

    Raises:
        CheckpointError: there is no run, or it was assembled from objects or classes of a script.
        DamageError: a file was altered since the run wrote it.
    """
    cfg = stored_config(folder)
    parts = read_meta(folder).get("assembled", [])
    if parts:
        raise CheckpointError(
            f"{folder} was assembled from objects of a script ({', '.join(parts)}); assemble it again there, with "
            f"folder={str(folder)!r} and resume_existing=True"
        )
    return cfg


@contextmanager
def status(folder: Path) -> Iterator[None]:
    """Keeps ``status`` in meta.json: running, finished, interrupted or failed (with the error)."""
    meta = read_meta(folder)
    write_run(folder, {META: meta_text({**meta, "status": "running"})})
    try:
        yield
    except BaseException as error:
        ended = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
        text = meta_text({**meta, "status": ended, "error": f"{type(error).__name__}: {error}"})
        with suppress(CheckpointError, OSError):  # a full disk, or a folder that is gone, is not what went wrong first
            write_run(folder, {META: text}, ended=True)
        raise
    finished = {**{k: v for k, v in meta.items() if k != "error"}, "status": "finished"}
    with RunFolder(folder).writes():
        write_run(folder, {META: meta_text(finished)}, ended=True)


def meta_text(meta: Mapping[str, Any]) -> str:
    """``meta.json`` as text."""
    return json.dumps(meta, indent=1)


def provenance(cfg: dict[str, Any]) -> dict[str, Any]:
    """What ``meta.json`` holds of a run that begins."""
    return {
        "unified_rl": __version__,
        "python": platform.python_version(),
        "versions": {name: version(name) for name in PACKAGES},
        "seed": cfg.get("seed", 0),
        "git_revision": _git_revision(),
        "command": " ".join([os.path.basename(sys.argv[0]), *sys.argv[1:]]),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def version(name: str) -> str | None:
    """The version of an installed package, or None."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _git_revision() -> str | None:
    try:
        out = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=5
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return out.stdout.strip() or None if out.returncode == 0 else None
