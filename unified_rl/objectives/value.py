"""Value regression."""

from __future__ import annotations

import torch
from torch import Tensor

from unified_rl.correction.internal.surrogate import KnownGradient


def value_loss(
    value: Tensor, target: Tensor, mask: Tensor, old_value: Tensor | None = None, clip: float | None = None
) -> Tensor:
    """Half the mean squared error over masked-in entries; 0 with a graph where nothing is masked in.

    Args:
        value: any shape, with gradient.
        target: same shape, detached here.
        mask: same shape, bool.
        old_value: the prediction at the start of the update; needed with ``clip``.
        clip: with ``old_value``, the larger of the clipped and unclipped errors counts ("Proximal Policy Optimization
            Algorithms", arXiv:1707.06347, as commonly implemented).
    """
    if clip is None or old_value is None:
        with torch.no_grad():
            error = torch.where(mask, value - target, 0.0)
            half = error.square().sum().mul_(0.5)
        return KnownGradient.apply(value, half, error) / mask.sum().clamp(min=1)
    target = torch.where(mask, target.detach(), value.detach())
    error = (value - target).square()
    old_value = torch.where(mask, old_value, value.detach())
    bounded = old_value + (value - old_value).clamp(-clip, clip)
    error = torch.maximum(error, (bounded - target).square())
    kept = torch.where(mask, error, torch.zeros_like(error))
    return 0.5 * kept.sum() / mask.sum().clamp(min=1)
