"""A trust region that holds for every state after every update."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor

from unified_rl.correction import Correction
from unified_rl.errors import ConfigError
from unified_rl.interventions.base import Metrics, Plain, Wrapper
from unified_rl.interventions.distribution import old_distribution
from unified_rl.optimizer import Optimizer
from unified_rl.protocols import Trainable
from unified_rl.ranges import Count, NonNegative, Positive, Whole
from unified_rl.units import Steps


class FixUp(Wrapper):
    """An adaptive KL penalty, then steps on the KL alone until every state's is within the bound.

    The penalty's weight follows ``beta <- max(0, beta - learning_rate (bound - margin * largest KL))``. A state is an
    environment step, or a token's context. Where ``max_steps`` do not suffice, the weights are pulled back towards the
    start of the update, halving the way until the bound holds, so it always does. Guaranteed Trust Region Optimization
    via Two-Phase KL Penalization, 2312.05405 (formulas from memory; the pull is ours).

    Args:
        policy, correction: see :class:`Wrapper`.
        bound: largest KL(now || start of the update) of a state.
        margin: the penalty aims at ``bound / margin``.
        initial: first weight of the penalty.
        learning_rate: of that weight.
        max_steps: most optimiser steps of one fix-up phase.
        top_k: tokens of a categorical that are kept one by one; above the vocabulary's size the KL is exact, else the
            bound is on a lower bound of it.

    Raises:
        ConfigError: the policy shows neither logits nor normals.
    """

    reports = ("loss/wrapper", "wrapper/beta", "wrapper/fix_up_steps", "wrapper/pulled_back", "wrapper/kl_max")
    rescores = True
    reads_weights = True

    def __init__(
        self,
        policy: Trainable,
        correction: Correction,
        *,
        bound: Positive = 0.2,
        margin: NonNegative = 3.0,
        initial: NonNegative = 1.0,
        learning_rate: NonNegative = 0.01,
        max_steps: Whole = 50,
        top_k: Count = 64,
    ) -> None:
        super().__init__(policy, correction)
        old = old_distribution(policy, top_k)
        if old is None:
            raise ConfigError(
                f"correction {correction.name} bounds the KL of whole distributions, and {type(policy).__name__} has "
                "neither read_logits nor normals; use correction=ppo"
            )
        self.old, self.bound, self.margin, self.beta = old, bound, margin, initial
        self.learning_rate, self.max_steps = learning_rate, max_steps
        self.worst: Tensor | None = None

    def attach(self, optimizer: Optimizer) -> None:
        """Keeps the policy's weights for the pull back."""
        super().attach(optimizer)
        self.parameters: list[Tensor] = [p for name, p in optimizer.named if name.startswith("policy.")]

    def start(self, progress: float) -> None:
        """Remembers the weights."""
        self.before = [p.detach().clone() for p in self.parameters]

    def annotate(self, part: TensorDictBase) -> dict[str, Tensor]:
        """The distributions at the start of the update."""
        return self.old.store(part)

    def score(self, part: TensorDictBase, plain: Plain) -> tuple[Tensor, Tensor | None]:
        """Log-probs and the weighted KL."""
        log_prob, kl = self.old.divergence(part)
        worst = self._by_state(kl.detach(), part).amax()
        self.worst = worst if self.worst is None else torch.maximum(self.worst, worst)
        return log_prob, self.beta * kl

    def around(self, step: Callable[[], Metrics], batch: TensorDictBase) -> Metrics:
        """One step, then one of the penalty's weight."""
        self.worst, beta = None, self.beta
        metrics = step()
        assert self.worst is not None
        worst = float(self.shard.largest(self.worst))
        self.beta = max(0.0, beta - self.learning_rate * (self.bound - self.margin * worst))
        return {**metrics, "wrapper/beta": beta}

    def finish(self, batches: Sequence[TensorDictBase]) -> Metrics:
        """Steps on the KL until it is within the bound everywhere."""
        steps, pulls = 0, 0
        while max(worst := [self.largest(batch) for batch in batches]) > self.bound and steps < self.max_steps:
            outside = [batch for batch, kl in zip(batches, worst, strict=True) if kl > self.bound]
            for batch in outside[: self.max_steps - steps]:
                self._descend(batch)
                steps += 1
        largest = max(worst)
        while largest > self.bound:
            self._pull(0.5 if pulls < 30 else 1.0)
            pulls += 1
            largest = max(self.largest(batch) for batch in batches)
        return {"wrapper/fix_up_steps": steps, "wrapper/pulled_back": pulls, "wrapper/kl_max": largest}

    @torch.no_grad()
    def largest(self, batch: TensorDictBase) -> float:
        """The largest KL of a state of the batch."""
        kl = self.shard.divided(batch, lambda rows: self.old.divergence(rows)[1])
        return float(self._by_state(kl, batch).amax())

    def _by_state(self, kl: Tensor, batch: TensorDictBase) -> Tensor:
        return torch.where(batch["mask"], kl, 0.0) if self.language else Steps.of(batch).sum(kl)

    def _descend(self, batch: TensorDictBase) -> None:
        """One step on the mean KL of the states that are beyond half of the bound; every process makes it whole."""
        self.optimizer.zero_grad()
        kl = self._by_state(self.old.divergence(batch)[1], batch)
        far = kl.detach() > 0.5 * self.bound
        loss = torch.where(far, kl, 0.0).sum() / far.sum().clamp(min=1)
        loss.backward()
        self.optimizer.step(loss)

    @torch.no_grad()
    def _pull(self, share: float) -> None:
        torch._foreach_lerp_(self.parameters, self.before, share)

    def state_dict(self) -> dict[str, Any]:
        """The penalty's weight."""
        return {"beta": self.beta}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores it."""
        self.beta = float(state["beta"])
