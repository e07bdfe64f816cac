"""Methods whose "advantage" is a residual of rewards and log-ratios, computed over whole groups in ``prepare``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from unified_rl.correction.generators import GENERATORS, Generator
from unified_rl.correction.internal.distributed import Total
from unified_rl.correction.kernels.kernel import Kernel, Traits, by_name, clipped_formula, number
from unified_rl.correction.kernels.unit import ppo
from unified_rl.correction.levels import CLAMP
from unified_rl.correction.lookup import bind
from unified_rl.correction.view import View, anchor_log_prob, masked
from unified_rl.errors import ConfigError, RecordError
from unified_rl.ranges import NonNegative, Positive, Radius, UnitInterval, UpperBound
from unified_rl.returns.groups import Groups
from unified_rl.units import row_return


class Residual(Kernel):
    """Weight 1 on the centered residual: TBA (2503.18929), GVPO (2504.19599), CoPG (2406.19185) up to a factor.

    The advantage is ``scale * (delta - group mean of delta)`` with ``delta = R - beta * (S - S_anchor)``, S a row's
    summed log-prob; with ``soft`` it is ``scale * (delta - V)``, V the group's soft value
    ``soft * log mean exp(R / soft)`` (KARL, 2603.05218). ``divide``: none, ``group`` (by group size - 1) or ``pairs``
    (times the group size). ``length_normalized`` uses row means for S; ``importance_cap`` multiplies by the row's ratio
    to the behavior policy, capped.
    """

    name = "residual"
    traits = Traits(holds_ratio=False, own_advantage=True, groups="dro", purpose="regulariser")
    beta: NonNegative = 0.1
    scale: Positive = 1.0
    centered: bool = True
    divide: Literal["none", "group", "pairs"] = "none"
    length_normalized: bool = False
    importance_cap: UpperBound | None = None
    soft: UpperBound | None = None

    def __post_init__(self) -> None:
        """Refuses two centers.

        Raises:
            ConfigError: not centered, and measured from the group's soft value.
        """
        if self.soft is not None and not self.centered:
            raise ConfigError(
                "correction.kernel.centered=false would be of no effect with correction.kernel.soft, which takes the "
                "group's soft value off in place of its mean: leave one of them out"
            )

    @property
    def anchors(self) -> tuple[str, ...]:
        """The behavior policy's where the residual is weighted by its ratio."""
        return () if self.importance_cap is None else ("behavior",)

    @property
    def without_groups(self) -> str | None:
        """A residual that is not centered needs no group, unless it is measured from the group's soft value."""
        return self.traits.groups if self.centered or self.soft is not None else None

    def formula(self) -> str:
        """The residual."""
        return (
            "1, with A = "
            + ("" if self.scale == 1.0 else f"{number(self.scale)} * ")
            + ("delta" if not self.centered and self.soft is None else f"(delta - {self._baseline()})")
            + {"none": "", "group": " / (group size - 1)", "pairs": " * group size"}[self.divide]
            + ("" if self.importance_cap is None else f" * min(row ratio to behavior, {number(self.importance_cap)})")
            + f", delta = R - {number(self.beta)} * {'mean' if self.length_normalized else 'sum'} over the row of d"
        )

    def _baseline(self) -> str:
        if self.soft is None:
            return "group mean of delta"
        return f"{number(self.soft)} * log of the group mean of exp(R / {number(self.soft)})"

    def prepare(self, view: View, total: Total) -> dict[str, Tensor]:
        """The residual of each row, as the advantage of its units."""
        drift = view.unit_log_ratio.sum(-1)
        if self.length_normalized:
            drift = drift / view.layout.count.squeeze(-1).to(drift.dtype)
        groups = Groups.of(view.batch)
        reward = row_return(view.batch).to(drift.dtype)
        delta = reward - self.beta * drift
        if self.soft is not None:
            value = self.scale * (delta - soft_value(reward, groups, self.soft))
        else:
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


def soft_value(reward: Tensor, groups: Groups, temperature: float) -> Tensor:
    """``temperature * log mean exp(reward / temperature)`` of each row's group, ``[B]``: from the best to the mean."""
    if math.isinf(temperature):
        return groups.mean(reward)
    x = reward.double() / temperature
    return (temperature * (groups.logsumexp(x) - groups.count.double().log())).to(reward.dtype)


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


