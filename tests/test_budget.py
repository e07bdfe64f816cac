"""How long a run is, said in epochs or updates: they come to steps, which everything else goes by."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from run_cases import ALLOW, CONTROL, LANGUAGE, composed, merged

import unified_rl as ur
from unified_rl import cli
from unified_rl.config import compose
from unified_rl.errors import ConfigError
from unified_rl.training.checkpoint import latest_checkpoint, read_checkpoint
from unified_rl.training.run import Job, train, with_steps

TINY = [word for word in LANGUAGE if word.startswith("policy")]
QUIET = ("eval_every=0", "eval_episodes=2", "checkpoint_every=0", "samples_rows=0")


@pytest.fixture
def problems(tmp_path: Path) -> Path:
    """10 problems to train on."""
    path, other = tmp_path / "problems.jsonl", tmp_path / "held_out.jsonl"
    for file, first, count in ((path, 0, 10), (other, 50, 3)):
        records = [{"question": f"{i} + 1?", "answer": str(i + 1)} for i in range(first, first + count)]
        file.write_text("\n".join(map(json.dumps, records)))
    return path


def of_file(problems: Path, *more: str) -> list[str]:
    held_out = problems.with_name("held_out.jsonl")
    task = ["env=jsonl", f"env.path={problems}", f"env.eval_path={held_out}", "env.max_turn_tokens=4"]
    return merged([*task, *TINY, "rollout.prompts=4", "rollout.group_size=2", *QUIET], more)


def steps(words: list[str]) -> int:
    return int(with_steps(composed(words), ALLOW)["steps"])


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([*LANGUAGE, "updates=7"], 7 * 16),
        ([*CONTROL, "updates=3"], 3 * 4 * 8 * 4),
        ([*CONTROL[:1], "agent=sac", "rollout.num_envs=2", "updates=5"], 5 * 2 * 4),
        ([*LANGUAGE[:-2], "agent=sft", "rollout.rows=6", "updates=2"], 12),
    ],
)
def test_updates_come_to_the_steps_of_so_many(words: list[str], expected: int, tmp_path: Path) -> None:
    assert steps(words) == expected
    job = Job(composed([*words, "eval_episodes=2"]), ALLOW)
    assert job.make_trainer(tmp_path).planned == int(words[-1].split("=")[1])


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (["epochs=1"], 3 * 8),  # 10 prompts, 4 an update: the third begins the next epoch
        (["epochs=2"], 5 * 8),
        (["epochs=0.4"], 8),
        (["epochs=2", "env.drop_last=true"], 4 * 8),
        (["epochs=1", "agent=sft", "rollout.prompts=null", "rollout.group_size=null", "rollout.rows=5"], 10),
    ],
)
def test_an_epoch_is_each_training_prompt_once(problems: Path, more: list[str], expected: int) -> None:
    words = [word for word in of_file(problems, *more) if not word.endswith("=null")]
    assert steps(words) == expected


def test_a_run_of_epochs_visits_each_prompt_as_often_and_says_its_steps(
    problems: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["epochs=2", "agent.lr_schedule=linear"]
    assert cli.main(["train", "--cfg", *of_file(problems, *more)]) == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert (shown["steps"], shown["epochs"], shown["updates"]) == (40, 2.0, None)
    run = train(composed(of_file(problems, *more, f"run_dir={tmp_path / 'run'}", "log_every=8")), ALLOW)
    rows = ur.Run(run).metrics()
    assert rows[-1]["rollout/epoch"] == 2.0 and rows[-1]["update"] == 5 and rows[-1]["steps"] == 40
    assert ur.Run(run).config["steps"] == 40
    rates = [row["agent/lr"] for row in rows[1:]]
    assert rates == pytest.approx([rates[0] * (5 - i) / 5 for i in range(5)])


def test_a_run_of_updates_is_the_run_of_its_steps_and_goes_on_to_more(tmp_path: Path) -> None:
    def weights(run: Any) -> dict[str, torch.Tensor]:
        found: dict[str, torch.Tensor] = read_checkpoint(latest_checkpoint(Path(run)))["agent"]["policy"]
        return found

    def made(name: str, *more: str) -> Path:
        return train(composed(merged(LANGUAGE, QUIET, [f"run_dir={tmp_path / name}"], more)), ALLOW)

    plain, whole, part = made("plain", "steps=64"), made("whole", "updates=4"), made("part", "updates=2")
    assert ur.Run(part).config["steps"] == 32
    ur.Run(part, allow=ALLOW).resume(updates=4)
    assert (ur.Run(part).config["steps"], ur.Run(part).config["updates"]) == (64, 4)
    for run in (whole, part):
        assert all(torch.equal(w, weights(run)[k]) for k, w in weights(plain).items())
    assert cli.main(["train", f"resume={part}", "steps=80", *(f"--allow={prefix}" for prefix in ALLOW)]) == 0
    assert (ur.Run(part).config["steps"], ur.Run(part).config["updates"]) == (80, None)
    assert cli.main(["train", f"resume={part}", "updates=6", *(f"--allow={prefix}" for prefix in ALLOW)]) == 0
    assert ur.Run(part).metrics()[-1]["steps"] == 96


def test_early_stopping_ends_a_run_of_updates(tmp_path: Path) -> None:
    stop = "early_stopping={metric: rollout/episodes, patience: 1}"
    words = merged(CONTROL, ["updates=20", "log_every=128", "eval_episodes=2", f"run_dir={tmp_path / 'run'}", stop])
    run = train(composed(words), ALLOW)
    assert 1 < ur.Run(run).metrics()[-1]["update"] < 20


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([*LANGUAGE, "steps=64", "updates=4"], "steps=64 and updates=4 both say how long the run is"),
        ([*LANGUAGE, "epochs=1", "updates=4"], "epochs=1 and updates=4 both say"),
        ([*LANGUAGE, "updates=0"], "updates=0 must be at least 1"),
        ([*LANGUAGE, "epochs=0"], "epochs=0"),
        ([*LANGUAGE, "epochs=1"], "EasyChain makes new ones without end: set steps or updates"),
        ([*CONTROL, "epochs=1"], "epochs=1 counts visits of training prompts, and control has none: set steps or"),
        (["env=pendulum", "agent=sb3_ppo", "updates=3"], "updates=3 needs a rollout.*collects by itself: set steps"),
    ],
)
def test_budgets_that_mean_nothing_are_refused(words: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        with_steps(composed(words), ALLOW)


def test_recorded_rows_have_no_epochs_and_scripts_cannot_say_two_things(problems: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"rows of rollout.data are drawn at random: set steps or updates"):
        words = [*of_file(problems), "agent=sft", "epochs=1", "rollout.data=rows"]
        steps([word for word in words if not word.startswith(("rollout.prompts", "rollout.group"))])
    cfg = composed([*CONTROL, "steps=64", "eval_episodes=2"])
    with pytest.raises(ConfigError, match="updates=7 comes to 896 steps, and steps=64 says how long the run is too"):
        Job({**cfg, "updates": 7}).make_trainer(tmp_path)


def test_a_budget_of_a_file_gives_way_and_names_of_others_are_told(tmp_path: Path) -> None:
    option = tmp_path / "recipe" / "long.yaml"
    option.parent.mkdir()
    option.write_text("# @package _global_\nupdates: 900\n")
    words = ["recipe=long", *CONTROL]
    found = compose(words, config_dirs=[str(tmp_path)])
    assert found["updates"] == 900 and "steps" not in found
    found = compose([*words, "steps=32"], config_dirs=[str(tmp_path)])
    assert found["steps"] == 32 and "updates" not in found
    for name, ours in (("max_steps", "updates"), ("num_train_epochs", "epochs")):
        with pytest.raises(ConfigError, match=f"here it is called {ours}"):
            compose([f"{name}=3"])
