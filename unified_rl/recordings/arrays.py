"""NumPy files: a dictionary of arrays in one ``.npz``, a folder of ``.npy``, or one ``.npy`` with named fields."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from unified_rl.errors import DataError
from unified_rl.recordings.columns import Array, Options, Raw, picked


def read_arrays(path: Path, options: Options) -> Raw:
    """Columns of a NumPy file.

    Raises:
        DataError: it cannot be read without pickle, or lacks observations or actions.
    """
    if path.is_dir():
        files = {file.stem: file for file in sorted(path.glob("*.npy"))}
        if not files:
            raise DataError(
                f"{path} holds no .npy files: an .npz file, or a folder with observations.npy, actions.npy ..."
            )
        return picked(str(path), files, lambda name: _load(files[name]), options)
    with open(path, "rb") as file:
        magic = file.read(6)
    if magic.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        with _opened(path) as archive:
            return picked(str(path), archive.files, lambda name: _entry(path, archive, name), options)
    if not magic.startswith(b"\x93NUMPY"):
        form = {b"\x89HDF\r\n": ", but HDF5: unified-rl data import hdf5", b"PAR1": ", but Parquet"}
        raise DataError(f"{path} is no NumPy file{next((s for m, s in form.items() if magic.startswith(m)), '')}")
    values = _load(path)
    if values.dtype.names is None:
        raise DataError(
            f"{path} is one array without named fields: data import npz takes an .npz file (numpy.savez), or a folder "
            "of .npy files named observations.npy, actions.npy ..."
        )
    return picked(str(path), values.dtype.names, lambda name: values[name], options)


def _opened(path: Path) -> Any:
    try:
        return np.load(path, allow_pickle=False)
    except (ValueError, OSError, EOFError, BadZipFile) as error:
        raise _refused(path, "", error) from error


def _load(path: Path) -> Array:
    try:
        values: Array = np.load(path, allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise _refused(path, "", error) from error
    return values


def _entry(path: Path, archive: Any, name: str) -> Array:
    try:
        values: Array = archive[name]
    except (ValueError, OSError, EOFError, BadZipFile) as error:
        raise _refused(path, f" column {name!r}", error) from error
    return values


def _refused(path: Path, what: str, error: Exception) -> DataError:
    if "pickle" in str(error).lower():
        return DataError(
            f"{path}:{what or ' the file'} can only be read by pickle, which runs what it reads and is refused; save "
            "arrays of numbers with numpy.savez(FILE, observations=..., actions=...)"
        )
    return DataError(f"{path}{':' + what if what else ''} cannot be read: {error}")
