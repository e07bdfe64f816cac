"""Behaviour cloning and supervised fine-tuning: one agent, the policy's own supervised loss."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor

from unified_rl.configurable import configurable
from unified_rl.errors import ConfigError
from unified_rl.instantiate import is_ours
from unified_rl.learning_rate import LearningRate, check_learning
from unified_rl.optimizer import Optimizer
from unified_rl.protocols import HasGenerator, Trainable, domain_of, layout_of, standardises
from unified_rl.ranges import Count, NonNegative, Share, UnitInterval, UpperBound, Whole, ranged
from unified_rl.replay import Fresh, Replay
from unified_rl.replay.fit import check_replay
from unified_rl.shard import ALONE, Shard
from unified_rl.units import trim_units


def live_copy(policy: Trainable) -> Trainable:
    """The weights that are trained while ``policy`` holds their average; both standardise by the same moments."""
    live = copy.deepcopy(policy)
    if standardises(policy):
        live.normalizer = policy.normalizer  # type: ignore[attr-defined]
    return live


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
        lr_schedule, warmup_steps, warmup_ratio, optimizer: as of
            :class:`~unified_rl.agents.policy_gradient.PolicyGradient`.
        batch_size: rows of one optimiser step; by default ``rows``.
        micro_batch: rows of one forward pass; their gradients add up to that of the whole batch (with losses that draw
            noise, up to the noise). None takes all.
        ema: decay of an exponential moving average of the weights, which is what is evaluated, saved as the policy and
            handed on; it rises to that as ``(1 + n) / (10 + n)`` over the first steps ``n``. None averages nothing.
        updates: optimiser steps per call of :meth:`update`.
        gamma: discount of what a run records of this policy (``unified-rl evaluate --record``), and of the rewards
            within a chunk of actions; supervised rows have no return.
        max_grad_norm: bound of the gradient norm.
        weight_decay: decay of matrices and embeddings, not of biases and norms; decoupled with AdamW.
        device: where updates run.
    """

    supervised = True
    """Its learning rate is that of imitation, where the policy suggests one."""

    option = "behavior_cloning"
    """What the configuration calls it, for errors; a run sets its own choice."""

    shard: Shard = ALONE

    def __init__(
        self,
        policy: Trainable,
        generator: torch.Generator,
        rows: Count = 256,
        lr: NonNegative = 1e-3,
        lr_schedule: str | dict[str, Any] = "constant",
        warmup_steps: Whole = 0,
        warmup_ratio: UnitInterval = 0.0,
        optimizer: str | dict[str, Any] = "adamw",
        batch_size: Count | None = None,
        micro_batch: Count | None = None,
        ema: Share | None = None,
        updates: Count = 1,
        gamma: UnitInterval = 0.99,
        max_grad_norm: UpperBound | None = 1.0,
        weight_decay: NonNegative = 0.0,
        device: str = "cpu",
    ) -> None:
        self.policy, self.generator, self.gamma = policy, generator, gamma
        self.rows, self.batch_size, self.updates = rows, batch_size or rows, updates
        self.micro_batch, self.device = micro_batch, torch.device(device)
        self.learning_rate = LearningRate(lr, lr_schedule, warmup_steps, warmup_ratio)
        if ema is not None and domain_of(policy) == "language":
            raise ConfigError(f"agent.ema={ema} averages the weights of control policies: leave it out")
        self.ema, self.live = ema, policy if ema is None else live_copy(policy)
        self.optimizer = Optimizer(
            {"policy": self.live}, lr, weight_decay=weight_decay, max_grad_norm=max_grad_norm, kind=optimizer
        )
        self._hand_out(generator)
        self.version = 0

    def _hand_out(self, generator: torch.Generator) -> None:
        """Gives the policy the stream of losses that draw noise."""
        for one in (self.policy, self.live):
            if isinstance(one, HasGenerator):
                one.generator = generator

    def share(self, shard: Shard) -> None:
        """Divides the passes among processes that are given the same rows; noise is drawn from a stream of each."""
        self.shard = shard

    def weights(self) -> list[Tensor]:
        """The weights that are trained, and the policy's buffers, which are the same in every process."""
        return [*self.optimizer.parameters, *self.policy.buffers()]

    def models(self) -> list[Any]:
        """The policy, and the weights that are trained where these are not its own."""
        return [self.policy] if self.live is self.policy else [self.policy, self.live]

    @classmethod
    def check_settings(cls, settings: Mapping[str, Any]) -> None:
        """Refuses an optimiser or a schedule that cannot be made, when a run is composed.

        Raises:
            ConfigError: under the setting's full name.
        """
        check_learning(settings)

    @property
    def metric_names(self) -> frozenset[str] | None:
        """What updates report; None of a class of the user's own."""
        return frozenset({"loss/nll", "grad/norm", "agent/lr"}) if is_ours(self) else None

    def plan_updates(self, updates: int) -> None:
        """Tells the learning rate's schedule how many updates the run has.

        Raises:
            ConfigError: its warm-up is longer.
        """
        self.learning_rate.plan(updates, self.updates)

    def step(self, batch: TensorDictBase) -> dict[str, Tensor]:
        """One optimiser step on a batch of demonstrations; returns ``loss/nll`` (mean over supervised units)."""
        batch = batch.to(self.device)
        if self.learning_rate.moves:
            self.optimizer.set_lr(self.learning_rate(self.optimizer.steps))
        self.optimizer.zero_grad()
        whole = self.micro_batch is None or self.micro_batch >= len(batch)
        if whole and self.shard.world == 1:
            total, count = self._loss(batch)
            loss = total / (count if isinstance(count, int) else count.clamp(min=1))
            loss.backward()
        else:
            loss = self._accumulated(batch)
        norm = self.optimizer.step(loss)
        if self.ema is not None:
            self._average(self.ema)
        return {"loss/nll": loss.detach(), "grad/norm": norm}

    @torch.no_grad()
    def _average(self, ema: float) -> None:
        steps = self.optimizer.steps
        share = 1.0 - min(ema, (1 + steps) / (10 + steps))
        torch._foreach_lerp_(list(self.policy.parameters()), list(self.live.parameters()), share)

    def _loss(self, rows: TensorDictBase) -> tuple[Tensor, Tensor | int]:
        """The summed loss of the rows, and over how many entries the mean is."""
        if layout_of(rows) == "language":
            rows = trim_units(rows, int(rows["token_mask"].sum(-1).max()))
        nll = self.live.nll(rows)
        mask = rows["mask"] if "mask" in rows.keys() and rows["mask"].shape == nll.shape else None
        if mask is None:
            return nll.sum(), nll.numel()
        return torch.where(mask, nll, 0.0).sum(), mask.sum()

    def _accumulated(self, batch: TensorDictBase) -> Tensor:
        """Gradients of the mean over all supervised entries, ``micro_batch`` rows at a time; the loss, detached.

        Of several processes each passes its own rows, and the sums are of all.
        """
        total: Any = 0
        loss = torch.zeros((), device=self.device)
        shard, own = self.shard, batch[self.shard.mine(len(batch))]
        parts = shard.parts(own, len(batch), self.micro_batch) if len(own) else []
        for rows in parts:
            part, count = self._loss(rows)
            part.backward()
            loss, total = loss + part.detach(), total + count
        for _ in range(shard.passes(len(batch), self.micro_batch) - len(parts) if shard.in_step else 0):
            (0.0 * self._loss(shard.own(batch)[:1])[0]).backward()  # others have more
        if self.shard.world > 1:
            self.shard.sum_gradients(self.optimizer.parameters)
            found = self.shard.sums({"loss": loss, "count": total}, self.device)
            loss, total = found["loss"].to(loss.dtype), float(found["count"])
        total = total.clamp(min=1) if isinstance(total, Tensor) else max(total, 1)
        gradients = [p.grad for p in self.optimizer.parameters if p.grad is not None]
        torch._foreach_div_(gradients, total)
        mean: Tensor = loss / total
        return mean

    def update(self, replay: Replay, progress: float = 0.0) -> dict[str, Any]:
        """``updates`` optimiser steps on rows drawn from the replay."""
        if self.version == 0:
            self.check_replay(replay)
        metrics: dict[str, Any] = {}
        if self.shard.world > 1:
            self._hand_out(self.shard.stream(self.generator, self.version))
        for _ in range(self.updates):
            metrics = dict(self.step(replay.sample(self.batch_size, version=self.version)))
        metrics["agent/lr"] = self.optimizer.rate
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
        """Policy, the weights that are trained where these are another's average, optimiser, stream and version."""
        live = {} if self.ema is None else {"live": dict(self.live.state_dict())}
        return {
            "policy": dict(self.policy.state_dict()),
            **live,
            "optimizer": self.optimizer.state_dict(),
            "micro_batch": self.micro_batch,
            "generator": self.generator.get_state(),
            "version": self.version,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores :meth:`state_dict`."""
        self.policy.load_state_dict(state["policy"])
        if self.ema is not None:
            self.live.load_state_dict(state["live"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.micro_batch = state.get("micro_batch", self.micro_batch)
        self.generator.set_state(state["generator"])
        self.version = state["version"]
