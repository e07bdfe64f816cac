"""A success tracker a prompt, for a baseline without groups."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class SuccessTracker:
    """Discounted Beta counts of each prompt's success. Single-stream Policy Optimization (SPO).

    Args:
        prompts: how many prompts there are; ids are 0 to prompts - 1.
        low, high: bounds of the forgetting factor.
        half_life: drift of the mean log-prob at which half is forgotten.
    """

    def __init__(self, prompts: int, *, low: float = 0.875, high: float = 0.96, half_life: float = 0.06) -> None:
        self.success, self.failure = torch.full((prompts,), 0.5), torch.full((prompts,), 0.5)
        self.low, self.high, self.half_life = low, high, half_life

    def value(self, prompt: Tensor) -> Tensor:
        """Estimated success rate of each row's prompt ``[B]``: the baseline; ask before :meth:`update`."""
        success = self.success[prompt.cpu()]
        return (success / (success + self.failure[prompt.cpu()])).to(prompt.device)

    def seed(self, prompt: Tensor, successes: Tensor, trials: int) -> None:
        """Starts the counts of prompts ``[P]`` from ``successes [P]`` of so many offline trials."""
        strength = 1 / (1 - self.low)
        at = prompt.cpu()
        self.success[at] = strength * (successes.cpu().float() + 0.5) / (trials + 1)
        self.failure[at] = strength - self.success[at]

    def update(self, prompt: Tensor, reward: Tensor, drift: Tensor) -> None:
        """Takes in rewards ``[B]`` in [0, 1]; ``drift [B]`` is the mean |log-prob change| on the last stored answer."""
        keep = (2.0 ** (-drift.cpu().float() / self.half_life)).clamp(self.low, self.high)
        for i, r, k in zip(prompt.tolist(), reward.tolist(), keep.tolist(), strict=True):
            self.success[i] = k * self.success[i] + r
            self.failure[i] = k * self.failure[i] + 1 - r

    def state_dict(self) -> dict[str, Any]:
        """The counts."""
        return {"success": self.success.clone(), "failure": self.failure.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores :meth:`state_dict`."""
        self.success, self.failure = state["success"].clone(), state["failure"].clone()
