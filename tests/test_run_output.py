"""What a run says in words while it begins and while it goes on."""

from __future__ import annotations

from pathlib import Path

import pytest
from run_cases import ALLOW, CONTROL, LANGUAGE, composed, merged

import unified_rl as ur
from unified_rl.training.run import resume, train


def small(base: tuple[str, ...], folder: Path, *more: str) -> Path:
    steps = ("steps=32", "log_every=16") if base is LANGUAGE else ("steps=64",)
    return train(composed(merged(base, [*steps, "eval_episodes=2", f"run_dir={folder}"], more)), ALLOW)


@pytest.mark.parametrize("base", [CONTROL, LANGUAGE], ids=["control", "language"])
def test_a_learning_rate_of_0_is_said_once_and_nothing_else_changes(
    base: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = small(base, tmp_path / "null", "agent.lr=0")
    said = capsys.readouterr().err
    assert said.count("agent.lr=0: this run learns nothing (a null control)") == 1
    assert ur.Run(run).metrics()[-1]["update"] >= 1
    small(base, tmp_path / "plain")
    assert "learns nothing" not in capsys.readouterr().err


def test_a_learning_rate_of_0_is_said_of_assembled_runs_and_again_where_one_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = small(CONTROL, tmp_path / "null", "agent=ppo", "agent.lr=0")
    assert "learns nothing" in capsys.readouterr().err
    resume(str(run), steps=128)
    assert capsys.readouterr().err.count("learns nothing") == 1
    ur.assemble("two_route", agent={"name": "ppo", "lr": 0.0}, steps=64, progress=False)
    assert capsys.readouterr().err.count("learns nothing") == 1
    warm = ("warm_start=demonstrations", "warm_start.stages=[{updates: 1}]", "warm_start.dataset=8")
    small(CONTROL, tmp_path / "warm", "agent.lr=0", "steps=0", *warm)
    assert "learns nothing" not in capsys.readouterr().err
