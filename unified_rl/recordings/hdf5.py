"""HDF5 files: robomimic's groups of demonstrations, D4RL's flat arrays, and folders of a file an episode (ALOHA)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from unified_rl.errors import ConfigError, DataError, UnifiedRLError
from unified_rl.instantiate import nearest
from unified_rl.interop.guard import one_line
from unified_rl.recordings.columns import ALIASES, Array, Options, Raw, joined, numbers, of_episodes, picked

DEMONSTRATION = re.compile(r"demo_?(\d+)")
STEP_COLUMNS = {"action": ["actions"], "reward": ["rewards"], "done": ["dones"]}
ENDINGS = (".hdf5", ".h5")


def read_hdf5(path: Path, options: Options) -> Raw:
    """Columns of an HDF5 file, or of a folder of them.

    Raises:
        ConfigError: h5py is not installed.
        DataError: it cannot be read, refers to other files, or lacks observations or actions.
    """
    try:
        import h5py
    except ImportError as error:
        raise ConfigError(f"reading {path} needs h5py: pip install 'unified-rl[hdf5]'") from error
    if path.is_dir():
        return _folder(path, options, h5py)
    return _file(path, options, h5py)


def _file(path: Path, options: Options, h5py: Any) -> Raw:
    try:
        with h5py.File(path, "r") as file:
            found: dict[str, Any] = {}
            file.visititems(lambda name, entry: _collect(path, found, name, entry, h5py.Dataset))
            demonstrations = {name.split("/")[1] for name in found if name.startswith("data/") and name.count("/") > 1}
            if any(DEMONSTRATION.fullmatch(name) for name in demonstrations):
                return _robomimic(path, found, demonstrations, options)
            if options.mask is not None:
                raise DataError(f"mask={options.mask} names demonstrations, and {path} holds none (data/demo_0 ...)")
            return _flat(path, found, options)
    except UnifiedRLError:
        raise
    except Exception as error:  # a damaged file raises kinds of all sorts in h5py
        raise DataError(f"{path} cannot be read as HDF5: {one_line(error)}") from error


def _flat(path: Path, found: Mapping[str, Any], options: Options) -> Raw:
    """Columns by their names; of a group of observations, its vectors side by side."""
    notes: list[str] = []
    if options.observation is None and not any(name in found for name in ALIASES["observation"]):
        for group in ALIASES["observation"]:
            vectors = sorted(name for name in found if name.startswith(f"{group}/") and found[name].ndim in (1, 2))
            if vectors and not notes:
                options, notes = replace(options, observation=vectors), _joined_note(vectors)
    raw = picked(str(path), found, lambda name: _read(found[name]), options)
    return Raw(raw.columns, [*notes, *raw.notes])


def _joined_note(names: list[str]) -> list[str]:
    return [f"the observation is {', '.join(names)}, in this order; observation=[...] chooses others"]


def _folder(path: Path, options: Options, h5py: Any) -> Raw:
    """A file an episode, as ALOHA records them, in the order of the numbers in their names."""
    files = [file for ending in ENDINGS for file in path.glob(f"*{ending}")]
    if not files:
        raise DataError(f"{path} holds no {' or '.join(ENDINGS)} files")
    files.sort(key=lambda file: (int(re.sub(r"\D", "", file.stem) or 0), file.name))
    found = [_file(file, options, h5py) for file in files]
    for file, raw in zip(files, found, strict=True):
        if "episode" in raw.columns:
            raise DataError(f"{file} holds several episodes: import such files one by one")
        here, first = (
            "; ".join([", ".join(one.columns), *(note for note in one.notes if not note.startswith("left out"))])
            for one in (raw, found[0])
        )
        if here != first:
            raise DataError(f"{file} holds other columns than {files[0].name}: {here}, there {first}")
    raw = of_episodes([one.columns for one in found], found[0].notes)
    return Raw(raw.columns, [f"{len(files)} files, an episode each", *raw.notes])


def _collect(path: Path, found: dict[str, Any], name: str, entry: Any, kind: type) -> None:
    """Notes a data set; links to other files are not visited, and data that lie in other files refused."""
    if isinstance(entry, kind):
        if entry.external or entry.is_virtual:  # type: ignore[attr-defined]
            raise DataError(f"{path}: {name} lies in another file, which is not opened; write it into this one")
        found[name] = entry


def _read(entry: Any) -> Array:
    values: Array = np.asarray(entry[()])
    return values


def _robomimic(path: Path, found: Mapping[str, Any], names: set[str], options: Options) -> Raw:
    """``data/demo_N`` with ``obs``, ``actions``, ``rewards``, ``dones``, and ``next_obs`` where it is stored."""
    demonstrations = sorted(names, key=lambda name: (int(re.sub(r"\D", "", name) or 0), name))
    if options.mask is not None:
        demonstrations = _masked(path, found, demonstrations, options.mask)
    first = f"data/{demonstrations[0]}"
    keys, notes = _observed(path, found, first, options)
    columns = {**STEP_COLUMNS, **options.names}
    episodes = []
    for name in demonstrations:
        here = f"data/{name}"
        one = {"observation": joined([_column(path, found, f"{here}/{key}") for key in keys])}
        after = [f"{here}/next_{key}" for key in keys]
        if all(key in found for key in after):
            one["next_observation"] = joined([_column(path, found, key) for key in after])
        for key, called in columns.items():
            if f"{here}/{called[0]}" in found or key == "action" or key in options.names:
                one[key] = joined([_column(path, found, f"{here}/{name}") for name in called])
        episodes.append(one)
    return of_episodes(episodes, notes)


def _column(path: Path, found: Mapping[str, Any], name: str) -> Array:
    if name not in found:
        raise DataError(f"{path} has no {name}")
    return numbers(str(path), name, _read(found[name]))


def _observed(path: Path, found: Mapping[str, Any], first: str, options: Options) -> tuple[list[str], list[str]]:
    """The entries of ``obs`` that are joined, and a note that says which."""
    place = f"{first}/obs"
    if place in found:
        return ["obs"], []
    held = sorted(name.removeprefix(f"{place}/") for name in found if name.startswith(f"{place}/"))
    if not held:
        raise DataError(f"{path} has no {place}: extract observations first (robomimic's dataset_states_to_obs)")
    if options.observation is not None:
        wrong = [key for key in options.observation if key not in held]
        if wrong:
            raise DataError(f"{path} has no {place}/{wrong[0]}; {nearest(wrong[0], held)}")
        return [f"obs/{key}" for key in options.observation], []
    low = [key for key in held if found[f"{place}/{key}"].ndim <= 2]
    images = [key for key in held if key not in low]
    if not low:
        raise DataError(f"{path} has only images in {place}: {', '.join(held)}; policies take vectors")
    return [f"obs/{key}" for key in low], _joined_note(low) + (
        [f"left out images: {', '.join(images)}"] if images else []
    )


def _masked(path: Path, found: Mapping[str, Any], names: list[str], mask: str) -> list[str]:
    lists = sorted(name.removeprefix("mask/") for name in found if name.startswith("mask/"))
    if mask not in lists:
        raise DataError(f"{path} has no mask/{mask}; {nearest(mask, lists) if lists else 'it has no masks'}")
    wanted = {one.decode() if isinstance(one, bytes) else str(one) for one in _read(found[f"mask/{mask}"]).tolist()}
    kept = [name for name in names if name in wanted]
    if not kept:
        raise DataError(f"{path}: mask/{mask} names none of its {len(names)} demonstrations")
    return kept
