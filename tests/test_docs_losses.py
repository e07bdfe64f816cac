"""The page on losses: its commands train, and its tables name everything that there is."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from docs_cases import Block, blocks, commands

from unified_rl import cli
from unified_rl.agents.loss import TERMS
from unified_rl.objectives.coefficients import COEFFICIENTS
from unified_rl.rollout import sources
from unified_rl.training.metrics import read_metrics

PAGE = "docs/losses.md"
SMALL = ["rollout.prompts=2", "rollout.group_size=4", "steps=16", "eval_episodes=2", "progress=false"]


@pytest.fixture(scope="module")
def page(source: Path) -> list[Block]:
    return blocks(source / PAGE)


def test_every_command_of_the_page_trains(page: list[Block], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = [command for block in page if block.language == "bash" for command in commands(block.text)]
    assert len(found) == 3
    for number, command in enumerate(found):
        assert cli.main([*command, *SMALL, f"run_dir=run{number}"]) == 0, command
        metrics = read_metrics(tmp_path / f"run{number}" / "metrics.jsonl")[-1]
        (term,) = re.findall(r"objectives\.(imitate|prefer|near)", " ".join(command))
        assert metrics["update"] == 2 and f"loss/{term}" in metrics, (command, sorted(metrics))


def test_the_tables_of_the_page_are_complete(source: Path) -> None:
    text = (source / PAGE).read_text()
    for name in (*TERMS, *COEFFICIENTS):
        assert f"`{name}`" in text, name
    rows = {name for name in sources.__all__ if name not in ("Recited", "Request", "RowSource")}
    assert rows == set(re.findall(r"^\| `([A-Z]\w+)` \|", text, re.MULTILINE))
