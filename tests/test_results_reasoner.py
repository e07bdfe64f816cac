"""The commands of docs/results/reasoner.md, on a folder with a tiny model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from docs_cases import page_commands
from test_language_data import LETTERS, TEMPLATE

from unified_rl import cli
from unified_rl.commands import compare
from unified_rl.config import compose, config_root, resolve_defaults
from unified_rl.envs.language import character_tokenizer
from unified_rl.policies.causal_lm import CausalLM
from unified_rl.study.grid import Study, make_jobs
from unified_rl.training.run import train

SMALL = ["steps=8", "rollout.prompts=2", "rollout.group_size=2", "log_every=4", "eval_every=4", "eval_episodes=2",
         "checkpoint_every=8", "samples_every=4", "env.max_turn_tokens=4", "policy.autocast=false"]  # fmt: skip


@pytest.fixture
def place(tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with ``smollm2``, a tiny model, and the files that the example writes."""
    monkeypatch.chdir(tmp_path)
    script = str(source / "examples" / "sums.py")
    arguments = ["sums.jsonl", "test.jsonl", "--each", "12", "--held-out", "6"]
    subprocess.run([sys.executable, script, *arguments], check=True, capture_output=True)
    lines = Path("sums.jsonl").read_text().splitlines(keepends=True)
    Path("warm.jsonl").write_text("".join(lines[:10]))
    Path("train.jsonl").write_text("".join(lines[10:]))
    asked = {json.loads(line)["prompt"] for line in lines}
    assert asked.isdisjoint(json.loads(line)["prompt"] for line in Path("test.jsonl").read_text().splitlines())
    tokenizer = character_tokenizer("".join(sorted({*LETTERS, *"".join(asked)})))
    tokenizer.chat_template = TEMPLATE
    config = {"model_type": "llama", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
              "intermediate_size": 32}  # fmt: skip
    CausalLM(tokenizer, 1024, config=config, seed=1).model.save_pretrained("smollm2")
    tokenizer.save_pretrained("smollm2")
    return tmp_path


def study() -> dict[str, Any]:
    cfg = resolve_defaults(compose(["study=reasoner"], primary="compare"), primary="compare")
    cfg["study"]["overrides"] += SMALL
    return {**cfg, "study": {**cfg["study"], "workers": 0}}


def test_the_commands_of_the_page_run_in_small(place: Path, source: Path) -> None:
    done = []
    for verb, *words in page_commands(source / "docs" / "results" / "reasoner.md"):
        done.append(verb)
        if verb == "train":
            tiny = [word for word in words if not word.startswith(("steps=", "rollout.rows=", "policy.autocast="))]
            train(resolve_defaults(compose([*tiny, "steps=8", "rollout.rows=4", "policy.autocast=false"])))
        elif verb == "compare":
            assert words == ["study=reasoner"]
            compare(study(), progress=False)
        else:
            runs = sorted(Path("runs/reasoner/runs").glob("fresh-grpo*"))
            words = [str(runs[0]) if "fresh-grpo" in word else word for word in words]
            words = [word for word in words if not word.startswith("env.max_turn_tokens=")]
            words += ["env.max_turn_tokens=4"] if verb == "evaluate" else []
            assert cli.main([verb, *words]) == 0, (verb, words)
    assert done[:4] == ["train", "export", "compare", "evaluate"]
    with open("runs/reasoner/training.csv") as handle:
        assert len(handle.readlines()) == 1 + 4 * 3  # four runs, the start and two updates of each


def test_the_arms_differ_in_what_they_are_called_after(place: Path) -> None:
    Path("smollm2").rename("start")
    grid = Study.from_config(resolve_defaults(compose(["study=reasoner"], primary="compare"), primary="compare"))
    _, jobs = make_jobs(grid, lambda overrides: resolve_defaults(compose(overrides)))
    told = {
        (job.labels["domain"], job.labels["correction"]): (
            job.cfg["correction"]["kernel"],
            job.cfg["rollout"]["staleness"],
            job.cfg["env"]["shuffle_rewards"],
        )
        for job in jobs
    }
    ppo = {"name": "ppo", "clip_low": 0.2, "clip_high": 0.2}
    assert told == {
        ("fresh", "grpo"): (ppo, 0, False),
        ("fresh", "shuffled"): (ppo, 0, True),
        ("stale", "grpo"): (ppo, 8, False),
        ("stale", "uncorrected"): ({"name": "constant"}, 8, False),
    }
    updates = {job.cfg["steps"] // (job.cfg["rollout"]["prompts"] * job.cfg["rollout"]["group_size"]) for job in jobs}
    assert updates == {60} and (config_root() / "study" / "reasoner.yaml").is_file()
