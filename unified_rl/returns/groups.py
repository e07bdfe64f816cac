"""Group baselines and normalisers: ``A = (reward - baseline) / scale`` within groups of rows.

One scatter-based reducer serves every kind. Sources: DeepSeekMath (2402.03300), Dr. GRPO (2503.20783), Back to Basics
(2402.14740, leave-one-out), On-Policy RL with Optimal Reward Baseline (2505.23585, length), ReMax (2310.10505, greedy),
REINFORCE++ (2501.03262, whiten), GDPO (several rewards), AsymRE (2506.20520, shift).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from tensordict import TensorDictBase
from torch import Tensor

from unified_rl.errors import ConfigError, RecordError
from unified_rl.ranges import NonNegative, Positive, UnitInterval, Whole


class Groups:
    """Sums, means and extremes over the rows of each group, handed back to every row.

    Args:
        group: ``[B]`` int64 group ids; any integers.
    """

    def __init__(self, group: Tensor) -> None:
        ids, self.index = torch.unique(group, return_inverse=True)
        self.number = ids.numel()
        self.count = self.sum(torch.ones(group.shape[0], device=group.device))

    @classmethod
    def of(cls, record: TensorDictBase) -> Groups:
        """The groups of a record; one group where it names none."""
        group = record.get("group", None)
        return cls(torch.zeros_like(record["mask"][:, 0], dtype=torch.int64) if group is None else group)

    def sum(self, x: Tensor) -> Tensor:
        """Each row's group sum of ``x [B]``."""
        return x.new_zeros(self.number).index_add(0, self.index, x)[self.index]

    def mean(self, x: Tensor) -> Tensor:
        """Each row's group mean of ``x [B]``."""
        return self.sum(x) / self.count.to(x.dtype)

    def weighted_mean(self, x: Tensor, weight: Tensor) -> Tensor:
        """Each row's group mean of ``x [B]`` under ``weight [B]``; 0 where the weights sum to 0."""
        total = self.sum(weight)
        return self.sum(weight * x) / torch.where(total == 0, 1.0, total)

    def first(self) -> Tensor:
        """Number of the first row of each group, ``[number]`` int64."""
        rows = torch.arange(len(self.index), device=self.index.device)
        start = rows.new_full((self.number,), len(rows))
        return start.scatter_reduce(0, self.index, rows, "amin")

    def extreme(self, x: Tensor, how: str) -> Tensor:
        """Each row's group ``amax`` or ``amin`` of ``x [B]``."""
        return x.new_zeros(self.number).scatter_reduce(0, self.index, x, how, include_self=False)[self.index]

    def std(self, x: Tensor, ddof: int) -> Tensor:
        """Each row's group standard deviation; 0 where the group has no more than ``ddof`` rows."""
        square = self.sum((x - self.mean(x)).square())
        return (square / (self.count.to(x.dtype) - ddof).clamp(min=1)).sqrt() * (self.count > ddof)

    def logsumexp(self, x: Tensor) -> Tensor:
        """Each row's group ``log sum exp`` of ``x [B]``."""
        top = self.extreme(x, "amax")
        return top + self.sum((x - top).exp()).log()


def lone(group: Tensor) -> bool:
    """Whether there are rows, whose ids of groups are ``[B]`` int64, and every one is alone in its group."""
    return 0 < len(group) == len(group.unique())


def _mean(reward: Tensor, groups: Groups) -> Tensor:
    """The group's mean (GRPO)."""
    return groups.mean(reward)


def _leave_one_out(reward: Tensor, groups: Groups) -> Tensor:
    """The mean of the others (RLOO)."""
    return (groups.sum(reward) - reward) / (groups.count.to(reward.dtype) - 1).clamp(min=1)


def _greedy(reward: Tensor, groups: Groups) -> Tensor:
    """The group's best reward."""
    return groups.extreme(reward, "amax")


def _none(reward: Tensor, groups: Groups) -> Tensor:
    """No baseline."""
    return torch.zeros_like(reward)


BASELINES: dict[str, Callable[[Tensor, Groups], Tensor]] = {
    "mean": _mean,
    "leave_one_out": _leave_one_out,
    "max": _greedy,
    "none": _none,
}
"""Baselines that need nothing but the rewards; ``weighted``, ``soft`` and ``given`` take another argument."""


