"""What losses of single transitions read, each computed once a phase."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, TypeVar

import torch
from tensordict import TensorDictBase
from torch import Tensor, nn

KEYS = ("observation", "action", "reward", "discount", "terminated", "next_observation")
"""Columns of a replay row that a gradient step reads."""
Part = TypeVar("Part", bound=Callable[..., Any])


def prepare_batch(sample: TensorDictBase, device: torch.device, *extra: str) -> dict[str, Tensor]:
    """A replay sample as the tensors that a gradient step reads; ``bootstrap`` is ``discount * (1 - terminated)``.

    Args:
        sample: batch size ``[B]`` with :data:`KEYS`.
        device: of the step.
        extra: further columns to keep.
    """
    batch = {key: sample[key].to(device, non_blocking=True) for key in KEYS}
    batch["bootstrap"] = batch.pop("discount").masked_fill(batch.pop("terminated"), 0.0)
    for key in extra:
        batch[key] = sample[key].to(device)
    return batch


def needs(*names: str) -> Callable[[Part], Part]:
    """Declares what a part of a loss reads beside the batch, so that an agent can refuse it before the first step.

    Args:
        names: of ``rsample`` (a reparameterised policy), ``nll``, ``entropy`` (the entropy weight), ``value`` (a state
            value), ``advantage``, ``members`` (a random order of the ensemble's members), ``generator`` (random numbers
            within the step). A need of the same name as a bool setting falls away where that is false.
    """

    def mark(part: Part) -> Part:
        part.needs = names  # type: ignore[attr-defined]
        return part

    return mark


def needs_of(part: partial[Any]) -> set[str]:
    """What a part that :func:`~unified_rl.correction.lookup.bind` made declares by :func:`needs`."""
    return {name for name in getattr(part.func, "needs", ()) if part.keywords.get(name, True) is not False}


@dataclass
class Networks:
    """The networks of a value-based agent.

    Attributes:
        policy: the actor; critic: action values ``[num, B]``; target: its slow copy; value: state values, or None.
        log_alpha: of the entropy weight, scalar.
    """

    policy: Any  # a BoxPolicy, Reparameterised where a part draws actions: an agent checks that before
    critic: nn.Module
    target: nn.Module
    value: nn.Module | None
    log_alpha: Tensor


@dataclass
class Transitions:
    """A batch of transitions for one phase of an update.

    Attributes:
        batch: ``observation``, ``action``, ``next_observation`` ``[B, .]``, ``reward`` and ``bootstrap`` ``[B]``; from
            prioritised replay ``priority_weight [B]``; where a part needs it ``members [num]`` int64.
        nets: the networks.
        noise: ``[2, B, a]`` standard normal: of the next action, and of the fresh one.
        alpha: the entropy weight, scalar without gradient.
        aggregate: ``(q [num, B], t) -> [B]``, from an ensemble's values to one.
        generator: for whatever else is drawn.
        average: ``[B]`` without gradient to its mean; of several processes that share a batch, over all of it. A loss
            is the mean over the rows that are here.
        metrics: means over the rows for the log; parts add to it.
    """

    batch: Mapping[str, Tensor]
    nets: Networks
    noise: Tensor
    alpha: Tensor
    aggregate: Callable[[Tensor, Transitions], Tensor]
    generator: torch.Generator
    average: Callable[[Tensor], Tensor] = torch.mean
    metrics: dict[str, Tensor] = field(default_factory=dict)
    target: Tensor | None = None
    """Of the critic, ``[B]`` without gradient; set in its phase."""

    @cached_property
    def following(self) -> tuple[Tensor, Tensor]:
        """A fresh next action ``[B, a]`` and its log-prob ``[B]``; targets are computed without gradient."""
        out: tuple[Tensor, Tensor] = self.nets.policy.rsample(self.batch["next_observation"], noise=self.noise[0])
        return out

    @cached_property
    def fresh(self) -> tuple[Tensor, Tensor]:
        """A fresh action and its log-prob, with gradient through the sample."""
        out: tuple[Tensor, Tensor] = self.nets.policy.rsample(self.batch["observation"], noise=self.noise[1])
        return out

    @cached_property
    def nll(self) -> Tensor:
        """The policy's supervised loss of the stored actions, ``[B]``."""
        out: Tensor = self.nets.policy.nll(self.batch, self.generator).sum(-1)
        return out

    @cached_property
    def q(self) -> Tensor:
        """The critic at the stored actions ``[num, B]``, with gradient."""
        out: Tensor = self.nets.critic(self.batch["observation"], self.batch["action"])
        return out

    @cached_property
    def td_error(self) -> Tensor:
        """``Q(s, a) - target``, ``[num, B]``, with gradient."""
        assert self.target is not None
        return self.q - self.target

    @cached_property
    def stored_q(self) -> Tensor:
        """The slow critic at the stored actions, members aggregated, ``[B]`` without gradient."""
        with torch.no_grad():
            return self.aggregate(self.nets.target(self.batch["observation"], self.batch["action"]), self)

    @cached_property
    def value(self) -> Tensor:
        """``V(s)``, ``[B]``."""
        assert self.nets.value is not None
        out: Tensor = self.nets.value(self.batch["observation"])
        return out

    @cached_property
    def advantage(self) -> Tensor:
        """The slow critic at the stored action minus ``V(s)``, or minus itself at a fresh action; ``[B]``, detached."""
        with torch.no_grad():
            if self.nets.value is not None:
                return self.stored_q - self.value
            action, _ = self.nets.policy.rsample(self.batch["observation"], noise=self.noise[1])
            return self.stored_q - self.aggregate(self.nets.target(self.batch["observation"], action), self)


Loss = Callable[[Transitions], Tensor]
