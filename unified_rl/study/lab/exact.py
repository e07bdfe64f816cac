"""Exact mean and variance of a correction's gradient estimator, by summing over every trajectory.

The estimator of one row is ``sum over units of coefficient * score``. Rows are independent, or come in groups whose
advantages look at each other's rewards; with rewards of 0 and 1 an advantage depends on its own reward and the number
of successes among the others, so both moments are finite sums there too.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from tensordict import TensorDict
from torch import Tensor

from unified_rl.returns import group_advantage
from unified_rl.study.lab.plan import GROUP, Plan
from unified_rl.study.lab.problems import Problem
from unified_rl.study.lab.record import coefficients, record, row_scale
from unified_rl.study.lab.scene import Scene
from unified_rl.study.lab.values import scatter


@dataclass(frozen=True)
class Moments:
    """Of an estimator that averages rows.

    Attributes:
        mean: ``[F, A]``.
        variance: of one row's estimate (trace of its covariance); that of N rows is this over N. Where rows come in
            groups, N times the variance of N rows, which counts that rows of a group are not independent.
        batches: how many batches or groups were drawn; 0 where the moments are exact.
        projections: ``[batches]`` sampled gradients' inner products with the true one, for standard errors.
        square: unbiased estimate of the mean's squared norm.
    """

    mean: Tensor
    variance: float
    square: float
    batches: int = 0
    projections: Tensor | None = None


def row_moments(scene: Scene, coefficient: Tensor) -> Moments:
    """Moments where rows are independent, from the ``coefficient [B, N]`` of every trajectory's scores."""
    p = scene.probability
    mean = scene.policy.score_sum(scatter(scene.problem, p[:, None] * coefficient), scene.table)
    second = p @ squared_norm(scene.gram, coefficient)
    square = float(mean.square().sum())
    return Moments(mean, float(second) - square, square)


def squared_norm(gram: Tensor, coefficient: Tensor) -> Tensor:
    """Squared norm of each row's estimate, ``[..., B]``, from ``coefficient [..., B, N]``."""
    return torch.einsum("bij,...bi,...bj->...b", gram, coefficient, coefficient)


def group_moments(scene: Scene, coefficient: Tensor) -> Moments:
    """Moments where rows come in groups of ``G`` and rewards are 0 or 1.

    Args:
        scene: who acts, who learns, and where.
        coefficient: ``[G, B, N]``, by the number of successes among the other ``G - 1`` rows.
    """
    size, probability, success = len(coefficient), scene.probability, scene.problem.returns == 1
    rate = probability @ success.double()
    others = binomial(size - 1, rate)
    weighted = probability[:, None] * coefficient
    parts = torch.stack([weighted * (success == bool(r))[:, None] for r in (0, 1)])
    means = scene.policy.score_sum(
        scatter(scene.problem, parts), scene.table
    )  # [2, G, F, A], by own reward and successes of others
    mean = (others[:, None, None] * means.sum(0)).sum(0)
    second = others @ (squared_norm(scene.gram, coefficient) @ probability)
    square = float(mean.square().sum())
    variance = float(second) - square + (size - 1) * (float(_pair(means, rate)) - square)
    return Moments(mean, variance, square)


def _pair(means: Tensor, rate: Tensor) -> Tensor:
    """Expected inner product of the estimates of two rows of a group, summed over the successes of the rest."""
    size = means.shape[1]
    if size == 1:
        return means.sum() * 0.0
    rest = binomial(size - 2, rate)
    total = rest.new_zeros(())
    for own in (0, 1):
        for other in (0, 1):
            mine, yours = means[own, other : other + size - 1], means[other, own : own + size - 1]
            total = total + rest @ (mine * yours).sum((-2, -1))
    return total


def binomial(n: int, rate: Tensor) -> Tensor:
    """Probabilities of 0 to ``n`` successes, ``[n + 1]``."""
    k = torch.arange(n + 1, dtype=torch.float64)
    choose = (torch.lgamma(torch.tensor(n + 1.0).double()) - torch.lgamma(k + 1) - torch.lgamma(n - k + 1)).exp()
    return choose * rate**k * (1 - rate) ** (n - k)


def exact_moments(plan: Plan, scene: Scene, group: int) -> Moments:
    """Exact moments of a preset.

    Args:
        plan: with the route ROW or GROUP.
        scene: who acts, who learns, and where.
        group: rows of a group.
    """
    problem, by_policy = scene.problem, scene.log_probs(plan.correction)
    scale, rows = row_scale(plan.correction, problem, scene.probability), torch.arange(len(problem.mask))
    if plan.route != GROUP:
        advantage = row_advantage(plan, problem, scene.advantage)
        batch = record(problem, rows, by_policy, advantage, torch.zeros_like(rows))
        found = coefficients(plan.correction, by_policy["current"], batch, scale)
        return row_moments(scene, found)
    repeated = rows.repeat(group)
    others = torch.arange(group).repeat_interleave(len(rows))
    given = group_statistics(plan, group)[(problem.returns[repeated]).long() * group + others]
    wide = {name: x[repeated] for name, x in by_policy.items()}
    advantage = given["advantage"][:, None].expand(len(repeated), problem.mask.shape[1])
    batch = record(problem, repeated, wide, advantage, torch.zeros_like(repeated))
    stats = {key: given[key] for key in given.keys() if key != "advantage"}
    if plan.advantage == "own":
        stats["advantage"] = advantage
    found = coefficients(plan.correction, wide["current"], batch, scale[repeated], stats)
    return group_moments(scene, found.view(group, len(rows), -1))


def row_advantage(plan: Plan, problem: Problem, critic: Tensor) -> Tensor:
    """The advantage of each unit where it does not look at other rows, ``[B, N]``; ``critic`` holds the true Q - V."""
    if plan.advantage == "reward":
        return problem.reward
    out: Tensor = critic - plan.correction.advantage.get("shift", 0.0)
    return out


def group_statistics(plan: Plan, group: int) -> TensorDict:
    """What a row's advantage is for each own reward and number of successes among the others, ``[2 * G]``.

    Found by handing the library a group for each case, whose first row is the one asked about.
    """
    own = torch.arange(2).repeat_interleave(group)
    others = torch.arange(group).repeat(2)
    successes = torch.arange(1, group)[None, :] <= others[:, None]
    reward = torch.cat([own[:, None].double(), successes.double()], -1).flatten()
    ids = torch.arange(2 * group).repeat_interleave(group)
    if plan.advantage == "group":
        found = {"advantage": group_advantage(reward, ids, **plan.correction.advantage)}
    else:
        found = _own_statistics(plan, reward, ids)
    return TensorDict({key: value[::group] for key, value in found.items()}, batch_size=[2 * group])


def _own_statistics(plan: Plan, reward: Tensor, ids: Tensor) -> dict[str, Tensor]:
    """Statistics of a kernel that looks at groups itself, for rows of one unit without drift."""
    zero = torch.zeros(len(reward), 1, dtype=torch.float64)
    batch = TensorDict(
        {
            "behavior_log_prob": zero,
            "mask": torch.ones_like(zero, dtype=torch.bool),
            "step_index": torch.zeros_like(zero, dtype=torch.int64),
            "reward": reward[:, None],
            "group": ids,
        },
        batch_size=[len(reward)],
    )
    stats = plan.correction.prepare(zero, batch)
    return {"advantage": stats["advantage"].squeeze(-1), "success_rate": stats["success_rate"]}
