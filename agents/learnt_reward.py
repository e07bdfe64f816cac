"""A reward that is learnt from comparisons of rows, along with the policy that it rewards."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from unified_rl.agents.modelled_reward import Fitted, Form
from unified_rl.correction.lookup import bind
from unified_rl.errors import ConfigError
from unified_rl.objectives.pairs import check_order, order_of
from unified_rl.objectives.reward_losses import REWARD_LOSSES, Fit
from unified_rl.objectives.scores import Within
from unified_rl.policies.reward_model import Coverage, RewardModel, hidden_of, placed
from unified_rl.protocols import Trainable
from unified_rl.ranges import Count, Name, NonNegative, Positive, UnitInterval
from unified_rl.returns.groups import lone

PAIRS_AT_ONCE = 256
"""Comparisons whose features are held together."""


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

    compares = True
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
        super().__init__(weight=weight, form=form, within=within, rows=rows, steps=steps, every=every, lr=lr)
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
        self.policy = policy
        self.train(RewardModel(policy, hidden_of(policy, self.hidden), self.frozen, seed), policy)
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
                "a prompt (rollout.group_size) or start (rollout.starts), or set agent.reward_model.within=batch"
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
