"""The page on robots: every command of its section on data runs, in small, in the order of the page."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from docs_cases import blocks, commands
from test_robot_data import demonstration, lerobot, minari_set

import unified_rl as ur
from unified_rl import cli
from unified_rl.replay import read_rows

SECTIONS = ("Data", "Importing", "Checking", "Making")
TRAIN = {"steps": "32", "eval_episodes": "1", "eval_every": "0", "progress": "false", "policy.hidden": "[8]"}
OFFLINE = {"agent.critic_hidden": "[8]", "agent.batch_size": "8", "agent.learning_starts": "8"}
ROBOTS = ("hopper", "inverted_pendulum")
"""The page says hopper where a set is made; the run whose policy acts here is the pendulum's."""


ARM = {"joints": "observation", "torques": "action"}


def small(words: list[str], number: int) -> list[str]:
    """A command of the page with the sizes of a test."""
    if words[0] == "data":
        words = [word.replace(*ROBOTS) if word == ROBOTS[0] else word for word in words]
        return ["32" if word == "100000" else word for word in words]
    given = dict(word.split("=", 1) for word in words[1:])
    sizes = TRAIN | ({} if given.get("agent") == "behavior_cloning" else OFFLINE)
    sizes |= {"rollout.rows": "16"} if "rollout.data" in given else {"rollout.random_steps": "8"}
    run = "runs/NAME" if given.get("agent") == "behavior_cloning" else f"runs/{number}"
    best = {"keep_best": "eval/score"} if run == "runs/NAME" else {}
    return ["train", *(f"{key}={value}" for key, value in {**given, **sizes, **best, "run_dir": run}.items())]


def test_every_command_on_data_runs(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    h5py = pytest.importorskip("h5py")
    monkeypatch.chdir(tmp_path)
    ur.data("make", "inverted_pendulum", "random", "seen", steps=160)
    rows = {key: value.numpy() for key, value in read_rows("seen").items()}
    columns = {"observations": "observation", "actions": "action", "rewards": "reward", "terminals": "terminated"}
    np.savez("demos.npz", episode_ids=rows["episode"], **{name: rows[key] for name, key in columns.items()})
    np.savez(
        "own.npz", torques=rows["action"], joints=rows["observation"], goal=rows["reward"], ended=rows["truncated"]
    )
    arms = {f"{arm}_{what}": rows[key] for arm in ("left", "right") for what, key in ARM.items()}
    np.savez("arms.npz", rewards=rows["reward"], dones=rows["truncated"], **arms)
    with h5py.File("demos.hdf5", "w") as file:
        demonstration(file.create_group("data/demo_0"), 3, 0.0)
        file["data/demo_0/obs/gripper"] = np.zeros((3, 1))
        file["data/demo_0/next_obs/gripper"] = np.zeros((3, 1))
        file["mask/train"] = np.array([b"demo_0"])
    for name in ("minari_set", "lerobot_set"):
        (tmp_path / name).mkdir()
    spaces = pytest.importorskip("gymnasium").spaces
    inside = {"place": spaces.Box(-np.inf, np.inf, (2,), np.float32), "mode": spaces.Discrete(3)}
    minari_set(tmp_path / "minari_set", observation_space=spaces.Dict(inside), action_space=spaces.Discrete(9))
    lerobot(tmp_path / "lerobot_set", "v3.0")
    page = blocks(source / "docs" / "robot.md")
    found = [words for b in page if b.language == "bash" and b.section in SECTIONS for words in commands(b.text)]
    assert len(found) == 15 and {words[0] for words in found} == {"data", "train"}
    for number, words in enumerate(found):
        assert cli.main(small(words, number)) == 0, (words, capsys.readouterr().err)
    assert (tmp_path / "returns.png").is_file() and read_rows("own_rows")["observation"].shape[-1] == 5
    assert read_rows("arm_rows")["action"].shape[-1] == 2
    assert json.loads((tmp_path / "hopper_expert" / "dataset.json").read_text())["checkpoint"] == "best"
    assert len(read_rows("hopper_mixed")) == 64
