"""Every command and file of docs/rewards.md works as printed."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from docs_cases import blocks, commands
from test_tools import TEMPLATE, call
from transformers import LlamaConfig, LlamaForCausalLM

from unified_rl.cli import main
from unified_rl.envs.language.reward_functions import SHIPPED
from unified_rl.envs.language.tokenizer import train_bpe
from unified_rl.training.metrics import read_metrics

QUICK = ["rollout.prompts=2", "rollout.group_size=2", "steps=4", "eval_episodes=2", "progress=false"]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: Path) -> Path:
    """A folder with the page's files, a data file and a tiny chat model."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    for block in blocks(source / "docs" / "rewards.md"):
        if block.title:
            (tmp_path / block.title).write_text(block.text)
            monkeypatch.delitem(sys.modules, Path(block.title).stem, raising=False)
    rows = [{"question": f"What is {i} + {i}?", "answer": str(2 * i)} for i in range(30)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = train_bpe([TEMPLATE + call("add", a=1, b=2)] * 2, 400)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.eos_token, tokenizer.chat_template = "<|im_end|>", TEMPLATE
    tokenizer.save_pretrained(tmp_path / "model")
    shape: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(**shape, intermediate_size=32, vocab_size=len(tokenizer), max_position_embeddings=4096)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    return tmp_path


def test_the_commands_of_the_page_run(place: Path, source: Path) -> None:
    found = [
        words for b in blocks(source / "docs" / "rewards.md") if b.language == "bash" for words in commands(b.text)
    ]
    assert len(found) >= 6
    for number, words in enumerate(found):
        if words[0] == "evaluate":
            assert main([*words, "--rows", "256", "--episodes", "2"]) == 0
            continue
        if "env=two_route" in words:
            robot = ["rollout.num_envs=4", "rollout.horizon=16", "eval_episodes=2", "progress=false"]
            robot += (
                ["warm_start.stages=[{updates: 2}]"] if "steps=0" in words else ["steps=128", f"run_dir=run{number}"]
            )
            assert main([*words, *robot]) == 0, " ".join(words)
            continue
        short = [] if any("max_turn_tokens" in w for w in words) else ["env.max_turn_tokens=8"]
        assert main([*words, *QUICK, *short, f"run_dir=run{number}"]) == 0, " ".join(words)
        last = read_metrics(place / f"run{number}" / "metrics.jsonl")[-1]
        if any(word.startswith("reward=") for word in words):
            assert any(key.startswith("rollout/rewards/") for key in last)


def test_the_example_is_the_pages_file_and_the_table_names_every_reward(source: Path) -> None:
    page = source / "docs" / "rewards.md"
    code = next(block.text for block in blocks(page) if block.title == "my_rewards.py")
    assert code in (source / "examples" / "my_rewards.py").read_text()
    for name in (*SHIPPED, "task"):
        assert f"\n| `{name}` |" in page.read_text()
