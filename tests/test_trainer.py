"""What a run leaves behind, what evaluation reports, and that recorded rows train another policy."""

from __future__ import annotations

import csv
import json
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tensordict import TensorDict

from unified_rl import cli
from unified_rl.config import compose
from unified_rl.replay import Replay, Uniform, read_rows
from unified_rl.training.checkpoint import checkpoints, latest_checkpoint, read_checkpoint
from unified_rl.training.run import Job, evaluate_run, resume, train

COMMON = ["progress=false", "eval_episodes=8", "seed=5"]
CONTROL = ["env=inverted_pendulum", "agent=ppo", "agent.minibatch=64", "agent.epochs=2"]
SIZES = ["rollout.num_envs=4", "rollout.horizon=32", "steps=512", "eval_every=256", "checkpoint_every=128"]
LANGUAGE = [
    "env=chain_mod",
    "env.modulus=5",
    "env.terms=2",
    "policy=causal_lm_tiny",
    "agent=policy_gradient",
    "correction=grpo",
    "rollout.prompts=4",
    "rollout.group_size=4",
    "steps=48",
]


@pytest.fixture(scope="module")
def control(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run made by the command line."""
    folder = tmp_path_factory.mktemp("control") / "run"
    assert cli.main(["train", *CONTROL, *SIZES, *COMMON, f"run_dir={folder}"]) == 0
    return folder


@pytest.fixture(scope="module")
def language(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("language") / "run"
    return train(compose([*LANGUAGE, *COMMON, f"run_dir={folder}"]))


@pytest.fixture(scope="module")
def recorded(control: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of the control run's policy."""
    folder = tmp_path_factory.mktemp("recorded") / "rows"
    assert cli.main(["evaluate", str(control), "--record", str(folder)]) == 0
    return folder


def rows_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_the_run_folder_holds_everything_that_made_it(control: Path) -> None:
    config = yaml.safe_load((control / "config.yaml").read_text())
    assert config["agent"]["epochs"] == 2 and config["agent"]["lam"] == 0.95  # given, and a signature's default
    assert config["seed"] == 5 and config["choices"]["env"] == "inverted_pendulum"
    meta = json.loads((control / "meta.json").read_text())
    assert meta["seed"] == 5 and meta["status"] == "finished" and "git_revision" in meta and meta["command"]
    assert meta["versions"]["torch"] == metadata.version("torch") and meta["versions"]["mujoco"]
    assert any((control / "tensorboard").iterdir())
    assert [path.name for path in checkpoints(control / "checkpoints")] == ["step_000000000003", "step_000000000004"]


def test_metrics_are_the_same_in_both_files(control: Path) -> None:
    rows = rows_of(control)
    with open(control / "metrics.csv", newline="") as handle:
        table = list(csv.DictReader(handle))
    assert [row["steps"] for row in rows] == [0, 128, 256, 384, 512] == [int(row["steps"]) for row in table]
    assert [row["steps"] for row in rows if "eval/score" in row] == [0, 256, 512]
    for row, line in zip(rows, table, strict=True):
        assert {key: value for key, value in line.items() if value} == {k: str(v) for k, v in row.items()}
    assert {"ess/unit", "kl/k3", "loss/policy", "loss/value", "grad/norm", "rollout/return"} <= rows[-1].keys()


def test_events_for_tensorboard_hold_the_scores(control: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(control / "tensorboard"))
    events.Reload()
    found = [(event.step, event.value) for event in events.Scalars("eval/score")]
    assert found == [
        (row["steps"], pytest.approx(row["eval/score"])) for row in rows_of(control) if "eval/score" in row
    ]


def test_the_same_seed_gives_the_same_run_and_another_seed_does_not(control: Path, tmp_path: Path) -> None:
    def policy(seed: int, folder: Path) -> dict[str, torch.Tensor]:
        run = train(compose([*CONTROL, *SIZES, *COMMON[:2], f"seed={seed}", f"run_dir={folder}"]))
        return read_checkpoint(latest_checkpoint(run))["agent"]["policy"]

    want = read_checkpoint(latest_checkpoint(control))["agent"]["policy"]
    same, other = policy(5, tmp_path / "same"), policy(6, tmp_path / "other")
    assert all(torch.equal(want[key], same[key]) for key in want)
    assert not all(torch.equal(want[key], other[key]) for key in want)


def test_every_collected_step_is_trained_on(tmp_path: Path) -> None:
    trainer = Job(compose([*CONTROL, *SIZES, *COMMON])).make_trainer(tmp_path)
    rows, _ = trainer.rollout.collect(0)
    assert int(rows["terminated"].sum()) > 4  # several episodes in a window
    trainer.replay.extend(rows)
    record = trainer.agent._draw(trainer.replay)
    assert bool(record["mask"].all()) and record["mask"].numel() == rows.numel()


@pytest.mark.parametrize("name", ["control", "language"])
def test_evaluate_prints_what_the_run_logged_last(
    name: str, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    run = request.getfixturevalue(name)
    assert cli.main(["evaluate", str(run)]) == 0
    printed = dict(line.split() for line in capsys.readouterr().out.splitlines())
    logged = {key: value for key, value in rows_of(run)[-1].items() if key.startswith("eval/")}
    assert printed == {key: f"{value:.4f}" for key, value in logged.items()}


def test_evaluation_leaves_training_as_it_was(tmp_path: Path) -> None:
    final = []
    for every in (0, 16):
        run = train(compose([*LANGUAGE, *COMMON, f"eval_every={every}", f"run_dir={tmp_path / str(every)}"]))
        final.append(read_checkpoint(latest_checkpoint(run))["agent"]["policy"])
    assert all(torch.equal(final[0][key], final[1][key]) for key in final[0])


def test_language_rows_are_recorded_with_their_rewards(language: Path, tmp_path: Path) -> None:
    evaluate_run(str(language), episodes=4, record=str(tmp_path / "rows"))
    rows = read_rows(tmp_path / "rows")
    assert rows.numel() > 0 and {"tokens", "mask", "reward", "behavior_log_prob", "group"} <= set(rows.keys())
    assert set(rows["reward"].unique().tolist()) <= {0.0, 1.0}


# --------------------------------------------------------------------------------------------- imitation


def losses(run: Path) -> list[float]:
    return [row["loss/nll"] for row in rows_of(run) if "loss/nll" in row]


def test_recorded_rows_train_another_policy(recorded: Path, tmp_path: Path) -> None:
    clone = ["env=inverted_pendulum", "policy=diffusion", "agent=behavior_cloning", f"rollout.data={recorded}"]
    assert cli.main(["train", *clone, "steps=5120", "eval_every=0", *COMMON, f"run_dir={tmp_path / 'clone'}"]) == 0
    found = losses(tmp_path / "clone")
    assert len(found) == 20 and found[-1] < found[0] - 0.05


def test_cloning_recovers_the_function_behind_the_rows(tmp_path: Path) -> None:
    observation = torch.randn(1024, 4, generator=torch.Generator().manual_seed(0))
    action = (observation[:, :1] - 0.5 * observation[:, 1:2]).clamp(-2.9, 2.9)
    replay = Replay(1024, sampler=Uniform())
    replay.extend(TensorDict({"observation": observation, "action": action}, batch_size=[1024]))
    replay.dumps(tmp_path / "rows")
    clone = ["env=inverted_pendulum", "agent=behavior_cloning", f"rollout.data={tmp_path / 'rows'}", "agent.lr=1e-2"]
    cfg = compose([*clone, "steps=51200", "eval_every=0", *COMMON, f"run_dir={tmp_path / 'clone'}"])
    policy = Job(cfg).policy
    policy.load_state_dict(read_checkpoint(latest_checkpoint(train(cfg)))["agent"]["policy"])
    error = (policy.sample(observation, deterministic=True)["action"] - action).abs().mean()
    assert float(error) < 0.1 * float(action.std())


def test_supervised_fine_tuning_learns_the_demonstrated_style(tmp_path: Path) -> None:
    task = ["env=chain_mod", "env.modulus=5", "env.terms=2", "policy=causal_lm_tiny", "rollout.style=direct"]
    options = ["agent=sft", "agent.lr=2e-3", "rollout.rows=64", "steps=6400", "checkpoint_every=3200", *COMMON]
    run = train(compose([*task, *options, f"run_dir={tmp_path / 'run'}"]))
    found = losses(run)
    assert found[0] > 1.5 and found[-1] < 0.7  # a format that is known, a sum that is half known
    assert rows_of(run)[-1]["eval/length"] == pytest.approx(3.0, abs=0.5)


def test_imitation_resumes_bit_for_bit(tmp_path: Path) -> None:
    task = ["env=two_route", "policy=flow", "agent=behavior_cloning", "rollout.rows=32", "eval_every=0", *COMMON]
    whole = train(compose([*task, "steps=128", f"run_dir={tmp_path / 'whole'}"]))
    part = train(compose([*task, "steps=64", f"run_dir={tmp_path / 'part'}"]))
    resume(str(part), steps=128)
    first, second = (read_checkpoint(latest_checkpoint(run))["agent"]["policy"] for run in (whole, part))
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["env=half_cheetah"], "no scripted expert"),
        (["env=half_cheetah", "rollout.data={missing}"], "missing"),
        (["env=half_cheetah", "rollout.data={rows}"], "holds observations of 4 entries, but the environment's have 17"),
        (["env=chain_mod", "rollout.data={rows}"], "lack tokens"),
    ],
)
def test_demonstrations_that_are_not_there_or_do_not_fit(
    overrides: list[str], words: str, recorded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = {"missing": tmp_path / "missing", "rows": recorded}
    argv = [text.format(**names) for text in overrides]
    capsys.readouterr()
    assert cli.main(["train", *argv, "agent=behavior_cloning", *COMMON, f"run_dir={tmp_path / 'run'}"]) == 2
    error = capsys.readouterr().err
    assert error.count("unified-rl: ") == 1 and words in error.splitlines()[-1]
