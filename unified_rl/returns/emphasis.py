"""Weights for learning off-policy that are neither a target nor a plain ratio: emphasis, and ACER's two terms."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from unified_rl.errors import ConfigError
from unified_rl.returns.scan import CLAMP, Trajectory, backward_scan, shifted


def emphatic_weights(
    log_ratio: Tensor,
    done: Tensor,
    gamma: float | Tensor,
    lam: float = 0.0,
    interest: Tensor | float = 1.0,
    mask: Tensor | None = None,
) -> Tensor:
    """How much each step's value error counts: ``lam i_t + (1 - lam) F_t``, ``F_t = i_t + gamma rho_{t-1} F_{t-1}``.

    The trace F starts anew after ``done``. Emphatic TD, 1503.04269.

    Args:
        log_ratio: ``[B, T]``, log of target over behavior probability of each step's whole action.
        done: ``[B, T]`` bool, ends of episodes and slices.
        gamma: float or ``[B, T]``, the discount from a step to its successor.
        lam: trace parameter of the learner; 1 gives the interest alone.
        interest: float or ``[B, T]``.
        mask: ``[B, T]`` bool; masked steps are transparent and get 0.

    Returns:
        Weights to multiply the value loss by, ``[B, T]``, detached.
    """
    wanted = torch.as_tensor(interest, dtype=log_ratio.dtype, device=log_ratio.device).expand_as(log_ratio)
    path = Trajectory(wanted, torch.zeros_like(done), done, gamma, mask)
    carry = path.trace * path.ratio(log_ratio)  # what a step hands on to the next one
    if mask is not None:
        carry = carry.masked_fill(~mask, 1.0)
    # forwards in time is backwards in the flipped row; a step receives by the carry of the one before it
    follow_on = backward_scan(path.reward.flip(-1), shifted(carry.flip(-1))).flip(-1)
    (weights,) = path.masked(lam * path.reward + (1 - lam) * follow_on)
    return weights


@dataclass(frozen=True)
class TruncatedScores:
    """The two terms of ACER's policy gradient as coefficients of scores.

    Attributes:
        taken: ``[B, T]``, of the score of the taken action: ``min(c, ratio) (G - V)``.
        every: ``[B, T, A]``, of the score of each action: ``pi(a) max(0, 1 - c / ratio(a)) (Q(a) - V)``.
    """

    taken: Tensor
    every: Tensor


def truncated_scores(
    log_prob: Tensor, behavior_log_prob: Tensor, action: Tensor, q: Tensor, target: Tensor, c: float = 10.0
) -> TruncatedScores:
    """Truncation with bias correction: what truncating the ratio leaves out, an expectation over all actions puts back.

    Sample Efficient Actor-Critic with Experience Replay, 1611.01224 (``c = 10`` from memory).

    Args:
        log_prob, behavior_log_prob: ``[B, T, A]``, of every action under the two policies.
        action: ``[B, T]`` int64, taken.
        q: ``[B, T, A]`` action values; their mean under the policy is the baseline V.
        target: ``[B, T]``, of the taken action's value, for example :func:`unified_rl.returns.retrace`.
        c: truncation; 0 leaves the expectation alone, infinity the ratio alone.

    Raises:
        ConfigError: c below 0.
    """
    if c < 0:
        raise ConfigError(f"the truncation c is a ratio and cannot be negative, got {c}")
    log_prob, q = log_prob.detach(), q.detach()
    ratio = (log_prob - behavior_log_prob.detach()).clamp(-CLAMP, CLAMP).exp()
    value = (log_prob.exp() * q).sum(-1)
    taken = ratio.gather(-1, action.unsqueeze(-1)).squeeze(-1).clamp(max=c) * (target.detach() - value)
    left_out = (1 - c / ratio).clamp(min=0.0)
    return TruncatedScores(taken, log_prob.exp() * left_out * (q - value.unsqueeze(-1)))


def within_trust_region(gradient: Tensor, divergence_gradient: Tensor, delta: float) -> Tensor:
    """The closest vector to ``gradient`` that raises the divergence by at most ``delta`` to first order. ACER, eq. 12.

    Args:
        gradient, divergence_gradient: ``[..., F]``, by the statistics of the policy's distribution.
        delta: bound on their inner product.

    Returns:
        ``gradient - max(0, (k . gradient - delta) / |k|^2) k``, ``[..., F]``.
    """
    k = divergence_gradient
    excess = ((k * gradient).sum(-1, keepdim=True) - delta).clamp(min=0.0)
    return gradient - excess / k.square().sum(-1, keepdim=True).clamp(min=1e-30) * k
