"""A replay as a folder: live rows in one safetensors file, everything else in ``replay.json``, which is the commit."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from tensordict import TensorDict
from torch import Tensor

from unified_rl.errors import CheckpointError, DamageError
from unified_rl.files import Entry, Manifest, fitting
from unified_rl.replay.files import read_meta, write_meta

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
_ASIDE = ".writing-rows.safetensors"
_ROWS = re.compile(r"rows-[0-9a-f]+\.safetensors")
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
    aside, rows, kept = folder / _ASIDE, folder, True
    try:
        folder.mkdir(parents=True, exist_ok=True)
        written = _stream(aside, pieces)
        rows = folder / f"rows-{written['sha256'][:16]}.safetensors"  # named by content: equal replays, equal files
        kept = rows.exists()
        os.replace(aside, rows)
        write_meta(folder / "replay.json", {**meta, "rows": rows.name, "rows_file": written})
    except (OSError, CheckpointError) as error:
        with suppress(OSError):
            aside.unlink(missing_ok=True)
            if not kept:
                rows.unlink(missing_ok=True)
        raise CheckpointError(f"the replay could not be saved to {folder}: {error}") from error
    for other in folder.glob("rows-*.safetensors"):
        if other != rows:
            other.unlink()


def _stream(path: Path, pieces: Pieces) -> Entry:
    """Writes a safetensors file piece by piece; returns its size and digest."""
    header, offset = {}, 0
    for name, parts in pieces.items():
        rows = sum(len(part) for part in parts)
        size = sum(part.numel() * part.element_size() for part in parts)
        shape = [rows, *parts[0].shape[1:]]
        header[name] = {"dtype": _DTYPES[parts[0].dtype], "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    head = len(text).to_bytes(8, "little") + text
    found = hashlib.sha256(head)
    with open(path, "wb") as file:
        file.write(head)
        for part in (part for parts in pieces.values() for part in parts):
            data = part.cpu().contiguous().view(-1).view(torch.uint8).numpy().data
            found.update(data)
            file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return {"size": len(head) + offset, "sha256": found.hexdigest()}


class Saved:
    """An opened folder of :func:`save`, checked against its digests.

    Raises:
        CheckpointError: the folder is of another version.
        DamageError: a file is missing or altered; the message names it.
    """

    def __init__(self, path: str | Path) -> None:
        folder = Path(path)
        self.meta = read_meta(folder / "replay.json")
        if "rows_file" not in self.meta:
            raise CheckpointError(f"{folder} is the folder of a memory-mapped replay, not of a saved one")
        name = str(self.meta["rows"])
        if not _ROWS.fullmatch(name):
            raise CheckpointError(f"{folder / 'replay.json'} names rows={name!r}, which is no file of a replay")
        Manifest(folder, {name: [self.meta["rows_file"]]}).check()
        try:
            self._file: Any = safe_open(str(folder / name), framework="pt")  # its methods are not typed
        except (OSError, SafetensorError) as error:
            raise DamageError(f"{folder / name} cannot be read: {error}") from error

    def names(self) -> set[str]:
        """Names of the saved tensors."""
        return set(self._file.keys())

    def read(self, name: str, first: int, last: int) -> Tensor:
        """Rows ``[first, last)`` of one tensor."""
        out: Tensor = self._file.get_slice(name)[first:last]
        return out


def readable(path: str | Path) -> AbstractContextManager[None]:
    """Within it, saved rows that are not what :func:`save` writes are an error about their folder.

    A digest says that a file is as it was written, not who wrote it.

    Raises:
        CheckpointError: names ``path`` and what was wrong.
    """
    return fitting(f"the rows at {path} cannot be read")


def lanes_and_rows(meta: Mapping[str, Any], path: str | Path) -> tuple[int, int]:
    """The lanes and the number of rows that a saved replay says it has.

    Raises:
        CheckpointError: they are no counts.
    """
    counts: list[Any] = [meta.get(name) for name in ("lanes", "written", "capacity")]
    if not all(type(count) is int for count in counts) or counts[0] < 1 or min(counts) < 0:
        raise CheckpointError(f"{path}: lanes, written and capacity are {counts}, which are no counts of rows")
    return counts[0], min(counts[1:])


def read_rows(path: str | os.PathLike[str], where: str = "") -> TensorDict:
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
        other = no_rows(path)
        if other is not None:
            raise CheckpointError(f"{where}={path} {other}")
        try:
            return read_rows(path)
        except CheckpointError as error:
            raise CheckpointError(f"{where}: {error}") from error
    with readable(Path(path)):
        return _read_rows(Path(path))


_MAKES = "makes a folder of rows of it"
_MINARI = f"is a data set of Minari: 'unified-rl data import minari {{path}} FOLDER' {_MAKES}"
OTHERS = {
    "metadata.json": _MINARI,
    "data/metadata.json": _MINARI,
    "meta/info.json": f"is a data set of LeRobot: 'unified-rl data import lerobot {{path}} FOLDER' {_MAKES}",
    "config.yaml": f"is a run: 'unified-rl evaluate {{path}} --record FOLDER' {_MAKES}",
}
"""Files of folders that people take for a folder of rows."""


def no_rows(path: str | os.PathLike[str]) -> str | None:
    """What a path is instead of a folder of rows, and how to make one of it; None where it may be one."""
    place = Path(path)
    if place.is_file():
        return (
            "is a file, but rows are read from a folder that 'unified-rl data import FORMAT FILE FOLDER' or "
            "'unified-rl evaluate RUN --record FOLDER' wrote; from arrays of N rows: Replay(N, "
            "sampler=Uniform()).extend(TensorDict({'observation': ..., 'action': ...}, [N])), then .dumps('FOLDER') on "
            "that replay"
        )
    if not place.exists():
        return "does not exist; 'unified-rl data import' and 'unified-rl data make' write folders of rows"
    if (place / "replay.json").is_file():
        return None
    return next((text.format(path=path) for name, text in OTHERS.items() if (place / name).is_file()), None)


def _read_rows(path: str | Path) -> TensorDict:
    saved = Saved(path)
    lanes, count = lanes_and_rows(saved.meta, path)
    if not count:
        raise CheckpointError(f"the replay saved at {path} holds no rows")
    lead = [count] if lanes == 1 else [count // lanes, lanes]
    names = [name for name in saved.names() if name.startswith("row.")]
    rows = {name.removeprefix("row."): saved.read(name, 0, count).unflatten(0, lead) for name in sorted(names)}
    return TensorDict(rows, batch_size=lead)
