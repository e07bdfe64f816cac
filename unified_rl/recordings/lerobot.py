"""LeRobot data sets of version 2 and 3: Parquet and ``meta/info.json``, read by pyarrow.

The ``lerobot`` package itself would bring video decoders, drivers and a hub client for what are two columns of numbers;
the format is documented and stable within a version, and another version is refused.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from unified_rl.errors import ConfigError, DataError
from unified_rl.interop.guard import one_line
from unified_rl.recordings.columns import Array, Options, Raw, picked

VERSIONS = ("v2.", "v3.")
STATES = ("observation.state", "observation.environment_state")
"""Features that are joined to the observation where nobody chooses."""


def read_lerobot(path: Path, options: Options) -> Raw:
    """Frames of a LeRobot folder in the order of their episodes.

    Raises:
        ConfigError: pyarrow is not installed.
        DataError: it is of another version, incomplete, or lacks observations or actions.
    """
    try:
        import pyarrow
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise ConfigError(f"reading {path} needs pyarrow: pip install 'unified-rl[datasets]'") from error
    info = _info(path)
    features = info["features"]
    files = sorted((path / "data").rglob("*.parquet"))
    if not files:
        raise DataError(f"{path / 'data'} holds no Parquet files")
    numeric = [name for name, feature in features.items() if feature.get("dtype") not in ("image", "video", "string")]
    try:
        tables = [parquet.read_table(file, columns=_held(parquet, file, numeric)) for file in files]
        table = pyarrow.concat_tables(tables)
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        raise DataError(f"{path / 'data'} cannot be read: {one_line(error)}") from error
    frames = info.get("total_frames")
    if frames is not None and frames != table.num_rows:
        raise DataError(
            f"{path} is incomplete: its meta/info.json says {frames} frames, its Parquet files hold {table.num_rows}"
        )
    columns = {name: _array(path, name, table.column(name)) for name in table.column_names}
    if options.observation is None and any(name in columns for name in STATES):
        options.observation = [name for name in STATES if name in columns]
    order = _order(path, columns)
    raw = picked(str(path), columns, lambda name: columns[name][order], options)
    pictures = [name for name, feature in features.items() if feature.get("dtype") in ("image", "video")]
    return Raw(raw.columns, [*raw.notes, *([f"left out images: {', '.join(pictures)}"] if pictures else [])])


def _info(path: Path) -> dict[str, Any]:
    place = path / "meta" / "info.json"
    try:
        info = json.loads(place.read_text())
        version, features = str(info["codebase_version"]), info["features"]
        assert isinstance(features, dict) and all(isinstance(one, dict) for one in features.values())
    except (OSError, ValueError, KeyError, TypeError, AssertionError) as error:
        raise DataError(f"{path} is no LeRobot data set: {place} cannot be read: {error}") from error
    if not version.startswith(VERSIONS):
        raise DataError(
            f"{path} is of LeRobot's format {version}; versions 2 and 3 are read (lerobot converts older ones)"
        )
    return dict(info)


def _held(parquet: Any, file: Path, names: list[str]) -> list[str]:
    held = set(parquet.read_schema(file).names)
    return [name for name in names if name in held]


def _array(path: Path, name: str, column: Any) -> Array:
    """``[N]`` or ``[N, width]``."""
    import pyarrow
    import pyarrow.compute as compute

    column = column.combine_chunks()
    if column.null_count:
        raise DataError(f"{path}: column {name!r} has {column.null_count} empty entries")
    shape = [len(column)]
    while pyarrow.types.is_list(column.type) or pyarrow.types.is_fixed_size_list(column.type):
        lengths = compute.unique(compute.list_value_length(column)).to_pylist()
        if len(lengths) != 1:
            raise DataError(f"{path}: the lists of column {name!r} are not all of one length")
        shape.append(lengths[0])
        column = column.flatten()
    values: Array = np.asarray(column.to_numpy(zero_copy_only=False))
    return values.reshape(shape)


def _order(path: Path, columns: dict[str, Array]) -> Array:
    for name in ("episode_index", "frame_index"):
        if name not in columns:
            raise DataError(f"{path}: its Parquet files have no column {name}")
    return np.lexsort((columns["frame_index"].reshape(-1), columns["episode_index"].reshape(-1)))
