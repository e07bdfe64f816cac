"""Where rows live: a ring addressed by serial numbers.

Every row ever written has a serial number, counted from 0. Serial ``r`` lives at position ``r % physical``; the newest
``capacity`` serials are live. Rows of one slot (one per lane) have consecutive serials, so a lane's next row is
``lanes`` serials later, and serial order is age order: samplers draw serials and never meet the ring's seam.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.int64]


@dataclass
class Ring:
    """The bookkeeping of a replay, shared with its sampler.

    Attributes:
        capacity: live rows at most; a multiple of ``lanes``.
        physical: positions; larger than ``capacity`` where a write must never touch a live row.
        lanes: rows of one slot.
        written: rows committed so far; a multiple of ``lanes``.
    """

    capacity: int
    physical: int
    lanes: int
    written: int = 0

    @property
    def oldest(self) -> int:
        """Serial of the oldest live row."""
        return max(0, self.written - self.capacity)

    @property
    def live(self) -> int:
        """Number of live rows."""
        return min(self.written, self.capacity)

    def last_start(self, length: int) -> int:
        """One past the newest serial from which a window of ``length`` slots is wholly written."""
        return self.written - (length - 1) * self.lanes

    def position(self, serials: IntArray) -> IntArray:
        """Where the rows with these serials are stored."""
        return serials if self.written <= self.physical else serials % self.physical

    def serial(self, positions: IntArray) -> IntArray:
        """The serials of the live rows stored at these positions (of the future, if never written)."""
        return self.oldest + (positions - self.oldest) % self.physical

    def pieces(self, low: int, high: int) -> list[tuple[int, int, int]]:
        """The serials ``[low, high)`` as at most two runs of positions: ``(offset in the range, first, last + 1)``."""
        first, count = low % self.physical, high - low
        head = min(count, self.physical - first)
        runs = [(0, first, first + head)]
        if head < count:
            runs.append((head, 0, count - head))
        return runs

    def read(self, values: NDArray[Any], low: int, high: int) -> NDArray[Any]:
        """The entries of ``values [physical, ...]`` that belong to the serials ``[low, high)``, in serial order."""
        runs = self.pieces(low, high)
        if len(runs) == 1:
            return values[runs[0][1] : runs[0][2]]
        return np.concatenate([values[first:last] for _, first, last in runs])

    def write(self, values: NDArray[Any], low: int, high: int, new: Any) -> None:
        """Assigns the scalar or array ``new`` to the serials ``[low, high)`` of ``values [physical, ...]``."""
        scalar = np.ndim(new) == 0
        for offset, first, last in self.pieces(low, high):
            values[first:last] = new if scalar else new[offset : offset + last - first]
