"""Exploration noise that every simulation holds for several steps, and that is drawn again when its time is over."""

from __future__ import annotations

from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor

from unified_rl.protocols import HoldsNoise


class HeldNoise:
    """The noise of K simulations; each is drawn anew when its episode ended or it was held for long enough.

    Args:
        policy: draws it, and acts under it.
        count: ``K``.

    Attributes:
        noise: ``[K, ...]`` as the policy draws it; None before the first step.
        age: ``[K]`` int64, steps for which each was held.
        due: ``[K]`` bool, whether each is drawn anew before the next step.
    """

    def __init__(self, policy: HoldsNoise, count: int) -> None:
        self.policy = policy
        self.noise: Tensor | None = None
        self.age = torch.zeros(count, dtype=torch.int64)
        self.due = torch.ones(count, dtype=torch.bool)

    @classmethod
    def of(cls, policy: Any, count: int) -> HeldNoise | None:
        """That of a policy which holds any."""
        return cls(policy, count) if isinstance(policy, HoldsNoise) and policy.hold_steps else None

    def __call__(self, observation: Tensor, generator: torch.Generator) -> TensorDict:
        """The policy's sample ``[K]`` for ``observation [K, d]`` under the noise of each simulation."""
        fresh = int(self.due.sum())
        if fresh:
            drawn = self.policy.draw_noise(fresh, generator)
            noise = drawn.new_zeros(len(self.due), *drawn.shape[1:]) if self.noise is None else self.noise
            self.noise = noise.index_put((self.due.to(drawn.device),), drawn)
            self.age[self.due] = 0
        assert self.noise is not None
        return self.policy.sample_held(observation, self.noise)

    def advance(self, done: Tensor) -> None:
        """A step was made, which ended the episode in the simulations ``done [K]``."""
        self.age += 1
        self.due = done | (self.age >= self.policy.hold_steps)

    def state_dict(self) -> dict[str, Any]:
        """What is held, and for how long it was."""
        noise = None if self.noise is None else self.noise.cpu()
        return {"noise": noise, "age": self.age.clone(), "due": self.due.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores :meth:`state_dict`."""
        noise: Tensor | None = state["noise"]
        device = next(self.policy.parameters()).device if isinstance(self.policy, torch.nn.Module) else "cpu"
        self.noise = None if noise is None else noise.to(device)
        self.age, self.due = state["age"].clone(), state["due"].clone()
