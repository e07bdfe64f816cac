"""What a run says in words while it begins and while it goes on."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from run_cases import ALLOW, CONTROL, LANGUAGE, composed, merged

import unified_rl as ur
from unified_rl.errors import ConfigError
from unified_rl.training.display import Display, Lines, make_display
from unified_rl.training.run import resume, train


def small(base: tuple[str, ...], folder: Path, *more: str, progress: bool = False) -> Path:
    steps = ("steps=32", "log_every=16") if base is LANGUAGE else ("steps=64",)
    return train(
        composed(merged(base, [*steps, "eval_episodes=2", f"run_dir={folder}"], more)), ALLOW, progress=progress
    )


@pytest.mark.parametrize("base", [CONTROL, LANGUAGE], ids=["control", "language"])
def test_a_learning_rate_of_0_is_said_once_and_nothing_else_changes(
    base: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = small(base, tmp_path / "null", "agent.lr=0")
    said = capsys.readouterr().err
    assert said.count("agent.lr=0: the policy learns nothing (a null control)") == 1
    assert ur.Run(run).metrics()[-1]["update"] >= 1
    small(base, tmp_path / "plain")
    assert "policy learns nothing" not in capsys.readouterr().err


def test_a_learning_rate_of_0_is_said_of_assembled_runs_and_again_where_one_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = small(CONTROL, tmp_path / "null", "agent=ppo", "agent.lr=0")
    assert "policy learns nothing" in capsys.readouterr().err
    resume(str(run), steps=128)
    assert capsys.readouterr().err.count("learns nothing") == 1
    ur.assemble("two_route", agent={"name": "ppo", "lr": 0.0}, steps=64, progress=False)
    assert capsys.readouterr().err.count("learns nothing") == 1
    warm = ("warm_start=demonstrations", "warm_start.stages=[{updates: 1}]", "warm_start.dataset=8")
    small(CONTROL, tmp_path / "warm", "agent.lr=0", "steps=0", *warm)
    assert "policy learns nothing" not in capsys.readouterr().err


def test_a_run_that_is_refused_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for more in ("keep_best=rollout/rewrad", "epochs=1", "rollout=control"):
        with pytest.raises(ConfigError):
            train(composed([*LANGUAGE[:-2], more]), ALLOW)
    assert not any((tmp_path / "runs").iterdir())
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("kept")
    for place in ("mine", "new/deep"):
        with pytest.raises(ConfigError, match="rewrad"):
            small(LANGUAGE, tmp_path / place, "keep_best=rollout/rewrad")
    assert (tmp_path / "mine" / "notes.txt").read_text() == "kept" and not (tmp_path / "new" / "deep").exists()


def test_what_was_trained_before_a_refusal_stays_to_be_looked_at(tmp_path: Path) -> None:
    stages = ("warm_start=demonstrations", "warm_start.dataset=8", "warm_start.stages=[{updates: 2, until_loss: 1e-9}]")
    with pytest.raises(ConfigError, match="above until_loss"):
        small(CONTROL, tmp_path / "warm", *stages)
    assert "above until_loss" in (tmp_path / "warm" / "meta.json").read_text()
    with pytest.raises(ConfigError, match="did you mean 'rollout/return'"):  # known from the first evaluation
        small(CONTROL, tmp_path / "evaluated", "keep_best=rollout/retrun")
    assert (tmp_path / "evaluated" / "metrics.jsonl").stat().st_size > 0


EVERY = ("eval_every=128", "log_every=128", "steps=256")


def test_without_a_terminal_every_logged_row_is_one_line_on_standard_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = small(CONTROL, tmp_path / "run", *EVERY, progress=True)
    said = capsys.readouterr()
    lines = said.err.splitlines()
    assert said.out == "" and len(lines) == len(ur.Run(run).metrics()) == 3
    assert re.fullmatch(r"update 0/2  steps 0/256  eval score -?[\d.e-]+", lines[0])
    number = r"-?[\d.e-]+"
    last = rf"update 2/2  steps 256/256  return {number}  loss {number}  eval score {number}  left 0:00:00"
    assert re.fullmatch(last, lines[2]) and "left 0:00:0" in lines[1]
    small(CONTROL, tmp_path / "quiet", *EVERY)
    assert capsys.readouterr().err == ""


def test_a_resumed_run_and_a_warm_start_are_told_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    warm = ("warm_start=demonstrations", "warm_start.stages=[{updates: 3}]", "warm_start.dataset=8")
    run = small(CONTROL, tmp_path / "run", *EVERY, *warm, progress=True)
    assert re.match(r"warm start 1  step 1/3  loss -?[\d.]+\nupdate 0/2", capsys.readouterr().err)
    resume(str(run), steps=384, progress=True)
    assert capsys.readouterr().err.splitlines()[-1].startswith("update 3/3  steps 38")


def test_a_terminal_has_a_bar_and_no_lines(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert isinstance(make_display("run"), Lines)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    display = make_display("run")
    assert isinstance(display, Display)
    with display:
        display.update(4, {"eval/score": 0.5})
    assert capsys.readouterr().err == ""


def test_lines_are_flushed_at_once_and_a_log_that_is_gone_stops_nothing() -> None:
    code = (
        "import os, sys; from unified_rl.training.display import Lines; lines = Lines(); lines.update(1, {}); "
        "os.write(2, b'behind\\n'); sys.stderr.close(); lines.update(2, {})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stderr == "steps 1/0\nbehind\n"
