"""Off-policy evaluation: the value of a policy from episodes of another, each with its ESS and interval.

Episodes are rows ``[B, T]`` that start at column 0, padded behind with ``mask`` False; a record whose rows hold several
is cut into them (:meth:`Episodes.of`). Needs exact ratios. Sources:
Precup, Sutton and Singh (2000); Jiang and Li (1511.03722); Thomas and Brunskill (1604.00923).
"""

from __future__ import annotations

import math
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


@dataclass(frozen=True)
class Cut:
    """Where the steps of a record's rows lie among the episodes that they are taken apart into.

    Attributes:
        row: ``[B, T]`` int64, the episode of each step.
        column: ``[B, T]`` int64, its number in the episode.
        valid: ``[B, T]`` bool; other steps are left out.
    """

    row: Tensor
    column: Tensor
    valid: Tensor

    @classmethod
    def of(cls, record: TensorDictBase, valid: Tensor) -> Cut | None:
        """Of a record; None where each of its rows is one episode.

        Raises:
            RecordError: a row, or the episode before another, has no end.
        """
        keys = [key for key in ("terminated", "truncated") if key in record.keys()]
        ends = torch.stack([record[key] for key in keys]).any(0) & valid if keys else None
        starts = valid & (valid.long().cumsum(-1) == 1)  # the first of its row, behind what is left out
        if "episode" in record.keys():
            episode = record["episode"]
            starts[:, 1:] |= (episode[:, 1:] != episode[:, :-1]) & valid[:, 1:]
        if ends is not None:
            starts[:, 1:] |= (ends | ~valid)[:, :-1] & valid[:, 1:]
            _refuse_fragments(ends, starts, valid)
        count = starts.long().sum(-1)
        if bool((count == 1).all()) or not bool(valid.any()):
            return None
        row = starts.long().cumsum(-1) - 1 + (count.cumsum(0) - count).unsqueeze(-1)
        position = torch.arange(valid.shape[1], device=valid.device).expand_as(valid)
        begun = torch.where(starts, position, 0).cummax(-1).values
        return cls(row, position - begun, valid)

    def __call__(self, column: Tensor) -> Tensor:
        """A column ``[B, T]`` as episodes ``[E, L]``, padded behind with zeros."""
        shape = (int(self.row.max()) + 1, int(self.column[self.valid].max()) + 1)
        out = column.new_zeros(shape)
        out[self.row[self.valid], self.column[self.valid]] = column[self.valid]
        return out


def _refuse_fragments(ends: Tensor, starts: Tensor, valid: Tensor) -> None:
    """Raises RecordError where the last step of an episode is neither terminated nor truncated."""
    following = torch.cat([starts[:, 1:] | ~valid[:, 1:], torch.ones_like(valid[:, :1])], -1)
    open_ended = valid & following & ~ends
    if bool(open_ended.any()):
        row, step = (int(x) for x in open_ended.nonzero()[0])
        raise RecordError(
            f"row {row} leaves an episode at step {step} that neither terminated nor was truncated "
            f"({int(open_ended.sum())} such pieces): off-policy evaluation needs whole episodes; collect longer rows, "
            "or cut the pieces off by step_mask"
        )


def _discounts(record: TensorDictBase, valid: Tensor, gamma: float) -> Tensor:
    """The discount ``[B, T]`` of each step: ``gamma``, or its power for chunks of actions."""
    found = record.get("discount", None)
    if found is None or not 0.0 < gamma < 1.0:
        return torch.full_like(record["reward"], gamma, dtype=torch.float64)
    power = (found.double().clamp(min=1e-300).log() / math.log(gamma)).round().clamp(min=1.0)
    wrong = valid & ((gamma**power - found.double()).abs() > 1e-6)
    if bool(wrong.any()):
        raise RecordError(
            f"the record's discount holds {float(found[wrong][0]):g}, which is no power of gamma={gamma}; evaluate "
            "with the discount that the rows were recorded under"
        )
    out: Tensor = gamma**power
    return out


