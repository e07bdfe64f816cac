"""Metrics of an optimiser step that do not depend on how its batch was split."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

from unified_rl.shard import Shard

Metrics = dict[str, Any]
TOTAL, COUNT = "\ntotal", "\ncount"
"""Behind the name of a mean, while its parts are summed over processes."""


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

    def over(self, shard: Shard, device: Any) -> None:
        """Takes in the shares of the other processes."""
        flat: Metrics = {}
        for key, value in self._found.items():
            parts = {TOTAL: value.total, COUNT: value.count} if isinstance(value, Mean) else {"": value}
            flat |= {key + part: x for part, x in parts.items()}
        found = shard.sums(flat, device)
        means = [key.removesuffix(TOTAL) for key in found if key.endswith(TOTAL)]
        self._found = {key: x for key, x in found.items() if not key.endswith((TOTAL, COUNT))}
        self._found |= {key: Mean(found[key + TOTAL], found[key + COUNT]) for key in means}

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
