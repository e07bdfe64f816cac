"""Minari data sets, read by Minari."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from unified_rl.errors import ConfigError, DataError
from unified_rl.instantiate import nearest
from unified_rl.interop.guard import one_line
from unified_rl.recordings.columns import Array, Options, Raw, of_episodes
from unified_rl.spaces import Box, DictSpace, Discrete, Image, MultiDiscrete, Part, TupleSpace, part_from_gymnasium

SPACES = ("observation_space", "action_space")


def read_minari(path: Path, options: Options) -> Raw:
    """Episodes of a Minari folder; observations are flattened as Gymnasium does, choices counted from 0.

    Raises:
        ConfigError: Minari is not installed.
        DataError: the folder is none of Minari's, of a version that it does not read, or would need code to be run.
    """
    try:
        import minari
        from minari.dataset.minari_storage import MinariStorage
    except ImportError as error:
        raise ConfigError(f"reading {path} needs minari: pip install 'unified-rl[minari]'") from error
    folder = path / "data" if (path / "data" / "metadata.json").is_file() else path
    _check(folder, getattr(minari, "supported_dataset_versions", None))
    try:
        storage = MinariStorage.read(folder)
        observation, action = (part_from_gymnasium(getattr(storage, name)) for name in SPACES)
        raw = of_episodes(_episodes(storage, observation, action, options))
    except (DataError, ConfigError):
        raise
    except Exception as error:  # the library, h5py and pyarrow raise kinds of their own
        raise DataError(f"{path} cannot be read by Minari: {one_line(error)}") from error
    if isinstance(observation, DictSpace):
        names = options.observation or list(dict(observation.parts))
        return Raw(
            raw.columns, [f"the observation is {', '.join(names)}, in this order; observation=[...] chooses others"]
        )
    return raw


def _check(folder: Path, versions: Any) -> None:
    """Refuses metadata without spaces: Minari would then import and make the environment that they name."""
    try:
        meta = json.loads((folder / "metadata.json").read_text())
        spaces, version = [meta.get(name) for name in SPACES], meta.get("minari_version")
    except (OSError, ValueError, AttributeError) as error:
        raise DataError(f"{folder} is no Minari data set: its metadata.json cannot be read: {error}") from error
    if not all(isinstance(space, str) for space in spaces):
        raise DataError(
            f"{folder / 'metadata.json'} names no observation_space and action_space, so Minari would have to import "
            "an environment to read it; give both when the data set is created"
        )
    if version is not None and versions is not None and version not in versions:
        raise DataError(
            f"{folder} was written by Minari {version}; the installed one reads {', '.join(sorted(versions))}"
        )


def _episodes(storage: Any, observation: Part, action: Part, options: Options) -> Iterator[dict[str, Array]]:
    for one in storage.get_episodes(range(storage.total_episodes)):
        steps = len(one["rewards"])
        columns = {
            "observation": flat(one["observations"], observation, options.observation),
            "action": _numbered(np.asarray(one["actions"]), action, steps),
            "reward": np.asarray(one["rewards"]),
            "terminated": np.asarray(one["terminations"]),
            "truncated": np.asarray(one["truncations"]),
        }
        infos = one.get("infos") or {}
        success = next((infos[key] for key in ("success", "is_success") if key in infos), None)
        if success is not None and len(success) in (steps, steps + 1):
            columns["success"] = np.asarray(success)[-steps:]
        yield columns


def flat(values: Any, part: Part, keys: list[str] | None = None) -> Array:
    """Values ``[N, ...]`` of a space as vectors ``[N, width]``, in the order of ``gymnasium.spaces.flatten``.

    Raises:
        DataError: images, or entries that are not there.
    """
    if isinstance(part, DictSpace):
        parts = dict(part.parts)
        wrong = [key for key in keys or () if key not in parts]
        if wrong:
            raise DataError(f"observations have no entry {wrong[0]!r}; {nearest(wrong[0], parts)}")
        return np.concatenate([flat(values[key], parts[key]) for key in keys or parts], axis=1)
    if keys is not None:
        raise DataError(f"observation={keys} chooses entries of a dictionary, and observations are {part.describe()}")
    if isinstance(part, TupleSpace):
        return np.concatenate([flat(one, inner) for one, inner in zip(values, part.parts, strict=True)], axis=1)
    if isinstance(part, Image):
        raise DataError(
            f"observations hold {part.describe()}; policies take vectors: choose entries with observation=[...]"
        )
    array = np.asarray(values)
    if isinstance(part, Discrete):
        return np.eye(part.n, dtype=np.float32)[array.reshape(-1).astype(np.int64) - part.start]
    if isinstance(part, MultiDiscrete):
        chosen = array.reshape(len(array), -1).astype(np.int64) - np.asarray(part.start)
        return np.concatenate([np.eye(n, dtype=np.float32)[chosen[:, k]] for k, n in enumerate(part.counts)], axis=1)
    return array.reshape(len(array), -1)


def _numbered(values: Array, part: Part, steps: int) -> Array:
    """Actions as policies write them: real, or choices from 0."""
    if part.choices is None:
        return values.reshape(steps, -1)
    start: Any = 0
    if isinstance(part, Discrete | MultiDiscrete):
        start = np.asarray(part.start)
    elif isinstance(part, Box):
        start = part.low_array.reshape(-1).astype(np.int64)
    numbered: Array = values.reshape(steps, -1).astype(np.int64) - start
    return numbered
