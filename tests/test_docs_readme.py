"""What README and the pages say runs: Python blocks, commands, and links."""

from __future__ import annotations

import re
import runpy
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from docs_cases import Block, blocks, commands

import unified_rl as ur
from unified_rl import cli
from unified_rl.config import config_root

PAGES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/design.md", "docs/extending.md", "docs/configuration.md",
         "docs/losses.md", "docs/returns.md", "docs/reasoner.md", "docs/robot.md", "docs/api.md")  # fmt: skip
LINK = re.compile(r"\]\(([^)#\s]*)(#[^)\s]*)?\)")


@pytest.fixture(scope="module")
def readme(source: Path) -> list[Block]:
    return blocks(source / "README.md")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working directory in which ``my_configs`` holds a study."""
    (tmp_path / "my_configs" / "study").mkdir(parents=True)
    (tmp_path / "my_configs" / "study" / "mine.yaml").write_text((config_root() / "study/quickstart.yaml").read_text())
    monkeypatch.chdir(tmp_path)
    yield tmp_path


def python_blocks(readme: list[Block]) -> list[str]:
    return [block.text for block in readme if block.language == "python"]


def test_the_readme_trains_from_overrides(
    readme: list[Block], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = next(text for text in python_blocks(readme) if "ur.train(" in text)
    held: dict[str, Any] = {}
    exec(text.replace("20_000", "2048").replace("episodes=128", "episodes=2").replace(
        '"correction"', '"progress": False, "eval_episodes": 2, "correction"'), held)  # fmt: skip
    assert held["run"].metrics()[-1]["update"] > 0 and not held["policy"].training
    assert "eval/score" in capsys.readouterr().out


def test_the_script_of_the_readme_trains(readme: list[Block], folder: Path) -> None:
    """Exactly the block, but for the budget."""
    text = next(text for text in python_blocks(readme) if "ur.assemble(" in text)
    statements = [line for line in text.splitlines() if line.strip()]
    assert len(statements) <= 18
    small = text.replace("20_000", "4096").replace('"updates": 200', '"updates": 2')
    assert small.count("4096") == 1 and '"updates": 2,' in small
    held: dict[str, Any] = {}
    exec(small, held)
    trainer = held["trainer"]
    assert trainer.policy is held["policy"] and trainer.env is held["env"] and trainer.trainer.updates == 2
    assert trainer.rollout.staleness == 2 and not list(folder.glob("runs*"))


def test_the_parts_of_the_readme_work_alone(readme: list[Block]) -> None:
    text = next(text for text in python_blocks(readme) if "load_correction(" in text and "assemble" not in text)
    held: dict[str, Any] = {}
    exec(text, held)
    assert held["log_prob"].grad.abs().sum() > 0


def test_the_python_of_the_configuration_page_is_accepted(source: Path, folder: Path) -> None:
    """Composed and assembled, not trained: the calls of ``train`` become calls of ``compose``."""
    held: dict[str, Any] = {}
    for text in python_blocks(blocks(source / "docs" / "configuration.md")):
        exec(
            re.sub(r"ur\.train\((.*)\)", r"ur.compose(flatten(\1))", "from unified_rl.config import flatten\n" + text),
            held,
        )
    assert held["run"]["agent"]["lr"] == 1e-3 and held["trainer"].agent.batches.epochs == 4


def test_the_drawing_and_the_rooms_are_those_of_the_source(source: Path) -> None:
    from test_import_rule import ORDER

    text = (source / "docs" / "design.md").read_text()
    table = re.findall(r"^\| (`.*?) \|", text, re.MULTILINE)
    rooms = [name.rstrip("/").removesuffix(".py") for row in table for name in re.findall(r"`([\w./]+)`", row)]
    assert [room for room in rooms if room in ORDER] == [room for room in ORDER if room in rooms]
    assert set(ORDER) == {room for room in rooms if room in ORDER}


def test_every_command_of_the_readme_is_accepted(readme: list[Block], folder: Path) -> None:
    found = [command for block in readme if block.language == "bash" for command in commands(block.text)]
    assert len(found) > 8
    for verb, *words in found:
        arguments = cli._parser(verb).parse_intermixed_args(words)
        if verb in cli.COMPOSED:
            ur.compose(arguments.overrides, primary=verb, config_dirs=arguments.config_dir, allow=arguments.allow)


def test_every_target_of_the_readme_is_one_of_make(readme: list[Block], source: Path) -> None:
    made = [command for block in readme if block.language == "bash" for command in commands(block.text, "make")]
    text = (source / "Makefile").read_text()
    assert made and all(re.search(rf"^{target[0]}:", text, re.MULTILINE) for target in made)


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str, source: Path) -> None:
    path = source / page
    for target, anchor in LINK.findall(path.read_text()):
        if "://" in target:
            continue
        there = (path.parent / target).resolve() if target else path
        assert there.exists(), target
        if anchor and there.suffix == ".md":
            headings = re.findall(r"^#+ (.+)$", there.read_text().lower(), re.MULTILINE)
            assert anchor[1:] in {re.sub(r"[^\w\- ]", "", h).strip().replace(" ", "-") for h in headings}, anchor


def test_the_api_page_is_what_the_docstrings_say(source: Path) -> None:
    written = runpy.run_path(str(source / "docs" / "api.py"), run_name="api")
    assert (source / "docs" / "api.md").read_text() == written["page"](), "out of date: run python docs/api.py"


def test_the_api_page_leaves_no_name_out(source: Path) -> None:
    text = (source / "docs" / "api.md").read_text()
    assert all(f"### {name}\n" in text for name in ur.__all__ if name != "__version__")


def test_the_table_of_renamed_modules_is_true(source: Path) -> None:
    text = (source / "CHANGELOG.md").read_text()
    rows = re.findall(r"^\| `(unified_rl[\w.]*)` \| `(unified_rl[\w.]*)` \|$", text, re.MULTILINE)
    assert len(rows) > 20
    assert [new for _, new in rows if find_spec(new) is None] == []


@pytest.mark.parametrize(("name", "sizes"), [("robot", {"steps": 8192}), ("reasoner", {"steps": 256, "imitation": 5})])
def test_the_examples_run(name: str, sizes: dict[str, int], source: Path) -> None:
    module = runpy.run_path(str(source / "examples" / f"{name}.py"), run_name=name)
    found = module["main"](**sizes)
    if name == "robot":
        assert all(after > before + 1 for before, after in found.values())
    else:
        assert 0.0 < found[0] < 1.0 and found[0] != found[1]
