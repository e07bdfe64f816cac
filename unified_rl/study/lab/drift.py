"""Behavior policies that differ from the current one by a known amount.

The current policy is the last of an ascent path. Drift is either noise on the logits (a sampler that computes something
slightly different) or lag (the policy some steps back on the path).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from unified_rl.errors import ConfigError
from unified_rl.policies.sampling import keep_min_p
from unified_rl.study.lab.policies import Policy
from unified_rl.study.lab.problems import Problem
from unified_rl.study.lab.values import divergence, true_advantage, true_gradient

DECAY = 0.9
"""Of the moving average that stands in for PPO-EWMA's proximal policy."""

LARGEST, DRAWS = 3.0, 200
"""Noise on the logits has at most this standard deviation; so many draws are tried."""


@dataclass(frozen=True)
class Ascent:
    """Policies of an exact gradient ascent, oldest first.

    Attributes:
        theta: ``[K + 1, F, A]`` parameters.
        table: ``[K + 1, S, A]`` log-probabilities.
        step: the learning rate.
    """

    theta: Tensor
    table: Tensor
    step: float


@dataclass(frozen=True)
class Drift:
    """One situation: who acted, who learns, and what lies between.

    Attributes:
        kind: ``none``, ``noise`` or ``lag``.
        amount: the wanted KL (noise) or the number of steps (lag).
        kl: ``KL(behavior || current)`` over trajectories.
        tables: log-probabilities ``[S, A]`` of current, behavior, proximal, average, reference, proxy and teacher.
        lag: steps between behavior and current, as the version interpolation needs it.
    """

    kind: str
    amount: float
    kl: float
    tables: dict[str, Tensor]
    lag: int


def ascent(problem: Problem, policy: Policy, *, steps: int = 64, kl: float = 1.0, seed: int = 0) -> Ascent:
    """Exact gradient ascent from random parameters, with the learning rate at which first and last are ``kl`` apart."""
    start = policy.initial(seed)
    scale = 1.0 / float(true_gradient(problem, policy, policy.log_table(start)).norm())

    def walk(step: float) -> Ascent:
        theta = [start]
        for _ in range(steps):
            gradient = true_gradient(problem, policy, policy.log_table(theta[-1]))
            theta.append(theta[-1] + step * gradient)
        stacked = torch.stack(theta)
        return Ascent(stacked, policy.log_table(stacked), step)

    def distance(log_step: float) -> float:
        path = walk(scale * 2.0**log_step)
        return divergence(problem, path.table[0], path.table[-1])

    return walk(scale * 2.0 ** bisect(distance, kl, -10.0, 6.0, tolerance=1e-2))


def bisect(
    function: Callable[[float], float], wanted: float, low: float, high: float, tolerance: float = 1e-6
) -> float:
    """Where an increasing function takes the ``wanted`` value, to a relative ``tolerance`` of that value."""
    for _ in range(80):
        middle = (low + high) / 2
        found = function(middle)
        if abs(found - wanted) <= tolerance * wanted:
            return middle
        low, high = (middle, high) if found < wanted else (low, middle)
    return (low + high) / 2


def noisy(problem: Problem, table: Tensor, amounts: Sequence[float], seed: int = 0) -> list[Tensor]:
    """Behavior policies ``[S, A]`` at each ``KL(behavior || current)``: one draw of normal noise on the logits, scaled.

    Draws with which the largest KL would need noise of more than ``LARGEST`` are passed over: they make the behavior
    deterministic before it is that far away.

    Raises:
        ConfigError: no draw reaches the largest KL.
    """
    g = torch.Generator().manual_seed(seed)
    for _ in range(DRAWS):
        noise = torch.randn(table.shape, generator=g, dtype=torch.float64)

        def distance(size: float, noise: Tensor = noise) -> float:
            return divergence(problem, (table + size * noise).log_softmax(-1), table)

        if distance(LARGEST) > max(amounts):
            sizes = [bisect(distance, kl, 0.0, LARGEST) for kl in amounts]
            return [(table + size * noise).log_softmax(-1) for size in sizes]
    raise ConfigError(f"no noise on the logits reaches a KL of {max(amounts):g} in {problem.name}; ask for less")


def situations(
    problem: Problem, policy: Policy, path: Ascent, *, noise: Sequence[float], lags: Sequence[int], seed: int = 0
) -> list[Drift]:
    """No drift, then noise at each KL, then each lag."""
    current, last = path.table[-1], len(path.table) - 1
    found = [_drift(problem, path, "none", 0.0, current, current, current, 0)]
    for amount, behavior in zip(noise, noisy(problem, current, noise, seed) if noise else (), strict=True):
        middle = ((behavior + current) / 2).log_softmax(-1)
        found.append(_drift(problem, path, "noise", amount, behavior, middle, middle, 2))
    for lag in lags:
        middle = path.table[last - lag // 2]
        found.append(_drift(problem, path, "lag", lag, path.table[last - lag], middle, _average(policy, path), lag))
    return found


def _average(policy: Policy, path: Ascent) -> Tensor:
    """The policy whose parameters are the moving average of the path's."""
    age = torch.arange(len(path.theta) - 1, -1, -1, dtype=torch.float64)
    weight = DECAY**age
    return policy.log_table((weight[:, None, None] * path.theta).sum(0) / weight.sum())


def _drift(
    problem: Problem,
    path: Ascent,
    kind: str,
    amount: float,
    behavior: Tensor,
    proximal: Tensor,
    average: Tensor,
    lag: int,
) -> Drift:
    current, reference = path.table[-1], path.table[0]
    tables = {
        "current": current,
        "behavior": behavior,
        "proximal": proximal,
        "average": average,
        "reference": reference,
        "proxy": filtered(proximal),
        "teacher": teacher(problem, reference),
    }
    return Drift(kind, amount, divergence(problem, behavior, current), tables, lag)


def filtered(table: Tensor) -> Tensor:
    """A policy without the actions below 0.02 times the most probable one (Lp-Reg's proxy, 2510.03222)."""
    return keep_min_p(table, 0.02).log_softmax(-1)


def teacher(problem: Problem, table: Tensor, temperature: float = 0.25) -> Tensor:
    """A better policy: proportional to ``pi(a) exp(A(a) / temperature)``, A averaged over the rows that come by."""
    shape, mask = (problem.states, problem.actions), problem.mask
    places, gain = (problem.state[mask], problem.action[mask]), true_advantage(problem, table)[mask]
    total = gain.new_zeros(shape).index_put(places, gain, accumulate=True)
    count = gain.new_zeros(shape).index_put(places, torch.ones_like(gain), accumulate=True)
    return (table + total / count.clamp(min=1) / temperature).log_softmax(-1)
