"""Control environments: batched MuJoCo, the two-route task, mazes, any Gymnasium id."""

from unified_rl.envs.control.base import ControlEnvBase
from unified_rl.envs.control.chunk import ActionChunk
from unified_rl.envs.control.gymnasium_env import GymnasiumEnv
from unified_rl.envs.control.mujoco_env import TASKS, BatchedMujocoEnv, make_mujoco
from unified_rl.envs.control.point_maze import PointMazeEnv
from unified_rl.envs.control.two_route import TwoRouteEnv
from unified_rl.envs.control.wrappers import ActionRepeat, FrameStack

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
    "make_mujoco",
]
