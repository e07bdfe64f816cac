"""``unified-rl train -m``: the product of all values as a study, in one folder, continued by the same command."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import yaml

import unified_rl as ur
from unified_rl import cli
from unified_rl.errors import ConfigError
from unified_rl.study.grid import Study, make_jobs
from unified_rl.study.sweep import sweep_study

TINY = ["env=pendulum", "agent=ppo", "policy.hidden=[4]", "agent.critic_hidden=[4]", "rollout.num_envs=2",
        "rollout.horizon=4", "steps=16", "eval_episodes=2", "agent.epochs=1"]  # fmt: skip


def test_keys_become_the_axes_of_a_study() -> None:
    sweep = sweep_study(["agent=ppo", "env=hopper,walker2d", "agent.lr=1e-3,3e-4", "seed=range(1,4)", "steps=100"])
    study = sweep["study"]
    assert study["domains"] == {
        "env=hopper lr=0.001": ["env=hopper", "agent.lr=0.001"],
        "env=hopper lr=0.0003": ["env=hopper", "agent.lr=0.0003"],
        "env=walker2d lr=0.001": ["env=walker2d", "agent.lr=0.001"],
        "env=walker2d lr=0.0003": ["env=walker2d", "agent.lr=0.0003"],
    }
    assert study["seeds"] == [1, 2, 3] and study["staleness"] == [0] and study["corrections"] == [{"default": []}]
    assert study["overrides"] == ["agent=ppo", "steps=100"]
    jobs = make_jobs(Study.from_config(sweep), lambda overrides: {"seen": overrides})[1]
    assert len({job.slug for job in jobs}) == len(jobs) == 12
    assert not any("staleness" in text for job in jobs for text in job.cfg["seen"])  # not every rollout has it
    other = sweep_study(["correction=ppo,tis", "rollout.staleness=0,4", "a.lr=1,2", "b.lr=3,4"])["study"]
    assert other["corrections"] == [{"ppo": ["correction=ppo"]}, {"tis": ["correction=tis"]}]
    assert other["staleness"] == [0, 4] and "a.lr=1 b.lr=3" in other["domains"]


def test_lists_and_quoted_values_are_one_value() -> None:
    study = sweep_study(["policy.hidden=[4],[8,8]", "correction.penalty=[{name: k3, anchor: reference}]"])["study"]
    assert list(study["domains"].values()) == [["policy.hidden=[4]"], ["policy.hidden=[8,8]"]]
    assert study["overrides"] == ["correction.penalty=[{name: k3, anchor: reference}]"]


def test_a_sweep_trains_reports_and_is_continued(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "sweep"
    words = ["train", "-m", *TINY, "agent.lr=0.001,0.01", "seed=3", f"run_dir={folder}", "--workers", "0"]
    assert cli.main(words) == 0
    assert f"study folder: {folder}" in capsys.readouterr().out
    with (folder / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {(row["domain"], row["seed"]) for row in rows} == {("lr=0.001", "3"), ("lr=0.01", "3")}
    runs = sorted((folder / "runs").iterdir())
    assert {yaml.safe_load((run / "config.yaml").read_text())["agent"]["lr"] for run in runs} == {0.001, 0.01}
    assert (folder / "report.md").exists() or (folder / "report.html").exists()
    with pytest.raises(ConfigError, match="no key has any"):
        ur.sweep(TINY)
    before = [(run / "metrics.jsonl").stat().st_mtime_ns for run in runs]
    assert ur.sweep(words[2:-2], workers=0, progress=False) == folder
    assert [(run / "metrics.jsonl").stat().st_mtime_ns for run in runs] == before  # nothing is trained twice
    assert json.loads((runs[0] / "meta.json").read_text())["status"] == "finished"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["agent=ppo", "steps=100"], "no key has any: write key=a,b"),
        (["agent.lr=1,2", "agent.lr=3"], "agent.lr is given twice"),
        (["agent.lr=interval(1,2)"], "names no list of values"),
        (["run_dir=a,b"], "give it one value"),
        (["seed=a,b"], "seed must be whole numbers"),
        (["nonsense"], "not of the form key=value"),
    ],
)
def test_what_is_no_sweep_is_refused(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        sweep_study(words)


def test_the_command_line_says_what_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "agent.lr=1,2"]) == 2
    assert "unified-rl train -m" in capsys.readouterr().err
    assert cli.main(["train", "-m", "resume=runs/x", "agent.lr=1,2"]) == 2
    assert "the same command again goes on" in capsys.readouterr().err
    assert cli.main(["train", "-m", "agent.lrr=1,2", "env=pendulum", "agent=ppo"]) == 2
    assert "did you mean 'lr'" in capsys.readouterr().err
