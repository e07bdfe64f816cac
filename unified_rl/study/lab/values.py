"""Exact probabilities, values and gradients, by summing over every trajectory. All float64."""

from __future__ import annotations

import torch
from torch import Tensor

from unified_rl.study.lab.policies import Policy
from unified_rl.study.lab.problems import Problem


def unit_log_prob(problem: Problem, table: Tensor) -> Tensor:
    """Log-probability of each unit under log-probabilities ``table [..., S, A]``, ``[..., B, N]``; 0 where masked."""
    return table[..., problem.state, problem.action].masked_fill(~problem.mask, 0.0)


def row_probability(problem: Problem, table: Tensor) -> Tensor:
    """Probability of each trajectory, ``[..., B]``; sums to 1."""
    return (problem.chance + unit_log_prob(problem, table).sum(-1)).exp()


def divergence(problem: Problem, behavior: Tensor, current: Tensor) -> float:
    """``KL(behavior || current)`` over whole trajectories."""
    log_ratio = unit_log_prob(problem, behavior) - unit_log_prob(problem, current)
    return float((row_probability(problem, behavior) * log_ratio.sum(-1)).sum())


def expected_return(problem: Problem, table: Tensor) -> Tensor:
    """Expected return of a policy, ``[...]``."""
    return row_probability(problem, table) @ problem.returns


def values(problem: Problem, table: Tensor) -> tuple[Tensor, Tensor]:
    """Exact ``V [nodes]`` and ``Q [nodes, A]``; 0 where no trajectory comes by."""
    weight = row_probability(problem, table)[:, None].expand_as(problem.reward)[problem.mask]
    to_go, node = problem.to_go[problem.mask], problem.node[problem.mask]
    pair = node * problem.actions + problem.action[problem.mask]

    def average(index: Tensor, number: int) -> Tensor:
        total = torch.zeros(number, dtype=torch.float64).index_add(0, index, weight * to_go)
        mass = torch.zeros(number, dtype=torch.float64).index_add(0, index, weight)
        return total / torch.where(mass > 0, mass, 1.0)

    return average(node, problem.nodes), average(pair, problem.nodes * problem.actions).view(problem.nodes, -1)


def true_advantage(problem: Problem, table: Tensor) -> Tensor:
    """``Q - V`` of each unit, ``[B, N]``; 0 where masked."""
    v, q = values(problem, table)
    return (q[problem.node, problem.action] - v[problem.node]).masked_fill(~problem.mask, 0.0)


def scatter(problem: Problem, coefficient: Tensor) -> Tensor:
    """Sum over rows of what each state and action is multiplied by: ``coefficient [..., B, N]`` to ``[..., S, A]``."""
    index = (problem.state * problem.actions + problem.action).flatten()
    flat = coefficient.masked_fill(~problem.mask, 0.0).flatten(-2)
    out = flat.new_zeros((*flat.shape[:-1], problem.states * problem.actions))
    found: Tensor = out.index_add(-1, index, flat).unflatten(-1, (problem.states, problem.actions))
    return found


def true_gradient(problem: Problem, policy: Policy, table: Tensor) -> Tensor:
    """Gradient of the expected return, ``[..., F, A]``, for ``table [..., S, A]``."""
    weight = row_probability(problem, table) * problem.returns
    return policy.score_sum(scatter(problem, weight[..., None].expand(*weight.shape, problem.mask.shape[1])), table)
