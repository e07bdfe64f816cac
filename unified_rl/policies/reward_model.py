"""Reward models: a linear head on features of an answer or of a step, and a language model that reads backwards."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from tensordict import TensorDict, TensorDictBase
from torch import Tensor, nn

from unified_rl.errors import ConfigError
from unified_rl.policies.base import action_bounds
from unified_rl.policies.causal_lm import CausalLM
from unified_rl.policies.critics import Critic
from unified_rl.policies.encoder import image_features
from unified_rl.policies.networks import mlp, seeded, trunk_width
from unified_rl.policies.pretrained import trunk_states
from unified_rl.protocols import ControlPolicy, Trainable, is_language, standardises
from unified_rl.ranges import Count, Seed, ranged


class AnswerFeatures(nn.Module):
    """Last hidden states at the end of every row, from a copy of a policy's transformer.

    Under adapters the copy has adapters of its own and shares the weights that nobody trains.

    Args:
        policy: that is copied.
    """

    def __init__(self, policy: CausalLM) -> None:
        super().__init__()
        self.policy = copy.deepcopy(policy)
        self.width = int(policy.model.config.get_text_config(decoder=True).hidden_size)

    def forward(self, rows: TensorDictBase) -> Tensor:
        """Right-padded ``tokens [B, N]`` to ``[B, d]`` float32."""
        length = rows["token_mask"].sum(-1).clamp(min=1)
        if not len(length):  # groups whose answers are all alike have nobody to compare
            return torch.zeros(0, self.width, device=length.device)
        states = trunk_states(self.policy.model, rows["tokens"][:, : int(length.max())])
        return states[torch.arange(len(states), device=states.device), length - 1].float()


class StepFeatures(Critic):
    """Features of an observation and an action, both as a policy's network sees them.

    Args:
        policy: whose space it is, and whose fixed moments it takes over.
        hidden: widths of the layers.
        seed: of their weights.
    """

    action_middle: Tensor
    action_half: Tensor

    def __init__(self, policy: ControlPolicy, hidden: Sequence[Count], seed: int) -> None:
        super().__init__(policy.space.observation, standardises(policy), image_features(policy), seed)
        self.choices = policy.space.action.choices
        bounds = {"middle": torch.zeros(1), "half": torch.ones(1)}
        if self.choices is None:
            bounds = action_bounds(policy.space)
        for name in ("middle", "half"):
            self.register_buffer(f"action_{name}", bounds[name], persistent=False)
        inputs = self.width + (policy.space.action_dim if self.choices is None else sum(self.choices))
        self.out = trunk_width(inputs, hidden)
        with seeded(seed):
            self.layers = mlp(inputs, hidden, activation="tanh", setting="agent.reward_model.hidden")

    def forward(self, rows: TensorDictBase) -> Tensor:
        """``observation [B, T, d]`` and ``action [B, T, a]`` to ``[B, T, f]``."""
        action = rows["action"]
        if self.choices is None:
            action = (action - self.action_middle) / self.action_half
        else:
            action = torch.cat([F.one_hot(action[..., i], n) for i, n in enumerate(self.choices)], -1)
        seen = self.normalize(rows["observation"])
        out: Tensor = self.layers(torch.cat([seen, action.to(seen.dtype)], -1))
        return out


@ranged("agent.reward_model")
class RewardModel(nn.Module):
    """A linear reward of features: of a whole answer, which its last turn has, or of every step of an episode.

    A row's score is the sum of its rewards. Scores start at 0.

    Args:
        policy: the policy whose rows it judges: a language model lends a copy of its transformer, any other its space.
        hidden: widths of the layers (control).
        frozen: only the head learns, on features that stay as they are at the start.
        seed: of fresh weights.
        bias: the head has one: where rows are not compared with each other, what all share has a say too.
    """

    def __init__(
        self,
        policy: Trainable,
        hidden: Sequence[Count] = (64, 64),
        frozen: bool = False,
        seed: Seed = 0,
        bias: bool = False,
    ) -> None:
        super().__init__()
        self.language = is_language(policy)
        self.body: AnswerFeatures | StepFeatures
        if is_language(policy):
            self.body = AnswerFeatures(cast(CausalLM, policy))
            self.width = self.body.width
        else:
            self.body = StepFeatures(cast(ControlPolicy, policy), hidden, seed)
            self.width = self.body.out
        self.frozen = frozen
        if frozen:
            self.body.requires_grad_(False)
        with seeded(seed):
            self.head = nn.Linear(self.width, 1, bias=bias)  # what all rows share has no say in a comparison
        for weight in self.head.parameters():
            nn.init.zeros_(weight)
        self.to(policy.device)

    def features(self, rows: TensorDictBase) -> Tensor:
        """``[B, f]``, over whose linear function rows are compared: of an answer, or summed over valid steps."""
        found: Tensor = self.body(rows)
        if self.language:
            return found
        return torch.where(rows["step_mask"].unsqueeze(-1), found, 0.0).sum(-2)

    def scores(self, rows: TensorDictBase) -> Tensor:
        """``[B]``."""
        out: Tensor = self.head(self.features(rows)).squeeze(-1)
        return out

    def forward(self, rows: TensorDictBase, features: Tensor | None = None) -> Tensor:
        """Rewards ``[B, T]``, 0 at steps that do not count; ``features`` are those of the rows where they are known."""
        if self.language:
            found = self.features(rows) if features is None else features
            return placed(self.head(found).squeeze(-1), rows)
        reward: Tensor = self.head(self.body(rows)).squeeze(-1)
        return torch.where(rows["step_mask"], reward, 0.0)

    def observe(self, rows: TensorDictBase) -> None:
        """Adds the observations of rows that it will learn from to the moments by which it standardises them."""
        if isinstance(self.body, StepFeatures):
            self.body.update_normalizer(rows["observation"][rows["step_mask"]])


def hidden_of(policy: Trainable, hidden: Sequence[Count] | None) -> Sequence[Count]:
    """Widths of the layers of a model beside ``policy``, 64 and 64 where None are given.

    Raises:
        ConfigError: some are, beside a language model.
    """
    if hidden is not None and is_language(policy):
        raise ConfigError(
            "agent.reward_model.hidden is of layers on observations and actions, and a language model's reward is a "
            "head on its own transformer: leave it out"
        )
    return (64, 64) if hidden is None else hidden


def placed(score: Tensor, rows: TensorDictBase) -> Tensor:
    """Scores of rows ``[B]`` as rewards ``[B, T]``: an answer's at its last turn, an episode's in equal parts."""
    valid: Tensor = rows["step_mask"]
    if "tokens" in rows.keys():
        last = valid & (valid.flip(-1).cumsum(-1).flip(-1) == 1)
        return torch.where(last, score.unsqueeze(-1), 0.0)
    share = score / valid.sum(-1).clamp(min=1)
    return torch.where(valid, share.unsqueeze(-1), 0.0)


class Coverage(nn.Module):
    """Where comparisons have been made, and how little is known elsewhere: the radius of a confidence ellipsoid.

    ``|f - v| / sqrt(n)`` in the norm of the inverse of ``mean((f_w - f_l)(f_w - f_l)^T) + ridge I``, over ``n``
    comparisons, with ``v`` the mean of the features that were compared. "Principled Reinforcement Learning with Human
    Feedback from Pairwise or K-wise Comparisons", 2301.11270.

    Args:
        width: of features.
        ridge: added to the diagonal.
    """

    outer: Tensor
    total: Tensor
    pairs: Tensor

    def __init__(self, width: int, ridge: float) -> None:
        super().__init__()
        self.ridge = ridge
        self.register_buffer("outer", torch.zeros(width, width))
        self.register_buffer("total", torch.zeros(width))
        self.register_buffer("pairs", torch.zeros(()))

    def observe(self, better: Tensor, worse: Tensor) -> None:
        """Adds comparisons between features ``[P, f]``."""
        gap = better - worse
        self.outer += gap.T @ gap
        self.total += 0.5 * (better + worse).sum(0)
        self.pairs += len(gap)

    def radius(self, features: Tensor) -> Tensor:
        """Of features ``[B, f]``, ``[B]``."""
        count = self.pairs.clamp(min=1)
        metric = self.outer / count + self.ridge * torch.eye(len(self.outer), device=self.outer.device)
        gap = features - self.total / count
        solved = torch.cholesky_solve(gap.T, torch.linalg.cholesky(metric)).T
        return ((gap * solved).sum(-1).clamp(min=0) / count).sqrt()


class ReversedModel(nn.Module):
    """A language model of reversed rows, which scores a prompt given its answer.

    "Time-Reversal Provides Unsupervised Feedback to LLMs", 2412.02626.

    Args:
        policy: whose copy learns to read backwards.

    Raises:
        ConfigError: it is no language model.
    """

    def __init__(self, policy: Trainable) -> None:
        super().__init__()
        if not isinstance(policy, CausalLM):
            raise ConfigError(
                "agent.reward_model.name=reversed reads text backwards, and this policy says none: use "
                "agent.reward_model.name=learnt"
            )
        self.policy = copy.deepcopy(policy)

    def losses(self, rows: TensorDictBase) -> Tensor:
        """Supervised losses ``[B, N]`` of all tokens of reversed rows but the first, 0 elsewhere."""
        back = reversed_rows(rows)
        mask = back["token_mask"].clone()
        mask[:, 0] = False
        return self.policy.nll(back.set("mask", mask))

    def scores(self, rows: TensorDictBase) -> Tensor:
        """The mean log-prob of a token of the prompt, ``[B]``."""
        back = reversed_rows(rows)
        out: Tensor = -self.policy.nll(back).sum(-1) / back["mask"].sum(-1).clamp(min=1)
        return out

    def forward(self, rows: TensorDictBase) -> Tensor:
        """Rewards ``[B, T]``, of the last turn."""
        return placed(self.scores(rows), rows)


def reversed_rows(rows: TensorDictBase) -> TensorDict:
    """Rows with their real tokens in reversed order, still padded on the right.

    Args:
        rows: ``tokens [B, N]``, ``token_mask [B, N]`` and ``mask [B, N]``, of what was sampled.

    Returns:
        ``tokens``, ``token_mask``, and as ``mask`` the tokens of the prompt, which come last; never the first column.
    """
    real, sampled = rows["token_mask"], rows["mask"]
    place = torch.arange(real.shape[1], device=real.device).expand_as(real)
    length = real.sum(-1, keepdim=True)
    from_end = torch.where(real, length - 1 - place, place)
    prompt = real & (sampled.cumsum(-1) == 0)
    mask = prompt.gather(1, from_end)
    mask[:, 0] = False
    found = {"tokens": rows["tokens"].gather(1, from_end), "token_mask": real, "mask": mask}
    return TensorDict(found, batch_size=rows.batch_size)