def group_advantage(
    reward: Tensor,
    group: Tensor,
    *,
    baseline: str = "mean",
    scale: str = "none",
    ddof: Whole = 1,
    eps: NonNegative = 1e-6,
    singleton: float | Literal["auto"] | None = "auto",
    min_spread: NonNegative = 0.0,
    shift: float = 0.0,
    temperature: Positive = 1.0,
    weight: Tensor | None = None,
    given: Tensor | None = None,
    units: Tensor | None = None,
    reward_weights: Sequence[float] | None = None,
    combine: str = "sum_first",
) -> Tensor:
    """Advantages relative to the rows of the same group.

    Args:
        reward: ``[B]`` float, or ``[B, K]`` for K rewards; NaN where a row has no such reward, which then counts in no
            sum, mean or spread.
        group: ``[B]`` int64; rows of replay or of an expert may carry the id of a fresh group and so join it.
        baseline: mean, leave_one_out, max, none; ``weighted`` (mean under ``weight``: OPO with lengths, an optimal
            baseline with squared score norms); ``soft`` (``tau log mean exp(r / tau)``); ``given`` (a greedy rollout's
            reward, a tracker's or a critic's value).
        scale: ``none``; ``std`` (of the group); ``batch`` (of all rewards); ``whiten`` (centres and divides by the
            spread of the centred values over the batch).
        ddof: subtracted from the count in a standard deviation.
        eps: added to a standard deviation.
        singleton: advantage of a row that is alone in its group; None keeps its reward, which ``batch`` and ``whiten``
            then scale with all others. ``auto`` is 0, and None where ``scale`` is ``whiten``: the batch is what such a
            row is compared with (verl's REINFORCE++ with a group baseline). Does not apply where the group has no say
            (baselines ``none`` and ``given`` with a scale other than ``std``).
        min_spread: a group's standard deviation is taken to be at least this, so that a group mixing 0.01 and 0 is
            not blown up to the size of one mixing 1 and 0.
        shift: added to the baseline (AsymRE uses -0.1).
        temperature: of the soft baseline.
        weight, given: ``[B]``, for the baselines above.
        units: ``[B]``, how often each row counts in ``batch`` and ``whiten``: its number of units, to whiten over units
            (REINFORCE++); each row once if not given.
        reward_weights: K weights, all 1 if not given.
        combine: with K rewards, ``sum_first``, or ``normalize_first`` (each is made an advantage, then they are summed:
            GDPO). Where ``scale`` is ``whiten``, each column is first divided by its group's spread, and the sum is
            whitened, as in GDPO's releases.

    Returns:
        ``[B]`` float, detached. Groups whose rewards are all equal get exactly 0 (before the shift), whatever eps is.

    Raises:
        ConfigError: an unknown option.
        RecordError: shapes disagree, or an argument that the baseline needs is missing.
    """
    if combine not in ("sum_first", "normalize_first"):
        raise ConfigError(f"combine must be sum_first or normalize_first, got {combine!r}")
    if scale not in ("none", "std", "batch", "whiten"):
        raise ConfigError(f"scale must be none, std, batch or whiten, got {scale!r}")
    columns, weights = _columns(reward, group, reward_weights)
    groups = Groups(group)
    if combine == "sum_first":
        columns, weights = summed(reward, group, reward_weights).unsqueeze(-1), weights.new_ones(1)

    counts = torch.ones_like(columns[:, 0]) if units is None else units.to(columns.dtype)
    spread = _Spread(ddof, eps, min_spread, counts)
    lone = (None if scale == "whiten" else 0.0) if singleton == "auto" else singleton
    each = "std" if combine == "normalize_first" and scale == "whiten" else scale

    def one(r: Tensor) -> Tensor:
        if columns.shape[1] > 1 and bool((absent := r.isnan()).any()):
            return among(r, ~absent)
        centred = _centred(r, groups, baseline, shift, temperature, weight, given)
        if baseline in ("none", "given") and each != "std":
            return _scaled(centred, r, groups, each, spread)
        alone = groups.count == 1
        if lone is None:
            return _scaled(torch.where(alone, r, centred), r, groups, each, spread)
        return torch.where(alone, torch.full_like(r, lone), _scaled(centred, r, groups, each, spread))

    def among(r: Tensor, rows: Tensor) -> Tensor:
        """Advantages of those rows among themselves; the others have none of this reward."""
        own, theirs, counted = (None if x is None else x[rows] for x in (weight, given, units))
        out = torch.zeros_like(r)
        if bool(rows.any()):
            out[rows] = group_advantage(
                r[rows], group[rows], baseline=baseline, scale=each, ddof=ddof, eps=eps, singleton=lone,
                min_spread=min_spread, shift=shift, temperature=temperature, weight=own, given=theirs, units=counted,
            )  # fmt: skip
        return out

    total = torch.stack([one(r) for r in columns.unbind(-1)], -1) @ weights
    return spread.whitened(total) if each != scale else total


