"""Methods whose "advantage" is a residual of rewards and log-ratios, computed over whole groups in ``prepare``."""

from __future__ import annotations

import torch
from torch import Tensor

from unified_rl.correction.internal.distributed import Total
from unified_rl.correction.kernels.unit import ppo
from unified_rl.correction.view import View, anchor_log_prob, masked
from unified_rl.errors import RecordError
from unified_rl.returns.groups import Groups
from unified_rl.units import row_return


def residual_prepare(
    view: View,
    total: Total,
    *,
    beta: float = 0.1,
    scale: float = 1.0,
    centred: bool = True,
    divide: str = "none",
    length_normalized: bool = False,
    importance_cap: float | None = None,
) -> dict[str, Tensor]:
    """``scale * (delta - group mean of delta)`` with ``delta = R - beta * (S - S_anchor)``, S a row's summed log-prob.

    ``divide``: none, ``group`` (by group size - 1) or ``pairs`` (times the group size). ``length_normalized`` uses row
    means for S; ``importance_cap`` multiplies by the row's ratio to the behavior policy, capped.
    """
    drift = view.unit_log_ratio.sum(-1)
    if length_normalized:
        drift = drift / view.layout.count.squeeze(-1).to(drift.dtype)
    groups = Groups.of(view.batch)
    delta = row_return(view.batch).to(drift.dtype) - beta * drift
    value = scale * (delta - groups.mean(delta) if centred else delta)
    if divide == "group":
        value = value / (groups.count - 1).clamp(min=1)
    elif divide == "pairs":
        value = value * groups.count
    if importance_cap is not None:
        value = value * view.against("behavior").sum(-1).clamp(-20, 20).exp().clamp(max=importance_cap)
    return {"advantage": value.unsqueeze(-1).expand_as(view.log_ratio)}


def residual(
    view: View,
    *,
    beta: float = 0.1,
    scale: float = 1.0,
    centred: bool = True,
    divide: str = "none",
    length_normalized: bool = False,
    importance_cap: float | None = None,
) -> Tensor:
    """Weight 1 on the centred residual: TBA (2503.18929), GVPO (2504.19599), CoPG (2406.19185) up to a factor."""
    return torch.ones_like(view.log_ratio)


def likelihood_pair_prepare(
    view: View, total: Total, *, floor: float = 1.0, negative_weight: float = 1.0, normalize: int = 1
) -> dict[str, Tensor]:
    """Success rates of the groups; the advantage becomes plus or minus the group's weight, 0 in uniform groups.

    Raises:
        RecordError: a reward that is neither 0 nor 1.
    """
    reward = row_return(view.batch).to(view.log_ratio.dtype)
    if not bool(((reward == 0) | (reward == 1)).all()):
        raise RecordError(
            "this correction splits answers into right and wrong and needs rewards of 0 or 1; with graded rewards use "
            "correction=topr, or correction=grpo"
        )
    rate = Groups.of(view.batch).mean(reward)
    mixed = (rate > 0) & (rate < 1)
    q = rate.clamp(0.02, 0.98)
    weight = {0: torch.ones_like(q), 1: 1 - q, 2: ((1 - q) / q).sqrt()}[normalize]
    sign = torch.where(reward > 0, 1.0, -negative_weight)
    value = torch.where(mixed, weight * sign, 0.0)
    return {"success_rate": q, "advantage": value.unsqueeze(-1).expand_as(view.log_ratio)}


def likelihood_pair(view: View, *, floor: float = 1.0, negative_weight: float = 1.0, normalize: int = 1) -> Tensor:
    """1 if right; ``q r / ((1 - q) max(x, floor))``, ``x = (1 - q r) / (1 - q)``, if wrong. NFT, 2505.18116."""
    q = view.row("success_rate")
    ratio = view.log_ratio.clamp(max=10.0).exp()
    x = (1 - q * ratio) / (1 - q)
    return (q * ratio / ((1 - q) * x.clamp(min=floor))).masked_fill_(view.up, 1.0)


def teacher_ppo_prepare(
    view: View, total: Total, *, clip_low: float = 0.2, clip_high: float = 0.2, scale: float = 1.0
) -> dict[str, Tensor]:
    """The advantage of a unit is how much more the teacher likes it than the reference does, centred on the batch."""
    signal = anchor_log_prob(view.batch, "teacher") - anchor_log_prob(view.batch, "reference")
    signal = masked(view.mask, signal).clamp(-20, 20)
    mean = total(signal.sum()) / total(view.mask.sum()).clamp(min=1)
    return {"advantage": scale * (signal - mean).to(view.log_ratio.dtype)}


def teacher_ppo(view: View, *, clip_low: float = 0.2, clip_high: float = 0.2, scale: float = 1.0) -> Tensor:
    """PPO on the teacher's token signal. ERPD, 2605.25582 (our reading of an abstract)."""
    return ppo(view, clip_low=clip_low, clip_high=clip_high)
