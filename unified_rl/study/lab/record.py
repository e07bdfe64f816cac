"""From trajectories to what the correction sees, and back to a coefficient for the score of each unit."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from tensordict import TensorDict
from torch import Tensor

from unified_rl.correction import Correction
from unified_rl.correction.reduction import REDUCTIONS
from unified_rl.study.lab.problems import Problem

LogProbs = Mapping[str, Tensor]


def record(problem: Problem, rows: Tensor, by_policy: LogProbs, advantage: Tensor, group: Tensor) -> TensorDict:
    """A batch of trajectories.

    Args:
        problem: where they come from.
        rows: ``[R]`` int64, which trajectories.
        by_policy: ``[R, N]`` log-probs of behavior, proximal, reference, proxy and teacher.
        advantage: ``[R, N]``.
        group: ``[R]`` int64.

    Returns:
        A record in float64. An outcome problem is one step with one reward; else every unit is a step.
    """
    mask, reward = problem.mask[rows], problem.reward[rows]
    index = torch.zeros_like(problem.action[rows])
    if not problem.outcome:
        index = index + torch.arange(mask.shape[1])
    anchors = ("behavior", "proximal", "reference", "proxy", "teacher")
    return TensorDict(
        {
            **{f"{name}_log_prob": by_policy[name] for name in anchors},
            "mask": mask,
            "step_index": index,
            "reward": reward.sum(-1, keepdim=True) if problem.outcome else reward,
            "policy_version": torch.zeros_like(index),
            "advantage": advantage,
            "group": group,
            "row_id": torch.arange(len(rows)),
        },
        batch_size=[len(rows)],
    )


def row_scale(correction: Correction, problem: Problem, probability: Tensor) -> Tensor:
    """What the reduction multiplies each trajectory's units by, ``[B]``, so that a unit's is 1 on average.

    A batch is divided by its number of units, of rows or by a constant. The first is random; here it is its expectation
    (what a large batch has), and constants are taken out, so that no reduction is called biased for its scale alone.
    """
    count = problem.mask.sum(-1).double()
    scale = REDUCTIONS[correction.reduce](count, correction.horizon, lambda x: x)
    return scale * (probability @ count) / (probability @ (scale * count))


def coefficients(
    correction: Correction,
    log_prob: Tensor,
    batch: TensorDict,
    scale: Tensor,
    given: Mapping[str, Tensor] | None = None,
) -> Tensor:
    """What each unit's score is multiplied by in the ascent direction, ``[R, N]``: minus the loss's derivative.

    Args:
        correction: any; penalties and attached levels are covered, since the loss itself is differentiated.
        log_prob: ``[R, N]`` of the current policy.
        batch: the record.
        scale: ``[R]``, takes the place of the reduction.
        given: statistics that take the place of those that the batch gives.
    """
    leaf = log_prob.detach().clone().requires_grad_()
    stats = correction.prepare(leaf.detach(), batch)
    for key, value in {**(given or {}), "coefficient": scale}.items():
        stats[key] = value
    (gradient,) = torch.autograd.grad(correction.loss(leaf, batch, stats).loss, leaf)
    return -gradient
