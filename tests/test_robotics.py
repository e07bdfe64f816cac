"""The usual robot suites through Gymnasium, where they are installed with a MuJoCo that runs them (docs/robot.md)."""

from __future__ import annotations

import mujoco
import pytest
import torch

from unified_rl.envs.control import GymnasiumEnv
from unified_rl.instantiate import allowing
from unified_rl.policies.gaussian import GaussianPolicy
from unified_rl.spaces import DictSpace

VERSION = tuple(map(int, mujoco.__version__.split(".")[:2]))
RUNS = pytest.mark.skipif(VERSION > (3, 10), reason="gymnasium-robotics 1.4.2 does not run with this MuJoCo")


@RUNS
@pytest.mark.parametrize(
    ("id", "width", "is_goal"),
    [("FetchReach-v4", 16, True), ("PointMaze_UMaze-v3", 8, True), ("AdroitHandDoor-v1", 39, False)],
)
def test_gymnasium_robotics_runs_and_can_be_put_back(id: str, width: int, is_goal: bool) -> None:
    pytest.importorskip("gymnasium_robotics")
    with allowing(["gymnasium_robotics"]):
        env = GymnasiumEnv(f"gymnasium_robotics:{id}", num_envs=2, max_episode_steps=4)
    assert env.current_observation().shape == (2, width)
    assert (isinstance(env.space.observation, DictSpace) and env.space.observation.is_goal) == is_goal
    policy = GaussianPolicy(env.space)
    for _ in range(4):
        step = env.step_batch(policy.sample(env.current_observation(), torch.Generator().manual_seed(0))["action"])
    assert step.truncated.all() and "success" in step.info
    assert env.resumable() in (True, False)


def test_dm_control_runs_through_shimmy() -> None:
    pytest.importorskip("dm_control")
    pytest.importorskip("shimmy")
    with allowing(["shimmy"]):
        env = GymnasiumEnv("shimmy:dm_control/cartpole-balance-v0", num_envs=2, max_episode_steps=3)
    assert env.current_observation().shape == (2, 5) and env.space.action.width == 1
    steps = [env.step_batch(torch.zeros(2, 1)) for _ in range(3)]
    assert steps[2].truncated.all() and float(steps[0].reward.min()) > 0.5
