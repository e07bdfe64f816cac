"""Unit-level transforms of the log-ratio before the level; they may see the sign of the advantage."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def pessimistic_clip(d: Tensor, advantage: Tensor, *, low: float = 0.4, high: float = 0.4) -> Tensor:
    """Clips each log-ratio to ``[-low, high]`` in the direction that A pushes only. GMPO, 2507.20673."""
    clipped = d.clamp(-low, high)
    return torch.where(advantage > 0, torch.minimum(d, clipped), torch.maximum(d, clipped))


def clamp(d: Tensor, advantage: Tensor, *, low: float = -1.0, high: float = 1.5) -> Tensor:
    """Clamps each log-ratio to ``[low, high]``. Humanline, in Humanline: Online Alignment as Perceptual Loss."""
    return d.clamp(low, high)


PRES: dict[str, Callable[..., Tensor]] = {"pessimistic_clip": pessimistic_clip, "clamp": clamp}
