"""Coefficients of terms: constants, and pure functions of how far a run is."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from unified_rl.correction.lookup import bind

Coefficient = Callable[[float, int], float]
"""``(progress in [0, 1], update number) -> value``."""


def linear(progress: float, update: int, *, start: float, end: float = 0.0) -> float:
    """From ``start`` to ``end`` over the run."""
    return start + (end - start) * progress


def warmup_cosine(
    progress: float, update: int, *, peak: float, valley: float, warmup: int = 200, decay: int = 400
) -> float:
    """Linear to ``peak`` over ``warmup`` updates, a cosine to ``valley`` over ``decay``, then constant. CHORD."""
    if update < warmup:
        return peak * update / warmup
    share = min(1.0, (update - warmup) / decay)
    return valley + 0.5 * (peak - valley) * (1.0 + math.cos(math.pi * share))


COEFFICIENTS: dict[str, Callable[..., float]] = {"linear": linear, "warmup_cosine": warmup_cosine}


class ProportionalIntegral:
    """Moves a coefficient so that a metric of the update before comes to a target. EntroPIC.

    ``base + gain e + integral sum(e)``, ``e = target - metric``, kept within the bounds.
    """

    def __init__(
        self,
        *,
        metric: str,
        target: float,
        base: float = 0.0,
        gain: float = 1.0,
        integral: float = 0.0,
        low: float = 0.0,
        high: float = 1.0,
    ) -> None:
        self.metric, self.target, self.base, self.gain, self.integral = metric, target, base, gain, integral
        self.low, self.high = low, high
        self.error = self.sum = 0.0

    def __call__(self, progress: float, update: int) -> float:
        """The present value."""
        return min(self.high, max(self.low, self.base + self.gain * self.error + self.integral * self.sum))

    def observe(self, metrics: Mapping[str, Any]) -> None:
        """Takes in the metrics of an update."""
        if self.metric in metrics:
            self.error = self.target - float(metrics[self.metric])
            self.sum += self.error

    def state_dict(self) -> dict[str, float]:
        """The last error and the sum of all."""
        return {"error": self.error, "sum": self.sum}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Restores :meth:`state_dict`."""
        self.error, self.sum = state["error"], state["sum"]


CONTROLLERS: dict[str, Callable[..., Any]] = {"proportional_integral": ProportionalIntegral}


def coefficient(node: float | Mapping[str, Any]) -> Coefficient:
    """A number, or a mapping with ``name``; ``complement: true`` makes it one minus that."""
    if not isinstance(node, (int, float)) and node.get("name") in CONTROLLERS:
        return bind(node, CONTROLLERS, "coefficient")[0]()
    if isinstance(node, (int, float)):
        return lambda progress, update: float(node)
    function, extra = bind(node, COEFFICIENTS, "coefficient", ["complement"])
    if extra.get("complement"):
        return lambda progress, update: 1.0 - function(progress, update)
    return function
