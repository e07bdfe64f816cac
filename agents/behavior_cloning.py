"""Behaviour cloning and supervised fine-tuning: one agent, the policy's own supervised loss."""

from __future__ import annotations

from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor

from unified_rl.configurable import configurable
from unified_rl.errors import ConfigError
from unified_rl.optimizer import Optimizer
from unified_rl.protocols import HasGenerator, Trainable, layout_of
from unified_rl.ranges import Count, NonNegative, UnitInterval, UpperBound, ranged
from unified_rl.replay import Fresh, Replay
from unified_rl.replay.fit import check_replay
from unified_rl.units import trim_units


@configurable
@ranged("agent")
class BehaviorCloning:
    """Minimises ``policy.nll`` over rows of demonstrations.

    For a language model this is supervised fine-tuning, for a flow policy flow matching, for a diffusion policy
    epsilon prediction, for a Gaussian maximum likelihood.

    Args:
        policy: any policy.
        generator: stream of losses that draw noise (flow and diffusion).
        rows: rows of one collection; the default batch.
        lr: learning rate.
        batch_size: rows of one optimiser step; by default ``rows``.
        updates: optimiser steps per call of :meth:`update`.
        gamma: discount of what a run records of this policy (``unified-rl evaluate --record``), and of the rewards
            within a chunk of actions; supervised rows have no return.
        max_grad_norm: bound of the gradient norm.
        weight_decay: decoupled weight decay.
        device: where updates run.
    """

    supervised = True
    """Its learning rate is that of imitation, where the policy suggests one."""

    option = "behavior_cloning"
    """What the configuration calls it, for errors; a run sets its own choice."""

    def __init__(
        self,
        policy: Trainable,
        generator: torch.Generator,
        rows: Count = 256,
        lr: NonNegative = 1e-3,
        batch_size: Count | None = None,
        updates: Count = 1,
        gamma: UnitInterval = 0.99,
        max_grad_norm: UpperBound | None = 1.0,
        weight_decay: NonNegative = 0.0,
        device: str = "cpu",
    ) -> None:
        self.policy, self.generator, self.gamma = policy, generator, gamma
        self.rows, self.batch_size, self.updates = rows, batch_size or rows, updates
        self.device = torch.device(device)
        self.optimizer = Optimizer({"policy": policy}, lr, weight_decay=weight_decay, max_grad_norm=max_grad_norm)
        if isinstance(policy, HasGenerator):
            policy.generator = generator
        self.version = 0

    def step(self, batch: TensorDictBase) -> dict[str, Tensor]:
        """One optimiser step on a batch of demonstrations; returns ``loss/nll`` (mean over supervised units)."""
        batch = batch.to(self.device)
        if layout_of(batch) == "language":
            batch = trim_units(batch, int(batch["token_mask"].sum(-1).max()))
        nll = self.policy.nll(batch)
        mask = batch["mask"] if "mask" in batch.keys() and batch["mask"].shape == nll.shape else None
        loss = nll.mean() if mask is None else torch.where(mask, nll, 0.0).sum() / mask.sum().clamp(min=1)
        self.optimizer.zero_grad()
        loss.backward()
        norm = self.optimizer.step(loss)
        return {"loss/nll": loss.detach(), "grad/norm": norm}

    def update(self, replay: Replay, progress: float = 0.0) -> dict[str, Any]:
        """``updates`` optimiser steps on rows drawn from the replay."""
        if self.version == 0:
            self.check_replay(replay)
        metrics: dict[str, Any] = {}
        for _ in range(self.updates):
            metrics = self.step(replay.sample(self.batch_size, version=self.version))
        self.version += 1
        return metrics

    def check_replay(self, replay: Replay) -> None:
        """Refuses a replay that this agent cannot use.

        Raises:
            ConfigError: by name, with what works instead.
        """
        check_replay(replay, self.option)
        wanted = self.updates * self.batch_size
        if isinstance(getattr(replay, "sampler", None), Fresh) and wanted > self.rows:
            raise ConfigError(
                f"replay=fresh hands out each of the {self.rows} rows of a collection once, and agent.updates="
                f"{self.updates} steps of agent.batch_size={self.batch_size} rows take {wanted}: use replay=uniform, "
                "or raise rollout.rows"
            )

    def state_dict(self) -> dict[str, Any]:
        """Policy, optimiser, stream and version."""
        return {
            "policy": dict(self.policy.state_dict()),
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
            "version": self.version,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores :meth:`state_dict`."""
        self.policy.load_state_dict(state["policy"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generator"])
        self.version = state["version"]
