"""A replay as a folder: live rows in one safetensors file, everything else in ``replay.json``, which is the commit."""

from __future__ import annotations

import json
import os
import secrets
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from tensordict import TensorDict
from torch import Tensor

from unified_rl.errors import CheckpointError
from unified_rl.replay.files import FORMAT, read_meta, write_atomically

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
Pieces = Mapping[str, list[Tensor]]
"""For each name the parts of one tensor, in order along its first dimension."""


def save(path: str | Path, meta: dict[str, Any], pieces: Pieces) -> None:
    """Writes a replay to the folder ``path``; what was there before stays valid until the last step.

    Args:
        meta: JSON-able values.
        pieces: the live rows; streamed, never joined in memory.

    Raises:
        CheckpointError: the folder cannot be written (a full disk, for example); the previous content is intact.
    """
    folder = Path(path)
    rows = folder / f"rows-{secrets.token_hex(4)}.safetensors"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        checksum = _stream(rows, pieces)
        meta = {**meta, "format": FORMAT, "rows": rows.name, "checksum": checksum}
        write_atomically(folder / "replay.json", json.dumps(meta, indent=1).encode())
    except (OSError, CheckpointError) as error:
        rows.unlink(missing_ok=True)
        raise CheckpointError(f"the replay could not be saved to {folder}: {error}") from error
    for other in folder.glob("rows-*.safetensors"):
        if other != rows:
            other.unlink()


def _stream(path: Path, pieces: Pieces) -> int:
    """Writes a safetensors file piece by piece; returns the checksum of its data."""
    header, offset = {}, 0
    for name, parts in pieces.items():
        rows = sum(len(part) for part in parts)
        size = sum(part.numel() * part.element_size() for part in parts)
        shape = [rows, *parts[0].shape[1:]]
        header[name] = {"dtype": _DTYPES[parts[0].dtype], "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    checksum = 0
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for part in (part for parts in pieces.values() for part in parts):
            data = part.cpu().contiguous().view(-1).view(torch.uint8).numpy().data
            checksum = zlib.crc32(data, checksum)
            file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return checksum


class Saved:
    """An opened folder of :func:`save`, checked against its checksum.

    Raises:
        CheckpointError: the folder is missing, truncated, altered or of another version.
    """

    def __init__(self, path: str | Path) -> None:
        folder = Path(path)
        self.meta = read_meta(folder / "replay.json")
        rows = folder / self.meta["rows"]
        try:
            if _checksum(rows) != self.meta["checksum"]:
                raise CheckpointError(f"{rows} is damaged: its checksum is not the one in replay.json")
            self._file: Any = safe_open(str(rows), framework="pt")  # its methods are not typed
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{rows} cannot be read: {error}") from error

    def names(self) -> set[str]:
        """Names of the saved tensors."""
        return set(self._file.keys())

    def read(self, name: str, first: int, last: int) -> Tensor:
        """Rows ``[first, last)`` of one tensor."""
        out: Tensor = self._file.get_slice(name)[first:last]
        return out


def read_rows(path: str | Path, where: str = "") -> TensorDict:
    """The rows of a saved replay, whatever its size was: a data set for another run.

    Args:
        path: its folder.
        where: the full name of the setting that holds the path, for errors.

    Returns:
        Batch size ``[slots, lanes]``, or ``[rows]`` where there is one lane; oldest first.

    Raises:
        CheckpointError: the folder is missing, damaged or of another version, or holds no rows.
    """
    if where:
        try:
            return read_rows(path)
        except CheckpointError as error:
            raise CheckpointError(f"{where}: {error}") from error
    saved = Saved(path)
    lanes, written, capacity = (int(saved.meta[name]) for name in ("lanes", "written", "capacity"))
    count = min(written, capacity)
    if not count:
        raise CheckpointError(f"the replay saved at {path} holds no rows")
    lead = [count] if lanes == 1 else [count // lanes, lanes]
    names = [name for name in saved.names() if name.startswith("row.")]
    rows = {name.removeprefix("row."): saved.read(name, 0, count).unflatten(0, lead) for name in sorted(names)}
    return TensorDict(rows, batch_size=lead)


def _checksum(path: Path) -> int:
    with open(path, "rb") as file:
        file.seek(8 + int.from_bytes(file.read(8), "little"))
        checksum = 0
        for block in _blocks(file):
            checksum = zlib.crc32(block, checksum)
    return checksum


def _blocks(file: Any) -> Iterator[bytes]:
    while block := file.read(1 << 22):
        yield block
