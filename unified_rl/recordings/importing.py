"""``unified-rl data import FORMAT PATH FOLDER``: a file of somebody else's as rows that runs train on."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tensordict import TensorDict

from unified_rl.errors import ConfigError, DataError
from unified_rl.instantiate import nearest
from unified_rl.recordings.arrays import read_arrays
from unified_rl.recordings.checking import Finding, check_rows, flaws
from unified_rl.recordings.columns import ALIASES, Options, Raw, transitions
from unified_rl.recordings.files import check_new, env_names, make_control_env, write_set
from unified_rl.recordings.hdf5 import read_hdf5
from unified_rl.recordings.lerobot import read_lerobot
from unified_rl.recordings.minari import read_minari

FORMATS: dict[str, Callable[[Path, Options], Raw]] = {
    "npz": read_arrays,
    "minari": read_minari,
    "hdf5": read_hdf5,
    "lerobot": read_lerobot,
}
ALL = {*ALIASES, "dones", "mask"}
TAKES = {"npz": ALL - {"mask"}, "hdf5": ALL, "minari": {"observation"}, "lerobot": ALL - {"mask"}}
"""Options of :class:`~unified_rl.recordings.columns.Options` that each of them reads."""
PICKLED = (".pkl", ".pickle", ".pt", ".pth", ".joblib")
"""Endings of files that only pickle reads."""


def import_data(
    format: str,
    path: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    options: Mapping[str, Any] | None = None,
    env: Mapping[str, Any] | None = None,
    allow: Sequence[str] = (),
    config_dirs: Sequence[str] = (),
) -> tuple[TensorDict, list[str], list[Finding]]:
    """Reads a file or folder and writes its steps as rows; with an environment, only rows that fit it.

    Args:
        format: a name of :data:`FORMATS`.
        path: the file or folder.
        folder: is made.
        options: see :meth:`~unified_rl.recordings.columns.Options.of`.
        env: of an environment that the rows must fit, ``{"env": NAME, "env.KEY": VALUE}``.
        allow: packages that configuration may build.
        config_dirs: folders with options of your own.

    Returns:
        The rows, what was left out or assumed, and what the check found.

    Raises:
        ConfigError: an unknown format or option, a folder that holds something, or rows that do not fit.
        DataError: the file cannot be read, or holds numbers that are not finite.
    """
    if format not in FORMATS:
        raise ConfigError(f"data import knows no format {format!r}; {nearest(format, FORMATS)}")
    target, source, chosen = check_new(folder), Path(path), Options.of(options or {})
    for key in options or {}:
        if key not in TAKES[format]:
            raise ConfigError(f"data import {format} takes no {key}=, which its files say themselves")
    if source.suffix in PICKLED:
        raise DataError(
            f"{source} can only be read by pickle, which runs what it reads and is refused; save it as .npz"
        )
    if not source.exists():
        raise DataError(f"there is no {source}")
    made = make_control_env(env, allow, 4, 0, "data import", config_dirs) if env else None
    rows, notes = transitions(FORMATS[format](source, chosen), str(source), chosen.dones)
    wrong = flaws(rows, str(source))
    if wrong:
        raise DataError(wrong[0])
    found = check_rows(rows, made, str(source)) if made is not None else []
    errors = [one.text for one in found if one.level == "error"]
    if errors:
        raise ConfigError(f"{errors[0]} (nothing was written)")
    about: dict[str, Any] = {"made": f"data import {format}", "from": str(source), "notes": notes}
    if env:
        about["env"] = env_names(env, allow, config_dirs)
    write_set(target, rows, about)
    return rows, notes, found
