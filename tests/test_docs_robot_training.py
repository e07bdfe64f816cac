"""The page on robots: every command of its section on training runs, in small, in the order of the page."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from docs_cases import blocks, commands

import unified_rl as ur
from unified_rl import cli

SECTIONS = ("From demonstrations to reinforcement", "Histories and plans", "Goals", "Sweeps")
SMALL = {"policy.hidden": "[8]", "steps": "32", "updates": "2", "eval_episodes": "1", "eval_every": "0"}
CRITIC = {"agent.critic_hidden": "[8]", "rollout.num_envs": "2", "rollout.horizon": "4"}
OFF_POLICY = {"agent.batch_size": "8", "agent.learning_starts": "8", "agent.updates_per_step": "0.25",
              "rollout.random_steps": "0"}  # fmt: skip
ROBOT = """
import gymnasium
import numpy as np


class Reach(gymnasium.Env):
    def __init__(self):
        box = gymnasium.spaces.Box(-9.0, 9.0, (1,), np.float32)
        names = ("observation", "achieved_goal", "desired_goal")
        self.observation_space = gymnasium.spaces.Dict({name: box for name in names})
        self.action_space = gymnasium.spaces.Box(-1.0, 1.0, (1,), np.float32)

    def compute_reward(self, achieved, desired, info):
        return -(np.abs(achieved - desired)[..., 0] > 0.1).astype(np.float32)

    def seen(self):
        return {"observation": self.x.copy(), "achieved_goal": self.x.copy(), "desired_goal": self.goal.copy()}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.x, self.goal = np.zeros(1, np.float32), self.np_random.uniform(-1, 1, 1).astype(np.float32)
        return self.seen(), {}

    def step(self, action):
        self.x = (self.x + 0.2 * action).astype(np.float32)
        return self.seen(), float(self.compute_reward(self.x, self.goal, {})), False, False, {}


gymnasium.register("Reach-v0", entry_point=Reach, max_episode_steps=6)
"""


def small(words: list[str]) -> list[str]:
    """A command of the page with the sizes of a test."""
    options = [word for word in words if "=" not in word and word != "train" and not word.isdigit()]
    given = dict(word.split("=", 1) for word in words if "=" in word)
    given = {**given, **{key: value for key, value in SMALL.items() if key in given or key.split("_")[0] == "eval"}}
    given["policy.hidden"] = SMALL["policy.hidden"]
    given["steps" if "updates" not in given else "updates"] = "32" if "updates" not in given else "2"
    if given["agent"] == "behavior_cloning":
        given["rollout.rows"] = "16"
    else:
        given |= CRITIC | (OFF_POLICY if given["agent"] == "sac" else {})
    allowed = [words[words.index("--allow") + 1]] if "--allow" in words else []
    if "-m" in options:
        given |= {"agent.lr": "1e-3,3e-4", "seed": "1", "env": "hopper"}
    rest = [*options, *(["--workers", "0"] if "--workers" in options else [])]
    flags = [flag for flag in rest if flag not in ("--workers", "--allow", *allowed)]
    flags = [flag for flag in flags if flag != "0"] + (["--workers", "0"] if "--workers" in options else [])
    where = [word for name in allowed for word in ("--allow", name)]
    return ["train", *where, *flags, *(f"{key}={value}" for key, value in given.items()), "progress=false"]


def test_every_command_on_training_runs(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "my_robot.py").write_text(ROBOT)
    ur.data("make", "hopper", "random", "with_rewards", steps=160)
    from unified_rl.replay import Replay, Uniform, read_rows

    rows = read_rows("with_rewards")
    replay = Replay(160, sampler=Uniform())
    replay.extend(rows.reshape(160).select("observation", "action", "episode", "step"))
    replay.dumps("my_rows")
    page = blocks(source / "docs" / "robot.md")
    found = [words for block in page if block.section in SECTIONS for words in commands(block.text)]
    assert len(found) == 6
    for words in found:
        assert cli.main(small(words)) == 0, words
    first = json.loads((tmp_path / "runs" / "CLONE" / "metrics.jsonl").read_text().splitlines()[0])
    assert "eval/nll" in first
    assert ur.load_policy("runs/CLONE", "best").space.action.shape == (3,)
