"""Rejection: rules that take units or whole rows out of the update.

A rule gets unit log-ratios ``d [B, N]`` (0 where masked), the layout and the advantage, and returns ``keep [B, N]``.
Bounds are always about the ratio itself, never about its inverse.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from unified_rl.correction.levels import LEVELS, Layout, Level
from unified_rl.correction.lookup import bind
from unified_rl.ranges import Bound, NonNegative, UpperBound, ordered


@ordered("low", "high")
def band(
    d: Tensor,
    layout: Layout,
    advantage: Tensor,
    *,
    level: str | Mapping[str, Any] | Level = "geometric",
    low: Bound = 0.5,
    high: UpperBound = 2.0,
) -> Tensor:
    """Keeps where the ratio at ``level`` lies in ``[low, high]``."""
    function = level if callable(level) else bind(level, LEVELS, "level")[0]
    log_ratio: Tensor = function(d, layout)
    lower = math.log(low) if low > 0 else -math.inf
    return (log_ratio >= lower) & (log_ratio <= math.log(high))


def divergence(
    d: Tensor,
    layout: Layout,
    advantage: Tensor,
    *,
    estimator: Literal["k1", "k2", "k3"] = "k3",
    over: Literal["unit", "sequence_sum", "sequence_mean", "sequence_max"] = "sequence_mean",
    high: Bound = 0.01,
) -> Tensor:
    """Keeps where a divergence estimate of the acting policy from the other is at most ``high``.

    ``estimator`` k1 is ``|log ratio|``, k2 ``d^2 / 2``, k3 ``exp(d) - 1 - d``; ``over`` is unit, sequence_sum,
    sequence_mean or sequence_max.
    """
    if estimator == "k1":  # the sum first: opposite drifts cancel, as in the ratio of the whole row
        return OVER[over](d.abs() if over == "sequence_max" else d, layout).abs() <= high
    return OVER[over](ESTIMATORS[estimator](d), layout) <= high


@ordered("low", "high")
def veto(d: Tensor, layout: Layout, advantage: Tensor, *, low: Bound = 1e-4, high: UpperBound = math.inf) -> Tensor:
    """Drops the whole row if any unit's ratio is below ``low`` or above ``high``."""
    lower = math.log(low) if low > 0 else -math.inf
    bad = layout.mask & ((d < lower) | (d > min(math.log(high), math.inf)))
    return ~bad.any(-1, keepdim=True).expand_as(d)


def off_policy_sequence(d: Tensor, layout: Layout, advantage: Tensor, *, delta: NonNegative = 1e-4) -> Tensor:
    """Drops rows of negative advantage whose mean log-ratio fell below ``-delta``. DeepSeek-V3.2's sequence mask."""
    drift = -d.sum(-1, keepdim=True) / layout.count.to(d.dtype)
    total = advantage.masked_fill(~layout.mask, 0.0).sum(-1, keepdim=True)
    return ((total >= 0) | (drift <= delta)).expand_as(d)


ESTIMATORS: dict[str, Callable[[Tensor], Tensor]] = {
    "k1": torch.abs,
    "k2": lambda d: 0.5 * d.square(),
    "k3": lambda d: d.expm1() - d,
}

OVER: dict[str, Callable[[Tensor, Layout], Tensor]] = {
    "unit": lambda x, layout: x,
    "sequence_sum": lambda x, layout: x.sum(-1, keepdim=True).expand_as(x),
    "sequence_mean": lambda x, layout: (x.sum(-1, keepdim=True) / layout.count.to(x.dtype)).expand_as(x),
    "sequence_max": lambda x, layout: x.amax(-1, keepdim=True).expand_as(x),
}

REJECTS: dict[str, Callable[..., Tensor]] = {
    "band": band,
    "divergence": divergence,
    "veto": veto,
    "off_policy_sequence": off_policy_sequence,
}
