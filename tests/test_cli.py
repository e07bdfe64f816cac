"""The command line: what it prints, how it exits, what it hands over, and what it does not import."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from unified_rl import cli
from unified_rl.errors import CheckpointError

HEAVY = ("torch", "hydra", "omegaconf", "numpy", "tensordict", "rich", "transformers", "mujoco")
CONTROL = ["env=pendulum", "agent=ppo"]


def python(code: str, *argv: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Runs code in a fresh interpreter."""
    full = {**os.environ, **env}
    return subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, text=True, env=full, timeout=120)


@pytest.mark.parametrize(
    "argv",
    [["--help"], ["train", "--help"], ["compare", "--help"], ["evaluate", "--help"], ["corrections", "--help"]],
)
def test_help_imports_nothing_heavy(argv: list[str]) -> None:
    code = "import sys; from unified_rl.cli import main; rc = main()"
    code += f"; print([m for m in {HEAVY} if m in sys.modules]); sys.exit(rc)"
    done = python(code, *argv)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"


def test_help_takes_no_longer_than_a_few_bare_interpreters() -> None:
    def seconds(code: str, *argv: str) -> float:
        started = time.perf_counter()
        assert python(code, *argv).returncode == 0
        return time.perf_counter() - started

    bare, full = "import argparse, yaml", "from unified_rl.cli import main; main()"
    pairs = [(seconds(bare), seconds(full, "train", "--help")) for _ in range(5)]
    assert min(full for _, full in pairs) < 4 * min(bare for bare, _ in pairs)


def test_overview_names_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 0
    shown = capsys.readouterr().out
    assert all(verb in shown for verb in cli.VERBS)


def test_train_help_lists_groups_options_and_comments(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "env").mkdir()
    (tmp_path / "env" / "moon.yaml").write_text("# @package _global_\n# Land on the moon\nenv: null\n")
    assert cli.main(["train", "--config-dir", str(tmp_path), "--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "env=" in lines and "correction=" in lines and "resume=RUN" in "\n".join(lines)
    assert any(line.split() == ["moon", "Land", "on", "the", "moon"] for line in lines)
    assert any(line.strip().startswith("half_cheetah") and "HalfCheetah-v5" in line for line in lines)


def test_cfg_prints_the_resolved_configuration(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "--cfg", *CONTROL, "agent.lr=1e-3", "steps=2e3"]) == 0
    cfg = yaml.safe_load(capsys.readouterr().out)
    assert cfg["steps"] == 2000 and cfg["agent"]["lr"] == 1e-3 and cfg["choices"]["env"] == "pendulum"
    assert "gamma" in cfg["agent"] and cfg["seed"] == 0


def test_help_with_overrides_prints_their_keys(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", *CONTROL, "--help"]) == 0
    assert "lr" in yaml.safe_load(capsys.readouterr().out)["agent"]


def test_own_classes_need_allow_on_the_command_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "groups" / "agent").mkdir(parents=True)
    text = "# @package _global_\n# Mine\nagent: {_target_: my_agents.Mine, power: 3}\nallow: [my_agents]\n"
    (tmp_path / "groups" / "agent" / "mine.yaml").write_text(text.rsplit("allow", 1)[0])
    (tmp_path / "my_agents.py").write_text("class Mine:\n    def __init__(self, power: int, lr: float = 0.5): ...\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    argv = ["train", "env=pendulum", "agent=mine", "--config-dir", "groups", "--cfg"]
    assert cli.main(argv) == 2
    assert "--allow my_agents" in capsys.readouterr().err
    assert cli.main([*argv, "--allow", "my_agents"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["agent"] == {"_target_": "my_agents.Mine", "lr": 0.5, "power": 3}
    (tmp_path / "groups" / "agent" / "mine.yaml").write_text(text)
    assert cli.main(argv) == 2
    assert "--allow my_agents" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["trian"], "did you mean 'train'"),
        (["train", "agnt=sac"], "did you mean 'agent'"),
        (["train", "env=half_cheeta"], "did you mean 'half_cheetah'"),
        (["train", "seed=1", "seed=2"], "seed is given twice"),
        (["train", "resume=x", "seed=2"], "no other key but steps; remove seed"),
        (["train", "resume=x", "resume=y"], "twice"),
        (["train", "resume="], "run folder"),
        (["train", "resume=x", "steps=many"], "steps=many"),
        (["train", "resume=x", "steps=1.5"], "steps=1.5"),
        (["train", "resume=x", "--cfg"], "config.yaml"),
        (["evaluate"], "RUN"),
        (["compare"], "study"),
        (["compare", "study=quikstart"], "did you mean 'quickstart'"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    argv: list[str], words: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(cli.DEBUG, raising=False)
    assert cli.main(argv) == 2
    error = capsys.readouterr().err
    assert error.startswith("unified-rl: ") and error.count("\n") == 1 and words in error


def test_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(cli.DEBUG, "1")
    with pytest.raises(CheckpointError):
        cli.main(["train", "resume=/nowhere/at/all"])


def test_a_missing_run_is_one_clear_error(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(cli.DEBUG, raising=False)
    for argv in (["train", "resume=/nowhere/at/all"], ["evaluate", "/nowhere/at/all"]):
        assert cli.main(argv) == 2
        assert "/nowhere/at/all" in capsys.readouterr().err


def test_interrupt_exits_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(arguments: argparse.Namespace) -> int:
        raise KeyboardInterrupt

    monkeypatch.setitem(cli.VERBS, "doctor", interrupted)
    assert cli.main(["doctor"]) == 130


def test_an_unknown_option_exits_2() -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["train", "--allwo", "x"])
    assert caught.value.code == 2


def test_train_hands_over_the_resolved_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    import unified_rl.training.run as run

    seen: dict[str, Any] = {}
    monkeypatch.setattr(run, "train", lambda cfg, allow: seen.update(cfg=cfg, allow=allow))
    monkeypatch.setattr(run, "resume", lambda *given: seen.update(resumed=given))
    monkeypatch.setattr(run, "evaluate_run", lambda *given, **named: seen.update(evaluated=(given, named)))
    assert cli.main(["train", *CONTROL, "--allow", "mine", "seed=3"]) == 0
    assert seen["cfg"]["seed"] == 3 and seen["cfg"]["choices"]["env"] == "pendulum" and seen["allow"] == ["mine"]
    assert cli.main(["train", "resume=runs/a=b", "steps=2e4"]) == 0
    assert seen["resumed"] == ("runs/a=b", 20_000, [])
    assert cli.main(["evaluate", "runs/x", "--episodes", "7", "--checkpoint", "400", "--rows", "64"]) == 0
    assert seen["evaluated"] == (("runs/x", 7, [], None), {"checkpoint": "400", "rows": 64})


def test_the_installed_command_runs() -> None:
    command = Path(sys.executable).with_name("unified-rl")
    done = subprocess.run([command, "--version"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stdout.strip().count(".") == 2
