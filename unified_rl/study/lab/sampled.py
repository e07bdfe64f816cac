"""Seeded Monte Carlo for corrections whose statistics span a batch, or groups that can not be summed over."""

from __future__ import annotations

import torch
from torch import Tensor

from unified_rl.returns import group_advantage
from unified_rl.study.lab.exact import Moments, row_advantage
from unified_rl.study.lab.plan import SAMPLED_BATCH, Plan
from unified_rl.study.lab.policies import Policy
from unified_rl.study.lab.problems import Problem
from unified_rl.study.lab.record import coefficients, record, row_scale
from unified_rl.study.lab.scene import Scene


def sampled_moments(plan: Plan, scene: Scene, *, group: int, rows: int, batches: int) -> Moments:
    """Moments of a preset from drawn batches.

    Args:
        plan: any route; batches are drawn one by one where the correction looks at whole batches, else all at once.
        scene: who acts, who learns, and where.
        group, rows, batches: rows of a group, rows of a batch, and how many batches.

    The draws depend on the numbers alone, so every preset sees the same rows.
    """
    problem, drawn = scene.problem, draw(scene.probability, rows * batches)
    by_policy = {name: x[drawn] for name, x in scene.log_probs(plan.correction).items()}
    scale = row_scale(plan.correction, problem, scene.probability)[drawn]
    ids = torch.arange(len(drawn)) // group
    batch = record(problem, drawn, by_policy, sampled_advantage(plan, problem, scene.advantage, drawn, ids), ids)
    parts = batches if plan.route == SAMPLED_BATCH else 1
    pieces = zip(by_policy["current"].chunk(parts), batch.chunk(parts), scale.chunk(parts), strict=True)
    found = torch.cat([coefficients(plan.correction, x, b, c) for x, b, c in pieces])
    size = rows if plan.route == SAMPLED_BATCH else group
    gradients = row_gradients(problem, scene.policy, scene.table, drawn, found, size)
    return from_gradients(gradients, size, scene.truth)


def draw(probability: Tensor, number: int, seed: int = 0) -> Tensor:
    """Indices of ``number`` independent rows, ``[number]`` int64."""
    u = torch.rand(number, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.searchsorted(probability.cumsum(0), u).clamp(max=len(probability) - 1)


def sampled_advantage(plan: Plan, problem: Problem, critic: Tensor, rows: Tensor, group: Tensor) -> Tensor:
    """Advantages of drawn rows, ``[R, N]``; zeros where the kernel computes its own, ``critic[rows]`` where wanted."""
    if plan.advantage == "own":
        return torch.zeros_like(problem.reward[rows])
    if plan.advantage != "group":
        return row_advantage(plan, problem, critic)[rows]
    settings = dict(plan.correction.advantage)
    if settings.get("baseline") == "weighted":
        settings["weight"] = problem.mask[rows].sum(-1).double()
    found = group_advantage(problem.returns[rows], group, **settings)
    return found[:, None].expand(len(rows), problem.mask.shape[1])


def row_gradients(
    problem: Problem, policy: Policy, table: Tensor, rows: Tensor, coefficient: Tensor, size: int
) -> Tensor:
    """Mean gradient of each run of ``size`` rows, ``[R / size, F, A]``."""
    pairs = problem.states * problem.actions
    index = problem.state[rows] * problem.actions + problem.action[rows]
    index = index + (torch.arange(len(rows)) // size * pairs)[:, None]
    flat = coefficient.masked_fill(~problem.mask[rows], 0.0).flatten() / size
    number = len(rows) // size
    weight = flat.new_zeros(number * pairs).index_add(0, index.flatten(), flat)
    return policy.score_sum(weight.view(number, problem.states, problem.actions), table)


def from_gradients(gradients: Tensor, size: int, truth: Tensor) -> Moments:
    """Unbiased moments from independent gradients ``[M, F, A]`` of ``size`` rows each."""
    number, mean = len(gradients), gradients.mean(0)
    spread = float((gradients - mean).square().sum() / (number - 1))
    square = float(mean.square().sum()) - spread / number
    return Moments(mean, size * spread, square, number, (gradients * truth).sum((-2, -1)))
