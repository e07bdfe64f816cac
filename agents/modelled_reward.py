"""What every reward model of an agent is, and what is fitted along with the policy."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Literal

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor, nn

from unified_rl.errors import ConfigError, NonFiniteError
from unified_rl.instantiate import nearest
from unified_rl.objectives.rows import Rows
from unified_rl.objectives.scores import Within
from unified_rl.optimizer import Optimizer
from unified_rl.policies.reward_model import placed
from unified_rl.protocols import Trainable
from unified_rl.ranges import Count, NonNegative, UnitInterval
from unified_rl.returns.groups import Groups
from unified_rl.units import Source

Form = Literal["score", "pairwise"]


class ModelledReward:
    """What the reward of every row becomes, before advantages are computed.

    Args:
        weight: share of the model in the reward; the rest is the environment's.
        form: ``score``, or ``pairwise``: the mean probability that a row beats another one that it is compared with,
            less a half ("A Unified Pairwise Framework for RLHF", 2504.04950).
        within: whom rows are compared with, those of their group or all of the update.

    A class that compares rows whatever ``form`` says so by ``compares``, and one that takes from the environment's
    reward instead of giving another by ``penalty``.

    Attributes:
        module: with the weights, after :meth:`attach`.
        micro_batch: rows of one pass; None takes all.

    Raises:
        ConfigError: rows to compare with, where nothing is compared.
    """

    compares = penalty = False

    module: nn.Module
    micro_batch: int | None = None

    def __init__(self, *, weight: UnitInterval = 1.0, form: Form = "score", within: Within = "group") -> None:
        self.weight, self.form, self.within = weight, form, within
        if within == "batch" and form == "score" and not self.compares:
            raise ConfigError(
                "agent.reward_model.within=batch says with whom rows are compared, and none is: set "
                "agent.reward_model.form=pairwise, or leave within out"
            )

    reports = frozenset({"reward_model/reward"})

    def attach(self, policy: Trainable, seed: int) -> None:
        """Makes the model beside a policy.

        Raises:
            ConfigError: they do not fit.
        """
        raise NotImplementedError

    def check_columns(self, columns: Collection[str]) -> None:
        """Looks at the names of what rows will hold, before any are collected.

        Raises:
            ConfigError: one that it reads is missing; says what to set.
        """

    def check_sources(self, sources: Collection[int]) -> None:
        """Looks at who made the rows that will be drawn, before any are collected.

        Raises:
            ConfigError: it learns from rows of others alone.
        """

    def check_groups(self, record: TensorDictBase) -> None:
        """Looks for groups, where it compares their rows, before any row is left out.

        Raises:
            ConfigError: every row is alone in its group.
        """

    def learn(self, record: TensorDict, version: int, metrics: dict[str, Any]) -> None:
        """Looks at the rows of an update before it rewards them."""

    def rewards(self, rows: TensorDictBase) -> Tensor:
        """The model's rewards of rows, ``[B, T]``."""
        out: Tensor = self.module(rows)
        return out

    def __call__(self, record: TensorDict, version: int, metrics: dict[str, Any]) -> None:
        """Learns from the rows where it does, and writes ``reward [B, T]``.

        Args:
            record: the rows of an update.
            version: of the present weights.
            metrics: of the update.
        """
        with torch.enable_grad():
            self.learn(record, version, metrics)
        reward = torch.cat([self.rewards(part) for part in self._parts(record)])
        metrics["reward_model/reward"] = reward.sum(-1).mean()
        if self.form == "pairwise":
            reward = placed(preferred(reward.sum(-1), self.groups(record)) - 0.5, record)
        if self.weight != 1.0:
            own = torch.where(record["step_mask"], record["reward"], 0.0)
            reward = own + self.weight * (reward - own)
        record["reward"] = reward

    def _parts(self, rows: TensorDict) -> list[TensorDict]:
        """Rows of one pass each."""
        parts: list[TensorDict] = list(rows.split(self.micro_batch or len(rows)))
        return parts

    def groups(self, record: TensorDictBase) -> Tensor:
        """Who is compared with whom, ``[B]`` int64."""
        group: Tensor = record["group"]
        return group if self.within == "group" else torch.zeros_like(group)

    def parameters(self) -> list[Tensor]:
        """Weights and buffers."""
        return [*self.module.parameters(), *self.module.buffers()]

    def state_dict(self) -> dict[str, Any]:
        """What a bit-exact continuation needs."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores :meth:`state_dict`."""

    def load_model(self, state: Mapping[str, Any]) -> None:
        """Restores what rewards depend on, of :meth:`state_dict`."""


