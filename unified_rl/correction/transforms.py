"""Unit-level transforms of the log-ratio before the level; they may see the sign of the advantage."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from unified_rl.correction.internal.surrogate import KnownGradient
from unified_rl.correction.view import narrow, share
from unified_rl.ranges import Bound, Extended, ordered


def pessimistic_clip(d: Tensor, advantage: Tensor, *, low: Bound = 0.4, high: Bound = 0.4) -> Tensor:
    """Clips each log-ratio to ``[-low, high]`` in the direction that A pushes only. GMPO, 2507.20673."""
    up = narrow(advantage) > 0
    free = d.new_full((), torch.inf)
    lower, upper = torch.where(up, -free, d.new_full((), -low)), torch.where(up, d.new_full((), high), free)
    return _clipped(d, d.detach().clamp(lower, upper))


@ordered("low", "high")
def clamp(d: Tensor, advantage: Tensor, *, low: Extended = -1.0, high: Extended = 1.5) -> Tensor:
    """Clamps each log-ratio to ``[low, high]``. Humanline, in Humanline: Online Alignment as Perceptual Loss."""
    return _clipped(d, d.detach().clamp(low, high))


def _clipped(d: Tensor, value: Tensor) -> Tensor:
    """``value``, which is ``d`` clipped: it follows ``d`` where the two are equal."""
    return KnownGradient.apply(d, value, share(value == d, d.dtype)) if d.requires_grad else value


PRES: dict[str, Callable[..., Tensor]] = {"pessimistic_clip": pessimistic_clip, "clamp": clamp}
