"""The rules of an arm with two motors that reaches for a goal: functions of all simulations at once.

``state`` holds arrays with one row a simulation (:class:`unified_rl.envs.control.mjcf.State`).
"""

from __future__ import annotations

from typing import Any

import numpy as np

NEAR = 0.06
"""Metres between tip and goal below which the goal is reached."""


def offset(state: Any) -> np.ndarray:
    """From the tip to the goal, ``[K, 2]`` metres."""
    return (state.body("goal") - state.site("tip"))[:, :2]


def distance(state: Any) -> np.ndarray:
    """Between tip and goal, ``[K]`` metres."""
    return np.linalg.norm(offset(state), axis=1)


def observation(state: Any) -> np.ndarray:
    """Angles as sine and cosine, joint velocities, the goal and the way to it, ``[K, 10]``."""
    angles, speeds = state.qpos[:, :2], state.qvel[:, :2]
    goal = state.body("goal")[:, :2]
    return np.concatenate([np.sin(angles), np.cos(angles), speeds, goal, offset(state)], axis=1)


def reward(state: Any, action: np.ndarray, before: Any) -> np.ndarray:
    """Metres that the tip came closer, a price of time and effort, and 1 for the goal, ``[K]``."""
    closer = distance(before) - distance(state)
    return 5.0 * closer - 0.02 - 0.001 * np.square(action).sum(1) + reached(state)


def reached(state: Any) -> np.ndarray:
    """Ends an episode, ``[K]`` bool."""
    return distance(state) < NEAR


def metrics(state: Any) -> dict[str, np.ndarray]:
    """Told of every episode's last step, as ``eval/success`` and ``eval/distance``."""
    return {"success": reached(state), "distance": distance(state)}


def initial(model: Any, rng: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
    """A bent arm at rest, and a goal in front of it: ``qpos [count, 4]``, ``qvel [count, 4]``."""
    angles = np.array([-0.8, 1.6]) + rng.uniform(-0.3, 0.3, (count, 2))
    radius, direction = rng.uniform(0.2, 0.45, count), rng.uniform(-1.2, 1.2, count)
    goal = radius[:, None] * np.stack((np.cos(direction), np.sin(direction)), axis=1)
    return np.concatenate([angles, goal], axis=1), np.zeros((count, 4))
