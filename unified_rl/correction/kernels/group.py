"""Methods whose "advantage" is a residual of rewards and log-ratios, computed over whole groups in ``prepare``."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from unified_rl.correction.internal.distributed import Total
from unified_rl.correction.kernels.kernel import Kernel, Traits, by_name, clipped_formula, number
from unified_rl.correction.kernels.unit import ppo
from unified_rl.correction.view import View, anchor_log_prob, masked
from unified_rl.errors import RecordError
from unified_rl.ranges import NonNegative, Positive, Radius, UpperBound
from unified_rl.returns.groups import Groups
from unified_rl.units import row_return


class Residual(Kernel):
    """Weight 1 on the centered residual: TBA (2503.18929), GVPO (2504.19599), CoPG (2406.19185) up to a factor.

    The advantage is ``scale * (delta - group mean of delta)`` with ``delta = R - beta * (S - S_anchor)``, S a row's
    summed log-prob. ``divide``: none, ``group`` (by group size - 1) or ``pairs`` (times the group size).
    ``length_normalized`` uses row means for S; ``importance_cap`` multiplies by the row's ratio to the behavior policy,
    capped.
    """

    name = "residual"
    traits = Traits(holds_ratio=False, own_advantage=True, groups="dro", purpose="regulariser")
    beta: NonNegative = 0.1
    scale: Positive = 1.0
    centered: bool = True
    divide: Literal["none", "group", "pairs"] = "none"
    length_normalized: bool = False
    importance_cap: UpperBound | None = None

    @property
    def anchors(self) -> tuple[str, ...]:
        """The behavior policy's where the residual is weighted by its ratio."""
        return () if self.importance_cap is None else ("behavior",)

    @property
    def without_groups(self) -> str | None:
        """A residual that is not centered needs no group."""
        return self.traits.groups if self.centered else None

    def formula(self) -> str:
        """The residual."""
        return (
            "1, with A = "
            + ("" if self.scale == 1.0 else f"{number(self.scale)} * ")
            + ("(delta - group mean of delta)" if self.centered else "delta")
            + {"none": "", "group": " / (group size - 1)", "pairs": " * group size"}[self.divide]
            + ("" if self.importance_cap is None else f" * min(row ratio to behavior, {number(self.importance_cap)})")
            + f", delta = R - {number(self.beta)} * {'mean' if self.length_normalized else 'sum'} over the row of d"
        )

    def prepare(self, view: View, total: Total) -> dict[str, Tensor]:
        """The residual of each row, as the advantage of its units."""
        drift = view.unit_log_ratio.sum(-1)
        if self.length_normalized:
            drift = drift / view.layout.count.squeeze(-1).to(drift.dtype)
        groups = Groups.of(view.batch)
        delta = row_return(view.batch).to(drift.dtype) - self.beta * drift
        value = self.scale * (delta - groups.mean(delta) if self.centered else delta)
        if self.divide == "group":
            value = value / (groups.count - 1).clamp(min=1)
        elif self.divide == "pairs":
            value = value * groups.count
        if self.importance_cap is not None:
            value = value * view.against("behavior").sum(-1).clamp(-20, 20).exp().clamp(max=self.importance_cap)
        return {"advantage": value.unsqueeze(-1).expand_as(view.log_ratio)}

    def weight(self, view: View) -> Tensor:
        """Ones."""
        return torch.ones_like(view.log_ratio)


class LikelihoodPair(Kernel):
    """1 if right; ``q r / ((1 - q) max(x, floor))``, ``x = (1 - q r) / (1 - q)``, if wrong. NFT, 2505.18116.

    ``q`` is the success rate of the group; ``normalize`` weighs a group by 1, ``1 - q`` or ``sqrt((1 - q) / q)``.
    """

    name = "likelihood_pair"
    traits = Traits(
        own_advantage=True, groups="topr", binary_rewards=True, scores_experts=True, purpose="other objective"
    )
    floor: Positive = 1.0
    negative_weight: NonNegative = 1.0
    normalize: Literal[0, 1, 2] = 1

    def formula(self) -> str:
        """Both likelihoods."""
        return (
            f"1 if right; q r / ((1 - q) max(x, {number(self.floor)})), x = (1 - q r) / (1 - q), if wrong; |A| = "
            + {0: "1", 1: "1 - q", 2: "sqrt((1 - q) / q)"}[self.normalize]
            + " (q: success rate of the group)"
        )

    def prepare(self, view: View, total: Total) -> dict[str, Tensor]:
        """Success rates of the groups; the advantage becomes plus or minus the group's weight, 0 in uniform groups.

        Raises:
            RecordError: a reward that is neither 0 nor 1.
        """
        reward = row_return(view.batch).to(view.log_ratio.dtype)
        if not bool(((reward == 0) | (reward == 1)).all()):
            raise RecordError(
                "this correction splits answers into right and wrong and needs rewards of 0 or 1; with graded rewards "
                "use correction=topr, or correction=grpo"
            )
        rate = Groups.of(view.batch).mean(reward)
        mixed = (rate > 0) & (rate < 1)
        q = rate.clamp(0.02, 0.98)
        weight = {0: torch.ones_like(q), 1: 1 - q, 2: ((1 - q) / q).sqrt()}[self.normalize]
        sign = torch.where(reward > 0, 1.0, -self.negative_weight)
        value = torch.where(mixed, weight * sign, 0.0)
        return {"success_rate": q, "advantage": value.unsqueeze(-1).expand_as(view.log_ratio)}

    def weight(self, view: View) -> Tensor:
        """The slopes of both likelihoods."""
        q = view.row("success_rate")
        ratio = view.log_ratio.clamp(max=10.0).exp()
        x = (1 - q * ratio) / (1 - q)
        return (q * ratio / ((1 - q) * x.clamp(min=self.floor))).masked_fill_(view.up, 1.0)


class TeacherPPO(Kernel):
    """PPO on the teacher's token signal. ERPD, 2605.25582 (our reading of an abstract)."""

    name = "teacher_ppo"
    traits = Traits(truncates=True, own_advantage=True, anchors=("teacher", "reference"), purpose="other objective")
    clip_low: Radius = 0.2
    clip_high: Radius = 0.2
    scale: Positive = 1.0

    def formula(self) -> str:
        """PPO's bounds, and the signal."""
        scale = "" if self.scale == 1.0 else f"{number(self.scale)} * "
        bounds = clipped_formula(1 - self.clip_low, 1 + self.clip_high, None)
        return f"{bounds}; A = {scale}centered log(teacher / reference)"

    def prepare(self, view: View, total: Total) -> dict[str, Tensor]:
        """A unit's advantage: how much more the teacher likes it than the reference does, centered on the batch."""
        signal = anchor_log_prob(view.batch, "teacher") - anchor_log_prob(view.batch, "reference")
        signal = masked(view.mask, signal).clamp(-20, 20)
        mean = total(signal.sum()) / total(view.mask.sum()).clamp(min=1)
        return {"advantage": self.scale * (signal - mean).to(view.log_ratio.dtype)}

    def weight(self, view: View) -> Tensor:
        """PPO's."""
        return ppo(view, self.clip_low, self.clip_high)


KERNELS = by_name(Residual, LikelihoodPair, TeacherPPO)
