"""The tables of docs/results/recipes.md are what their commands print, and the studies have their controls."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from unified_rl.config import compose, resolve_defaults
from unified_rl.study.grid import Study
from unified_rl.study.results import RunData, read_results
from unified_rl.study.table import main

COMMAND = re.compile(r"^    python -m unified_rl\.study\.table (.+)\n\n((?:\|.*\n)+)", re.MULTILINE)
STUDIES = ["replay", "guidance", "distillation", "preferences", "divergences", "occupancy"]


def runs(source: Path, name: str) -> list[RunData]:
    return read_results(source / f"docs/results/recipes/{name}/results.csv")


def test_every_table_is_what_its_command_prints(
    source: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(source)
    found = COMMAND.findall((source / "docs/results/recipes.md").read_text())
    assert {name for name in STUDIES if any(f"recipes/{name}/" in command for command, _ in found)} == set(STUDIES)
    for command, table in found:
        assert main(shlex.split(command)) == 0
        assert capsys.readouterr().out == table, command


@pytest.mark.parametrize("name", STUDIES)
def test_the_published_runs_are_those_of_the_study(source: Path, name: str) -> None:
    config = resolve_defaults(compose([f"study=recipes_{name}"], primary="compare"), primary="compare")
    study = Study.from_config(config)
    asked = {
        (domain, one if isinstance(one, str) else next(iter(one)), seed)
        for domain in study.domains
        for one in study.choices("corrections", domain)
        for seed in study.choices("seeds", domain)
    }
    labels = [run.labels for run in runs(source, name)]
    assert {(label["domain"], label["correction"], label["seed"]) for label in labels} == asked
    assert len({label["seed"] for label in labels}) == 5
    page = (source / "docs/results/recipes.md").read_text()
    assert f"| `unified-rl compare study=recipes_{name}` | {len(labels)} |" in page


@pytest.mark.parametrize("name", STUDIES)
def test_a_learning_rate_of_zero_changes_nothing(source: Path, name: str) -> None:
    still = [run for run in runs(source, name) if run.labels["correction"] == "frozen"]
    metric = "eval/route" if name == "occupancy" else "eval/accuracy"
    assert still and all(len(set(run.series(metric)[1])) == 1 for run in still)


@pytest.mark.parametrize("name", ["replay", "preferences"])
@pytest.mark.parametrize(("domain", "apart"), [("chain", 0.2), ("countdown", 0.15), ("countdown_low", 0.05)])
def test_shuffled_rewards_teach_nothing(source: Path, name: str, domain: str, apart: float) -> None:
    ends: dict[str, list[float]] = {}
    for run in runs(source, name):
        if run.labels["domain"] == domain:
            ends.setdefault(run.labels["correction"], []).append(run.last("eval/accuracy"))
    assert len(ends["shuffled"]) == 5 and max(ends["shuffled"]) < min(ends["grpo"]) - apart
    if domain != "chain":  # they lose what was imitated, in every seed
        assert all(end < start for end, start in zip(ends["shuffled"], ends["frozen"], strict=True))


def test_a_discriminator_that_does_not_learn_is_no_penalty(source: Path) -> None:
    found = {(run.labels["correction"], run.labels["seed"]): run for run in runs(source, "occupancy")}
    for seed in range(1, 6):
        plain, untaught = (found[name, seed].series("rollout/route")[1] for name in ("ppo", "untaught"))
        assert plain.tolist() == untaught.tolist()
