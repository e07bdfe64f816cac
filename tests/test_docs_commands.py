"""Every ``unified-rl`` command of README and docs is accepted, and those that can be small are run."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from docs_cases import page_commands
from test_language_data import LETTERS, TEMPLATE

from unified_rl import cli
from unified_rl.config import compose, config_root, resolve_defaults
from unified_rl.envs.language import character_tokenizer
from unified_rl.policies.causal_lm import CausalLM
from unified_rl.training.run import train

RUN_ELSEWHERE = {
    "docs/extending.md": "test_docs_extending",
    "docs/losses.md": "test_docs_losses",
    "docs/rewards.md": "test_docs_rewards",
    "docs/robot.md": "test_docs_robot",
    "docs/watching.md": "test_docs_watching",
}
"""Pages whose commands a test of their own runs."""
NOT_RUN = {
    r"^compare study=": "a study trains dozens of runs: minutes to hours (test_study_compare runs small ones)",
    r"^export .*--merge": "needs a run with adapters (test_export runs it)",
    r"^launch": "its processes import everything anew (test_ranks runs them)",
    r"^lab": "two minutes and more (test_lab_run runs parts of it)",
    r"^train --config-dir mine --allow hallway": "its environment is a name for one of the reader's own",
    r"^train --config-dir my_configs --allow mine env=\.\.\.": "its dots stand for the reader's own choice",
    r"engine=ray|recipe=pipeline_rl": "needs Ray, which takes seconds to start (test_ray runs small ones)",
    r"policy\.engine=(vllm|sglang)": "needs a server (test_engines_runs has small ones)",
    r"agent=sb3_sac": "Stable-Baselines3's first hundred steps take seconds (test_sb3 runs small ones)",
}
"""Commands that no test runs as they stand, and why; they are parsed, and composed where they hold no placeholder."""
LANGUAGE = {"prompts": 2, "group_size": 2}


@pytest.fixture(scope="module")
def pages(source: Path) -> dict[str, list[list[str]]]:
    names = ["README.md", *(f"docs/{path.name}" for path in sorted((source / "docs").glob("*.md")))]
    return {name: page_commands(source / name) for name in names}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the pages name: a ``model``, files of data, ``my_configs``."""
    folder = tmp_path_factory.mktemp("place")
    sums = [
        {"question": f"{a} + {b}?", "answer": f"{a} + {b} = {a + b}\n#### {a + b}"} for a in range(6) for b in range(6)
    ]
    files = {
        "train.jsonl": sums[:-6],
        "test.jsonl": sums[-6:],
        "teacher.jsonl": [{"prompt": one["question"], "completion": f" {one['answer']}"} for one in sums[:-6]],
        "chats.jsonl": [
            {"messages": [{"role": "user", "content": one["question"]}, {"role": "assistant", "content": "It is so."}]}
            for one in sums
        ],
    }
    for name, records in files.items():
        (folder / name).write_text("".join(json.dumps(record) + "\n" for record in records))
    tokenizer = character_tokenizer(LETTERS)
    tokenizer.chat_template = TEMPLATE
    config = {"model_type": "llama", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
              "intermediate_size": 32}  # fmt: skip
    CausalLM(tokenizer, 1024, config=config, seed=1).model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    (folder / "my_configs" / "study").mkdir(parents=True)
    (folder / "my_configs" / "study" / "mine.yaml").write_text((config_root() / "study/quickstart.yaml").read_text())
    return folder


def why_not(command: list[str]) -> str | None:
    return next((why for pattern, why in NOT_RUN.items() if re.search(pattern, " ".join(command))), None)


