"""Rewards from a model in place of the environment's: learnt along with the policy, or stored by an earlier run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from unified_rl.agents.learnt_reward import Learnt
from unified_rl.agents.modelled_reward import Fitted, Form, ModelledReward
from unified_rl.agents.occupancy import Occupancy
from unified_rl.agents.teacher import load_teacher
from unified_rl.correction.lookup import bind
from unified_rl.errors import ConfigError
from unified_rl.files import fitting
from unified_rl.objectives.objective import Parts
from unified_rl.objectives.scores import Within
from unified_rl.policies.reward_model import ReversedModel
from unified_rl.protocols import Trainable, is_language
from unified_rl.ranges import Name, UnitInterval
from unified_rl.training.checkpoint import intact_checkpoint
from unified_rl.training.provenance import stored_config
from unified_rl.training.restoring import check_finite

Node = str | Mapping[str, Any]


class Reversed(Fitted):
    """A language model that learns to read rows backwards; the reward is the prompt's log-prob given the answer.

    Args:
        weight, form, within, rows, steps, every, lr: see :class:`Fitted`.
    """

    reports = frozenset({"reward_model/reward", "reward_model/loss"})

    def attach(self, policy: Trainable, seed: int) -> None:
        """Copies the policy, which learns from there."""
        self.train(ReversedModel(policy), policy)

    def backward(self, rows: TensorDict) -> dict[str, Tensor]:
        """Of the mean supervised loss of a token of reversed rows."""
        assert isinstance(self.module, ReversedModel)
        count = (rows["token_mask"].sum() - len(rows)).clamp(min=1)
        total = torch.zeros((), device=rows["mask"].device)
        for part in self._parts(rows):
            loss = self.module.losses(part).sum() / count
            loss.backward()
            total = total + loss.detach()
        return {"reward_model/loss": total}


class Stored(ModelledReward):
    """The model of an earlier run, as that run left it.

    Args:
        folder: of the run, which had a reward model; its newest checkpoint is read.
        weight, form, within: see :class:`ModelledReward`.
    """

    def __init__(
        self, *, folder: Name, weight: UnitInterval = 1.0, form: Form = "score", within: Within = "group"
    ) -> None:
        super().__init__(weight=weight, form=form, within=within)
        self.folder = folder

    def attach(self, policy: Trainable, seed: int) -> None:
        """Reads the model; a language model's is of that run's size.

        Raises:
            CheckpointError: the folder is incomplete, or its model does not fit.
            ConfigError: it is no folder of a run, or the run had no reward model.
        """
        where = "agent.reward_model.folder"
        path = Path(self.folder)
        if not (path / "config.yaml").is_file():
            raise ConfigError(f"{where}={self.folder} is no folder of a run: train one with recipe=bt_rm")
        node = (stored_config(path).get("agent") or {}).get("reward_model")
        if not node:
            raise ConfigError(f"{where}: the run {path} had no reward model; train one with recipe=bt_rm")
        self.inner = make_reward_model(node)
        if self.inner.penalty:
            raise ConfigError(
                f"{where}: the run {path} had a penalty, which is no reward by itself; train one with recipe=bt_rm"
            )
        self.inner.attach(load_teacher(self.folder, policy, where) if is_language(policy) else policy, seed)
        checkpoint, state = intact_checkpoint(path, replay=False)
        with fitting(f"{where}: the reward model of {path} does not fit here"):
            self.inner.load_model(state["agent"].get("reward_model", {}))
        self.module = self.inner.module.requires_grad_(False)
        check_finite(dict(self.module.state_dict()), checkpoint)

    def rewards(self, rows: TensorDictBase) -> Tensor:
        """As that run's model gave them."""
        return self.inner.rewards(rows)

    def parameters(self) -> list[Tensor]:
        """Weights and buffers."""
        return self.inner.parameters()


REWARD_MODELS: dict[str, Callable[..., ModelledReward]] = {
    "learnt": Learnt,
    "occupancy": Occupancy,
    "reversed": Reversed,
    "stored": Stored,
}


def make_reward_model(node: Node) -> ModelledReward:
    """The model that ``agent.reward_model`` describes, not yet beside a policy.

    Raises:
        ConfigError: an unknown model or setting, under its full name.
    """
    made: ModelledReward = bind(node, REWARD_MODELS, "agent.reward_model")[0]()
    return made


def attached_reward_model(
    node: Node | None, parts: Parts, normalize_reward: bool, micro_batch: int | None, seed: int
) -> ModelledReward | None:
    """The model that ``agent.reward_model`` describes, beside the policy that it rewards; None without one.

    Args:
        node: of the configuration.
        parts: of the agent.
        normalize_reward: the critic learns scaled rewards of the environment.
        micro_batch: rows of one pass; None takes all.
        seed: of fresh weights.

    Raises:
        ConfigError: something would not look at the rewards of a model; names the setting and what works.
    """
    if node is None:
        return None
    made, column = make_reward_model(node), parts.correction.advantage.get("reward")
    if column is not None:
        raise ConfigError(
            f"agent.reward_model gives every row a reward, and correction.advantage.reward={column} reads columns "
            "instead: set one of them to null"
        )
    if parts.correction.advantage.get("baseline") == "tracker":
        raise ConfigError(
            "correction.advantage.baseline=tracker counts successes, from 0 to 1, and rewards of agent.reward_model "
            "are none: set correction.advantage.baseline=mean, or agent.reward_model=null"
        )
    if normalize_reward:
        raise ConfigError(
            "agent.normalize_reward scales by what the environment gives, and agent.reward_model gives other rewards: "
            "set it to false"
        )
    made.attach(parts.policy, seed)
    made.micro_batch = micro_batch
    return made
