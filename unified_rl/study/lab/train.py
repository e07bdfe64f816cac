"""Training on stale data, with the return known exactly: many runs (learning rates x seeds) side by side.

One update draws rows from the policy ``lag`` updates back and makes a few gradient steps on them. The proximal policy
is that of the update's start. A method's learning rates are multiples of one step size, worked out from the norm of its
own first gradient, so that methods of another scale get another grid; the best on the tuning seeds is reported on
the others. All methods and rates see the same random numbers.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor

from unified_rl.correction.proximal import interpolated
from unified_rl.correction.reduction import REDUCTIONS
from unified_rl.study.lab.drift import DECAY, ascent, filtered, situations, teacher
from unified_rl.study.lab.measure import measure
from unified_rl.study.lab.plan import SAMPLED_BATCH, Plan, follows_policy, make_plan
from unified_rl.study.lab.policies import POLICIES, Policy
from unified_rl.study.lab.problems import PROBLEMS, Problem
from unified_rl.study.lab.record import coefficients, record
from unified_rl.study.lab.sampled import row_gradients, sampled_advantage, sampled_moments
from unified_rl.study.lab.scene import Scene
from unified_rl.study.lab.values import expected_return, row_probability, true_gradient

SHORTLIST = ("reinforce", "importance_sampling", "sequence_is", "ppo", "decoupled_ppo", "cispo", "topr", "vespo")
RATES = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0)
"""Learning rates, as multiples of the step that moves the parameters as the true gradient's own norm would."""

TRAIN_LAGS = (0, 4, 16)
ERROR_ROWS, ERROR_BATCHES = 256, 32


@dataclass(frozen=True)
class Schedule:
    """What every training run has in common.

    Attributes:
        updates, inner: batches of rows, and gradient steps on each.
        rows, group: of a batch, and of a group in it.
        seeds: for tuning the learning rate, and as many again for the report.
    """

    updates: int = 32
    inner: int = 2
    rows: int = 32
    group: int = 8
    seeds: int = 4


