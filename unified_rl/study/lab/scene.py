"""A problem, a policy class and a drift, with what every correction needs of them computed once."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from unified_rl.correction import Correction
from unified_rl.correction.proximal import interpolated
from unified_rl.study.lab.drift import Drift
from unified_rl.study.lab.plan import follows_policy
from unified_rl.study.lab.policies import Policy
from unified_rl.study.lab.problems import Problem
from unified_rl.study.lab.values import row_probability, true_advantage, true_gradient, unit_log_prob


@dataclass(eq=False)
class Scene:
    """Who acts, who learns, and where."""

    problem: Problem
    policy: Policy
    drift: Drift

    @property
    def table(self) -> Tensor:
        """Log-probabilities of the current policy, ``[S, A]``."""
        return self.drift.tables["current"]

    @cached_property
    def probability(self) -> Tensor:
        """Of every trajectory under the behavior policy, ``[B]``."""
        return row_probability(self.problem, self.drift.tables["behavior"])

    @cached_property
    def truth(self) -> Tensor:
        """Gradient of the current policy's expected return, ``[F, A]``."""
        return true_gradient(self.problem, self.policy, self.table)

    @cached_property
    def gram(self) -> Tensor:
        """Inner products of scores within each trajectory, ``[B, N, N]``."""
        return self.policy.gram(self.problem, self.table)

    @cached_property
    def advantage(self) -> Tensor:
        """``Q - V`` of the current policy, ``[B, N]``."""
        return true_advantage(self.problem, self.table)

    @cached_property
    def unit_log_probs(self) -> dict[str, Tensor]:
        """Log-probabilities of every trajectory's units under each policy, ``[B, N]``."""
        return {name: unit_log_prob(self.problem, table) for name, table in self.drift.tables.items()}

    def log_probs(self, correction: Correction) -> dict[str, Tensor]:
        """The same, with the proximal policy that the correction asks for.

        That is the one between behavior and current, the moving average, one interpolated by version, or the behavior
        policy itself, which its own weights score here exactly as it sampled. A reference that
        the kernel's ratio is taken to is the proximal policy too (Humanline syncs it with the policy).
        """
        found = dict(self.unit_log_probs)
        provider = correction.proximal.get("provider", "snapshot")
        if provider == "average":
            found["proximal"] = found["average"]
        elif provider == "interpolated":
            version = torch.zeros_like(self.problem.action)
            found["proximal"] = interpolated(found["current"], found["behavior"], version, self.drift.lag)
        elif provider == "versions":
            found["proximal"] = found["behavior"]
        if follows_policy(correction):
            found["reference"] = found["proximal"]
        return found
