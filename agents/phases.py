"""From settings to the losses of a value-based agent: value, critic, actor; and what does not fit together."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from unified_rl.correction.lookup import bind
from unified_rl.errors import ConfigError
from unified_rl.objectives.offline_value import ACTORS, AGGREGATES, CRITICS, TARGETS, VALUES, least_of
from unified_rl.objectives.summands import Scales, Summands
from unified_rl.objectives.transitions import Transitions, needs_of
from unified_rl.policies.normalizer import RunningNormalizer
from unified_rl.protocols import HasSpace, Reparameterised, standardises

Node = str | Mapping[str, Any]


class Phases:
    """The losses by phase, each ``(t, scales) -> scalar``.

    Args:
        target: of the critic, from :data:`TARGETS`.
        aggregate: of an ensemble's members, from :data:`AGGREGATES`.
        value: loss of a state value, from :data:`VALUES`, or None.
        critic: terms of the critic's loss by name, from :data:`CRITICS`.
        actor: terms of the actor's loss by name, from :data:`ACTORS`.

    Raises:
        ConfigError: an unknown part or setting, by its full name.
    """

    def __init__(
        self,
        target: Node,
        aggregate: Node,
        value: Node | None,
        critic: Mapping[str, Any],
        actor: Mapping[str, Any],
    ) -> None:
        self.aggregate = bind(aggregate, AGGREGATES, "agent.aggregate")[0]
        self.target = bind(target, TARGETS, "agent.target")[0]
        self.value = None if value is None else bind(value, VALUES, "agent.value")[0]
        self.sums = {
            "critic": Summands(critic, CRITICS, "agent.critic"),
            "actor": Summands(actor, ACTORS, "agent.actor"),
        }
        self.parts: dict[str, partial[Any]] = {"agent.aggregate": self.aggregate, "agent.target": self.target}
        if self.value is not None:
            self.parts["agent.value"] = self.value
        for phase, summands in self.sums.items():
            self.parts |= {f"agent.{phase}.{name}": term for name, term in summands.terms.items()}

    def needing(self, need: str) -> list[str]:
        """Full names of the settings whose part declares the need."""
        return [name for name, part in self.parts.items() if need in needs_of(part)]

    def losses(self) -> dict[str, Callable[[Transitions, Scales], Tensor]]:
        """By phase, in the order of a gradient step."""
        value = self.value
        first = {} if value is None else {"value": lambda t, scales: value(t)}
        return {**first, "critic": self._critic, "actor": self.sums["actor"].loss}

    def _critic(self, t: Transitions, scales: Scales) -> Tensor:
        with torch.no_grad():
            t.target = self.target(t)
        return self.sums["critic"].loss(t, scales)

    def scales(self, progress: float, update: int) -> dict[str, Scales]:
        """The present coefficients of every phase that has some."""
        return {phase: summands.scales(progress, update) for phase, summands in self.sums.items()}

    # ------------------------------------------------------------------ what does not fit

    def check_policy(self, policy: object) -> None:
        """Refuses a policy that the parts cannot use.

        Raises:
            ConfigError: its actions are not continuous, or a part needs an ability that it lacks.
        """
        name = type(policy).__name__
        if not isinstance(policy, HasSpace) or policy.space.action.choices is not None:
            raise ConfigError(
                f"agent=sac and agent=actor_critic need continuous actions, and {name} has none; use "
                "policy=tanh_gaussian in a control environment, or agent=policy_gradient"
            )
        if isinstance(policy, Reparameterised):
            return
        draws = self.needing("rsample") + (self.needing("advantage") if self.value is None else [])
        if draws:
            raise ConfigError(
                f"{' and '.join(draws)} need a reparameterised policy (one with rsample), and {name} has none; use "
                "policy=tanh_gaussian, or agent.target=state_value agent.value=expectile agent.actor.policy=weighted"
            )

    def check_value(self) -> None:
        """Refuses a state value that is missing, or that nothing reads.

        Raises:
            ConfigError: one of both.
        """
        readers = self.needing("value")
        if readers and self.value is None:
            raise ConfigError(f"{' and '.join(readers)} need a state value; set agent.value=expectile")
        if self.value is not None and not readers and not self.needing("advantage"):
            raise ConfigError(
                "agent.value is learnt and nothing reads it; set agent.target=state_value or an agent.actor term of "
                "name weighted, or leave agent.value out"
            )

    def check_members(self, critics: int) -> None:
        """Refuses a random subset of the ensemble that is the whole of it.

        Raises:
            ConfigError: names both settings.
        """
        if self.aggregate.func is not least_of:
            return
        members = self.aggregate.keywords.get("members", 2)
        if members >= critics:
            raise ConfigError(
                f"agent.aggregate.members={members} draws all of agent.critics={critics}, which is "
                "agent.aggregate=least: set agent.critics above it"
            )

    def check_alpha(self, alpha: float, tune: bool, target_entropy: float | None) -> None:
        """Refuses settings of the entropy weight that would be of no effect.

        Raises:
            ConfigError: no part reads the weight, or none measures the entropy that it is tuned by.
        """
        measured = [name for name in self.needing("entropy") if name.startswith("agent.actor.")]
        if tune and not measured:
            raise ConfigError(
                "agent.tune_alpha tunes by the entropy that pathwise actor terms measure, and agent.actor has none "
                "with entropy; set agent.tune_alpha=false"
            )
        if tune and alpha == 0:
            raise ConfigError(
                "agent.alpha=0 must be above 0 where it is tuned; set agent.tune_alpha=false to leave the entropy out"
            )
        if alpha != 1.0 and not self.needing("entropy"):
            raise ConfigError(f"agent.alpha={alpha} weighs an entropy that no part of the loss has; leave it out")
        if target_entropy is not None and not tune:
            raise ConfigError("agent.target_entropy is what agent.tune_alpha tunes to; set agent.tune_alpha=true")

    def check_graph(self, policy: object) -> None:
        """Refuses what a CUDA graph would freeze.

        Raises:
            ConfigError: random numbers within the step, coefficients that change, or moments of the user's own.
        """
        inside = self.needing("generator") + ([] if isinstance(policy, Reparameterised) else self.needing("nll"))
        if inside:
            raise ConfigError(
                f"{' and '.join(inside)} draw random numbers within a gradient step, which a CUDA graph would repeat; "
                "set agent.cuda_graph=false"
            )
        changing = [f"agent.{phase}.{name}" for phase, sum_ in self.sums.items() for name in sum_.changing]
        if changing:
            raise ConfigError(f"{changing[0]}.coefficient changes, which a CUDA graph would not see; set a number")
        if standardises(policy) and not isinstance(getattr(policy, "normalizer", None), RunningNormalizer):
            raise ConfigError(
                f"{type(policy).__name__} standardises observations by a module of its own, whose moments a CUDA graph "
                "would freeze; set agent.cuda_graph=false"
            )