class TeacherRatio(Kernel):
    """PPO on the ratio to the geometric mean ``anchor^share teacher^(1 - share)``. RLAD, 2602.22495 (from memory).

    What the teacher likes more stays unclipped longer where it did well, and is clipped earlier where it did not:
    imitation is only ever through the advantage.
    """

    name = "teacher_ratio"
    traits = Traits(truncates=True, anchors=("teacher",))
    clip_low: Radius = 0.2
    clip_high: Radius = 0.2
    share: UnitInterval = 0.5

    def formula(self) -> str:
        """The ratio and its bounds."""
        mixed = f"log r = {number(self.share)} * d + {number(1 - self.share)} * log(current / teacher)"
        return f"{clipped_formula(1 - self.clip_low, 1 + self.clip_high, None)}; {mixed}"

    def weight(self, view: View) -> Tensor:
        """PPO's, of the mixed ratio."""
        mixed = self.share * view.log_ratio + (1 - self.share) * view.against("teacher")
        return ppo(replace(view, log_ratio=mixed), self.clip_low, self.clip_high)


class FDivergence(Kernel):
    """Weight 1 on ``-f'(pi / target)`` less its group's mean, ``target ~ anchor exp(R / beta)``. f-DPG, 2302.08215.

    Both are of whole rows, and the target's normaliser is the mean of ``target / pi`` over a prompt's rows.
    ``generator`` is a name of :data:`~unified_rl.correction.generators.GENERATORS` or a mapping: the reverse KL is
    reinforcement learning with a KL penalty, the forward KL distributional policy gradients (DPG). A weight is at most
    ``exp(20)``. With ``moment`` the target is the tilt ``anchor exp(lambda R)`` whose mean return is this number, as
    far as rows reach it (:func:`tilt_to`), whatever ``beta`` is. GDC, 2012.11635.
    """

    name = "f_divergence"
    traits = Traits(holds_ratio=False, own_advantage=True, groups="dro", purpose="other objective")
    generator: str | Mapping[str, Any] = "reverse_kl"
    beta: Positive = 0.1
    moment: float | None = None

    def __post_init__(self) -> None:
        """Checks the generator."""
        self._generator()

    def _generator(self) -> Generator:
        made: Generator = bind(self.generator, GENERATORS, "correction.kernel.generator")[0]()
        return made

    def formula(self) -> str:
        """The pseudo-reward."""
        name = self.generator if isinstance(self.generator, str) else self.generator["name"]
        power = f"R / {number(self.beta)}" if self.moment is None else "lambda R"
        return (
            f"1, with A = -f'(pi / target) - its group mean, target = anchor * exp({power}) / Z, "
            f"f of {str(name).replace('_', ' ')}"
        )

    def prepare(self, view: View, total: Total) -> dict[str, Tensor]:
        """The pseudo-reward of each row, as the advantage of its units."""
        groups, drift = Groups.of(view.batch), view.unit_log_ratio.sum(-1)
        reward = row_return(view.batch).to(drift.dtype)
        tilted = reward / self.beta if self.moment is None else tilt_to(self.moment, reward, -drift, total) * reward
        target = tilted - drift
        normaliser = groups.logsumexp(target) - groups.count.to(drift.dtype).log()
        pseudo = -self._generator().slope(normaliser - target)
        return {"advantage": (pseudo - groups.mean(pseudo)).unsqueeze(-1).expand_as(view.log_ratio)}

    def weight(self, view: View) -> Tensor:
        """Ones."""
        return torch.ones_like(view.log_ratio)


GRID, ROUNDS = 32, 6
"""Places that are looked at together, and how often: the number is known to 200 / 32^6."""


def tilt_to(moment: float, reward: Tensor, log_weight: Tensor, total: Total) -> Tensor:
    """What rewards are multiplied by so that ``exp(log_weight + number * reward)`` gives them this mean.

    The mean rises with the number, which is searched between -100 and 100: a moment that no row reaches ends there.

    Args:
        moment: wanted mean.
        reward: of the rows, ``[B]``.
        log_weight: their log-weights without a tilt, ``[B]``, clamped at +-20.
        total: sums over the processes that share the batch.
    """
    low = reward.new_full((), -100.0, dtype=torch.float64)
    step, r, base = -2 * low / GRID, reward.double(), log_weight.double().clamp(-CLAMP, CLAMP)
    at = torch.arange(1, GRID, device=reward.device)
    for _ in range(ROUNDS):
        tilt = low + step * at
        x = (base + tilt.unsqueeze(-1) * (r - moment)).clamp(max=600.0).exp()
        above = total((x * (r - moment)).sum(-1)) > 0
        low = low + step * (GRID - 1 - above.sum())
        step = step / GRID
    return (low + step * GRID / 2).to(reward.dtype)


KERNELS = by_name(Residual, LikelihoodPair, TeacherPPO, TeacherRatio, FDivergence)
