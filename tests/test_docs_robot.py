"""The page on robots: the commands and snippets of these sections run in their order."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from docs_cases import blocks, commands

import unified_rl as ur
from unified_rl.cli import main

SECTIONS = ("Look at it", "Leave with it")
SMALL = ["env=two_route", "env.max_steps=8", "policy=flow", "policy.steps=2", "policy.hidden=[8]", "agent=ppo",
         "agent.critic_hidden=[8]", "rollout.num_envs=2", "rollout.horizon=8", "steps=32", "eval_episodes=2",
         "keep_best=eval/score", "progress=false"]  # fmt: skip


def test_make_installs_the_versions_that_the_page_names(source: Path) -> None:
    line = re.search(r"^ROBOTICS := (.+)$", (source / "Makefile").read_text(), re.MULTILINE)
    assert line and len(line[1].split()) == 4
    page = (source / "docs" / "robot.md").read_text()
    assert all(f'"{version}"' in page for version in line[1].split())


def test_everything_under_look_and_leave_runs(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = [block for block in blocks(source / "docs" / "robot.md") if block.section in SECTIONS]
    monkeypatch.chdir(tmp_path)
    run = str(ur.train([*SMALL, "run_dir=runs/NAME"]))
    asked = {".onnx": ("onnx", "onnxscript", "onnxruntime"), ".mp4": ("imageio_ffmpeg",)}
    acted, files = 0, []
    for block in page:
        missing = [ending for ending, needs in asked.items() if ending in block.text and not _installed(needs)]
        for words in commands(block.text):
            if not any(ending in " ".join(words) for ending in missing):
                assert main(words) == 0, words
                files += [word for word in words if word.startswith(("out.", "policy."))]
        if block.language == "python" and not missing:
            space: dict[str, Any] = {}
            exec(block.text, space)
            expected = ur.load_policy(run, "best" if ".onnx" in block.text else None)(np.zeros(4))
            np.testing.assert_allclose(np.asarray(space["action"]).reshape(4, 2), expected, atol=1e-5)
            acted += 1
    assert acted >= 2 and {"out.gif", "out.png", "policy.pt2"} <= set(files)
    assert all((tmp_path / file).stat().st_size > 0 for file in files)


def test_the_arm_of_environments_trains(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(source / "examples" / "arm", tmp_path / "arm")
    monkeypatch.chdir(tmp_path / "arm")
    monkeypatch.syspath_prepend(tmp_path / "arm")
    small = ["rollout.num_envs=2", "rollout.horizon=16", "agent.minibatch=16", "agent.epochs=1", "policy.hidden=[8]",
             "agent.critic_hidden=[8]", "eval_episodes=2", "progress=false"]  # fmt: skip
    page = blocks(source / "docs" / "robot.md")
    called = [words for block in page if block.section == "An arm from an MJCF file" for words in commands(block.text)]
    for words in called:
        if words[0] == "train":
            words = [word for word in words if not word.startswith("steps=")] + ["steps=32", *small]
        assert main(words) == 0, words
    assert [words[0] for words in called] == ["train", "train", "evaluate"]
    assert (tmp_path / "arm" / "runs" / "arm" / "checkpoints").is_dir()


WAY = {"train": ["rollout.num_envs=2", "rollout.horizon=8", "policy.hidden=[8]", "eval_episodes=2", "progress=false"]}
LEARNT = ["agent.critic_hidden=[8]", "agent.minibatch=16", "agent.epochs=1"]


def shortened(words: list[str]) -> list[str]:
    """A command of the whole way with the sizes of a test."""
    words = ["64" if word == "20000" else word for word in words]
    kept = [word for word in words if not word.startswith(("steps=", "updates="))]
    if words[0] != "train":
        return words
    cloned = "agent=behavior_cloning" in words
    own = [word for word in WAY["train"] if not (cloned and word.startswith("rollout."))]
    return kept + own + (["rollout.rows=16", "updates=2"] if cloned else ["steps=32", *LEARNT])


def test_the_whole_way_of_the_arm(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(source / "examples" / "arm", tmp_path / "arm")
    monkeypatch.chdir(tmp_path / "arm")
    monkeypatch.syspath_prepend(tmp_path / "arm")
    page = blocks(source / "docs" / "robot.md")
    called = [words for block in page if block.section == "The whole way" for words in commands(block.text)]
    for words in called:
        code = main(shortened(words))
        said = capsys.readouterr().err
        assert code == 0 or ("--video" in words and "no offscreen renderer" in said), (words, said)
    assert [words[0] for words in called] == ["train", "data", "data", "train", "train", "evaluate", "export"]
    policy = ur.load_policy("runs/tuned")
    seen = np.zeros((3, *policy.space.observation.shape), np.float32)
    act = torch.export.load("arm.pt2").module()
    np.testing.assert_allclose(act(torch.from_numpy(seen)).detach().numpy(), policy(seen), atol=1e-5)


ROBOTS = """
import gymnasium
import numpy as np
class Reach(gymnasium.Env):
    observation_space, action_space = gymnasium.spaces.Box(-9, 9, (2,)), gymnasium.spaces.Box(-1, 1, (1,))
    def __init__(self, size: int = 1): self.size = size
    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.np_random.random(2, np.float32) * self.size, {}
    def step(self, action): return np.zeros(2, np.float32), float(action[0]), False, False, {}
def make_reach(size: int): return gymnasium.wrappers.TimeLimit(Reach(size), 4)
def make_many(num_envs: int, size: int): return gymnasium.vector.SyncVectorEnv([lambda: make_reach(size)] * num_envs)
gymnasium.register("Reach-v0", entry_point=Reach, max_episode_steps=4)
"""


def test_environments_of_gymnasium_train(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_robots.py").write_text(ROBOTS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    page = [block for block in blocks(source / "docs" / "robot.md") if block.section.startswith("An environment of G")]
    called = [words for block in page for words in commands(block.text)]
    small = ["rollout.num_envs=2", "rollout.horizon=8", "agent.minibatch=16", "agent.epochs=1", "policy.hidden=[8]",
             "agent.critic_hidden=[8]", "eval_episodes=2", "progress=false", "steps=16"]  # fmt: skip
    for number, words in enumerate(called):
        assert main([*words, *small, f"run_dir=runs/{number}"]) == 0, words
    assert len(called) == len(list((tmp_path / "runs").iterdir())) == 4


def _installed(packages: tuple[str, ...]) -> bool:
    try:
        return all(__import__(package) for package in packages)
    except ImportError:
        return False
