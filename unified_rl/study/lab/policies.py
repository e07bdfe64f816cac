"""Policies whose logits are linear in parameters: a table (a parameter a state and action), or shared features.

Parameters are ``theta [..., F, A]`` and logits ``features @ theta``; a table has one feature a state. The score of
action ``a`` in state ``s`` is ``features[s] x (one_hot(a) - pi(s))``, so means and second moments need no automatic
differentiation.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from unified_rl.study.lab.problems import Problem


@dataclass(frozen=True)
class Policy:
    """A policy class.

    Attributes:
        name: what it is called in tables.
        features: ``[S, F]`` float64, or None for a table.
        states, actions: how many there are.
    """

    name: str
    features: Tensor | None
    states: int
    actions: int

    @property
    def width(self) -> int:
        """Features, ``F``."""
        return self.states if self.features is None else self.features.shape[1]

    def log_table(self, theta: Tensor) -> Tensor:
        """Log-probabilities of every action in every state, ``[..., S, A]``."""
        logits = theta if self.features is None else self.features @ theta
        return logits.log_softmax(-1)

    def score_sum(self, weight: Tensor, table: Tensor) -> Tensor:
        """``sum over (s, a) of weight[s, a] * score(s, a)``, ``[..., F, A]``; ``table`` holds log-probabilities."""
        logits = weight - weight.sum(-1, keepdim=True) * table.exp()
        return logits if self.features is None else self.features.mT @ logits

    def gram(self, problem: Problem, table: Tensor) -> Tensor:
        """Inner products of the scores of any two units of a row, ``[B, N, N]``; 0 where one is masked."""
        state, action, p = problem.state, problem.action, table.exp()
        if self.features is None:
            kernel = (state[:, :, None] == state[:, None, :]).double()
        else:
            kernel = (self.features @ self.features.mT)[state[:, :, None], state[:, None, :]]
        crossed = p[state[:, :, None], action[:, None, :]]
        actions = (action[:, :, None] == action[:, None, :]).double() - crossed - crossed.mT
        actions += (p @ p.mT)[state[:, :, None], state[:, None, :]]
        both = problem.mask[:, :, None] & problem.mask[:, None, :]
        return (kernel * actions).masked_fill(~both, 0.0)

    def initial(self, seed: int) -> Tensor:
        """Parameters drawn from a normal distribution, so that logits have a spread of about 0.5."""
        g = torch.Generator().manual_seed(seed)
        theta = torch.randn(self.width, self.actions, generator=g, dtype=torch.float64)
        scale = 1.0 if self.features is None else float(self.features.square().sum(-1).mean().sqrt())
        return 0.5 * theta / scale


def tabular(problem: Problem) -> Policy:
    """A parameter for every state and action."""
    return Policy("tabular", None, problem.states, problem.actions)


def shared(problem: Problem) -> Policy:
    """Few features that many states have in common, so that a step in one state moves others too."""
    features = _walk_features(problem) if problem.name == "corridor" else _answer_features(problem)
    return Policy("shared", features, problem.states, problem.actions)


def _answer_features(problem: Problem) -> Tensor:
    """One-hot position, worth so far modulo 3, and last token."""
    before = torch.cat([torch.zeros_like(problem.action[:, :1]), problem.action[:, :-1]], -1)
    position = torch.arange(problem.mask.shape[1]).expand_as(before)
    parts = [(position, problem.mask.shape[1]), (before.cumsum(-1) % 3, 3), (before, problem.actions)]
    one_hot = torch.cat([torch.nn.functional.one_hot(x, n) for x, n in parts], -1).double()
    features = torch.zeros(problem.states, one_hot.shape[-1], dtype=torch.float64)
    features[problem.state[problem.mask]] = one_hot[problem.mask]
    return features


def _walk_features(problem: Problem) -> Tensor:
    """A constant and the place on the line."""
    place = torch.linspace(-1, 1, problem.states, dtype=torch.float64)
    return torch.stack([torch.ones_like(place), place], -1)


POLICIES = {"tabular": tabular, "shared": shared}
"""The policy classes of the lab by name."""
