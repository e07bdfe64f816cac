"""Samplers that draw rows in proportion to a weight of each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unified_rl.configurable import configurable
from unified_rl.errors import RecordError
from unified_rl.ranges import NonNegative, Positive, UnitInterval, Whole, ranged
from unified_rl.replay.ring import IntArray, Ring
from unified_rl.replay.samplers.base import Draw, Sampler
from unified_rl.replay.sum_tree import FloatArray, SumTree


class Weighted(Sampler):
    """Base: a sum tree over positions in which only live rows have weight.

    A consumer knows rows by position, and a row may be overwritten between a draw and the priorities that follow from
    it. So the serial that was last drawn at each position is kept, and priorities of a row that has left are dropped.
    """

    tree: SumTree
    drawn: IntArray
    """``[physical]``: the serial last drawn at each position, -1 for none."""

    def bind(self, ring: Ring, columns: dict[str, NDArray[Any]]) -> None:
        self.tree = SumTree(ring.physical)
        super().bind(ring, columns)

    def reset(self) -> None:
        self.tree.fill(0, self.ring.physical, 0.0)
        self.drawn = np.full(self.ring.physical, -1, dtype=np.int64)

    def handed_out(self, serials: IntArray) -> None:
        self.drawn[self.ring.position(serials)] = serials

    def _still_there(self, positions: IntArray) -> NDArray[np.bool_]:
        """Whether the row that was last drawn from each position, if any was, still lies there."""
        serials, drawn = self.ring.serial(positions), self.drawn[positions]
        out: NDArray[np.bool_] = (serials < self.ring.written) & ((drawn < 0) | (drawn == serials))
        return out

    def _fill(self, low: int, high: int, weights: FloatArray | float) -> None:
        """Assigns the weights of the serials ``[low, high)`` and clears those of the rows that left."""
        ring = self.ring
        if ring.physical > ring.capacity:
            for _, first, last in ring.pieces(max(0, low - ring.capacity), ring.oldest):
                self.tree.fill(first, last, 0.0)
        for offset, first, last in ring.pieces(low, high):
            part = weights if isinstance(weights, float) else weights[offset : offset + last - first]
            self.tree.fill(first, last, part)

    def _positions(self, count: int, rng: np.random.Generator, length: int) -> IntArray:
        """Draws live positions, one in each of ``count`` equal parts of the cumulated weight."""
        _, high = self.starts(length)
        quantiles = (np.arange(count) + rng.random(count)) / count
        if length == 1:
            return self.tree.draw(quantiles)
        hidden = self.ring.pieces(high, self.ring.written)  # windows from there would cross the newest row
        kept = [self.tree.weights[first:last].copy() for _, first, last in hidden]
        for _, first, last in hidden:
            self.tree.fill(first, last, 0.0)
        try:
            return self.tree.draw(quantiles)
        finally:
            for (_, first, last), weights in zip(hidden, kept, strict=True):
                self.tree.fill(first, last, weights)


@configurable
@ranged()
class Priority(Weighted):
    """Prioritised replay: P(row) proportional to ``(priority + eps) ** alpha``.

    A batch brings ``priority_weight [B]`` float32, the importance weights ``(n P) ** -beta`` divided by the largest of
    the batch. New rows get the largest priority seen, so that each is drawn soon. Source: Prioritized Experience
    Replay (arXiv 1511.05952), proportional variant with stratified draws.

    Args:
        alpha: 0 is uniform.
        beta: 1 corrects the bias in full.
        beta_draws: draws over which beta grows linearly to 1; 0 keeps it.
        eps: added to every priority.
    """

    takes_priority = weighs = True

    def __init__(
        self, alpha: NonNegative = 0.6, beta: UnitInterval = 0.4, beta_draws: Whole = 0, eps: NonNegative = 1e-6
    ) -> None:
        self.alpha, self.beta, self.beta_draws, self.eps = alpha, beta, beta_draws, eps

    def column_types(self) -> dict[str, Any]:
        return {"weight": np.float64}

    def reset(self) -> None:
        super().reset()
        self.largest, self.draws = (1.0 + self.eps) ** self.alpha, 0

    def wrote(self, low: int, high: int, values: Mapping[str, NDArray[Any]]) -> None:
        self.ring.write(self.columns["weight"], low, high, self.largest)
        self._fill(low, high, self.largest)

    def restore(self, low: int, high: int, values: Mapping[str, NDArray[Any]]) -> None:
        self._fill(low, high, self.ring.read(self.columns["weight"], low, high))

    def draw(self, count: int, rng: np.random.Generator, length: int, version: int | None) -> Draw:
        positions = self._positions(count, rng, length)
        weights = self.tree.weights.take(positions)
        self.draws += 1
        beta = self.beta
        if self.beta_draws:
            beta += (1.0 - beta) * min(1.0, self.draws / self.beta_draws)
        # (n P) ** -beta over its maximum: n and the total weight cancel
        importance = (weights.min() / weights) ** beta
        serials = self.ring.serial(positions)
        self.drawn[positions] = serials
        return Draw(serials, {"priority_weight": importance.astype(np.float32)})

    def update(self, positions: IntArray, priorities: FloatArray) -> None:
        if not len(priorities):
            return
        low, high = priorities.min(), priorities.max()
        if not (low >= 0 and high < np.inf):
            raise RecordError(f"priorities must be finite and not negative; they lie between {low} and {high}")
        current = self._still_there(positions)
        if not current.all():
            positions, priorities = positions[current], priorities[current]
        weights = (priorities + self.eps) ** self.alpha
        self.largest = max(self.largest, float(weights.max(initial=0.0)))
        self.columns["weight"][positions] = weights
        self.tree.set(positions, weights)

    def state_dict(self) -> dict[str, Any]:
        return {"largest": self.largest, "draws": self.draws}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.largest, self.draws = float(state["largest"]), int(state["draws"])


@configurable
@ranged()
class Softmax(Weighted):
    """P(row) proportional to ``exp(score / temperature)``, with replacement.

    The score is a stored key; ``update_priority`` replaces it. A batch brings no importance weights. Used for replay by
    reward in Trajectory Balance with Asynchrony (arXiv 2503.18929).

    Args:
        key: a stored scalar, or ``[T]`` values that are summed.
        temperature: large is uniform, small is greedy.
        renew: let the consumer replace the score of a drawn row by its error.
    """

    def __init__(self, key: str = "reward", temperature: Positive = 1.0, renew: bool = False) -> None:
        self.keys, self.temperature, self.takes_priority = (key,), temperature, renew

    def column_types(self) -> dict[str, Any]:
        return {"score": np.float64}

    def reset(self) -> None:
        super().reset()
        self.reference = -np.inf
        self._stale = False

    def before_write(self, count: int, values: Mapping[str, NDArray[Any]]) -> None:
        if not np.isfinite(values[self.keys[0]]).all():
            raise RecordError(f"{self.keys[0]} is not finite, and rows are drawn by it")

    def wrote(self, low: int, high: int, values: Mapping[str, NDArray[Any]]) -> None:
        score = values[self.keys[0]].astype(np.float64).reshape(high - low, -1).sum(1)
        self.ring.write(self.columns["score"], low, high, score)
        self._stale |= bool(score.max() > self.reference)
        if not self._stale:
            self._fill(low, high, self._weight(score))

    def restore(self, low: int, high: int, values: Mapping[str, NDArray[Any]]) -> None:
        self._stale = True

    def _weight(self, score: FloatArray) -> FloatArray:
        return np.exp((score - self.reference) / self.temperature)

    def _rebuild(self) -> None:
        low, high = self.ring.oldest, self.ring.written
        score = self.ring.read(self.columns["score"], low, high)
        self.reference = max(self.reference, float(score.max()))
        self.tree.fill(0, self.ring.physical, 0.0)
        self._fill(low, high, self._weight(score))
        self._stale = False

    def draw(self, count: int, rng: np.random.Generator, length: int, version: int | None) -> Draw:
        self.starts(length)
        if self._stale:
            self._rebuild()
        if self.tree.total < 1e-200:  # the row that the scores refer to has left
            self.reference = -np.inf
            self._rebuild()
        serials = self.ring.serial(self._positions(count, rng, length))
        self.handed_out(serials)
        return Draw(serials, {})

    def update(self, positions: IntArray, priorities: FloatArray) -> None:
        if not np.isfinite(priorities).all():
            raise RecordError("scores must be finite")
        current = self._still_there(positions)
        positions, priorities = positions[current], priorities[current]
        self.columns["score"][positions] = priorities
        self._stale |= bool(priorities.max(initial=-np.inf) > self.reference)
        if not self._stale:
            self.tree.set(positions, self._weight(priorities))

    def state_dict(self) -> dict[str, Any]:
        return {"reference": self.reference if np.isfinite(self.reference) else None, "stale": self._stale}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.reference = -np.inf if state["reference"] is None else float(state["reference"])
        self._stale = True
