"""Every block of docs/extending.md: files are written as their titles say, and the commands train with them."""

from __future__ import annotations

import importlib
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from docs_cases import Block, blocks, commands

from unified_rl import cli

PAGE = Path("docs") / "extending.md"
SECTIONS = ("A policy", "An agent", "An environment", "A correction", "A term of the loss", "A sampler", "A recipe")
CONTROL = ["rollout.num_envs=4", "rollout.horizon=8", "steps=256"]  # chunks of four commands
LANGUAGE = ["rollout.prompts=4", "rollout.group_size=4", "steps=32"]
SMALL = {
    "A policy": [*CONTROL[:2], "steps=64", "agent.minibatch=16", "agent.epochs=2"],
    "An environment": [*LANGUAGE, "warm_start.stages=[{updates: 30, lr: 3e-3}]"],
    "A correction": CONTROL,
    "A term of the loss": CONTROL,
    "A sampler": CONTROL,
}


@pytest.fixture(scope="module")
def page(source: Path) -> list[Block]:
    return blocks(source / PAGE)


@pytest.fixture(scope="module")
def project(page: list[Block], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A user's folder with every file of the page, importable."""
    folder = tmp_path_factory.mktemp("project")
    for block in page:
        if block.title is not None:
            path = folder / block.title
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(block.text)
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    yield folder
    sys.path.remove(str(folder))
    for name in [name for name in sys.modules if name.split(".")[0] == "mine"]:
        del sys.modules[name]


def test_every_section_has_its_files_and_one_command(page: list[Block]) -> None:
    for section in SECTIONS:
        here = [block for block in page if block.section == section]
        assert sum(block.language == "bash" for block in here) == 1, section
        assert all(block.title for block in here if block.language != "bash"), section
    assert {block.section for block in page} == set(SECTIONS)


def test_the_blocks_are_short(page: list[Block]) -> None:
    for block in page:
        lines = [line for line in block.text.splitlines() if line.strip() and not line.startswith(("import", "from"))]
        assert len(lines) <= 26, (block.title, len(lines))


@pytest.mark.parametrize("section", SECTIONS)
def test_two_updates_train_with_it(
    section: str, page: list[Block], project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(project)
    (command,) = (c for block in page if block.section == section for c in commands(block.text))
    small = [
        *SMALL.get(section, LANGUAGE),
        "eval_episodes=2",
        "progress=false",
        "seed=1",
        f"run_dir={tmp_path / 'run'}",
    ]
    assert cli.main([*command, *small]) == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["update"] == 2
    assert any(row.get("grad/norm", 0.0) > 0 for row in rows)
    shutil.rmtree(tmp_path / "run")


def test_without_allow_nothing_of_the_package_is_built(
    page: list[Block], project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(project)
    for section in SECTIONS[:-1]:
        (command,) = (c for block in page if block.section == section for c in commands(block.text))
        at = command.index("--allow")
        assert cli.main([*command[:at], *command[at + 2 :], "--cfg"]) == 2
        assert "--allow mine" in capsys.readouterr().err
