"""Control environments: batched MuJoCo, MJCF files of your own, the two-route task, any Gymnasium id."""

from unified_rl.envs.control.base import ControlEnvBase
from unified_rl.envs.control.chunk import ActionChunk
from unified_rl.envs.control.gymnasium_env import GymnasiumEnv
from unified_rl.envs.control.mjcf import make_mjcf
from unified_rl.envs.control.mujoco_env import TASKS, BatchedMujocoEnv, make_mujoco
from unified_rl.envs.control.two_route import TwoRouteEnv

__all__ = [
    "TASKS",
    "ActionChunk",
    "BatchedMujocoEnv",
    "ControlEnvBase",
    "GymnasiumEnv",
    "TwoRouteEnv",
    "make_mjcf",
    "make_mujoco",
]
