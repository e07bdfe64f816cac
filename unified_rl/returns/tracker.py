"""A success tracker a prompt, or a start of episodes, for a baseline without groups."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from unified_rl.errors import RecordError


class SuccessTracker:
    """Discounted Beta counts of each prompt's success. Single-stream Policy Optimization (SPO).

    Prompts, and starts of episodes in a simulation, are known by any integer ids; one that was never seen has the
    counts 0.5 and 0.5.

    Args:
        low, high: bounds of the forgetting factor.
        half_life: drift of the mean log-prob at which half is forgotten.
    """

    def __init__(self, *, low: float = 0.875, high: float = 0.96, half_life: float = 0.06) -> None:
        self.counts: dict[int, tuple[float, float]] = {}
        self.low, self.high, self.half_life = low, high, half_life

    def value(self, prompt: Tensor) -> Tensor:
        """Estimated success rate of each row's prompt ``[B]``: the baseline; ask before :meth:`update`."""
        pairs = [self.counts.get(i, (0.5, 0.5)) for i in prompt.tolist()]
        return torch.tensor([s / (s + f) for s, f in pairs], device=prompt.device)

    def seed(self, prompt: Tensor, successes: Tensor, trials: int) -> None:
        """Starts the counts of prompts ``[P]`` from ``successes [P]`` of so many offline trials."""
        strength = 1 / (1 - self.low)
        for i, s in zip(prompt.tolist(), successes.tolist(), strict=True):
            success = strength * (s + 0.5) / (trials + 1)
            self.counts[i] = success, strength - success

    def update(self, prompt: Tensor, reward: Tensor, drift: Tensor) -> None:
        """Takes in rewards ``[B]``; ``drift [B]`` is the mean |log-prob change| on the last stored answer.

        Raises:
            RecordError: a reward that is no success rate, below 0 or above 1.
        """
        if not bool(((reward >= 0) & (reward <= 1)).all()):
            raise RecordError(
                "a success tracker counts rewards from 0 to 1, and one lies outside: compare successes in their place "
                "(agent.columns={won: {name: success, threshold: 0.5}} correction.advantage.reward=won), or use "
                "correction.advantage.baseline=mean"
            )
        keep = (2.0 ** (-drift.cpu().double() / self.half_life)).clamp(self.low, self.high)
        for i, r, k in zip(prompt.tolist(), reward.tolist(), keep.tolist(), strict=True):
            success, failure = self.counts.get(i, (0.5, 0.5))
            self.counts[i] = k * success + r, k * failure + 1 - r

    def state_dict(self) -> dict[str, Any]:
        """The ids ``[P]`` and counts ``[P, 2]``."""
        ids = torch.tensor(list(self.counts), dtype=torch.int64)
        return {"prompt": ids, "counts": torch.tensor(list(self.counts.values()), dtype=torch.float64).reshape(-1, 2)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores :meth:`state_dict`."""
        pairs = zip(state["prompt"].tolist(), state["counts"].tolist(), strict=True)
        self.counts = {i: (success, failure) for i, (success, failure) in pairs}
