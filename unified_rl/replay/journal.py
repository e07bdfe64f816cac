"""The commit journal of a memory-mapped replay.

Two fixed-size records in one mapped file, written in turn. A record is valid if its checksum is; the valid record with
the higher sequence number is the current commit. A process killed while it writes one record leaves the other valid.
"""

from __future__ import annotations

import json
import mmap
import struct
import zlib
from pathlib import Path
from typing import Any

from unified_rl.errors import CheckpointError
from unified_rl.files import write_atomically

_SIZE = 4096
_HEADER = struct.Struct("<QII")  # sequence number, payload length, checksum of both and of the payload


class Journal:
    """The journal at ``path``; ``payload`` is what the current commit says."""

    def __init__(self, path: Path, sequence: int, payload: dict[str, Any]) -> None:
        self.path, self.sequence, self.payload = path, sequence, payload
        with open(path, "r+b") as file:
            self._map = mmap.mmap(file.fileno(), 2 * _SIZE)

    @classmethod
    def create(cls, path: Path) -> Journal:
        """Makes a journal with an empty commit."""
        first = _pack(1, b'{"written": 0}')
        write_atomically(path, bytes(_SIZE) + first.ljust(_SIZE, b"\0"))
        return cls(path, 1, {"written": 0})

    @classmethod
    def open(cls, path: Path) -> Journal:
        """Opens a journal.

        Raises:
            CheckpointError: if it is missing, or neither record is valid.
        """
        try:
            data = path.read_bytes()
        except OSError as error:
            raise CheckpointError(f"the replay's journal cannot be read: {error}") from error
        records = [_unpack(data[at : at + _SIZE]) for at in (0, _SIZE)]
        valid = [record for record in records if record is not None]
        if len(data) != 2 * _SIZE or not valid:
            raise CheckpointError(f"{path} is damaged: it names no commit")
        return cls(path, *max(valid, key=lambda record: record[0]))

    @staticmethod
    def committed_rows(path: Path) -> int:
        """Rows ever committed; 0 where there is no readable journal."""
        try:
            return int(Journal.open(path).payload["written"])
        except CheckpointError:
            return 0

    def commit(self, payload: dict[str, Any], durable: bool = False) -> None:
        """Makes ``payload`` the current commit."""
        record = _pack(self.sequence + 1, json.dumps(payload).encode())
        if len(record) > _SIZE:
            raise CheckpointError(f"a commit of {len(record)} bytes does not fit the journal's {_SIZE}")
        self.sequence += 1
        self.payload = payload
        at = self.sequence % 2 * _SIZE
        self._map[at : at + len(record)] = record
        if durable:
            self._map.flush()


def _pack(sequence: int, payload: bytes) -> bytes:
    checksum = zlib.crc32(payload, zlib.crc32(struct.pack("<QI", sequence, len(payload))))
    return _HEADER.pack(sequence, len(payload), checksum) + payload


def _unpack(record: bytes) -> tuple[int, dict[str, Any]] | None:
    if len(record) < _HEADER.size:
        return None
    sequence, length, _ = _HEADER.unpack_from(record)
    payload = record[_HEADER.size : _HEADER.size + length]
    if sequence == 0 or _pack(sequence, payload) != record[: _HEADER.size + length]:
        return None
    return sequence, json.loads(payload)
