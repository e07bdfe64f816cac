"""Rewards and returns of any size as numbers of size one, by running statistics that travel with the agent."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor, nn

from unified_rl.errors import ConfigError
from unified_rl.replay import Replay
from unified_rl.returns.scan import backward_scan

EPSILON = 1e-8
LIMIT = 10.0
"""Scaled rewards are clamped to plus or minus this."""


class Moments:
    """Running mean and variance of a number, float64."""

    def __init__(self) -> None:
        self.count = self.mean = 0.0
        self.var = 1.0

    def add(self, x: Tensor) -> None:
        """Takes in the entries of ``x``."""
        if not x.numel():
            return
        x = x.double()
        new, mean, var = float(x.numel()), float(x.mean()), float(x.var(correction=0))
        total, delta = self.count + new, mean - self.mean
        self.var = (self.var * self.count + var * new + delta**2 * self.count * new / total) / total
        self.mean += delta * new / total
        self.count = total

    @property
    def std(self) -> float:
        """At least the root of :data:`EPSILON`."""
        return float((self.var + EPSILON) ** 0.5)

    def state_dict(self) -> dict[str, Any]:
        """The three numbers."""
        return {"count": self.count, "mean": self.mean, "var": self.var}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores :meth:`state_dict`."""
        self.count, self.mean, self.var = (float(state[key]) for key in ("count", "mean", "var"))


class RewardScale:
    """Divides rewards by the running standard deviation of the discounted return so far in each episode.

    As Stable-Baselines3's ``VecNormalize`` and Gymnasium's ``NormalizeReward`` do, but the rewards that are stored,
    logged and evaluated stay what they are. "Implementation Matters in Deep Policy Gradients" (arXiv:2005.12729).
    """

    def __init__(self) -> None:
        self.moments = Moments()
        self._open: dict[int, tuple[float, float]] = {}
        """By running episode: its return so far, and the discount of its last step."""

    def observe(self, record: TensorDictBase) -> None:
        """Adds the rows of one collection, ``reward``, ``discount``, ``episode``, ``step_mask`` ``[B, T]``."""
        reward, episode, discount = (record[key].cpu() for key in ("reward", "episode", "discount"))
        reward, discount = reward.double(), discount.double()
        done, kept = (record["terminated"] | record["truncated"]).cpu(), record["step_mask"].cpu()
        before = [self._open.get(number, (0.0, 0.0)) for number in episode[:, 0].tolist()]
        start = reward.clone()
        start[:, 0] += torch.tensor(before, dtype=torch.float64).prod(-1)
        goes_on = ~done[:, :-1] & (episode[:, 1:] == episode[:, :-1])
        carry = torch.cat([torch.zeros_like(reward[:, :1]), discount[:, :-1] * goes_on], 1)
        found = backward_scan(start.flip(-1), carry.flip(-1)).flip(-1)  # forwards in time is backwards in a flipped row
        self.moments.add(found[kept])
        self._remember(found, discount, episode, done, kept)

    def _remember(self, found: Tensor, discount: Tensor, episode: Tensor, done: Tensor, kept: Tensor) -> None:
        last = (kept * torch.arange(1, kept.shape[1] + 1)).argmax(-1, keepdim=True)
        ends = [x.gather(1, last).squeeze(1).tolist() for x in (episode, found, discount, done)]
        self._open = {number: (total, factor) for number, total, factor, over in zip(*ends, strict=True) if not over}

    def __call__(self, reward: Tensor) -> Tensor:
        """Scaled rewards, clamped to plus or minus :data:`LIMIT`."""
        return (reward / self.moments.std).clamp(-LIMIT, LIMIT)

    def state_dict(self) -> dict[str, Any]:
        """Moments, and the returns of the running episodes."""
        return {"moments": self.moments.state_dict(), "open": [[k, *v] for k, v in self._open.items()]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores :meth:`state_dict`."""
        self.moments.load_state_dict(state["moments"])
        self._open = {int(number): (total, factor) for number, total, factor in state["open"]}


class ReturnScale:
    """The critic learns targets of mean 0 and standard deviation 1; its last layer keeps the values when these move.

    "Learning values across many orders of magnitude" (PopArt, arXiv:1602.07714).

    Args:
        last: the critic's output layer.
    """

    def __init__(self, last: nn.Linear) -> None:
        self.last, self.moments = last, Moments()

    @property
    def _std(self) -> float:
        return self.moments.std if self.moments.count else 1.0

    def value(self, output: Tensor) -> Tensor:
        """Values of the critic's outputs."""
        return output * self._std + self.moments.mean

    def output(self, value: Tensor) -> Tensor:
        """The outputs that stand for values."""
        return (value - self.moments.mean) / self._std

    @torch.no_grad()
    def observe(self, target: Tensor) -> None:
        """Takes in the targets of an update; the critic's values stay what they were."""
        std, mean = self._std, self.moments.mean
        self.moments.add(target)
        self.last.weight.mul_(std / self._std)
        self.last.bias.mul_(std).add_(mean - self.moments.mean).div_(self._std)

    def state_dict(self) -> dict[str, Any]:
        """The moments."""
        return self.moments.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores :meth:`state_dict`."""
        self.moments.load_state_dict(state)


def check_scales(reward: bool, returns: bool, *, use_critic: bool, language: bool) -> None:
    """Refuses scales where they would be of no effect.

    Raises:
        ConfigError: there is no critic of environment steps.
    """
    for name in [key for key, wanted in (("reward", reward), ("return", returns)) if wanted]:
        if language:
            raise ConfigError(f"agent.normalize_{name} is for critics in control, and this task is of language")
        if not use_critic:
            raise ConfigError(
                f"agent.normalize_{name} scales what a critic learns, and there is none: set agent.advantage=critic"
            )


def check_order(replay: object) -> None:
    """Refuses a replay that gives rows in another order than that of time, which running returns need.

    Raises:
        ConfigError: names what works.
    """
    if isinstance(replay, Replay) and not replay.sampler.queue:
        raise ConfigError(
            "agent.normalize_reward follows the return of every episode, so it needs rows once and in the order of "
            "time: use replay=fresh"
        )
