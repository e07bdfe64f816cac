"""Open-loop chunks: one policy decision is h actions."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from unified_rl.configurable import configurable
from unified_rl.envs.control.base import ControlEnvBase, EnvWrapper
from unified_rl.errors import ConfigError
from unified_rl.protocols import Demonstrates, StepResult
from unified_rl.ranges import Count, UnitInterval, ranged
from unified_rl.spaces import Box, Space


@configurable
@ranged("env")
class ActionChunk(EnvWrapper):
    """Executes ``h`` actions of ``a`` dimensions a decision: an action is ``[K, h * a]``, first action first.

    The reward of a decision is ``sum_i gamma^(m i) r_i`` over the executed actions, each of which takes ``m`` steps of
    the environment inside (one, but for repeated actions); their plain sum is ``undiscounted``. A simulation whose
    episode ends inside a chunk executes no more of it (``executed`` counts what it did) and keeps its true final
    observation.

    Args:
        env: an environment whose :meth:`advance` accepts a mask of running simulations.
        horizon: h.
        gamma: discount of a step between the actions of a chunk; a run gives ``agent.gamma``, and None is 0.99.

    Raises:
        ConfigError: ``horizon`` below 1, or discrete actions.
    """

    def __init__(self, env: ControlEnvBase, horizon: Count = 4, gamma: UnitInterval | None = None) -> None:
        one = env.space.action
        if not isinstance(one, Box) or one.integer:
            raise ConfigError(f"a chunk needs real-valued actions, got {one.describe()}")
        low, high = (tuple(bound.ravel().tolist()) * horizon for bound in (one.low_array, one.high_array))
        plan = Box((horizon, *one.shape), one.dtype, low, high)
        super().__init__(env, Space(env.space.observation, plan), horizon)
        self.horizon, self._action_dim = horizon, one.width
        if isinstance(env, Demonstrates):
            self.demonstrations = env.demonstrations
        self._gamma = 0.99 if gamma is None else gamma

    def advance(self, action: Tensor, running: Tensor | None = None) -> StepResult:
        """Executes the chunk ``[K, h * a]`` in every running simulation until its end or the episode's."""
        plan = self.plan(action)
        active = torch.ones(self.num_envs, dtype=torch.bool) if running is None else running.clone()
        total = self.inner.advance(plan[:, 0], active)
        total = total._replace(undiscounted=total.plain_reward)
        active = active & ~(total.terminated | total.truncated)
        discount, later = 1.0, self._gamma**self.inner.steps_per_action
        for index in range(1, self.horizon):
            if not bool(active.any()):
                break
            discount *= later
            total, active = self._merge(total, self.inner.advance(plan[:, index], active), active, discount)
        return total

    def plan(self, action: Tensor) -> Tensor:
        """The actions ``[K, h, a]`` of a decision."""
        return action.reshape(self.num_envs, self.horizon, self._action_dim)

    @staticmethod
    def _merge(total: StepResult, step: StepResult, active: Tensor, discount: float) -> tuple[StepResult, Tensor]:
        successor = torch.where(active.unsqueeze(-1), step.next_observation, total.next_observation)
        none = torch.zeros_like(step.reward)
        merged = StepResult(
            successor,
            total.reward + torch.where(active, discount * step.reward, none),
            torch.where(active, step.terminated, total.terminated),
            torch.where(active, step.truncated, total.truncated),
            successor,
            total.executed + torch.where(active, step.executed, torch.zeros_like(step.executed)),
            _merged_infos(total.info, step.info, active),
            total.plain_reward + torch.where(active, step.plain_reward, none),
        )
        return merged, active & ~(step.terminated | step.truncated)

    @property
    def gamma(self) -> float:
        """Discount of a step."""
        return self._gamma


def _merged_infos(old: dict[str, Tensor], new: dict[str, Tensor], active: Tensor) -> dict[str, Tensor]:
    """Infos of the last executed step of each simulation; NaN where that step told none of the name."""
    none = torch.full(active.shape, math.nan)
    if old.keys() == new.keys():  # keeps the dtype
        return {key: torch.where(active, value, old[key]) for key, value in new.items()}
    return {
        key: torch.where(active, new.get(key, none).float(), old.get(key, none).float())
        for key in dict.fromkeys([*old, *new])
    }