class Fitted(ModelledReward):
    """A model that learns, at every ``every``-th update, from the rows that the update draws.

    Args:
        weight, form, within: see :class:`ModelledReward`.
        rows: from which it learns, see :class:`~unified_rl.objectives.rows.Rows`.
        steps: gradient steps of one such update.
        every: 1 is every update; the first is always one.
        lr: learning rate.
    """

    def __init__(
        self,
        *,
        weight: UnitInterval = 1.0,
        form: Form = "score",
        within: Within = "group",
        rows: Any = None,
        steps: Count = 4,
        every: Count = 1,
        lr: NonNegative = 1e-3,
    ) -> None:
        super().__init__(weight=weight, form=form, within=within)
        self.rows, self.steps, self.every, self.lr = Rows.of(rows, "agent.reward_model.rows"), steps, every, lr

    def check_columns(self, columns: Collection[str]) -> None:
        """Looks for the columns by which it chooses rows.

        Raises:
            ConfigError: one is missing, or is a gate, which opens when rows have their rewards.
        """
        for name in self.rows.gates:
            if name not in columns:
                raise ConfigError(
                    f"agent.reward_model.rows names {name!r}, which is no column of collected rows (gates open after "
                    f"rewards); {nearest(name, columns)}: define rollout.columns.{name}, or choose by source"
                )

    def check_sources(self, sources: Collection[int]) -> None:
        """Looks for rows from which it would learn."""
        if self.rows.sources and not set(self.rows.sources) & set(sources):
            wanted, made = (
                ", ".join(Source(one).name.lower() for one in some) for some in (self.rows.sources, sources)
            )
            raise ConfigError(
                f"agent.reward_model.rows={wanted} would learn nothing: rows of this run are of source {made}; choose "
                "among those"
            )

    def train(self, module: nn.Module, policy: Trainable) -> None:
        """Makes the optimiser of a model."""
        self.module = module.to(policy.device)
        self.optimizer = Optimizer({"reward_model": self.module}, self.lr, max_grad_norm=1.0)

    def learn(self, record: TensorDict, version: int, metrics: dict[str, Any]) -> None:
        """Some gradient steps, where it is time."""
        if version % self.every:
            return
        rows = record if self.rows.every else self.rows.chosen(record)
        if not len(rows):
            return
        self.look(rows)
        for _ in range(self.steps):
            self.optimizer.zero_grad()
            told = self.backward(rows)
            metrics |= told
            if "reward_model/loss" not in told:
                break  # there is nothing to learn from
            self._step(told["reward_model/loss"])
        self.learnt(rows)

    def _step(self, loss: Tensor) -> None:
        try:
            self.optimizer.step(loss)
        except NonFiniteError as error:
            raise NonFiniteError(
                f"agent.reward_model cannot learn on: {error}; lower agent.reward_model.lr={self.lr:g}"
            ) from error

    def look(self, rows: TensorDict) -> None:
        """Looks at rows before it learns from them."""

    def backward(self, rows: TensorDict) -> dict[str, Tensor]:
        """Gradients of the loss of the rows; returns metrics, among them the loss where there is any."""
        raise NotImplementedError

    def learnt(self, rows: TensorDict) -> None:
        """After the gradient steps."""

    def state_dict(self) -> dict[str, Any]:
        """Weights and moments."""
        return {"model": dict(self.module.state_dict()), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores them."""
        self.load_model(state)
        self.optimizer.load_state_dict(state["optimizer"])

    def load_model(self, state: Mapping[str, Any]) -> None:
        """Restores the weights."""
        self.module.load_state_dict(state["model"])


def preferred(score: Tensor, group: Tensor) -> Tensor:
    """The mean probability ``sigmoid(s - s')`` that a row beats another one of its group, ``[B]``; 1/2 where alone."""
    together = group[:, None] == group
    wins = torch.where(together, torch.sigmoid(score[:, None] - score), 0.0).sum(-1) - 0.5  # without itself
    others = Groups(group).count - 1
    return torch.where(others > 0, wins / others.clamp(min=1), 0.5)
