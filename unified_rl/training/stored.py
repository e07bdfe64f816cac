"""Tensors of a checkpoint that are read when they are asked for, whole or a range of rows; no pickle.

A tensor that processes hold in pieces lies in several safetensors files, one of each process, whose headers say where
its pieces begin. They are laid out as the ``HuggingFaceStorageWriter`` of ``torch.distributed.checkpoint`` lays them
out, and its ``HuggingFaceStorageReader`` reads them. Its other format has an index that is a pickle.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from unified_rl.errors import DamageError

FOLDER = "pieces"
"""Of a checkpoint: the files of the processes."""
SHARDING, OFFSETS = "DCP_SHARDING_INFO", "saved_offsets"
"""Keys of a file's header, as ``torch.distributed.checkpoint`` names them."""


@dataclass(frozen=True)
class Piece:
    """Rows of a tensor in a file.

    Attributes:
        file: the file.
        name: of the tensor in it.
        begin: first row of the whole tensor that it holds.
        shape: of the piece.
        dtype: as safetensors names it.
    """

    file: Path
    name: str
    begin: int
    shape: tuple[int, ...]
    dtype: str

    @property
    def end(self) -> int:
        """The row behind its last."""
        return self.begin + (self.shape[0] if self.shape else 1)


class Stored:
    """A tensor in files.

    Args:
        pieces: of one name, in any order.

    Raises:
        DamageError: they do not make one tensor; names a file.
    """

    def __init__(self, pieces: Sequence[Piece]) -> None:
        self.pieces = sorted(pieces, key=lambda piece: piece.begin)
        first, at = self.pieces[0], 0
        for piece in self.pieces:
            if piece.begin != at or piece.shape[1:] != first.shape[1:] or piece.dtype != first.dtype:
                raise DamageError(f"{piece.file} is damaged: its part of {piece.name} does not fit the others'")
            at = piece.end
        self.shape = (at, *first.shape[1:]) if first.shape else ()

    def part(self, begin: int, end: int) -> Tensor:
        """Rows ``[end - begin, ...]`` in memory of their own.

        Raises:
            DamageError: a file cannot be read.
        """
        found = []
        for piece in self.pieces:
            low, high = max(begin, piece.begin), min(end, piece.end)
            if low < high or (piece is self.pieces[0] and begin >= end):
                with _opened(piece.file) as file:
                    rows = file.get_slice(piece.name)[max(low, piece.begin) - piece.begin : max(high - piece.begin, 0)]
                    found.append(rows.clone())
        return torch.cat(found) if len(found) > 1 else found[0]

    def whole(self) -> Tensor:
        """All of it.

        Raises:
            DamageError: a file cannot be read.
        """
        if self.shape:
            return self.part(0, self.shape[0])
        with _opened(self.pieces[0].file) as file:
            out: Tensor = file.get_tensor(self.pieces[0].name).clone()
            return out


def stored_in(file: Path) -> dict[str, Piece]:
    """The tensors, or pieces, of a file; nothing but its header is read.

    Raises:
        DamageError: it cannot be read, or its header is none that was written here.
    """
    with _opened(file) as opened:
        told = json.loads((opened.metadata() or {}).get(SHARDING, "{}"))
        found = {}
        for name in opened.keys():
            view = opened.get_slice(name)
            shape = tuple(view.get_shape())
            offsets = told[name][OFFSETS] if told else [0] * len(shape)
            if not all(type(x) is int for x in offsets) or len(offsets) != len(shape) or any(offsets[1:]):
                raise ValueError(f"{name} begins at {str(offsets)[:80]}")
            found[name] = Piece(file, name, offsets[0] if shape else 0, shape, view.get_dtype())
        return found


def found_pieces(folder: Path) -> dict[str, Stored]:
    """The tensors that lie in pieces in a checkpoint's folder; none where it has no such files.

    Raises:
        DamageError: as :func:`stored_in`, or a piece is missing.
    """
    named: dict[str, list[Piece]] = {}
    for file in sorted((folder / FOLDER).glob("*.safetensors")):
        for name, piece in stored_in(file).items():
            named.setdefault(name, []).append(piece)
    return {name: Stored(pieces) for name, pieces in named.items()}


def write_pieces(folder: Path, rank: int, pieces: Mapping[str, tuple[Tensor, int]]) -> None:
    """Writes what a process holds.

    Args:
        folder: of the checkpoint.
        rank: of the process.
        pieces: by name, rows of a tensor and where they begin in it; empty ones are left out.

    Raises:
        OSError, SafetensorError: the disk is full or the folder cannot be written.
    """
    held = {name: (rows.detach().to("cpu").contiguous(), at) for name, (rows, at) in pieces.items() if len(rows)}
    told = {name: {OFFSETS: [at] + [0] * (rows.ndim - 1)} for name, (rows, at) in held.items()}
    metadata = {"format": "pt", "DCP_VERSION": "1.0", SHARDING: json.dumps(told)}
    (folder / FOLDER).mkdir(exist_ok=True)
    tensors = {name: rows.clone() for name, (rows, _) in held.items()}
    save_file(tensors, folder / FOLDER / f"{rank:05d}.safetensors", metadata=metadata)


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    try:
        with safe_open(file, framework="pt") as opened:
            yield opened
    except (OSError, SafetensorError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise DamageError(f"{file} is damaged ({error})") from error
