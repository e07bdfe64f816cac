"""Drawing rows that are at most so many policy versions old."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unified_rl.configurable import configurable
from unified_rl.errors import RecordError
from unified_rl.ranges import Whole, ranged
from unified_rl.replay.ring import IntArray, Ring
from unified_rl.replay.samplers.base import Draw, Sampler, uniform


class VersionRuns:
    """Stretches of consecutive slots with the same versions, in write order.

    A row's version is the oldest of its units. For each run: its first serial, the smallest and largest version of its
    rows in any one slot, and the newest version of any unit; ``peak`` is the running maximum of ``largest``, which
    finds the first run that can hold rows within a bound by bisection even if writers deliver out of order.
    """

    _names = ("first", "smallest", "largest", "newest", "peak")

    def __init__(self) -> None:
        self._table = np.zeros((len(self._names), 16), dtype=np.int64)
        self._start = self._stop = 0

    def __len__(self) -> int:
        return self._stop - self._start

    def column(self, name: str) -> IntArray:
        """``[runs]``: one of the columns, oldest run first."""
        return self._table[self._names.index(name), self._start : self._stop]

    def append(self, first: int, lanes: int, oldest: IntArray, newest: IntArray) -> None:
        """Adds rows from serial ``first`` on with these versions (``[n]`` each, n a multiple of ``lanes``)."""
        slots = np.stack(
            [oldest.reshape(-1, lanes).min(1), oldest.reshape(-1, lanes).max(1), newest.reshape(-1, lanes).max(1)]
        )
        before = np.full((3, 1), np.iinfo(np.int64).min) if not len(self) else self._table[1:4, self._stop - 1, None]
        changes = np.flatnonzero((np.diff(slots, axis=1, prepend=before) != 0).any(0))
        peak = int(before[1, 0]) if not len(self) else int(self._table[4, self._stop - 1])
        self._reserve(len(changes))
        run = self._table[:, self._stop : self._stop + len(changes)]
        run[0] = first + changes * lanes
        run[1:4] = slots[:, changes]
        run[4] = np.maximum.accumulate(np.maximum(run[2], peak))
        self._stop += len(changes)

    def _reserve(self, count: int) -> None:
        if self._stop + count <= self._table.shape[1]:
            return
        held = self._table[:, self._start : self._stop]
        table = np.zeros((len(self._names), 2 * (len(self) + count)), dtype=np.int64)
        table[:, : len(self)] = held
        self._table, self._start, self._stop = table, 0, len(self)

    def expire(self, oldest: int) -> None:
        """Forgets the runs that end before the serial ``oldest``."""
        if len(self):
            self._start += max(0, int(self.column("first").searchsorted(oldest, side="right")) - 1)

    def within(self, bound: int, low: int, high: int) -> tuple[IntArray, IntArray, bool]:
        """Ranges of serials in ``[low, high)`` whose slots hold a row of at least version ``bound``.

        Returns:
            First serials and lengths of the ranges, and whether some of their rows are older than the bound.
        """
        skip = int(self.column("peak").searchsorted(bound))
        first = self.column("first")[skip:]
        last = np.append(first[1:], high)
        fit = self.column("largest")[skip:] >= bound
        first, last = np.maximum(first, low), np.minimum(last, high)
        fit &= last > first
        mixed = bool((self.column("smallest")[skip:][fit] < bound).any())
        return first[fit], (last - first)[fit], mixed


@configurable
@ranged()
class StalenessBounded(Sampler):
    """Uniform over the rows whose policy version is at most ``max_lag`` behind the consumer's, with replacement.

    The version of a row is that of its oldest unit (under ``mask``, if rows hold one). Draws need ``version=``. A draw
    costs a bisection and the number of versions within the bound, not a pass over the rows.

    Args:
        max_lag: 0 draws only what the consumer's own weights collected.
    """

    keys = ("policy_version",)
    optional_keys = ("mask",)

    def __init__(self, max_lag: Whole = 4) -> None:
        self.max_lag = max_lag

    def bind(self, ring: Ring, columns: dict[str, NDArray[Any]]) -> None:
        self._version: IntArray = np.zeros(ring.physical, dtype=np.int64)
        super().bind(ring, columns)

    def reset(self) -> None:
        self.runs = VersionRuns()

    def wrote(self, low: int, high: int, values: Mapping[str, NDArray[Any]]) -> None:
        oldest, newest = row_versions(values["policy_version"], values.get("mask"))
        self.ring.write(self._version, low, high, oldest)
        self.runs.append(low, self.ring.lanes, oldest, newest)
        self.runs.expire(self.ring.oldest)

    def draw(self, count: int, rng: np.random.Generator, length: int, version: int | None) -> Draw:
        low, high = self.starts(length)
        bound = self._bound(version)
        first, size, mixed = self.runs.within(bound, low, high)
        if not len(first):
            held = self.runs.column("largest")
            raise RecordError(
                f"no row is within max_lag={self.max_lag} of version {version}: the newest of {self.ring.live} rows is "
                f"of version {held.max()}; collect more, or raise max_lag"
            )
        serials = _pick(rng, count, first, size)
        while mixed:  # slots whose lanes differ in version
            stale = np.flatnonzero(self._version[self.ring.position(serials)] < bound)
            if not len(stale):
                break
            serials[stale] = _pick(rng, len(stale), first, size)
        return Draw(serials, {})

    def _bound(self, version: int | None) -> int:
        if version is None:
            raise RecordError("staleness-bounded draws need the consumer's version: sample(..., version=...)")
        newest = self.runs.column("newest")
        if newest.max() > version:
            raise RecordError(f"a row is of version {newest.max()}, newer than its consumer's {version}")
        return version - self.max_lag


def row_versions(version: NDArray[Any], mask: NDArray[Any] | None) -> tuple[IntArray, IntArray]:
    """Oldest and newest version of each row.

    Args:
        version: ``[n]`` or ``[n, N]`` int64.
        mask: ``[n, N]`` bool, the units that count; a row without any counts them all. Units of a version below 0,
            which no policy said, count nowhere but in a row that has no others.
    """
    if version.ndim == 1:
        return version, version
    if mask is None or mask.shape != version.shape:
        flat = version.reshape(len(version), -1)
        return flat.min(1), flat.max(1)
    counted = mask & (version >= 0)
    counted |= ~counted.any(1, keepdims=True) & mask
    counted |= ~counted.any(1, keepdims=True)
    info = np.iinfo(np.int64)
    return np.where(counted, version, info.max).min(1), np.where(counted, version, info.min).max(1)


def _pick(rng: np.random.Generator, count: int, first: IntArray, size: IntArray) -> IntArray:
    """Uniform serials from the ranges ``[first, first + size)``."""
    if len(first) == 1:
        return uniform(rng, int(first[0]), int(first[0] + size[0]), count)
    ends = size.cumsum()
    at = rng.integers(0, ends[-1], count)
    run = ends.searchsorted(at, side="right")
    return np.asarray(first[run] + at - (ends[run] - size[run]))
