"""The usual robot suites through Gymnasium, where they are installed with a MuJoCo that runs them (docs/robot.md).

``make robotics`` makes such an environment and runs this file in it; there nothing may be missing.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
from pathlib import Path

import mujoco
import pytest
import torch

import unified_rl as ur
from unified_rl.envs.control import GymnasiumEnv
from unified_rl.instantiate import allowing
from unified_rl.policies.gaussian import GaussianPolicy
from unified_rl.spaces import DictSpace

REQUIRED = bool(os.environ.get("UNIFIED_RL_ROBOTICS"))
VERSION = tuple(map(int, mujoco.__version__.split(".")[:2]))
ROBOTICS = pytest.mark.skipif(
    not REQUIRED and (VERSION > (3, 10) or importlib.util.find_spec("gymnasium_robotics") is None),
    reason="gymnasium-robotics 1.4.2 with a MuJoCo that it runs with is not installed: make robotics",
)
CONTROL = pytest.mark.skipif(
    not REQUIRED and any(importlib.util.find_spec(name) is None for name in ("dm_control", "shimmy")),
    reason="dm_control and shimmy are not installed: make robotics",
)
PPO = {"agent": "ppo", "rollout.horizon": 64, "updates": 2}
HER = {
    "agent": "sac",
    "replay": "her",
    "env.flatten": True,
    "agent.learning_starts": 100,
    "agent.batch_size": 32,
    "rollout.random_steps": 100,
    "steps": 120,
}
TASKS = {
    "FetchReach": ("gymnasium_robotics:FetchReach-v4", HER),
    "PointMaze": ("gymnasium_robotics:PointMaze_UMaze-v3", PPO),
    "PointMaze with HER": ("gymnasium_robotics:PointMaze_UMaze-v3", HER),
    "Adroit": ("gymnasium_robotics:AdroitHandDoor-v1", PPO),
    "dm_control": ("shimmy:dm_control/cartpole-balance-v0", {**PPO, "env.max_episode_steps": 50}),
}


@ROBOTICS
@pytest.mark.parametrize(
    ("id", "width", "is_goal"),
    [("FetchReach-v4", 16, True), ("PointMaze_UMaze-v3", 8, True), ("AdroitHandDoor-v1", 39, False)],
)
def test_gymnasium_robotics_runs_and_can_be_put_back(id: str, width: int, is_goal: bool) -> None:
    with allowing(["gymnasium_robotics"]):
        env = GymnasiumEnv(f"gymnasium_robotics:{id}", num_envs=2, max_episode_steps=4)
    assert env.current_observation().shape == (2, width)
    assert (isinstance(env.space.observation, DictSpace) and env.space.observation.is_goal) == is_goal
    policy = GaussianPolicy(env.space)
    for _ in range(4):
        step = env.step_batch(policy.sample(env.current_observation(), torch.Generator().manual_seed(0))["action"])
    assert step.truncated.all() and "success" in step.info
    assert env.resumable() in (True, False)


@CONTROL
def test_dm_control_runs_through_shimmy() -> None:
    with allowing(["shimmy"]):
        env = GymnasiumEnv("shimmy:dm_control/cartpole-balance-v0", num_envs=2, max_episode_steps=3)
    assert env.current_observation().shape == (2, 5) and env.space.action.width == 1
    steps = [env.step_batch(torch.zeros(2, 1)) for _ in range(3)]
    assert steps[2].truncated.all() and float(steps[0].reward.min()) > 0.5


@pytest.mark.parametrize("name", [pytest.param(k, marks=CONTROL if k == "dm_control" else ROBOTICS) for k in TASKS])
def test_it_trains(name: str, tmp_path: Path) -> None:
    id, options = TASKS[name]
    small = {"policy.hidden": [16], "agent.critic_hidden": [16], "rollout.num_envs": 2, "eval_episodes": 2}
    words = {"env": "gymnasium", "env.id": id, "run_dir": str(tmp_path / "run"), "progress": False, "log_every": 1}
    ur.train({**words, **small, **options}, allow=[id.partition(":")[0]])
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    learned = [row for row in rows if math.isfinite(row.get("grad/norm", row.get("loss/critic", math.nan)))]
    assert len(learned) >= 2, rows[-1]
    assert math.isfinite(rows[-1]["eval/return"])
    assert ("eval/success" in rows[-1]) == (name != "dm_control")
    policy = ur.load_policy(tmp_path / "run")
    assert policy.space.action.width == {"FetchReach": 4, "Adroit": 28, "dm_control": 1}.get(name, 2)
