"""Who speaks, or acts, in the policy's place while rows are collected."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from unified_rl.protocols import ControlEnv, Generates, LanguageEnv, LanguagePolicy, Samples
from unified_rl.rollout.conversation import Problems

ACTED = "foreign"
"""Entry ``[K]`` bool of a sample: simulations in which somebody else than the policy acted."""

Acts = Callable[[Tensor, torch.Generator], TensorDictBase]
"""``(observation [K, d], stream of the policy's noise)`` to a sample ``[K]`` with :data:`ACTED`."""


class Spoken(NamedTuple):
    """What a speaker is told of a collection.

    Attributes:
        env: the task.
        problems: of its prompts.
        version: of the policy.
        generator: the speaker's own stream.
    """

    env: LanguageEnv
    problems: Problems
    version: int
    generator: torch.Generator


@runtime_checkable
class Speaker(Protocol):
    """Continues prompts in the policy's place, which may have a say in it.

    Units that the policy did not sample by itself are marked by their version, see
    :mod:`unified_rl.policies.choosers`; their log-probs are those of who sampled them.
    """

    def check(self, env: LanguageEnv, policy: LanguagePolicy, setting: str) -> None:
        """Refuses a task or a policy that it cannot serve, before the first step.

        Raises:
            ConfigError: names the setting, and what works.
        """
        ...

    def speaks(self, policy: Generates, spoken: Spoken) -> Generates:
        """Who speaks in this collection."""
        ...


@runtime_checkable
class AddsRows(Protocol):
    """A speaker that has rows of its own to add."""

    def most(self, rows: int) -> int:
        """How many at most, beside so many conversations."""
        ...

    def more(self, rows: TensorDict, corrected: Tensor, policy: Generates, spoken: Spoken) -> TensorDict | None:
        """Rows like those of the collection, ``[n]``; None where there are none.

        Args:
            rows: of the conversations, ``[B]``.
            corrected: units that took the place of a proposal of the policy's, ``[B, N]`` bool.
            policy: that is trained.
            spoken: as in :meth:`Speaker.speaks`.
        """
        ...


@runtime_checkable
class Actor(Protocol):
    """Acts in simulations in the policy's place, which may have a say in it."""

    def check_control(self, env: ControlEnv, policy: Samples, setting: str) -> None:
        """Refuses an environment or a policy that it cannot serve, before the first step.

        Raises:
            ConfigError: names the setting, and what works.
        """
        ...

    def acts(self, policy: Samples, version: int, generator: torch.Generator) -> Acts | None:
        """Who acts in this collection; None is the policy by itself."""
        ...
