"""The commands of the reasoner's guide about training run as they stand, but for their size."""

from __future__ import annotations

from pathlib import Path

import pytest
from docs_cases import blocks, commands

from unified_rl import cli

SECTIONS = ("Optimiser and learning rate", "Supervised fine-tuning in pieces", "KL to the reference, entropy",
            "PPO with a token critic", "Sampling", "Memory")  # fmt: skip
SMALL = {"policy": "causal_lm_tiny", "steps": "8", "eval_episodes": "2", "progress": "false"}
SIZES = {"rollout.prompts": "2", "rollout.group_size": "2"}


def found(source: Path) -> list[list[str]]:
    page = blocks(source / "docs/reasoner.md")
    return [words for block in page if block.section in SECTIONS for words in commands(block.text)]


def smaller(words: list[str], folder: Path) -> list[str]:
    """The command with a small model, few rows and a folder of its own."""
    given = {word.partition("=")[0]: word for word in words[1:]}
    sizes = {"rollout.rows": "4", "agent.micro_batch": "2"} if "agent=sft" in words else SIZES
    changed = {**SMALL, **sizes, "run_dir": str(folder)}
    return [words[0], *({**given, **{key: f"{key}={value}" for key, value in changed.items()}}).values()]


def test_every_command_runs(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    listed = found(source)
    assert len(listed) == 11 and all(words[0] == "train" for words in listed)
    for number, words in enumerate(listed):
        assert cli.main(smaller(words, tmp_path / str(number))) == 0, (words, capsys.readouterr().err)
        assert (tmp_path / str(number) / "metrics.csv").exists() or "--plan" in words
    assert "peak, at the most" in capsys.readouterr().out