class Episodes:
    """Episodes made ready for evaluation: clean rewards, discounts and cumulative ratios.

    Args:
        reward: ``[B, T]``.
        log_ratio: ``[B, T]``, log of target over behavior probability of each step's whole action.
        gamma: discount of one step.
        mask: ``[B, T]`` bool, or None for all True.
        discount: ``[B, T]``, of each step, where they are not all ``gamma`` (chunks of actions).

    Raises:
        RecordError: shapes disagree, or a valid log-ratio is not finite.
    """

    def __init__(
        self,
        reward: Tensor,
        log_ratio: Tensor,
        gamma: float,
        mask: Tensor | None = None,
        discount: Tensor | None = None,
    ) -> None:
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
        each = torch.full_like(self.reward, gamma) if discount is None else torch.where(mask, discount, 1.0).double()
        ahead = each.cumprod(-1)
        self.discount = torch.cat([torch.ones_like(ahead[:, :1]), ahead[:, :-1]], -1)
        self.gamma = gamma
        self._cut: Cut | None = None

    @classmethod
    def of(cls, record: TensorDictBase, scored: UnitLogProb, gamma: float) -> Episodes:
        """Episodes from a record and the target policy's log-probs of what was done.

        A row is one episode, or several behind one another where the record says so: by ``episode``, or by
        ``terminated`` and ``truncated``. Those are taken apart. A piece without its end has no return, and leaving it
        out would favour short episodes, so it is refused.

        Args:
            record: batch size ``[B]``, with ``behavior_log_prob``, ``mask`` and ``step_index`` ``[B, N]``,
                ``reward [B, T]`` and optionally ``step_mask``, ``discount``, ``episode``, ``terminated`` and
                ``truncated``, all ``[B, T]``.
            scored: from the target policy's ``log_prob(record)``.
            gamma: discount of one step.

        Raises:
            RecordError: the log-probs are not exact, so their ratio is no importance weight of the executed action; a
                row ends in the middle of an episode; or its discounts are no powers of ``gamma``.
        """
        if not scored.exact:
            raise RecordError(
                "off-policy evaluation needs exact importance ratios, and this policy's log-probs are not those of the "
                "executed action; evaluate it by rollouts"
            )
        drift = scored.log_prob.detach().double() - record["behavior_log_prob"].double()
        steps = Steps.of(record)
        steps = Steps(steps.step_index, record["mask"] & scored.mask, steps.num_steps, steps.units_per_step)
        reward, valid = record["reward"], record.get("step_mask", None)
        valid = torch.ones_like(reward, dtype=torch.bool) if valid is None else valid
        cut = Cut.of(record, valid)
        columns = (reward, steps.sum(drift), valid, _discounts(record, valid, gamma))
        reward, log_ratio, mask, discount = columns if cut is None else (cut(column) for column in columns)
        episodes = cls(reward, log_ratio, gamma, mask, discount)
        episodes._cut = cut
        return episodes

    def arranged(self, column: Tensor) -> Tensor:
        """A column ``[B, T]`` of the record that these were made of, in their own order of rows."""
        return column if self._cut is None or column.shape != self._cut.valid.shape else self._cut(column)

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
    reward = episodes.discount * episodes.reward
    value = (share * reward).sum(-1).mean()
    mean = (share * reward).mean(0, keepdim=True)
    estimate = episodes.estimate((share * (reward - mean)).sum(-1))
    return Estimate(value, estimate.standard_error, estimate.ess, episodes.clamped)


def doubly_robust(episodes: Episodes, q: Tensor, expected_q: Tensor, *, weighted: bool = False) -> Estimate:
    """Model values corrected by ratio-weighted model errors: unbiased if the ratios or the values are right.

    Args:
        episodes: taken apart or not.
        q: ``[B, T]`` as the record's rows or the episodes, the model's value of the taken action.
        expected_q: ``[B, T]``, its expectation under the target policy in the same state.
        weighted: divide each step's cumulative ratios by their mean (weighted doubly robust).
    """
    q = torch.where(episodes.mask, episodes.arranged(q), 0.0).double()
    expected_q = torch.where(episodes.mask, episodes.arranged(expected_q), 0.0).double()
    ahead = episodes.cumulative
    before = torch.cat([torch.ones_like(ahead[:, :1]), ahead[:, :-1]], -1)
    error = episodes.reward - q
    terms = ahead * error + before * expected_q
    if not weighted:
        return episodes.estimate((episodes.discount * terms).sum(-1))
    ahead, before = ahead / ahead.mean(0, keepdim=True), before / before.mean(0, keepdim=True)
    error, expected_q = episodes.discount * error, episodes.discount * expected_q
    step = (ahead * error).mean(0), (before * expected_q).mean(0)
    value = (step[0] + step[1]).sum()
    centred = ahead * (error - step[0]) + before * (expected_q - step[1])  # linearised: the weights are estimates too
    estimate = episodes.estimate(centred.sum(-1))
    return Estimate(value, estimate.standard_error, estimate.ess, episodes.clamped)