def small(cfg: dict[str, Any], name: str) -> dict[str, Any]:
    """The same run with two updates of few rows, and policies of few weights."""
    cfg |= {"eval_episodes": 2, "progress": False, "run_dir": f"runs/{name}", "device": "cpu"}
    target = cfg["rollout"]["_target_"] if cfg.get("rollout") else ""
    rollout, agent = cfg.get("rollout") or {}, cfg["agent"]
    if target.endswith("LanguageRollout"):
        rollout |= LANGUAGE
        for source in (rollout.get("sources") or {}).values():
            source |= {"rows": 2} if "rows" in source else {}
        cfg["steps"] = 8
    elif target.endswith(("DemonstrationRollout", "StoredRollout")):
        rollout["rows"], cfg["steps"] = 16, 32
        if "ActorCritic" in agent["_target_"]:
            agent |= {"batch_size": 8, "learning_starts": 8}
    elif target.endswith("ControlRollout") and "ActorCritic" in agent["_target_"]:
        rollout |= {"num_envs": 2, "horizon": 8, "random_steps": 0}
        agent |= {"batch_size": 8, "learning_starts": 8, "updates_per_step": 0.25}
        cfg["replay"]["capacity"], cfg["steps"] = 4096, 32
    else:
        rollout |= {"num_envs": 2, "horizon": 16} if target else {}
        cfg["steps"] = 64
    if "JsonlProblems" in cfg["env"]["_target_"]:
        cfg["env"]["max_turn_tokens"] = 24
    elif cfg["env"]["_target_"].endswith("make_mujoco"):
        cfg["env"]["options"] = {"max_steps": 50}
    if cfg.get("warm_start"):
        stages = [{k: v for k, v in one.items() if k != "until_loss"} for one in cfg["warm_start"].get("stages", ())]
        cfg["warm_start"] |= {"stages": [{**one, "updates": 1} for one in stages], "batch_size": 4, "dataset": 8}
    if "config" in cfg["policy"]:
        cfg["policy"]["config"] |= {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}
    return cfg


def run(command: list[str], last: str, number: int) -> str:
    """Runs one command in small; the name of the newest run."""
    verb, *words = [re.sub(r"\bruns/(NAME|EARLIER)\b|^RUN$|=RUN$", lambda m: _run_of(m[0], last), w) for w in command]
    words = [word.replace("/path/to/model", "model") for word in words]
    if verb == "train" and not any(word.startswith("resume=") for word in words):
        arguments = cli._parser(verb).parse_intermixed_args([w for w in words if not w.startswith("device=")])
        cfg = compose(arguments.overrides, config_dirs=arguments.config_dir, allow=arguments.allow)
        name = f"{number:02d}"
        train(resolve_defaults(small(cfg, name), allow=arguments.allow), arguments.allow)
        return f"runs/{name}"
    small_words = ["--rows", "16"] if "--record" in words else []
    assert cli.main([verb, *words, *small_words]) == 0
    return last


def task_of(command: list[str]) -> str:
    return next((word for word in command if word.startswith("env=")), "")


def _run_of(word: str, last: str) -> str:
    return f"={last}" if word.startswith("=") else last


def test_every_command_that_is_not_run_is_accepted(
    pages: dict[str, list[list[str]]], place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    assert sum(map(len, pages.values())) > 30
    for page, found in pages.items():
        for verb, *words in found:
            if page not in RUN_ELSEWHERE and why_not([verb, *words]) is None:
                continue
            arguments = cli._parser(verb).parse_intermixed_args(words)
            placeholder = page in RUN_ELSEWHERE or "hallway" in words or "env=..." in words
            if verb in cli.COMPOSED and not placeholder:
                compose(arguments.overrides, primary=verb, config_dirs=arguments.config_dir, allow=arguments.allow)


def test_every_exception_is_a_command_of_some_page(pages: dict[str, list[list[str]]]) -> None:
    every = [" ".join(command) for found in pages.values() for command in found]
    assert [pattern for pattern in NOT_RUN if not any(re.search(pattern, one) for one in every)] == []
    assert set(RUN_ELSEWHERE) <= pages.keys()


def test_the_commands_of_the_pages_run_in_small(
    pages: dict[str, list[list[str]]], place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(place)
    runs, number = {"": ""}, 0
    for page, found in pages.items():
        for at, command in enumerate(found):
            if page in RUN_ELSEWHERE or why_not(command):
                continue
            number += 1
            task = task_of(command) or next(filter(None, map(task_of, found[at + 1 :])), "")
            last = runs.get(task, runs[""]) if "--record" in command else runs[""]
            try:
                runs[task] = runs[""] = run(command, last, number)
            except BaseException as error:
                raise AssertionError(f"{page}: unified-rl {' '.join(command)}") from error
    assert number > 15