class Runs:
    """Runs side by side: ``R = len(RATES) * 2 * seeds``, rates outermost.

    Args:
        plan: the correction; its advantage is ``group``, ``reward`` or ``own``.
        problem, policy: the setting.
        lag: updates between behavior and current policy.
        schedule: of every run.
    """

    def __init__(self, plan: Plan, problem: Problem, policy: Policy, lag: int, schedule: Schedule) -> None:
        self.plan, self.problem, self.policy, self.lag, self.schedule = plan, problem, policy, lag, schedule
        self.number = len(RATES) * 2 * schedule.seeds
        start = policy.initial(0)
        self.theta = start.expand(self.number, *start.shape).clone()
        self.reference = policy.log_table(start)
        self.teacher = teacher(problem, self.reference)
        self.history = [policy.log_table(self.theta)]
        self.average, self.average_weight = self.theta, 1.0
        shape = (schedule.updates, 2 * schedule.seeds, schedule.rows)
        self.uniform = torch.rand(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        self.group = torch.arange(self.number * schedule.rows) // schedule.group
        self.rate: Tensor | None = None

    def run(self) -> Tensor:
        """Trains; returns the exact final returns ``[rates, 2 * seeds]``."""
        for update in range(self.schedule.updates):
            self._update(update)
        return expected_return(self.problem, self.history[-1]).view(len(RATES), -1)

    def _update(self, update: int) -> None:
        behavior, proximal = self.history[max(0, update - self.lag)], self.history[-1]
        cumulative = row_probability(self.problem, behavior).cumsum(-1)
        u = self.uniform[update].repeat(len(RATES), 1)
        rows = torch.searchsorted(cumulative, u).clamp(max=cumulative.shape[-1] - 1)
        fixed = self._fixed(rows, behavior, proximal)
        for _ in range(self.schedule.inner):
            table = self.policy.log_table(self.theta)
            gradient = self._gradient(rows, table, fixed)
            if self.rate is None:
                self.rate = self._rates(gradient)
            self.theta = self.theta + self.rate * gradient
        self.average_weight = DECAY * self.average_weight + 1
        self.average = torch.lerp(self.average, self.theta, 1 / self.average_weight)
        self.history.append(self.policy.log_table(self.theta))

    def _fixed(self, rows: Tensor, behavior: Tensor, proximal: Tensor) -> dict[str, Tensor]:
        """Log-probs that do not change within an update, each ``[R * rows, N]``."""
        if self.plan.correction.proximal.get("provider") == "average":
            proximal = self.policy.log_table(self.average)
        if self.plan.correction.proximal.get("provider") == "versions":
            proximal = behavior
        tables = {
            "behavior": behavior,
            "proximal": proximal,
            "reference": proximal if follows_policy(self.plan.correction) else self.reference.expand_as(behavior),
            "proxy": filtered(proximal),
            "teacher": self.teacher.expand_as(behavior),
        }
        return {name: self._taken(table, rows) for name, table in tables.items()}

    def _taken(self, table: Tensor, rows: Tensor) -> Tensor:
        """Log-probs of the units of ``rows [R, n]`` under each run's own ``table [R, S, A]``, ``[R * n, N]``."""
        index = (self.problem.state * self.problem.actions + self.problem.action)[rows]
        found = table.flatten(-2).gather(-1, index.flatten(-2)).view(-1, index.shape[-1])
        return found.masked_fill(~self.problem.mask[rows.flatten()], 0.0)

    def _gradient(self, rows: Tensor, table: Tensor, fixed: dict[str, Tensor]) -> Tensor:
        """Each run's gradient, ``[R, F, A]``."""
        current, flat = self._taken(table, rows), rows.flatten()
        by_policy = dict(fixed)
        if self.plan.correction.proximal.get("provider") == "interpolated":
            version = torch.zeros_like(self.problem.action[flat])
            by_policy["proximal"] = interpolated(current, fixed["behavior"], version, self.lag)
        advantage = sampled_advantage(self.plan, self.problem, self.problem.reward, flat, self.group)
        batch = record(self.problem, flat, by_policy, advantage, self.group)
        found = self._coefficients(current, batch, self._scale(rows))
        return row_gradients(self.problem, self.policy, table, flat, found, self.schedule.rows)

    def _coefficients(self, current: Tensor, batch: TensorDict, scale: Tensor) -> Tensor:
        parts = self.number if self.plan.route == SAMPLED_BATCH else 1
        pieces = zip(current.chunk(parts), batch.chunk(parts), scale.chunk(parts), strict=True)
        return torch.cat([coefficients(self.plan.correction, x, b, c) for x, b, c in pieces])

    def _scale(self, rows: Tensor) -> Tensor:
        """The reduction within each run's own batch, with a unit's weight 1 on average, ``[R * n]``."""
        count = self.problem.mask.sum(-1).double()[rows]
        correction = self.plan.correction
        scale = REDUCTIONS[correction.reduce](count.flatten(), correction.horizon, lambda x: x).view_as(count)
        return (scale * count.sum(-1, keepdim=True) / (scale * count).sum(-1, keepdim=True)).flatten()

    def _rates(self, gradient: Tensor) -> Tensor:
        """``[R, 1, 1]``: each multiple of the method's own step size."""
        truth = true_gradient(self.problem, self.policy, self.reference).norm()
        own = gradient.flatten(1).norm(dim=1).mean().clamp(min=1e-12)
        each = torch.tensor(RATES, dtype=torch.float64).repeat_interleave(2 * self.schedule.seeds)
        out: Tensor = (each * truth / own).view(-1, 1, 1)
        return out


def one_step_error(plan: Plan, problem: Problem, policy: Policy, lag: int, group: int) -> float:
    """Error of one gradient of ``ERROR_ROWS`` rows, sampled; the behavior is ``lag`` steps back on an exact ascent."""
    path = ascent(problem, policy, steps=max(TRAIN_LAGS))
    lags = [lag] if lag else []
    scene = Scene(problem, policy, situations(problem, policy, path, noise=(), lags=lags)[-1])
    found = sampled_moments(plan, scene, group=group, rows=ERROR_ROWS, batches=ERROR_BATCHES)
    return measure(found, scene.truth).error(ERROR_ROWS)


def tuned(returns: Tensor) -> tuple[int, Tensor]:
    """The best rate on the first half of the seeds, and its returns on the second half."""
    half = returns.shape[1] // 2
    best = int(returns[:, :half].mean(1).argmax())
    return best, returns[best, half:]


def train(
    names: Sequence[str],
    *,
    schedule: Schedule | None = None,
    lags: Sequence[int] | None = None,
    problem_name: str = "tokens_graded",
    policy_name: str = "shared",
    watch: Callable[[str, int, int], None] | None = None,
) -> list[dict[str, Any]]:
    """Exact returns after training, a row for each correction, lag and reported seed.

    Presets that are not applicable are left out. Raises ConfigError for an unknown preset.
    """
    schedule, lags = schedule or Schedule(), TRAIN_LAGS if lags is None else lags
    problem = PROBLEMS[problem_name]()
    policy = POLICIES[policy_name](problem)
    plans = [plan for name in names if not (plan := make_plan(name, "group", binary=problem.binary)).reason]
    before = float(expected_return(problem, policy.log_table(policy.initial(0))))
    rows: list[dict[str, Any]] = []
    for index, plan in enumerate(plans):
        for place, lag in enumerate(lags):
            if watch is not None:
                watch(f"{plan.name}, lag {lag}", index * len(lags) + place, len(plans) * len(lags))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # rules that reject a whole batch say so at every step
                runs = Runs(plan, problem, policy, lag, schedule)
                best, reported = tuned(runs.run())
                error = one_step_error(plan, problem, policy, lag, schedule.group)
            assert runs.rate is not None
            rate = float(runs.rate.view(len(RATES), -1)[best, 0])
            rows += [
                {
                    "problem": problem.name,
                    "policy": policy.name,
                    "correction": plan.name,
                    "lag": lag,
                    "seed": seed,
                    "learning_rate": rate,
                    "rate_at_edge": best in (0, len(RATES) - 1),
                    "one_step_error": error,
                    "return_before": before,
                    "return_after": value,
                }
                for seed, value in enumerate(reported.tolist())
            ]
    if watch is not None:
        watch("", len(plans) * len(lags), len(plans) * len(lags))
    return rows
