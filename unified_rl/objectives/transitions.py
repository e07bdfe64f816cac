"""What losses of single transitions read, each computed once a phase."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn


@dataclass
class Networks:
    """The networks of a value-based agent.

    Attributes:
        policy: the actor; critic: action values ``[num, B]``; target: its slow copy; value: state values, or None.
        log_alpha: of the entropy weight, scalar.
    """

    policy: Any
    critic: nn.Module
    target: nn.Module
    value: nn.Module | None
    log_alpha: Tensor


@dataclass
class Transitions:
    """A batch of transitions for one phase of an update.

    Attributes:
        batch: ``observation``, ``action``, ``next_observation`` ``[B, .]``, ``reward`` and ``bootstrap`` ``[B]``.
        nets: the networks.
        noise: ``[2, B, a]`` standard normal: of the next action, and of the fresh one.
        generator: for everything else that is drawn.
    """

    batch: Mapping[str, Tensor]
    nets: Networks
    noise: Tensor
    generator: torch.Generator
    metrics: dict[str, Tensor] = field(default_factory=dict)

    @cached_property
    def alpha(self) -> Tensor:
        """The entropy weight, detached."""
        return self.nets.log_alpha.detach().exp()

    @cached_property
    def following(self) -> tuple[Tensor, Tensor]:
        """A fresh next action ``[B, a]`` and its log-prob ``[B]``, without gradient."""
        with torch.no_grad():
            return self.nets.policy.rsample(self.batch["next_observation"], noise=self.noise[0])

    @cached_property
    def fresh(self) -> tuple[Tensor, Tensor]:
        """A fresh action and its log-prob, with gradient through the sample."""
        return self.nets.policy.rsample(self.batch["observation"], noise=self.noise[1])

    @cached_property
    def nll(self) -> Tensor:
        """The policy's supervised loss of the stored actions, ``[B]``."""
        return self.nets.policy.nll(self.batch, self.generator).sum(-1)

    @cached_property
    def advantage(self) -> Tensor:
        """Target critic (least member) minus value at the stored actions, ``[B]``, detached."""
        with torch.no_grad():
            return self.stored_q.amin(0) - self.value

    @cached_property
    def stored_q(self) -> Tensor:
        """The target critic at the stored actions ``[num, B]``, detached."""
        with torch.no_grad():
            return self.nets.target(self.batch["observation"], self.batch["action"])

    @cached_property
    def value(self) -> Tensor:
        """``V(s)``, ``[B]``."""
        assert self.nets.value is not None
        return self.nets.value(self.batch["observation"])


Loss = Callable[[Transitions], Tensor]
