"""A weight that grows where an objective is far from met, or keeps moving."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from unified_rl.ranges import Positive, TwoOrMore, ranged

LARGEST = 50.0
"""Bound of the exponent."""


@ranged()
class Unsettled:
    """``exp((1 - mean + spread) / temperature)`` of a metric over the last updates: RECAP's attention to an objective.

    What is met and stays so gets 1, what is missed or volatile more; of several such weights only the proportion
    counts. Before the first update every objective gets as much as one that is wholly missed. 2510.21978 (saturation as
    the mean, instability as the standard deviation, and the exponential are assumed).

    Args:
        metric: a name in the run's metrics, from 0 to 1 where 1 is met.
        window: updates that are looked back at.
        temperature: large ones make all objectives count alike.

    Raises:
        ConfigError: a setting out of its range.
    """

    def __init__(self, *, metric: str, window: TwoOrMore = 8, temperature: Positive = 0.5) -> None:
        self.metric, self.window, self.temperature = metric, window, temperature
        self.seen: list[float] = []

    def __call__(self, progress: float, update: int) -> float:
        """The present value."""
        if not self.seen:
            return math.exp(min(LARGEST, 1 / self.temperature))
        mean = sum(self.seen) / len(self.seen)
        spread = math.sqrt(sum((x - mean) ** 2 for x in self.seen) / len(self.seen))
        return math.exp(max(-LARGEST, min(LARGEST, (1 - mean + spread) / self.temperature)))

    def observe(self, metrics: Mapping[str, Any]) -> None:
        """Takes in the metrics of an update, which hold the metric."""
        self.seen = [*self.seen, float(metrics[self.metric])][-self.window :]

    def state_dict(self) -> dict[str, Any]:
        """The metric of the last updates."""
        return {"values": list(self.seen)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores it."""
        self.seen = list(state["values"])
