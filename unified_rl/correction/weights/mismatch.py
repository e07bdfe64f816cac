"""Outer weights for the mismatch between the policy that acted and the one the trust region is built around.

``u`` is the ratio at the rule's level, ``[B, N]``. All weights are detached. Sources: IMPALA (1802.01561) for
truncation; Your Efficient RL Framework Secretly Brings You Off-Policy RL Training (notes, 2025) for its use on tokens;
IcePop in Every Step Evolves (2510.18855).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from unified_rl.correction.internal.distributed import Total, identity
from unified_rl.ranges import Bound, UpperBound, ordered


def exact(u: Tensor) -> Tensor:
    """The ratio itself."""
    return u


def truncate(u: Tensor, *, high: UpperBound = 2.0) -> Tensor:
    """``min(u, high)``: truncated importance sampling."""
    return u.clamp(max=high)


@ordered("low", "high")
def clip(u: Tensor, *, low: Bound = 0.5, high: UpperBound = 2.0) -> Tensor:
    """``clip(u, low, high)``."""
    return u.clamp(low, high)


@ordered("low", "high")
def mask(u: Tensor, *, low: Bound = 0.5, high: UpperBound = 2.0) -> Tensor:
    """``u`` inside ``[low, high]``, else weight 0. The denominator still counts the unit."""
    return u.masked_fill((u < low) | (u > high), 0.0)


MISMATCHES: dict[str, Callable[..., Tensor]] = {"exact": exact, "truncate": truncate, "clip": clip, "mask": mask}


def normalized(weight: Tensor, valid: Tensor, level: str, total: Total = identity) -> Tensor:
    """Weights divided by their mean: over units, or over rows where the level gives a row one weight.

    ``total`` sums over the processes that share the batch.
    """
    if level in ("sequence", "geometric"):
        rows = valid.any(-1)
        each = weight.masked_fill(~valid, -math.inf).amax(-1).clamp(min=0.0)
        mean = total(each.sum()) / total(rows.sum()).clamp(min=1)
    else:
        mean = total(weight.masked_fill(~valid, 0.0).sum()) / total(valid.sum()).clamp(min=1)
    return weight / torch.where(mean > 1e-8, mean, torch.ones_like(mean))
