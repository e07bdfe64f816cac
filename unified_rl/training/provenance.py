"""A run folder: its name, its configuration, and ``meta.json``, which tells what made it and how it ended."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from itertools import chain, count
from pathlib import Path
from typing import Any

import yaml

from unified_rl import __version__
from unified_rl.errors import CheckpointError
from unified_rl.training.checkpoint import write_json

PACKAGES = ("torch", "tensordict", "torchrl", "transformers", "gymnasium", "mujoco", "stable-baselines3", "numpy")
NAMED = ("env", "agent", "correction")
"""Groups whose choices a run is named after."""


def run_folder(cfg: dict[str, Any]) -> Path:
    """The folder of a run: ``run_dir``, or ``runs/name``, or a new one named after its choices, its seed and the time.

    A name that the library makes is made once: the folder is created here, so two runs never share it.
    """
    if cfg.get("run_dir"):
        return Path(cfg["run_dir"])
    runs = Path(cfg.get("runs") or "runs")
    return runs / cfg["name"] if cfg.get("name") else _new_folder(runs, _name(cfg))


def _name(cfg: dict[str, Any]) -> str:
    choices = [str((cfg.get("choices") or {}).get(group) or _target(cfg, group)) for group in NAMED]
    parts = [choice for choice in choices if choice != "none"]
    return "-".join([*parts, f"seed{cfg.get('seed', 0)}", time.strftime("%Y%m%d-%H%M%S")]).lower()


def _target(cfg: dict[str, Any], group: str) -> str:
    """The class of a node, for configurations that were not composed."""
    return str((cfg.get(group) or {}).get("_target_", "none")).rsplit(".", 1)[-1]


def _new_folder(runs: Path, name: str) -> Path:
    runs.mkdir(parents=True, exist_ok=True)
    for suffix in chain([""], (f"-{number}" for number in count(2))):
        folder = runs / (name + suffix)
        try:
            folder.mkdir()
        except FileExistsError:
            continue
        return folder
    raise AssertionError


def stored_config(folder: Path) -> dict[str, Any]:
    """The resolved configuration that a run folder holds.

    Raises:
        CheckpointError: the folder is missing or is not a run.
    """
    path = folder / "config.yaml"
    if not path.is_file():
        raise CheckpointError(f"{folder} is not a run folder: it holds no config.yaml")
    cfg: dict[str, Any] = yaml.safe_load(path.read_text())
    return cfg


def read_config(folder: Path) -> dict[str, Any]:
    """The configuration of a run that can be built again from it.

    Raises:
        CheckpointError: there is no run, or it was assembled from objects or classes of a script.
    """
    cfg, meta = stored_config(folder), folder / "meta.json"
    parts = json.loads(meta.read_text()).get("assembled", []) if meta.is_file() else []
    if parts:
        raise CheckpointError(
            f"{folder} was assembled from objects of a script ({', '.join(parts)}); assemble it again there, with "
            f"folder={str(folder)!r} and resume_existing=True"
        )
    return cfg


@contextmanager
def status(folder: Path) -> Iterator[None]:
    """Keeps ``status`` in meta.json: running, finished, interrupted or failed (with the error)."""
    meta = json.loads((folder / "meta.json").read_text())
    write_json(folder / "meta.json", {**meta, "status": "running"})
    try:
        yield
    except BaseException as error:
        ended = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
        write_json(folder / "meta.json", {**meta, "status": ended, "error": f"{type(error).__name__}: {error}"})
        raise
    write_json(folder / "meta.json", {**{k: v for k, v in meta.items() if k != "error"}, "status": "finished"})


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
