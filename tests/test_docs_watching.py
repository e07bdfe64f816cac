"""The page on watching a run: every command in it runs, and its callback stops a run."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from docs_cases import blocks, commands

import unified_rl as ur
from unified_rl import cli

SMALL = {
    "steps": "64",
    "eval_episodes": "4",
    "rollout.prompts": "2",
    "rollout.group_size": "4",
    "env.modulus": "5",
    "env.terms": "2",
    "progress": "false",
}


@pytest.fixture(scope="module")
def page(source: Path) -> Path:
    return source / "docs" / "watching.md"


def shrunk(words: list[str], run: str) -> list[str]:
    """A command of the page, on a run of the test and with sizes of the test."""
    words = [word.replace("runs/NAME", run).replace("runs/BEST", f"{run}_best") for word in words]
    if words[0] != "train":
        return [word.replace("=16", "=2").replace("scores.json", f"{run}.json") for word in words]
    given = dict(word.split("=", 1) for word in words[1:])
    given["logger"] = given.get("logger", "[csv]").replace(",wandb", "")  # test_loggers.py
    return ["train", *(f"{key}={value}" for key, value in {"run_dir": f"{run}_other", **given, **SMALL}.items())]


def test_every_command_of_the_page_runs(page: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    ur.train(["env=chain_mod", "policy=causal_lm_tiny", *(f"{k}={v}" for k, v in SMALL.items()), f"run_dir={run}"])
    found = [words for block in blocks(page) if block.language == "bash" for words in commands(block.text)]
    assert {words[0] for words in found} == {"samples", "train", "evaluate"} and len(found) == 10
    for words in found:
        assert cli.main(shrunk(words, str(run))) == 0, capsys.readouterr().err
    assert (tmp_path / "run.json").is_file() and (tmp_path / "run_best" / "best").is_dir()


def test_the_callback_of_the_page_stops_a_run(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (block,) = [block for block in blocks(page) if block.language == "python"]
    assert block.title == "mine/watch.py"
    (tmp_path / "watched_mine").mkdir()
    (tmp_path / "watched_mine" / "__init__.py").write_text("")
    (tmp_path / "watched_mine" / "watch.py").write_text(block.text)
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in [name for name in sys.modules if name.startswith("watched_mine")]:
        monkeypatch.delitem(sys.modules, name)
    words = ["env=chain_mod", "policy=causal_lm_tiny", *(f"{k}={v}" for k, v in SMALL.items())]
    callback = "callbacks=[{_target_: watched_mine.watch.StopWhenLong, tokens: 0.5}]"
    assert cli.main(["train", "--allow", "watched_mine", callback, *words, f"run_dir={tmp_path / 'run'}"]) == 0
    assert "StopWhenLong.on_evaluation_end asked for it" in capsys.readouterr().err
    assert [row["update"] for row in ur.Run(tmp_path / "run").metrics()] == [0]
