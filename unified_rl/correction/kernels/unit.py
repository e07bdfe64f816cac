"""Kernels: the weight ``g [B, N]`` that multiplies the score, detached.

A surrogate ``f(ratio) * A`` has the gradient ``g(ratio) * A * grad log pi`` with ``g(ratio) = ratio * f'(ratio)``; that
``g`` is what stands here. Kernels whose weight depends on the whole batch are in ``batch_kernels`` and ``regression``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from unified_rl.correction.view import View, narrow, only, share
from unified_rl.units import Source


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
    return only(~outside(view, clip_low, clip_high, dual_clip), view.ratio)


def outside(view: View, clip_low: float, clip_high: float, dual_clip: float | None) -> Tensor:
    """Where :func:`ppo` clips, ``[B, N]`` bool."""
    below = view.ratio < 1 - clip_low
    if dual_clip is not None:
        below = below | (view.ratio > dual_clip)
    return (view.up & (view.ratio > 1 + clip_high)) | (below & ~view.up)


def clamp(view: View, *, low: float = 0.0, high: float = math.inf) -> Tensor:
    """``clip(ratio, low, high)``: bounded weights that never lose their unit. CISPO, 2506.13585; AIPO, 2505.24034."""
    return view.ratio.clamp(low, high)


def band(view: View, *, low: float = 0.8, high: float = 1.2, weighted: bool = True) -> Tensor:
    """The ratio inside ``[low, high]``, else 0, whatever the sign of A; weight 1 inside where not ``weighted``.

    REC two-sided, 2509.24203; sPPO, 2108.05828 (bounds ``1 / (1 + eps)`` and ``1 + eps``, not weighted).
    """
    return _inside((view.ratio >= low) & (view.ratio <= high), view, weighted)


def ring(
    view: View,
    *,
    low: float = 0.8,
    high: float = 1.2,
    outer_low: float = 0.4,
    outer_high: float = 3.0,
    weighted: bool = True,
) -> Tensor:
    """Inside ``[low, high]``, or far enough out on the side that A pulls back from. REC ring, 2509.24203."""
    ratio, a = view.ratio, narrow(view.advantage)
    inside = (ratio >= low) & (ratio <= high)
    back = ((a >= 0) & (ratio <= outer_low)) | ((a <= 0) & (ratio >= outer_high))
    return _inside(inside | back, view, weighted)


def _inside(inside: Tensor, view: View, weighted: bool) -> Tensor:
    return only(inside, view.ratio) if weighted else share(inside, view.ratio.dtype)


def sign_clamp(
    view: View,
    *,
    low_positive: float = 0.8,
    high_positive: float = 1.2,
    low_negative: float = 0.0,
    high_negative: float = 2.0,
) -> Tensor:
    """``clip(ratio)`` with bounds chosen by the sign of A. DISPO, 2602.00983."""
    ratio = view.ratio
    positive = ratio.clamp(low_positive, high_positive)
    return torch.where(view.up, positive, ratio.clamp(low_negative, high_negative))


def taper(view: View, *, low: float = 0.0, high: float = 1.0) -> Tensor:
    """1 for A > 0, else ``clip(ratio, low, high)``. TOPR (Tapered Off-Policy REINFORCE), 2503.14286."""
    return view.ratio.clamp(low, high).masked_fill_(view.up, 1.0)


def _by_sign(up: Tensor, positive: float, negative: float, view: View) -> Tensor:
    """One of two settings for each unit, in the precision of the ratio."""
    return negative + (positive - negative) * up.to(view.ratio.dtype)


def gate(view: View, *, tau_positive: float = 1.0, tau_negative: float = 1.05) -> Tensor:
    """``4 r s (1 - s)`` with ``s = sigmoid(tau (r - 1))``: a soft clip. SAPO, 2511.20347."""
    tau = _by_sign(view.up, tau_positive, tau_negative, view)
    s = (tau * (view.ratio - 1)).sigmoid()
    return 4 * view.ratio * s * (1 - s)


def gamma(
    view: View,
    *,
    k_positive: float = 2.0,
    lam_positive: float = 3.0,
    k_negative: float = 3.0,
    lam_negative: float = 2.0,
) -> Tensor:
    """``r^k exp(lam - lam r)``: peaks at ``k / lam`` and vanishes on both sides. VESPO, 2602.10693."""
    up = narrow(view.advantage) >= 0
    k, lam = _by_sign(up, k_positive, k_negative, view), _by_sign(up, lam_positive, lam_negative, view)
    return (lam + k * view.log_ratio - lam * view.ratio).exp()


def tv_mask(view: View, *, low: float = 0.2, high: float = 0.2, cap: float = 20.0) -> Tensor:
    """``min(ratio, cap)``, or 0 where the probability itself moved too far the way A pushes. DPPO, 2602.04879."""
    moved = view.log_prob.exp() - (view.log_prob - view.unit_log_ratio).exp()
    bad = (view.up & (moved > high)) | (~view.up & (moved < -low))
    return only(~bad, view.ratio.clamp(max=cap))


def kl_mask(view: View, *, low: float = 0.05, high: float = 0.05, cap: float = 20.0) -> Tensor:
    """As ``tv_mask`` with the binary KL from the anchor, in the direction that A pushes. DPPO, 2602.04879."""
    tiny = 1e-8
    p, q = view.log_prob.exp(), (view.log_prob - view.unit_log_ratio).exp()
    kl = -q * view.unit_log_ratio + (1 - q) * ((1 - q + tiny) / (1 - p + tiny)).log()
    bad = (view.up & (p > q) & (kl > high)) | (~view.up & (p < q) & (kl > low))
    return only(~bad, view.ratio.clamp(max=cap))


def log_clip(
    view: View, *, low: float = 0.025, high: float = 0.05, dual: float | None = 0.05, power: float = 0.5
) -> Tensor:
    """PPO clipping of the log-ratio at ``-low t^power`` and ``high t^power``, t the unit's position in its row.

    For A < 0 also above ``dual t^power``. CTPO, 2605.07331.
    """
    wide = view.layout.position.to(view.log_ratio.dtype) ** power
    below = view.log_ratio < -low * wide
    bad = below if dual is None else below | (view.log_ratio > dual * wide)
    return view.zeroed(view.log_ratio > high * wide, bad)


def exp_advantage(view: View, *, temperature: float = 1.0) -> Tensor:
    """``exp(A / temperature)``, without a ratio. RED-Weight, 2509.24203."""
    return (narrow(view.advantage) / temperature).clamp(max=20.0).exp().expand_as(view.log_ratio)


def shape(view: View, *, gamma: float = 0.1) -> Tensor:
    """``gamma r / (r + gamma)^2``: lifts units of low probability. LUFFY's policy shaping, 2504.14945."""
    return gamma * view.ratio / (view.ratio + gamma).square()


def demonstration_shape(view: View, *, gamma: float = 0.1, clip_low: float = 0.2, clip_high: float = 0.2) -> Tensor:
    """``shape`` of the bare probability on demonstration and expert rows, PPO on all others. LUFFY, 2504.14945."""
    source = view.batch.get("source", None)
    on_policy = ppo(view, clip_low=clip_low, clip_high=clip_high)
    if source is None:
        return on_policy
    shown = (source == Source.DEMONSTRATION) | (source == Source.EXPERT)
    p = view.log_prob.exp()
    return torch.where(shown.unsqueeze(-1), gamma * p / (p + gamma).square(), on_policy)


def centered_ppo(view: View, *, clip: float = 0.2) -> Tensor:
    """PPO on the ratio to each unit's own behavior policy, clipped around the proximal policy's ratio to it.

    ReMix, 2507.06892 (clip form recalled, not read).
    """
    centre = (view.unit_log_ratio - view.against("proximal")).exp()
    ratio = view.ratio
    return view.zeroed(ratio > centre + clip, ratio < centre - clip)
