"""Checksums of memory-mapped rows and columns, kept current write by write, and the log of changes in place.

A checksum is the sum of the words of a stretch of memory, modulo 2**64 (2**32 for words of four bytes): rows can be
added one write after another, the sum of a single flipped bit is never the same, nor is that of a page of zeros unless
its words happened to add up to nothing. Adding up costs a fraction of the copy that a write is.
"""

from __future__ import annotations

import mmap
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unified_rl.errors import DamageError
from unified_rl.replay.ring import IntArray, Ring

_FEW = 48
"""Words up to which Python adds faster than numpy."""


class Words:
    """The words of an array ``[positions, *]`` of which row ranges are added up.

    Args:
        data: C-contiguous; sums follow what it holds.
    """

    def __init__(self, data: NDArray[Any]) -> None:
        size = data.nbytes // len(data)
        unit = next((unit for unit in (8, 4, 2, 1) if size % unit == 0), 1)
        self.words = data.reshape(-1).view(f"u{unit}") if size else np.zeros(0, np.uint8)
        self.width = size // unit
        self.kind = np.uint32 if unit == 4 else np.uint64  # four-byte words add twice as fast among themselves
        self.mask = (1 << 32) - 1 if unit == 4 else (1 << 64) - 1
        self._few = memoryview(self.words)

    def sum(self, first: int, last: int) -> int:
        """The sum over rows ``[first, last)``, not yet reduced."""
        first, last = first * self.width, last * self.width
        if last - first <= _FEW:
            return sum(self._few[first:last].tolist())
        return int(np.add.reduce(self.words[first:last], dtype=self.kind))

    def over(self, ring: Ring, low: int, high: int) -> int:
        """The sum over the serials ``[low, high)``."""
        return sum(self.sum(first, last) for _, first, last in ring.pieces(low, high)) & self.mask if high > low else 0


class RowSums:
    """One checksum for each leaf and each block of consecutive serials.

    The sum of a complete block lies in a mapped table; that of the block which still grows belongs into the commit, so
    it always covers exactly the rows that are committed.

    Args:
        path: file of the table.
        leaves: the arrays ``[physical, *]`` by name.
        ring: whose serials the blocks count; it keeps ``block`` rows behind the oldest live one.
        block: rows of a block.
        made: whether the file is there already.

    Raises:
        DamageError: the file is missing or of another size.
    """

    def __init__(self, path: Path, leaves: dict[str, NDArray[Any]], ring: Ring, block: int, made: bool) -> None:
        self.path, self.ring, self.block = path, ring, block
        self.words = {key: Words(array) for key, array in leaves.items()}
        self._list = list(self.words.values())
        shape = (ring.physical // block + 4, len(leaves))
        size = shape[0] * shape[1] * 8
        held = path.stat().st_size if path.is_file() else 0
        if made and held != size:
            raise DamageError(f"{path} is damaged: it holds {held} bytes of {size}")
        self.table = np.memmap(path, dtype=np.uint64, mode="r+" if made else "w+", shape=shape)
        self.start(0)

    def start(self, serial: int) -> None:
        """Forgets every row; the next one is ``serial``."""
        self.first = self.at = serial
        self.running = [0] * len(self._list)

    def state(self) -> list[Any]:
        """What belongs into a commit: the first serial that was added up, and the sums of the block that grows."""
        return [self.first, *self.running]

    def load(self, state: list[Any], written: int) -> None:
        """Takes :meth:`state` back."""
        self.first, self.running, self.at = int(state[0]), [int(x) for x in state[1:]], written

    def add(self, high: int) -> None:
        """Adds the rows from the last one added up to serial ``high``, which lie in the leaves already."""
        low, self.at = self.at, high
        while low < high:
            end = min(high, (low // self.block + 1) * self.block)
            for _, first, last in self.ring.pieces(low, end):
                self.running = [
                    (x + w.sum(first, last)) & w.mask for x, w in zip(self.running, self._list, strict=True)
                ]
            if end % self.block == 0:
                self.table[(end // self.block - 1) % len(self.table)] = self.running
                self.running = [0] * len(self._list)
            low = end

    def check(self, folder: Path) -> None:
        """Adds every live row up again.

        Raises:
            DamageError: a sum differs; the message names the leaf's file in ``folder``.
        """
        ring = self.ring
        for number in range(ring.oldest // self.block, -(-ring.written // self.block)):
            low, high = max(number * self.block, self.first), min((number + 1) * self.block, ring.written)
            whole = high == (number + 1) * self.block
            expected = self.table[number % len(self.table)].tolist() if whole else self.running
            for (key, words), want in zip(self.words.items(), expected, strict=True):
                if words.over(ring, low, high) != want:
                    raise DamageError(
                        f"{folder / key}.memmap is damaged (or {self.path.name} is): rows {low} to {high - 1} do not "
                        "add up to the checksum that was written with them"
                    )


class Changes:
    """The last change in place, written down before it is committed and made after: a kill between is caught up on.

    Args:
        path: the file; it grows with the largest change.
        made: whether it is there already.

    Raises:
        DamageError: it is missing, or of a size that it never has.
    """

    def __init__(self, path: Path, made: bool) -> None:
        self.path = path
        if not made:
            path.write_bytes(bytes(self._size(0)))
        held = path.stat().st_size if path.is_file() else 0
        room = (held - 32) // 16
        if room < 0 or held != self._size(room):
            raise DamageError(f"{path} is damaged: it holds {held} bytes")
        self._map(room)

    @staticmethod
    def _size(room: int) -> int:
        return 32 + 16 * room

    def _map(self, room: int) -> None:
        self.room = room
        with open(self.path, "r+b") as file:
            if self.path.stat().st_size < self._size(room):
                file.truncate(self._size(room))
            buffer = mmap.mmap(file.fileno(), self._size(room))
        self._head = np.frombuffer(buffer, np.uint64, 4)  # sequence number, count, column, checksum
        self._positions = np.frombuffer(buffer, np.int64, room, 32)
        self._values = np.frombuffer(buffer, np.uint64, room, 32 + 8 * room)

    def write(self, sequence: int, column: int, positions: IntArray, values: NDArray[Any]) -> None:
        """Notes that the commit of this number sets ``values`` at ``positions`` of a column."""
        count = len(positions)
        if count > self.room:
            self._head[0] = 0
            self._map(max(2 * self.room, count, 1024))
        head, held = self._head, self._values.view(values.dtype)[:count]
        head[0] = 0  # void until it is whole
        self._positions[:count] = positions
        held[:] = values
        head[1], head[2], head[3] = count, column, zlib.crc32(held, zlib.crc32(self._positions[:count]))
        head[0] = sequence

    def read(self, sequence: int, types: list[Any]) -> tuple[int, IntArray, NDArray[Any]] | None:
        """The column, positions and values that belong to a commit, or None where it changed nothing in place.

        Raises:
            DamageError: they are not what was written.
        """
        if int(self._head[0]) != sequence:
            return None
        _, count, column, checksum = (int(x) for x in self._head)
        if count <= self.room and column < len(types):
            positions, values = self._positions[:count], self._values.view(types[column])[:count]
            if zlib.crc32(values, zlib.crc32(positions)) == checksum:
                return column, positions.copy(), values.copy()
        raise DamageError(f"{self.path} is damaged: the last change in it is not what was written")
