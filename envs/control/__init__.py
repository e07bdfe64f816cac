"""Control environments: batched MuJoCo, MJCF files of your own, mazes, the two-route task, Gymnasium.

Parts are imported when first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from unified_rl.lazy import lazy

if TYPE_CHECKING:
    from unified_rl.envs.control.base import ControlEnvBase
    from unified_rl.envs.control.chunk import ActionChunk
    from unified_rl.envs.control.gymnasium_env import GymnasiumEnv
    from unified_rl.envs.control.mjcf import make_mjcf
    from unified_rl.envs.control.mujoco_env import TASKS, BatchedMujocoEnv, make_mujoco
    from unified_rl.envs.control.point_maze import PointMazeEnv
    from unified_rl.envs.control.two_route import TwoRouteEnv
    from unified_rl.envs.control.wrappers import ActionRepeat, FrameStack

_PLACES = {
    "TASKS": "mujoco_env",
    "ActionChunk": "chunk",
    "ActionRepeat": "wrappers",
    "BatchedMujocoEnv": "mujoco_env",
    "ControlEnvBase": "base",
    "FrameStack": "wrappers",
    "GymnasiumEnv": "gymnasium_env",
    "PointMazeEnv": "point_maze",
    "TwoRouteEnv": "two_route",
    "make_mjcf": "mjcf",
    "make_mujoco": "mujoco_env",
}
"""The module of each public name."""

__all__ = [
    "TASKS",
    "ActionChunk",
    "ActionRepeat",
    "BatchedMujocoEnv",
    "ControlEnvBase",
    "FrameStack",
    "GymnasiumEnv",
    "PointMazeEnv",
    "TwoRouteEnv",
    "make_mjcf",
    "make_mujoco",
]

__getattr__, __dir__ = lazy(__name__, {name: f"{__name__}.{module}" for name, module in _PLACES.items()})
