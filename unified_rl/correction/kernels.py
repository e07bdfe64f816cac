"""Kernels: the weight ``g [B, N]`` that multiplies the score, detached.

A surrogate ``f(ratio) * A`` has the gradient ``g(ratio) * A * grad log pi`` with ``g(ratio) = ratio * f'(ratio)``; that
``g`` is what stands here. A kernel whose weight depends on the whole batch names a ``prepare`` companion that sees it all.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from unified_rl.correction.view import View


def one(view: View) -> Tensor:
    """Weight 1: REINFORCE."""
    return torch.ones_like(view.log_ratio)


def importance(view: View) -> Tensor:
    """The ratio itself: plain importance sampling."""
    return view.ratio


def ppo(view: View, *, clip_low: float = 0.2, clip_high: float = 0.2, dual_clip: float | None = None) -> Tensor:
    """The ratio, or 0 where it left ``[1 - clip_low, 1 + clip_high]`` in the direction that A pushes.

    ``dual_clip`` also zeroes A < 0 above that ratio. Proximal Policy Optimization Algorithms, 1707.06347; dual clip:
    Mastering Complex Control in MOBA Games with Deep Reinforcement Learning, 1912.09729.
    """
    ratio = view.ratio
    bad = ratio < 1 - clip_low if dual_clip is None else (ratio < 1 - clip_low) | (ratio > dual_clip)
    return ratio.masked_fill(torch.where(view.advantage > 0, ratio > 1 + clip_high, bad), 0.0)


def clamp(view: View, *, low: float = 0.0, high: float = math.inf) -> Tensor:
    """``clip(ratio, low, high)``: bounded weights that never lose their unit. CISPO, 2506.13585; AIPO, 2505.24034."""
    return view.ratio.clamp(low, high)


def band(view: View, *, low: float = 0.5, high: float = 2.0) -> Tensor:
    """The ratio inside ``[low, high]``, else 0, whatever the sign of A (IcePop's rule as a kernel)."""
    ratio = view.ratio
    return torch.where((ratio >= low) & (ratio <= high), ratio, 0.0)


KERNELS: dict[str, Callable[..., Tensor]] = {
    "one": one,
    "is": importance,
    "ppo": ppo,
    "clamp": clamp,
    "band": band,
}

TRUNCATING = {"ppo", "clamp", "band"}
"""Kernels that follow the ratio until a bound: there ``g != ratio`` means clipped; elsewhere only ``g == 0`` does."""

RATIO_FREE = {"one"}
"""Kernels without a ratio: with them a mismatch weight to the behavior policy counts nothing twice."""

PREPARES: dict[str, Callable[..., dict[str, Tensor]]] = {}
"""Companions of kernels that need the whole batch: ``prepare(view, total, *, same settings) -> statistics``."""
