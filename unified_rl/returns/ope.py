"""Off-policy evaluation: the value of a policy from episodes of another, each with its ESS and interval.

Episodes are rows ``[B, T]`` that start at column 0, padded behind with ``mask`` False. Needs exact ratios. Sources:
Precup, Sutton and Singh (2000); Jiang and Li (1511.03722); Thomas and Brunskill (1604.00923).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from tensordict import TensorDictBase
from torch import Tensor

from unified_rl.errors import RecordError
from unified_rl.returns.scan import CLAMP
from unified_rl.units import Steps, UnitLogProb


@dataclass(frozen=True)
class Estimate:
    """An estimate of a policy's value.

    Attributes:
        value: scalar.
        standard_error: scalar, over episodes (for normalised estimators that of the linearised ratio).
        ess: effective number of episodes, of the whole-episode ratios.
        clamped: share of episodes whose log-ratio met the safety clamp; where it is not 0, "unbiased" is not true.
    """

    value: Tensor
    standard_error: Tensor
    ess: Tensor
    clamped: Tensor

    def interval(self, z: float = 1.96) -> tuple[float, float]:
        """``value`` plus and minus ``z`` standard errors."""
        half = z * float(self.standard_error)
        return float(self.value) - half, float(self.value) + half


class Episodes:
    """Episodes made ready for evaluation: clean rewards, discounts and cumulative ratios.

    Args:
        reward: ``[B, T]``.
        log_ratio: ``[B, T]``, log of target over behavior probability of each step's whole action.
        gamma: discount of one step.
        mask: ``[B, T]`` bool, or None for all True.

    Raises:
        RecordError: shapes disagree, or a valid log-ratio is not finite.
    """

    def __init__(self, reward: Tensor, log_ratio: Tensor, gamma: float, mask: Tensor | None = None) -> None:
        if reward.shape != log_ratio.shape:
            raise RecordError(f"reward {tuple(reward.shape)} and log_ratio {tuple(log_ratio.shape)} differ in shape")
        mask = torch.ones_like(reward, dtype=torch.bool) if mask is None else mask
        if bool((mask & ~torch.isfinite(log_ratio)).any()):
            raise RecordError("off-policy evaluation needs a finite log-ratio at every valid step")
        self.mask = mask
        self.reward = torch.where(mask, reward, 0.0).double()
        step = torch.where(mask, log_ratio, 0.0).double()
        total = step.cumsum(-1)
        self.clamped = (total.abs().amax(-1) > CLAMP).double().mean()
        self.ratio = step.clamp(-CLAMP, CLAMP).exp()
        self.cumulative = total.clamp(-CLAMP, CLAMP).exp()  # an ended episode keeps its last one
        self.discount = gamma ** torch.arange(reward.shape[1], dtype=torch.float64, device=reward.device)
        self.gamma = gamma

    @classmethod
    def of(cls, record: TensorDictBase, scored: UnitLogProb, gamma: float) -> Episodes:
        """Episodes from a record, one a row, and the target policy's log-probs of what was done.

        Args:
            record: batch size ``[B]``, with ``behavior_log_prob``, ``mask`` and ``step_index`` ``[B, N]``,
                ``reward [B, T]`` and optionally ``step_mask [B, T]``.
            scored: from the target policy's ``log_prob(record)``.
            gamma: discount of one step.

        Raises:
            RecordError: the log-probs are not exact, so their ratio is no importance weight of the executed action.
        """
        if not scored.exact:
            raise RecordError(
                "off-policy evaluation needs exact importance ratios, and this policy's log-probs are not those of the "
                "executed action; evaluate it by rollouts"
            )
        drift = scored.log_prob.detach().double() - record["behavior_log_prob"].double()
        steps = Steps.of(record)
        steps = Steps(steps.step_index, record["mask"] & scored.mask, steps.num_steps, steps.units_per_step)
        return cls(record["reward"], steps.sum(drift), gamma, record.get("step_mask", None))

    def estimate(self, each: Tensor) -> Estimate:
        """The mean of one number an episode."""
        error = each.std(correction=1) / len(each) ** 0.5 if len(each) > 1 else torch.full_like(each[0], torch.inf)
        whole = self.cumulative[:, -1]
        return Estimate(each.mean(), error, whole.sum().square() / whole.square().sum(), self.clamped)


def importance_sampling(episodes: Episodes) -> Estimate:
    """Whole-episode ratio times return."""
    return episodes.estimate(episodes.cumulative[:, -1] * (episodes.discount * episodes.reward).sum(-1))


def weighted_importance_sampling(episodes: Episodes) -> Estimate:
    """The same, divided by the sum of ratios (self-normalised): biased, bounded by the returns seen."""
    weight = episodes.cumulative[:, -1]
    returns = (episodes.discount * episodes.reward).sum(-1)
    share = weight / weight.mean()
    value = (share * returns).mean()
    estimate = episodes.estimate(share * (returns - value))
    return Estimate(value, estimate.standard_error, estimate.ess, episodes.clamped)


def per_decision(episodes: Episodes) -> Estimate:
    """Each reward under the ratios up to it."""
    return episodes.estimate((episodes.cumulative * episodes.discount * episodes.reward).sum(-1))


def weighted_per_decision(episodes: Episodes) -> Estimate:
    """Per-decision with each step's ratios divided by their mean over episodes."""
    share = episodes.cumulative / episodes.cumulative.mean(0, keepdim=True)
    value = (share * episodes.discount * episodes.reward).sum(-1).mean()
    mean = (share * episodes.reward).mean(0, keepdim=True)
    estimate = episodes.estimate((share * (episodes.reward - mean) * episodes.discount).sum(-1))
    return Estimate(value, estimate.standard_error, estimate.ess, episodes.clamped)


def doubly_robust(episodes: Episodes, q: Tensor, expected_q: Tensor, *, weighted: bool = False) -> Estimate:
    """Model values corrected by ratio-weighted model errors: unbiased if the ratios or the values are right.

    Args:
        q: ``[B, T]``, the model's value of the taken action.
        expected_q: ``[B, T]``, its expectation under the target policy in the same state.
        weighted: divide each step's cumulative ratios by their mean (weighted doubly robust).
    """
    q = torch.where(episodes.mask, q, 0.0).double()
    expected_q = torch.where(episodes.mask, expected_q, 0.0).double()
    ahead = episodes.cumulative
    before = torch.cat([torch.ones_like(ahead[:, :1]), ahead[:, :-1]], -1)
    error = episodes.reward - q
    terms = ahead * error + before * expected_q
    if not weighted:
        return episodes.estimate((episodes.discount * terms).sum(-1))
    ahead, before = ahead / ahead.mean(0, keepdim=True), before / before.mean(0, keepdim=True)
    step = (ahead * error).mean(0), (before * expected_q).mean(0)
    value = (episodes.discount * (step[0] + step[1])).sum()
    centred = ahead * (error - step[0]) + before * (expected_q - step[1])  # linearised: the weights are estimates too
    estimate = episodes.estimate((episodes.discount * centred).sum(-1))
    return Estimate(value, estimate.standard_error, estimate.ess, episodes.clamped)
