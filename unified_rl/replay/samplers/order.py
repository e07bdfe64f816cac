"""Samplers that look at nothing but the age of rows."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from typing import Any

import numpy as np

from unified_rl.configurable import configurable
from unified_rl.errors import RecordError
from unified_rl.ranges import Count, Positive, ranged
from unified_rl.replay.samplers.base import Draw, Sampler, uniform


@configurable
class Uniform(Sampler):
    """Every row (every window) with the same probability, with replacement."""

    def draw(self, count: int, rng: np.random.Generator, length: int, version: int | None) -> Draw:
        low, high = self.starts(length)
        return Draw(uniform(rng, low, high, count), {})


@configurable
@ranged()
class Segment(Uniform):
    """Uniform windows of ``length`` consecutive slots of one lane.

    Args:
        length: slots in a window, unless a draw names another length.
    """

    def __init__(self, length: Count = 16) -> None:
        self.length = length


@configurable
class Fresh(Sampler):
    """Each committed row exactly once, oldest first: on-policy training, and first-in first-out queues.

    A draw without length returns the oldest unconsumed rows. A draw of length ``T`` returns the oldest unconsumed
    ``T`` slots of every lane, so its batch size must be a multiple of the number of lanes. A draw of no given size
    returns what is left of the oldest write, so that an update takes what one collection brought, whatever its number.

    Args:
        drop: what happens to a write that would overwrite unconsumed rows: refused with a RecordError (default), or
            accepted and counted in ``dropped``.
    """

    queue = True

    def __init__(self, drop: bool = False) -> None:
        self.drop = drop

    def reset(self) -> None:
        self.cursor = self.ring.oldest
        self.dropped = 0
        self.writes: deque[int] = deque()
        self._opened = False

    def before_write(self, count: int, values: Mapping[str, Any]) -> None:
        excess = self.ring.written + count - self.ring.capacity - self.cursor
        if excess > 0 and not self.drop:
            raise RecordError(
                f"writing {count} rows would overwrite {excess} that no draw has returned yet; sample them first, "
                f"raise capacity above {self.ring.capacity}, or set drop=true"
            )
        self._opened = False

    def wrote(self, low: int, high: int, values: Mapping[str, Any]) -> None:
        if self._opened:  # a memory-mapped write may be committed in several parts
            self.writes[-1] += high - low
        else:
            self.writes.append(high - low)
        self._opened = True
        lost = max(0, self.ring.oldest - self.cursor)
        self.dropped += lost
        self._advance(lost)

    def _advance(self, count: int) -> None:
        """Moves the cursor, and takes so many rows off the oldest writes."""
        self.cursor += count
        while count and self.writes:
            taken = min(count, self.writes[0])
            self.writes[0] -= taken
            count -= taken
            if not self.writes[0]:
                self.writes.popleft()
                self._opened = self._opened and bool(self.writes)

    def restore(self, low: int, high: int, values: Mapping[str, Any]) -> None:
        """The cursor is restored by :meth:`load_state_dict`."""

    def pending(self) -> int:
        return self.ring.written - self.cursor

    def oldest_write(self, length: int) -> int:
        if not self.writes:
            raise RecordError("no write waits to be drawn; write rows before sampling")
        if self.writes[0] % length:
            raise RecordError(f"the oldest write holds {self.writes[0]} rows, no multiple of windows of {length}")
        return self.writes[0] // length

    def draw(self, count: int, rng: np.random.Generator, length: int, version: int | None) -> Draw:
        lanes = self.ring.lanes
        if length > 1 and count % lanes:
            raise RecordError(f"windows of fresh rows come for all {lanes} lanes at once, so not {count} of them")
        if count * length > self.pending():
            raise RecordError(f"{count * length} fresh rows were asked for, but {self.pending()} are unconsumed")
        offsets = np.arange(count)
        if length > 1:
            offsets = offsets // lanes * (lanes * length) + offsets % lanes
        serials = self.cursor + offsets
        self._advance(count * length)
        return Draw(serials, {})

    def state_dict(self) -> dict[str, Any]:
        return {"cursor": self.cursor, "dropped": self.dropped, "writes": list(self.writes)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.cursor, self.dropped = int(state["cursor"]), int(state["dropped"])
        waiting = [self.pending()] if self.pending() else []  # an older state tells no sizes: one write
        self.writes, self._opened = deque(map(int, state.get("writes", waiting))), False


@configurable
class WithoutReplacement(Sampler):
    """Epochs: every row that is live when an epoch starts, once, in random order.

    Rows overwritten during the epoch are skipped; rows written during it wait for the next one. A batch may straddle
    two epochs.
    """

    def reset(self) -> None:
        self._begin(0, 0, 0, 1)

    def _begin(self, seed: int, low: int, high: int, length: int) -> None:
        self.epoch = {"seed": seed, "low": low, "high": high, "length": length}
        self.order = low + np.random.default_rng(seed).permutation(high - low)
        self.taken = 0

    def draw(self, count: int, rng: np.random.Generator, length: int, version: int | None) -> Draw:
        low, high = self.starts(length)
        parts, missing = [], count
        while missing:
            if self.taken >= len(self.order) or self.epoch["length"] != length:
                self._begin(int(rng.integers(2**63)), low, high, length)
            chunk = self.order[self.taken : self.taken + missing]
            self.taken += len(chunk)
            chunk = chunk[chunk >= low]
            parts.append(chunk)
            missing -= len(chunk)
        return Draw(np.concatenate(parts), {})

    def state_dict(self) -> dict[str, Any]:
        return {**self.epoch, "taken": self.taken}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._begin(int(state["seed"]), int(state["low"]), int(state["high"]), int(state["length"]))
        self.taken = int(state["taken"])


@configurable
@ranged()
class Recency(Sampler):
    """Newer rows more often: the probability halves with every ``half_life`` slots of age, with replacement.

    Args:
        half_life: in slots (rows, where there is one lane).
    """

    def __init__(self, half_life: Positive = 10_000.0) -> None:
        self.half_life = half_life

    def draw(self, count: int, rng: np.random.Generator, length: int, version: int | None) -> Draw:
        low, high = self.starts(length)
        lanes = self.ring.lanes
        slots = (high - low) // lanes
        decay = math.log(2.0) / self.half_life
        # inverse distribution function of the geometric law truncated to `slots` ages
        mass = -math.expm1(-decay * slots)
        age = np.floor(-np.log1p(-rng.random(count) * mass) / decay).astype(np.int64)
        newest = high - lanes * (1 + np.minimum(age, slots - 1))
        return Draw(newest + rng.integers(0, lanes, count), {})
