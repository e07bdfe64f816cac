"""Goals of a Gymnasium environment: where they lie in its flat observation, and what reaching them is worth."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium.spaces.utils import flatdim
from torch import Tensor

from unified_rl.protocols import Goals

NAMES = ("achieved_goal", "desired_goal")


def goals_of(env: Any) -> Goals | None:
    """Of an environment that observes ``achieved_goal`` and ``desired_goal`` and has ``compute_reward``.

    Args:
        env: wrapped as it is used; it observes the dictionary, or what ``FlattenObservation`` makes of it.

    Returns:
        None where it has no goals, or is no such environment.
    """
    inside = env.unwrapped
    while not isinstance(env.observation_space, gymnasium.spaces.Dict) and isinstance(env, gymnasium.Wrapper):
        flat = isinstance(env, gymnasium.wrappers.FlattenObservation)
        if not flat and env.observation_space != env.env.observation_space:
            return None
        env = env.env
    space = env.observation_space
    if not isinstance(space, gymnasium.spaces.Dict) or not set(NAMES) <= set(space.spaces):
        return None
    if not callable(getattr(inside, "compute_reward", None)):
        return None
    at, places = 0, {}
    for name, part in space.spaces.items():
        places[name] = torch.arange(at, at + flatdim(part))
        at += flatdim(part)
    ends = _asked(inside, "compute_terminated", torch.bool) if hasattr(inside, "compute_terminated") else None
    return Goals(places[NAMES[0]], places[NAMES[1]], _asked(inside, "compute_reward", torch.float32), ends)


def _asked(env: Any, name: str, dtype: torch.dtype) -> Any:
    """``(achieved [N, g], desired [N, g]) -> [N]`` by the environment's own function of arrays, without infos."""

    def ask(achieved: Tensor, desired: Tensor) -> Tensor:
        found = getattr(env, name)(achieved.cpu().numpy(), desired.cpu().numpy(), {})
        if np.ndim(found) == 0 and len(achieved) != 1:  # it takes one row, and reduced all of them to one answer
            rows = zip(achieved.cpu().numpy(), desired.cpu().numpy(), strict=True)
            found = [getattr(env, name)(one, other, {}) for one, other in rows]
        return torch.as_tensor(np.asarray(found)).to(dtype).reshape(len(achieved))

    return ask
