"""The commit journal of a memory-mapped replay.

Two fixed-size records in one mapped file, written in turn, and behind them one word that says which is current. The
word is written last, in one store: a process that is killed while it writes a record leaves the word at the other one,
and a current record whose checksum is wrong was damaged.
"""

from __future__ import annotations

import json
import mmap
import struct
import zlib
from pathlib import Path
from typing import Any

from unified_rl.errors import CheckpointError, DamageError
from unified_rl.files import write_atomically

_SIZE = 4096
_HEADER = struct.Struct("<QII")  # sequence number, payload length, checksum of both and of the payload
_FIRST = struct.Struct("<QI")
_WORD = struct.Struct("<II")  # sequence number, checksum of it


class Journal:
    """The journal at ``path``; ``payload`` is what the commit at its opening says."""

    def __init__(self, path: Path, sequence: int, payload: dict[str, Any]) -> None:
        self.path, self.sequence, self.payload = path, sequence, payload
        with open(path, "r+b") as file:
            self._map = mmap.mmap(file.fileno(), 2 * _SIZE + _WORD.size)

    @classmethod
    def create(cls, path: Path) -> Journal:
        """Makes a journal with an empty commit."""
        first = _pack(1, b'{"written": 0}')
        write_atomically(path, bytes(_SIZE) + first.ljust(_SIZE, b"\0") + _word(1))
        return cls(path, 1, {"written": 0})

    @classmethod
    def open(cls, path: Path) -> Journal:
        """Opens a journal at its current commit.

        Raises:
            DamageError: it is missing, or what the last commit said is damaged.
        """
        try:
            data = path.read_bytes()
        except OSError as error:
            raise DamageError(f"the replay's journal cannot be read: {error}") from error
        word = data[2 * _SIZE :]
        found = [_unpack(data[at : at + _SIZE]) for at in (0, _SIZE)]
        for sequence, payload in (record for record in found if record is not None):
            if word == _word(sequence):
                return cls(path, sequence, payload)
        raise DamageError(f"{path} is damaged: it names no commit")

    @staticmethod
    def committed_rows(path: Path) -> int:
        """Rows ever committed; 0 where there is no readable journal."""
        try:
            return int(Journal.open(path).payload["written"])
        except DamageError:
            return 0

    def commit(self, payload: bytes, durable: bool = False) -> None:
        """Makes ``payload``, JSON, the current commit."""
        sequence = self.sequence + 1
        record = _pack(sequence, payload)
        if len(record) > _SIZE:
            raise CheckpointError(f"a commit of {len(record)} bytes does not fit the journal's {_SIZE}")
        self.sequence = sequence
        at = sequence % 2 * _SIZE
        self._map[at : at + len(record)] = record
        if durable:
            self._map.flush()
        self._map[2 * _SIZE : 2 * _SIZE + _WORD.size] = _word(sequence)
        if durable:
            self._map.flush()


def _pack(sequence: int, payload: bytes) -> bytes:
    checksum = zlib.crc32(payload, zlib.crc32(_FIRST.pack(sequence, len(payload))))
    return _HEADER.pack(sequence, len(payload), checksum) + payload


def _word(sequence: int) -> bytes:
    low = sequence & 0xFFFFFFFF
    return _WORD.pack(low, zlib.crc32(low.to_bytes(4, "little")))


def _unpack(record: bytes) -> tuple[int, dict[str, Any]] | None:
    if len(record) < _HEADER.size:
        return None
    sequence, length, _ = _HEADER.unpack_from(record)
    payload = record[_HEADER.size : _HEADER.size + length]
    if sequence == 0 or _pack(sequence, payload) != record[: _HEADER.size + length]:
        return None
    return sequence, json.loads(payload)
