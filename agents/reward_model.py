"""Rewards from a model in place of the environment's: learnt along with the policy, or stored by an earlier run."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor, nn

from unified_rl.agents.teacher import load_teacher
from unified_rl.correction import Correction
from unified_rl.correction.lookup import bind
from unified_rl.errors import ConfigError
from unified_rl.files import fitting
from unified_rl.instantiate import nearest
from unified_rl.objectives.pairs import check_order, order_of
from unified_rl.objectives.reward_losses import REWARD_LOSSES, Fit
from unified_rl.objectives.rows import Rows
from unified_rl.objectives.scores import Within
from unified_rl.optimizer import Optimizer
from unified_rl.policies.reward_model import Coverage, ReversedModel, RewardModel, placed
from unified_rl.protocols import Trainable, is_language
from unified_rl.ranges import Count, Name, NonNegative, Positive, UnitInterval
from unified_rl.returns.groups import Groups, lone
from unified_rl.training.checkpoint import intact_checkpoint
from unified_rl.training.provenance import stored_config
from unified_rl.training.restoring import check_finite

PAIRS_AT_ONCE = 256
"""Comparisons whose features are held together."""
Form = Literal["score", "pairwise"]
Node = str | Mapping[str, Any]


class ModelledReward:
    """What the reward of every row becomes, before advantages are computed.

    Args:
        weight: share of the model in the reward; the rest is the environment's.
        form: ``score``, or ``pairwise``: the mean probability that a row beats another one that it is compared with,
            less a half ("A Unified Pairwise Framework for RLHF", 2504.04950).
        within: whom rows are compared with, those of their group or all of the update.

    Attributes:
        module: with the weights, after :meth:`attach`.
        micro_batch: rows of one pass; None takes all.
    """

    module: nn.Module
    micro_batch: int | None = None

    def __init__(self, weight: float, form: Form, within: Within) -> None:
        self.weight, self.form, self.within = weight, form, within

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

    def __init__(self, weight: float, form: Form, within: Within, rows: Any, steps: int, every: int, lr: float) -> None:
        super().__init__(weight, form, within)
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
            self.optimizer.step(told["reward_model/loss"])
        self.learnt(rows)

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


class Learnt(Fitted):
    """A reward that is learnt from comparisons of rows.

    Args:
        loss: a name of :data:`~unified_rl.objectives.reward_losses.REWARD_LOSSES`, or a mapping with its settings.
        order: what says which row is better: ``reward``, the environment's return, or another column ``[B]``, such as
            ``source`` (rows of experts over the policy's own).
        hidden: widths of the model's layers (control); None is 64 and 64.
        frozen: learn a linear function of fixed features alone.
        pessimism: factor of the uncertainty that is taken from a row's score, see
            :class:`~unified_rl.policies.reward_model.Coverage`.
        ridge: of that uncertainty; None is 1.
        dependence: how far the model looks ahead to what the policy, trained on its rewards, will be compared on next;
            0 takes the compared rows as given. PARL, 2308.02585; see :meth:`lookahead`.
        weight, form, within, rows, steps, every, lr: see :class:`Fitted`.

    Raises:
        ConfigError: pessimism without fixed features, or a ridge without pessimism.
    """

    reports = frozenset({"reward_model/reward", "reward_model/loss", "reward_model/accuracy", "reward_model/pairs"})

    def __init__(
        self,
        *,
        loss: str | dict[str, Any] = "bradley_terry",
        order: Name = "reward",
        hidden: tuple[Count, ...] | None = None,
        frozen: bool = False,
        pessimism: NonNegative = 0.0,
        ridge: Positive | None = None,
        dependence: NonNegative = 0.0,
        weight: UnitInterval = 1.0,
        form: Form = "score",
        within: Within = "group",
        rows: Any = None,
        steps: Count = 4,
        every: Count = 1,
        lr: NonNegative = 1e-3,
    ) -> None:
        super().__init__(weight, form, within, rows, steps, every, lr)
        self.loss = bind(loss, REWARD_LOSSES, "agent.reward_model.loss")[0]()
        self.order, self.hidden, self.frozen = order, hidden, frozen
        self.pessimism, self.ridge, self.dependence = pessimism, 1.0 if ridge is None else ridge, dependence
        if pessimism and not frozen:
            raise ConfigError(
                "agent.reward_model.pessimism measures how far features lie from those that were compared before, so "
                "they must stay as they are: set agent.reward_model.frozen=true"
            )
        if ridge is not None and not pessimism:
            raise ConfigError(
                f"agent.reward_model.ridge={ridge} is of an uncertainty that counts for nothing: set "
                "agent.reward_model.pessimism, or leave ridge out"
            )
        self.coverage: Coverage | None = None

    def attach(self, policy: Trainable, seed: int) -> None:
        """Makes the model of a policy's own kind.

        Raises:
            ConfigError: widths of layers that a language model's has not.
        """
        if self.hidden is not None and is_language(policy):
            raise ConfigError(
                "agent.reward_model.hidden is of layers on observations and actions, and a language model's reward is "
                "a head on its own transformer: leave it out"
            )
        self.policy = policy
        self.train(RewardModel(policy, self.hidden or (64, 64), self.frozen, seed), policy)
        if self.pessimism:
            self.coverage = Coverage(self.model.width, self.ridge).to(policy.device)

    def check_columns(self, columns: Collection[str]) -> None:
        """Looks for the column that orders rows too."""
        super().check_columns(columns)
        check_order(self.order, columns, "agent.reward_model.order")

    @property
    def model(self) -> RewardModel:
        """The model."""
        assert isinstance(self.module, RewardModel)
        return self.module

    def check_groups(self, record: TensorDictBase) -> None:
        """Looks for something to compare."""
        if self.within == "group" and lone(record["group"][self.rows.ungated.of_record(record)]):
            raise ConfigError(
                "agent.reward_model compares rows of one group, and every row is alone in its own: sample several rows "
                "a prompt or reset state (rollout.group_size), or set agent.reward_model.within=batch"
            )

    def look(self, rows: TensorDict) -> None:
        """Takes in what observations are like."""
        self.model.observe(rows)
        self.last: Fit | None = None

    def backward(self, rows: TensorDict) -> dict[str, Tensor]:
        """Of the mean loss of the comparisons; rows that are compared may lie in different micro-batches."""
        parts = self._parts(rows)
        if len(parts) == 1:
            score = self.model.scores(rows)
        else:
            with torch.no_grad():
                score = torch.cat([self.model.scores(part) for part in parts])
            score.requires_grad_()
        order = order_of(rows, self.order)
        self.last = fit = self.loss(score, order, self.groups(rows))
        pairs = torch.tensor(float(len(fit.better)), device=score.device)
        if not len(fit.value):
            return {"reward_model/pairs": pairs}
        loss = fit.value.mean()
        if self.dependence:
            loss = loss + self.dependence * (score * self.lookahead(rows, fit)).mean()
        loss.backward()
        if score.is_leaf:
            assert score.grad is not None
            for part, slope in zip(parts, score.grad.split(len(parts[0])), strict=True):
                (self.model.scores(part) * slope).sum().backward()
        right = (score[fit.better] > score[fit.worse]).float().mean()
        return {"reward_model/loss": loss.detach(), "reward_model/accuracy": right, "reward_model/pairs": pairs}

    def lookahead(self, rows: TensorDict, fit: Fit) -> Tensor:
        """How the loss of the next comparisons changes with the reward of each row ``[B]``, through the policy.

        ``<grad S_i, sum_j l_j grad S_j>``, with ``S`` the rows' log-probs and ``l_j`` the loss of the comparisons that
        row j takes part in, less its mean: a step of policy gradient moves the weights along ``r_i grad S_i``, and the
        score function says what that does to the expected loss.
        """
        taking = torch.stack([torch.cat([fit.better, fit.worse]), fit.at.repeat(2)])
        row, at = torch.unique(taking, dim=1)  # a row of a ranking takes part once, whatever it is compared with
        each = fit.value.detach()[at] / len(fit.value)
        share = torch.zeros(len(rows), device=each.device).index_add(0, row, each)

        def score(part: TensorDict) -> Tensor:
            out: Tensor = torch.where(part["mask"], self.policy.log_prob(part).log_prob, 0.0).sum(-1)
            return out

        return inner_products(score, self._parts(rows), list(self.policy.parameters()), share - share.mean())

    @torch.no_grad()
    def learnt(self, rows: TensorDict) -> None:
        """Notes where comparisons were made."""
        if self.coverage is not None and self.last is not None:
            pairs = (rows.split(PAIRS_AT_ONCE) for rows in (self.last.better, self.last.worse))
            for better, worse in zip(*pairs, strict=True):
                self.coverage.observe(self.model.features(rows[better]), self.model.features(rows[worse]))
        self.last = None

    def rewards(self, rows: TensorDictBase) -> Tensor:
        """The model's, less what is uncertain about the row."""
        if self.coverage is None:
            return super().rewards(rows)
        features = self.model.features(rows)
        taken = placed(self.pessimism * self.coverage.radius(features), rows)
        reward: Tensor = self.model(rows, features) - taken
        return reward

    def parameters(self) -> list[Tensor]:
        """Weights and buffers, those of the coverage too."""
        return [*super().parameters(), *([] if self.coverage is None else self.coverage.buffers())]

    def state_dict(self) -> dict[str, Any]:
        """Weights and moments, and what was covered."""
        covered = {} if self.coverage is None else {"coverage": dict(self.coverage.state_dict())}
        return {**super().state_dict(), **covered}

    def load_model(self, state: Mapping[str, Any]) -> None:
        """Restores weights and what was covered."""
        super().load_model(state)
        if self.coverage is not None:
            self.coverage.load_state_dict(state["coverage"])


class Reversed(Fitted):
    """A language model that learns to read rows backwards; the reward is the prompt's log-prob given the answer.

    Args:
        weight, form, within, rows, steps, every, lr: see :class:`Fitted`.
    """

    reports = frozenset({"reward_model/reward", "reward_model/loss"})

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
        super().__init__(weight, form, within, rows, steps, every, lr)
        _refuse_within(form, within)

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
        super().__init__(weight, form, within)
        _refuse_within(form, within)
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


def _refuse_within(form: Form, within: Within) -> None:
    """Raises ConfigError where nothing is compared within anything."""
    if within == "batch" and form == "score":
        raise ConfigError(
            "agent.reward_model.within=batch says with whom rows are compared, and none is: set "
            "agent.reward_model.form=pairwise, or leave within out"
        )


REWARD_MODELS: dict[str, Callable[..., ModelledReward]] = {
    "learnt": Learnt,
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


def check_reward_model(correction: Correction, normalize_reward: bool) -> None:
    """Refuses what would not look at the rewards of a model.

    Raises:
        ConfigError: names the setting and what works.
    """
    column = correction.advantage.get("reward")
    if column is not None:
        raise ConfigError(
            f"agent.reward_model gives every row a reward, and correction.advantage.reward={column} reads columns "
            "instead: set one of them to null"
        )
    if normalize_reward:
        raise ConfigError(
            "agent.normalize_reward scales by what the environment gives, and agent.reward_model gives other rewards: "
            "set it to false"
        )


def preferred(score: Tensor, group: Tensor) -> Tensor:
    """The mean probability ``sigmoid(s - s')`` that a row beats another one of its group, ``[B]``; 1/2 where alone."""
    together = group[:, None] == group
    wins = torch.where(together, torch.sigmoid(score[:, None] - score), 0.0).sum(-1) - 0.5  # without itself
    others = Groups(group).count - 1
    return torch.where(others > 0, wins / others.clamp(min=1), 0.5)


def inner_products(
    score: Callable[[TensorDict], Tensor],
    parts: Sequence[TensorDict],
    weights: Sequence[Tensor],
    share: Tensor,
    step: float = 0.01,
) -> Tensor:
    """``<grad S_i, g>`` with ``g = sum_j share_j grad S_j`` over the weights, ``[B]``, by a central difference along g.

    Args:
        score: ``S [b]`` of rows under the present weights.
        parts: the rows of one pass each, ``B`` together.
        weights: moved along ``g`` and back while it is computed.
        share: ``[B]``.
        step: length of the move.
    """
    trained = [weight for weight in weights if weight.requires_grad]
    along: dict[int, Tensor] = {}
    for part, own in zip(parts, share.split([len(part) for part in parts]), strict=True):
        for at, slope in enumerate(torch.autograd.grad(score(part), trained, own, allow_unused=True)):
            if slope is not None:
                along[at] = along[at] + slope if at in along else slope
    norm = torch.stack([slope.norm() for slope in along.values()]).norm().clamp(min=1e-12)
    with torch.no_grad():
        first = {at: trained[at].clone() for at in along}
        sides = []
        for sign in (1.0, -1.0):
            for at, slope in along.items():
                trained[at].copy_(first[at] + sign * step * slope / norm)
            sides.append(torch.cat([score(part) for part in parts]))
        for at, start in first.items():
            trained[at].copy_(start)
    out: Tensor = (sides[0] - sides[1]) * norm / (2 * step)
    return out