def summed(reward: Tensor, group: Tensor, weights: Sequence[float] | None = None) -> Tensor:
    """Rewards ``[B]`` or ``[B, K]`` as one number a row, ``[B]``: the weighted sum; NaN of K counts nothing."""
    columns, each = _columns(reward, group, weights)
    if reward.ndim == 2:
        columns = torch.where(columns.isnan(), 0.0, columns)
    return (columns * each).sum(-1)


def stratified_advantage(
    reward: Tensor, group: Tensor, stratum: Tensor, *, blend: UnitInterval = 0.5, scale: str = "std", ddof: Whole = 0
) -> Tensor:
    """A mix of advantages within (group, stratum) and within the group: Stratified GRPO.

    Args:
        reward, group: as in :func:`group_advantage`.
        stratum: ``[B]`` int64, for example the number of tool calls; a row alone in its stratum uses its group's.
        blend: share of the within-stratum advantage; 0 is GRPO.
    """
    whole = group_advantage(reward, group, scale=scale, ddof=ddof)
    _, key = torch.unique(torch.stack([group, stratum], -1), dim=0, return_inverse=True)
    within = group_advantage(reward, key, scale=scale, ddof=ddof, singleton=0.0)
    within = torch.where(Groups(key).count == 1, whole, within)
    return blend * within + (1 - blend) * whole


def _columns(reward: Tensor, group: Tensor, weights: Sequence[float] | None) -> tuple[Tensor, Tensor]:
    """Rewards as ``[B, K]`` in at least float32, without gradient, and the K weights."""
    reward = reward.detach() if reward.dtype == torch.float64 else reward.detach().float()
    if group.shape != reward.shape[:1]:
        raise RecordError(f"group has shape {tuple(group.shape)}, but reward has {tuple(reward.shape)}")
    columns = reward.unsqueeze(-1) if reward.ndim == 1 else reward
    given = reward.new_ones(columns.shape[1]) if weights is None else reward.new_tensor(weights)
    if given.shape[0] != columns.shape[1]:
        raise RecordError(f"{given.shape[0]} reward_weights for {columns.shape[1]} rewards")
    return columns, given


def _centred(
    reward: Tensor,
    groups: Groups,
    baseline: str,
    shift: float,
    temperature: float,
    weight: Tensor | None,
    given: Tensor | None,
) -> Tensor:
    if baseline in BASELINES:
        b = BASELINES[baseline](reward, groups)
    elif baseline == "soft":
        b = temperature * (groups.logsumexp(reward / temperature) - groups.count.to(reward.dtype).log())
    elif baseline == "weighted":
        b = groups.weighted_mean(reward, _needed(weight, "weight", baseline).to(reward.dtype))
    elif baseline == "given":
        return reward - _needed(given, "given", baseline).to(reward.dtype) - shift
    else:
        raise ConfigError(f"unknown baseline {baseline!r}; known: {', '.join(BASELINES)}, soft, weighted, given")
    if baseline != "none":  # equal rewards: exactly 0, not what rounding left of it
        flat = groups.extreme(reward, "amax") == groups.extreme(reward, "amin")
        b = torch.where(flat, reward, b)
    return reward - b - shift


@dataclass(frozen=True)
class _Spread:
    """How a standard deviation is taken, and what it divides; ``counts [B]`` says how often a row counts."""

    ddof: int
    eps: float
    least: float
    counts: Tensor

    def divided(self, x: Tensor, spread: Tensor) -> Tensor:
        return x / (spread.clamp(min=self.least) + self.eps)

    def mean(self, x: Tensor) -> Tensor:
        return (self.counts * x).sum() / self.counts.sum().clamp(min=1)

    def batch_std(self, x: Tensor) -> Tensor:
        square = (self.counts * (x - self.mean(x)).square()).sum()
        return (square / (self.counts.sum() - self.ddof).clamp(min=1)).sqrt()

    def whitened(self, x: Tensor) -> Tensor:
        centred = x - self.mean(x)
        return self.divided(centred, self.batch_std(x))


def _scaled(centred: Tensor, reward: Tensor, groups: Groups, scale: str, spread: _Spread) -> Tensor:
    if scale == "std":
        own = groups.std(reward, spread.ddof)
        return torch.where(own == 0, centred, spread.divided(centred, own))
    if scale == "batch":
        return spread.divided(centred, spread.batch_std(reward))
    return spread.whitened(centred) if scale == "whiten" else centred


def _needed(x: Tensor | None, name: str, baseline: str) -> Tensor:
    if x is None:
        raise RecordError(f"baseline={baseline} needs the argument {name}")
    return x
