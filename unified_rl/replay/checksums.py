"""Checksums of memory-mapped rows and columns, kept current write by write, and the log of changes in place.

Rows are added to a checksum one write after another, whatever the writes were. Narrow rows go through CRC-32; the words
of wide ones are added up modulo 2**64 (2**32 for words of four bytes), which costs a fraction of copying them: a
flipped bit always changes that sum, and a page of zeros does unless its words happened to add up to nothing.
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


class Narrow:
    """CRC-32 over ranges of rows of at most 8 bytes.

    Args:
        data: ``[positions, bytes]`` uint8, C-contiguous; checksums follow what it holds.
    """

    def __init__(self, data: NDArray[Any]) -> None:
        self.width = data.shape[1]
        self._bytes = data.reshape(-1).data

    def extend(self, checksum: int, first: int, last: int) -> int:
        """The checksum of earlier rows and then of the rows ``[first, last)``."""
        return zlib.crc32(self._bytes[first * self.width : last * self.width], checksum)


class Words:
    """The words of an array ``[positions, *]``, added up over ranges of rows.

    Args:
        data: C-contiguous; sums follow what it holds.
    """

    def __init__(self, data: NDArray[Any]) -> None:
        size = data.nbytes // len(data)
        unit = next(unit for unit in (8, 4, 2, 1) if size % unit == 0)
        self.words = data.reshape(-1).view(f"u{unit}")
        self.width = size // unit
        self.kind = np.uint32 if unit == 4 else np.uint64  # four-byte words add twice as fast among themselves
        self.mask = (1 << 32) - 1 if unit == 4 else (1 << 64) - 1
        self._few = self.words.data

    def sum(self, first: int, last: int) -> int:
        """The sum over rows ``[first, last)``, not yet reduced."""
        first, last = first * self.width, last * self.width
        if last - first <= _FEW:
            return sum(self._few[first:last].tolist())
        return int(np.add.reduce(self.words[first:last], dtype=self.kind))

    def extend(self, checksum: int, first: int, last: int) -> int:
        """The checksum of earlier rows and then of the rows ``[first, last)``."""
        return (checksum + self.sum(first, last)) & self.mask

    def over(self, ring: Ring, low: int, high: int) -> int:
        """The sum over the serials ``[low, high)``."""
        return sum(self.sum(first, last) for _, first, last in ring.pieces(low, high)) & self.mask if high > low else 0


def _checksum(data: NDArray[Any]) -> Narrow | Words:
    return Words(data) if data.shape[1] > 8 else Narrow(data)


class RowSums:
    """One checksum for each leaf and each block of consecutive serials.

    The sum of a complete block lies in a mapped table; that of the block which still grows belongs into the commit, so
    it always covers exactly the rows that are committed.

    Args:
        path: file of the table.
        leaves: the arrays ``[physical, bytes]`` uint8 by name.
        ring: whose serials the blocks count; it keeps ``block`` rows behind the oldest live one.
        block: rows of a block.
        made: whether the file is there already.

    Raises:
        DamageError: the file is missing or of another size.
    """

    def __init__(self, path: Path, leaves: dict[str, NDArray[Any]], ring: Ring, block: int, made: bool) -> None:
        self.path, self.ring, self.block = path, ring, block
        self.leaves = {key: _checksum(array) for key, array in leaves.items()}
        self._list = list(self.leaves.values())
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
            self.running = self._extended(self.running, low, end)
            if end % self.block == 0:
                self.table[(end // self.block - 1) % len(self.table)] = self.running
                self.running = [0] * len(self._list)
            low = end

    def _extended(self, sums: list[int], low: int, high: int) -> list[int]:
        """Checksums and then the serials ``[low, high)``, a leaf each."""
        for _, first, last in self.ring.pieces(low, high):
            sums = [leaf.extend(x, first, last) for leaf, x in zip(self._list, sums, strict=True)]
        return sums

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
            sums = self._extended([0] * len(expected), low, high)
            for key, want, found in zip(self.leaves, expected, sums, strict=True):
                if found != want:
                    raise DamageError(
                        f"{folder / key}.memmap is damaged (or {self.path.name} is): rows {low} to {high - 1} do not "
                        "have the checksum that was written with them"
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
        head[1], head[2], head[3] = count, column, zlib.crc32(held.data, zlib.crc32(self._positions[:count].data))
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
            if zlib.crc32(values.data, zlib.crc32(positions.data)) == checksum:
                return column, positions.copy(), values.copy()
        raise DamageError(f"{self.path} is damaged: the last change in it is not what was written")
