"""Samplers that draw whole groups, or rows by category."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unified_rl.configurable import configurable
from unified_rl.errors import ConfigError, RecordError
from unified_rl.ranges import Count, NonNegative, ranged
from unified_rl.replay.ring import IntArray, Ring
from unified_rl.replay.samplers.base import Draw, Sampler


@configurable
@ranged()
class Group(Sampler):
    """Complete groups: rows that share ``group``, ``size`` of them at a time and adjacent in the batch.

    A group is complete while at least ``size`` of its rows are live. Where it has more (the same prompt was answered
    again), one of its whole generations is drawn, counted back from its newest row. Groups of one batch differ.

    Args:
        size: rows of a group; a batch size is a multiple of it.
    """

    keys = ("group",)

    def __init__(self, size: Count = 8) -> None:
        self.size = size

    def bind(self, ring: Ring, columns: dict[str, NDArray[Any]]) -> None:
        self._group: IntArray = np.zeros(ring.physical, dtype=np.int64)
        super().bind(ring, columns)

    def reset(self) -> None:
        self._indexed = -1, -1

    def wrote(self, low: int, high: int, values: Mapping[str, NDArray[Any]]) -> None:
        self.ring.write(self._group, low, high, values["group"].reshape(high - low, -1)[:, 0])

    def _index(self, low: int, high: int) -> None:
        """Sorts the live rows by group; they are nearly sorted, for which a stable sort is nearly linear."""
        if self._indexed == (low, high):
            return
        group = self.ring.read(self._group, low, high)
        self._order = low + np.argsort(group, kind="stable")
        ordered = np.sort(group, kind="stable")
        first = np.flatnonzero(np.diff(ordered, prepend=ordered[0] - 1))
        count = np.diff(first, append=len(ordered))
        complete = count >= self.size
        self._end, self._generations = (first + count)[complete], (count // self.size)[complete]
        self._indexed = low, high

    def pending(self) -> int:
        """Rows of complete groups."""
        if not self.ring.live:
            return 0
        self._index(*self.starts(1))
        return self.size * int(self._generations.sum())

    def draw(self, count: int, rng: np.random.Generator, length: int, version: int | None) -> Draw:
        self._index(*self.starts(length))
        if count % self.size:
            raise RecordError(f"groups have {self.size} rows, so a batch cannot have {count}")
        wanted = count // self.size
        if wanted > len(self._end):
            raise RecordError(f"{wanted} groups of {self.size} were asked for; {len(self._end)} complete ones are held")
        chosen = rng.choice(len(self._end), wanted, replace=False)
        generation = rng.integers(0, self._generations[chosen])
        first = self._end[chosen] - self.size * (1 + generation)
        return Draw(self._order[(first[:, None] + np.arange(self.size)).reshape(-1)], {})


class SerialLists:
    """For each category the serials of its rows, in write order."""

    def __init__(self) -> None:
        self._lists: dict[int, IntArray] = {}
        self._counts: dict[int, int] = {}

    def append(self, low: int, categories: IntArray, oldest: int) -> None:
        """Adds rows from serial ``low`` on; ``oldest`` is the oldest live serial."""
        for category in np.unique(categories).tolist():
            new = low + np.flatnonzero(categories == category)
            held = self._lists.get(category, np.zeros(64, dtype=np.int64))
            count = self._counts.get(category, 0)
            if count + len(new) > len(held):  # amortised: doubles, after dropping what has left the ring
                alive = held[held[:count].searchsorted(oldest) : count]
                count = len(alive)
                held = np.concatenate([alive, np.zeros(count + 2 * len(new), dtype=np.int64)])
            held[count : count + len(new)] = new
            self._lists[category], self._counts[category] = held, count + len(new)

    def between(self, category: int, low: int, high: int) -> IntArray:
        """The serials of a category in ``[low, high)``, ascending."""
        if category not in self._lists:
            return np.zeros(0, dtype=np.int64)
        held = self._lists[category][: self._counts[category]]
        first, last = held.searchsorted((low, high))
        return held[first:last]


@configurable
@ranged()
class Buckets(Sampler):
    """First a bucket by its weight, then a row of it uniformly, with replacement.

    A row belongs to bucket ``b`` if ``edges[b - 1] <= value < edges[b]``. Empty buckets give their weight to the
    others in proportion. Source for buckets by success rate: ExGRPO (arXiv 2510.02245).

    Args:
        key: a stored scalar, or ``[T]`` values that are summed.
        edges: ascending; one fewer than the buckets.
        weights: of the buckets; uniform if not given.
    """

    def __init__(self, key: str, edges: list[float], weights: list[NonNegative] | None = None) -> None:
        weights = [1.0] * (len(edges) + 1) if weights is None else weights
        if len(weights) != len(edges) + 1 or sorted(edges) != list(edges) or min(weights) < 0:
            raise ConfigError(f"{len(edges)} ascending edges need {len(edges) + 1} weights that are not negative")
        self.keys = (key,)
        self.edges, self.weights = np.asarray(edges, dtype=np.float64), np.asarray(weights, dtype=np.float64)

    def reset(self) -> None:
        self.lists = SerialLists()

    def wrote(self, low: int, high: int, values: Mapping[str, NDArray[Any]]) -> None:
        value = values[self.keys[0]].astype(np.float64).reshape(high - low, -1).sum(1)
        self.lists.append(low, self.edges.searchsorted(value, side="right"), self.ring.oldest)

    def draw(self, count: int, rng: np.random.Generator, length: int, version: int | None) -> Draw:
        low, high = self.starts(length)
        rows = [self.lists.between(bucket, low, high) for bucket in range(len(self.weights))]
        weights = self.weights * [len(serials) > 0 for serials in rows]
        if not weights.sum() > 0:
            raise RecordError(f"every bucket of {self.keys[0]} with a positive weight is empty")
        counts = rng.multinomial(count, weights / weights.sum())
        return Draw(np.concatenate([rng.choice(r, n) for r, n in zip(rows, counts, strict=True) if n]), {})
