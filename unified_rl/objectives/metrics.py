"""Metrics of an optimiser step that do not depend on how its batch was split."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

Metrics = dict[str, Any]


class Mean(NamedTuple):
    """A mean over entries, as their sum and their number, scalars: micro-batches add up both."""

    total: Any
    count: Any


class Sums:
    """Joins the metrics of the micro-batches of one optimiser step; no device synchronisation.

    A plain scalar is a share of a sum (a loss, say) and is added up; see also :class:`Mean`.
    """

    def __init__(self) -> None:
        self._found: dict[str, Any] = {}

    def add(self, metrics: Mapping[str, Any]) -> None:
        """Takes in a micro-batch."""
        for key, value in metrics.items():
            self._found[key] = joined(self._found[key], value) if key in self._found else value

    def values(self) -> Metrics:
        """One detached scalar a metric."""
        return {key: _value(x) for key, x in self._found.items()}


def joined(one: Any, other: Any) -> Any:
    """A metric of two micro-batches together."""
    if isinstance(one, Mean):
        return Mean(one.total + other.total, one.count + other.count)
    return one + other


def _value(x: Any) -> Any:
    if isinstance(x, Mean):
        x = x.total / (x.count.clamp(min=1) if isinstance(x.count, Tensor) else max(1, x.count))
    return x.detach() if isinstance(x, Tensor) and x.requires_grad else x
