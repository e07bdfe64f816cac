"""Where the proximal policy's log-probs come from, beside a snapshot at the start of the update."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from unified_rl.errors import RecordError
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


class Versions(Generic[Module]):
    """The weights with which a policy sampled: those it had at the start of its last updates, in host memory.

    With them the log-probs of a behavior policy can be computed again by the learner's own arithmetic, whatever its
    sampler reported. Missing Old Logits in Asynchronous Agentic RL, 2605.12070.

    Args:
        module: a copy of the policy that is trained, into which weights are loaded. What it shares with it (weights
            that nobody trains, moments of observations) is not kept.
        policy: the policy that is trained.
        keep: versions beside the newest.
    """

    def __init__(self, module: Module, policy: HasWeights, keep: int = 0) -> None:
        self.module, self.keep = module, keep
        self.kept: dict[int, dict[str, Tensor]] = {}
        self._own = [name for name, mine, theirs in _pairs(module, policy) if mine is not theirs]
        self._loaded: int | None = None

    @torch.no_grad()
    def store(self, policy: HasWeights, version: int) -> None:
        """Keeps the policy's weights as those of ``version``, and forgets those that are too old by now."""
        if version not in self.kept:
            own = set(self._own)
            taken = {name: theirs for name, _, theirs in _pairs(self.module, policy) if name in own}
            self.kept[version] = {name: weight.detach().to("cpu", copy=True) for name, weight in taken.items()}
        self.kept = {number: weights for number, weights in self.kept.items() if number >= version - self.keep}

    @torch.no_grad()
    def load(self, version: int) -> Module:
        """The policy of a version.

        Raises:
            RecordError: its weights are not kept.
        """
        if version not in self.kept:
            raise RecordError(
                f"a row was sampled by policy version {version}, and correction.proximal keeps the weights of versions "
                f"{min(self.kept, default=0)} to {max(self.kept, default=0)} (rollout.staleness + 1 of them): take out "
                "the source of older rows, or use correction=decoupled_ppo, which needs none"
            )
        if version != self._loaded:
            for name, mine, _ in _pairs(self.module, self.module):
                if name in self.kept[version]:
                    mine.copy_(self.kept[version][name])
            self._loaded = version
        return self.module

    def state_dict(self) -> dict[str, Any]:
        """The weights, by version."""
        return {str(version): dict(weights) for version, weights in self.kept.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores :meth:`state_dict`."""
        self.kept = {int(version): dict(weights) for version, weights in state.items()}
        self._loaded = None


def _pairs(one: HasWeights, other: HasWeights) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Weights by name and buffers by number, of two modules of one kind."""
    for (name, mine), theirs in zip(one.named_parameters(), other.parameters(), strict=True):
        yield name, mine, theirs
    for number, (held, newest) in enumerate(zip(one.buffers(), other.buffers(), strict=True)):
        yield f"buffer {number}", held, newest
