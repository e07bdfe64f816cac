"""examples/data_sets.py: one command from a task to its random, medium, expert and mixed sets."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch

import unified_rl as ur
from unified_rl.replay import read_rows

TINY = ["--steps", "192", "--rows", "320", "policy.hidden=[8]", "agent.critic_hidden=[8]", "agent.minibatch=32",
        "rollout.num_envs=2", "rollout.horizon=16", "eval_episodes=2", "progress=false"]  # fmt: skip


@pytest.fixture
def example(source: Path) -> dict[str, Any]:
    return runpy.run_path(str(source / "examples" / "data_sets.py"), run_name="data_sets")


@pytest.mark.parametrize(("env", "more"), [("inverted_pendulum", []), ("point_maze", ["env.maze=open"])])
def test_one_command_makes_four_sets(env: str, more: list[str], example: dict[str, Any], tmp_path: Path) -> None:
    example["main"].__globals__["EVALUATIONS"] = 3
    returns = example["main"]([env, str(tmp_path), *TINY, *more])
    assert list(returns) == ["random", "medium", "expert", "mixed"]
    made = {kind: tmp_path / f"{env}_{kind}" for kind in returns}
    rows = {kind: read_rows(folder) for kind, folder in made.items()}
    assert {kind: len(found) for kind, found in rows.items()} == {
        "random": 320,
        "medium": 320,
        "expert": 320,
        "mixed": 960,
    }
    about = {kind: json.loads((folder / "dataset.json").read_text()) for kind, folder in made.items()}
    assert about["medium"]["checkpoint"] <= about["expert"]["checkpoint"]
    settings = {word.split("=")[0]: word.split("=")[1] for word in more}
    for folder in made.values():
        assert ur.data("check", folder, env=env, **settings)["fits"]
    assert not torch.equal(rows["random"]["action"], rows["expert"]["action"])


def test_medium_is_a_third_of_the_way(example: dict[str, Any]) -> None:
    returns = {5: 12.0, 10: 39.0, 15: 40.0, 20: 100.0, 25: 70.0}
    assert example["chosen"](returns, 10.0) == {"medium": 15, "expert": 20}
    assert example["chosen"]({5: -50.0, 10: -20.0}, -60.0) == {"medium": 10, "expert": 10}
    assert example["chosen"]({5: -70.0}, float("nan")) == {"medium": 5, "expert": 5}
