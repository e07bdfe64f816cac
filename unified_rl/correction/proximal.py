"""Where the proximal policy's log-probs come from, beside a snapshot at the start of the update."""

from __future__ import annotations

import copy
from typing import Generic, TypeVar

import torch
from torch import Tensor

from unified_rl.protocols import HasWeights
from unified_rl.ranges import Share, ranged

Module = TypeVar("Module", bound=HasWeights)


def interpolated(log_prob: Tensor, behavior_log_prob: Tensor, policy_version: Tensor, version: int) -> Tensor:
    """Proximal log-probs between behavior and current, by age, without a forward pass. A-3PO, 2512.06547.

    Args:
        log_prob: ``[B, N]`` of the current policy.
        behavior_log_prob: ``[B, N]``.
        policy_version: ``[B, N]`` int64; -1 for units that no version sampled.
        version: the learner's.

    Returns:
        ``[B, N]`` detached: the behavior's at a lag of 1 or less, halfway at 2, the current policy's in the limit.
    """
    lag = (version - policy_version).clamp(min=1).to(behavior_log_prob.dtype)
    share = torch.where(policy_version < 0, 0.0, (lag - 1) / lag)
    return torch.lerp(behavior_log_prob, log_prob.detach().to(behavior_log_prob.dtype), share)


@ranged("correction.proximal")
class MovingAverage(Generic[Module]):
    """A policy whose weights are the debiased exponential average of another's. PPO-EWMA, 2110.00641.

    Args:
        module: the policy to follow; its weights are the first member of the average.
        decay: 0 follows at once, towards 1 remembers longer.
    """

    def __init__(self, module: Module, decay: Share = 0.9) -> None:
        self.module = copy.deepcopy(module)
        self.module.requires_grad_(False)
        self.decay, self.weight = decay, 1.0

    @torch.no_grad()
    def update(self, module: HasWeights) -> None:
        """Takes the newest weights in; buffers are copied."""
        self.weight = self.decay * self.weight + 1.0
        for mine, newest in zip(self.module.parameters(), module.parameters(), strict=True):
            mine.lerp_(newest, 1.0 / self.weight)
        for kept, other in zip(self.module.buffers(), module.buffers(), strict=True):
            kept.copy_(other)
