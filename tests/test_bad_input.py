"""Bad input through the command line and the trainer: one clear error, and nothing is lost."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from unified_rl import cli
from unified_rl.config import compose
from unified_rl.errors import CheckpointError, NonFiniteError
from unified_rl.files import Manifest
from unified_rl.policies.gaussian import GaussianPolicy
from unified_rl.training import checkpoint as checkpoint_module
from unified_rl.training.checkpoint import checkpoints, latest_checkpoint, lock_run, read_checkpoint
from unified_rl.training.run import Job, resume, train

COMMON = ["progress=false", "eval_episodes=2", "eval_every=0"]
PPO = [
    "env=inverted_pendulum",
    "agent=ppo",
    "agent.minibatch=32",
    "agent.epochs=1",
    "rollout.num_envs=2",
    "rollout.horizon=16",
]
LANGUAGE = [
    "env=chain_mod",
    "env.modulus=5",
    "env.terms=2",
    "policy=causal_lm_tiny",
    "agent=policy_gradient",
    "rollout.prompts=2",
    "rollout.group_size=4",
]


@pytest.fixture(autouse=True)
def no_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(cli.DEBUG, raising=False)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three updates with two checkpoints."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    return train(compose([*COMMON, *PPO, "steps=96", "checkpoint_every=32", f"run_dir={folder}"]))


def copy_of(run: Path, folder: Path) -> Path:
    import shutil

    shutil.copytree(run, folder)
    return folder


def refused(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that a command ends with."""
    capsys.readouterr()
    assert cli.main(argv) == 2
    error = capsys.readouterr().err
    assert error.startswith("unified-rl: ") and error.count("\n") == 1, error
    return error


# --------------------------------------------------------------------------------------------- misspelt


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["agent.epoch=3"], "has no key 'epoch'; did you mean 'epochs'"),
        (["rollout.horizn=3"], "did you mean 'horizon'"),
        (["polcy=gaussian"], "did you mean 'policy'"),
        (["policy=gausian"], "did you mean 'gaussian'"),
        (["agent.epochs=many"], "agent.epochs"),
        (["steps=1e400"], "steps"),
        (["device=gpu"], "device=gpu"),
        (["env.name=HalfCheeta-v5"], "HalfCheetah-v5"),
    ],
)
def test_what_is_misspelt_is_named_with_the_nearest(
    overrides: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = ["train", "env=half_cheetah", "agent=ppo", *COMMON, f"run_dir={tmp_path / 'run'}"]
    assert words in refused([*run, *overrides], capsys)


def test_an_unknown_gymnasium_id_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = ["train", "env=gymnasium", "env.id=Pendulm-v1", "agent=ppo", *COMMON, f"run_dir={tmp_path / 'run'}"]
    assert "Pendulm" in refused(run, capsys)


def test_a_run_that_could_not_be_built_does_not_block_its_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = ["train", *PPO, *COMMON, "steps=32", f"run_dir={tmp_path / 'run'}"]
    refused([*run, "policy=flow", "correction=dppo_tv"], capsys)
    assert cli.main(run) == 0


# --------------------------------------------------------------------------------------------- data files


@pytest.mark.parametrize(
    ("line", "words"),
    [('{"question": "1+1?"}', "line 3"), ("question: 1+1?", "line 3"), ('{"question": 3, "answer": []}', "line 3")],
)
def test_a_bad_line_of_a_problem_file_is_named(
    line: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = json.dumps({"question": "What is 1+1?", "answer": "#### 2"})
    path = tmp_path / "problems.jsonl"
    path.write_text(f"{good}\n{good}\n{line}\n")
    run = ["train", "env=jsonl", f"env.path={path}", "policy=causal_lm_tiny", *COMMON, f"run_dir={tmp_path / 'run'}"]
    error = refused(run, capsys)
    assert words in error and "problems.jsonl" in error


# --------------------------------------------------------------------------------------------- checkpoints


def test_a_missing_run_and_a_run_without_checkpoints(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import shutil

    for verb in (["train", f"resume={tmp_path / 'none'}"], ["evaluate", str(tmp_path / "none")]):
        assert "not a run folder" in refused(verb, capsys)
    run = copy_of(finished, tmp_path / "run")
    shutil.rmtree(run / "checkpoints")
    assert "no checkpoint" in refused(["evaluate", str(run)], capsys)


@pytest.mark.parametrize("name", ["state.json", "state.safetensors", "replay/replay.json"])
@pytest.mark.parametrize("how", ["missing", "truncated"])
def test_a_damaged_checkpoint_is_named(
    name: str, how: str, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = copy_of(finished, tmp_path / "run")
    newest = latest_checkpoint(run)
    damage(newest / name, how)
    assert cli.main(["train", f"resume={run}", "steps=128"]) == 0
    said = capsys.readouterr().err
    assert newest.name in said and name in said and "going back to" in said and f"set_aside_{newest.name}" in said
    for path in checkpoints(run / "checkpoints"):
        damage(path / name, how)
    error = refused(["train", f"resume={run}", "steps=256"], capsys)
    assert "no checkpoint" in error and "intact" in error and name in error


def damage(file: Path, how: str) -> None:
    if how == "missing":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:40])


def test_a_checkpoint_of_another_version_is_named(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = copy_of(finished, tmp_path / "run")
    newest = latest_checkpoint(run)
    file = newest / "state.json"
    file.write_text(file.read_text().replace('"format": 3', '"format": 99'))
    Manifest.of(newest, Manifest.read(newest).files).write()
    for verb in (["train", f"resume={run}"], ["evaluate", str(run)]):
        assert "format 99" in refused(verb, capsys)


def test_resume_takes_no_other_key(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "remove agent.lr" in refused(["train", f"resume={finished}", "agent.lr=0.1"], capsys)


def test_a_run_folder_in_use_and_one_that_is_taken(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with lock_run(finished):
        assert "in use" in refused(["train", f"resume={finished}"], capsys)
    assert "holds a run already" in refused(["train", *PPO, *COMMON, f"run_dir={finished}"], capsys)


def test_a_full_disk_leaves_the_checkpoint_before_intact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save, saves = checkpoint_module.save_state, []

    def full(folder: Path, state: dict[str, Any]) -> None:
        saves.append(folder)
        if len(saves) > 1:
            (folder / "state.json").write_text("{")
            raise OSError(28, "No space left on device")
        save(folder, state)

    monkeypatch.setattr(checkpoint_module, "save_state", full)
    run = tmp_path / "run"
    with pytest.raises(CheckpointError, match=r"No space left on device.*earlier checkpoints are intact"):
        train(compose([*COMMON, *PPO, "steps=128", "checkpoint_every=32", f"run_dir={run}"]))
    monkeypatch.undo()
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step_000000000001"]
    assert json.loads((run / "meta.json").read_text())["status"] == "failed"
    resume(str(run))
    assert json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["steps"] == 128


# --------------------------------------------------------------------------------------------- NaN


def control_run(folder: Path) -> Any:
    folder.mkdir()
    return Job(compose([*COMMON, *PPO, "steps=160", "checkpoint_every=0"])).make_trainer(folder)


@pytest.mark.parametrize("name", ["observation", "reward"])
def test_nan_from_the_environment_stops_with_a_clean_checkpoint(name: str, tmp_path: Path) -> None:
    trainer = control_run(tmp_path / "run")
    env, calls = trainer.rollout.env, []
    step = env.step_batch

    def broken(action: torch.Tensor) -> Any:
        result = step(action)
        calls.append(0)
        if len(calls) == 40:  # in the third collection: after two updates
            getattr(result, "reward" if name == "reward" else "next_observation")[1] = float("nan")
        return result

    env.step_batch = broken
    with pytest.raises(NonFiniteError, match=f"returned {name}=.* from step 40, simulation 1: it is not finite"):
        trainer.run()
    state = read_checkpoint(latest_checkpoint(tmp_path / "run"))
    assert state["updates"] == 2
    assert all(bool(torch.isfinite(value).all()) for value in state["agent"]["policy"].values())
    assert all(bool(torch.isfinite(value).all()) for value in state["agent"]["critic"].values())


def test_nan_in_a_weight_stops_at_the_action_it_gives(tmp_path: Path) -> None:
    trainer = control_run(tmp_path / "run")
    update = trainer.agent.update

    def poison(*args: Any) -> Any:
        out = update(*args)
        if trainer.agent.version == 2:
            trainer.agent.policy.get_parameter("trunk.0.weight").data[0, 0] = float("nan")
        return out

    trainer.agent.update = poison
    with pytest.raises(NonFiniteError, match=r"the policy's action is not finite .simulation 0, environment step 64"):
        trainer.run()
    assert latest_checkpoint(tmp_path / "run").name == "step_000000000002"


def test_nan_in_a_gradient_names_the_weight_and_the_step(tmp_path: Path) -> None:
    trainer = control_run(tmp_path / "run")
    policy: GaussianPolicy = trainer.agent.policy
    calls: list[int] = []

    def poison(gradient: torch.Tensor) -> torch.Tensor:
        calls.append(0)
        return gradient * float("nan") if len(calls) == 3 else gradient

    policy.get_parameter("trunk.0.weight").register_hook(poison)
    with pytest.raises(NonFiniteError, match=r"gradient of policy.* is not finite at optimiser step 2"):
        trainer.run()
    state = read_checkpoint(latest_checkpoint(tmp_path / "run"))
    assert state["updates"] == 3
    assert all(bool(torch.isfinite(value).all()) for value in state["agent"]["policy"].values())


def test_nan_in_a_language_model_is_named_and_saved(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    trainer = Job(compose([*COMMON, *LANGUAGE, "steps=40", "checkpoint_every=0"])).make_trainer(tmp_path / "run")
    update = trainer.agent.update

    def poison(*args: Any) -> Any:
        out = update(*args)
        if trainer.agent.version == 2:
            next(trainer.agent.policy.parameters()).data[:] = float("nan")
        return out

    trainer.agent.update = poison
    with pytest.raises(
        NonFiniteError, match=r"the policy's log-prob of a sampled token is not finite .*conversation 16"
    ):
        trainer.run()
    assert checkpoints(tmp_path / "run" / "checkpoints")


def test_nan_through_the_command_line_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    run_it = ["train", *PPO, *COMMON, "steps=96", "agent.lr=1e30", f"run_dir={run}"]
    assert "at optimiser step 1; the step was not taken" in refused(run_it, capsys)
    assert latest_checkpoint(run)
    assert json.loads((run / "meta.json").read_text())["status"] == "failed"


# --------------------------------------------------------------------------------------------- answers too long


def test_answers_beyond_the_budget_are_counted_as_truncated(tmp_path: Path) -> None:
    run = train(compose([*COMMON, *LANGUAGE, "env.max_turn_tokens=1", "steps=16", f"run_dir={tmp_path / 'run'}"]))
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    logged = [row["rollout/truncated"] for row in rows if "rollout/truncated" in row]
    assert logged and max(logged) > 0.5  # a fresh model seldom stops at its first token
    assert all(row["rollout/reward"] == 0.0 for row in rows if "rollout/reward" in row)
    assert rows[-1]["eval/truncated"] + 1e-6 >= 0.5


# --------------------------------------------------------------------------------------------- Ctrl-C


def test_ctrl_c_saves_and_exits_130_and_resume_finishes(tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = [sys.executable, "-m", "unified_rl.cli", "train", *PPO, *COMMON, "steps=3e6", "checkpoint_every=0"]
    child = subprocess.Popen(
        [*command, "log_every=32", f"run_dir={run}"], stderr=subprocess.PIPE, text=True, env={**os.environ}
    )
    deadline = time.monotonic() + 120
    while child.poll() is None and time.monotonic() < deadline:
        if (run / "metrics.jsonl").is_file() and (run / "metrics.jsonl").read_text().count("\n") > 3:
            break
        time.sleep(0.05)
    child.send_signal(signal.SIGINT)
    _, error = child.communicate(timeout=120)
    assert child.returncode == 130 and error.strip().splitlines()[-1] == "unified-rl: interrupted"
    assert json.loads((run / "meta.json").read_text())["status"] == "interrupted"
    updates = read_checkpoint(latest_checkpoint(run))["updates"]
    assert updates >= 3
    resume(str(run), steps=(updates + 1) * 32)
    assert json.loads((run / "meta.json").read_text())["status"] == "finished"
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["update"] for row in rows] == list(range(updates + 2))  # none twice, none missing


# --------------------------------------------------------------------------------------------- the user's own code


MINE = '''
    """A walk on a line: be near the origin."""
    import torch
    from torchrl.data import Bounded, Composite, Unbounded
    from torchrl.envs import EnvBase
    from tensordict import TensorDict


    class Walk(EnvBase):
        def __init__(self, num_envs: int = 1, seed: int = 0, length: int = 10) -> None:
            super().__init__(batch_size=[num_envs])
            self.length = length
            self.observation_spec = Composite(observation=Unbounded((num_envs, 2)), shape=(num_envs,))
            self.action_spec = Bounded(-1.0, 1.0, (num_envs, 1))
            self.reward_spec = Unbounded((num_envs, 1))
            self.set_seed(seed)

        def _set_seed(self, seed):
            self.rng = torch.Generator().manual_seed(seed or 0)

        def _flags(self, ended):
            return {"terminated": torch.zeros_like(ended), "truncated": ended, "done": ended}

        def _reset(self, td=None, **options):
            batch = self.batch_size
            start = torch.cat([torch.randn(*batch, 1, generator=self.rng), torch.zeros(*batch, 1)], -1)
            ended = torch.zeros(*batch, 1, dtype=torch.bool)
            return TensorDict({"observation": start, **self._flags(ended)}, batch)

        def _step(self, td):
            place = td["observation"] + torch.cat([td["action"] * 0.3, torch.ones_like(td["action"])], -1)
            ended = place[:, 1:] >= self.length
            out = {"observation": place, "reward": -place[:, :1].abs(), **self._flags(ended)}
            return TensorDict(out, self.batch_size)


    def make_walk(num_envs: int = 1, seed: int = 0, length: int = 10) -> Walk:
        return Walk(num_envs, seed, length)
'''


def test_the_users_environment_trains_with_allow_and_is_refused_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "my_walks.py").write_text(textwrap.dedent(MINE))
    (tmp_path / "groups" / "env").mkdir(parents=True)
    header = (
        "# @package _global_\n# A walk\ndefaults:\n  - override /rollout: control\n  - override /policy: gaussian\n"
    )
    (tmp_path / "groups" / "env" / "walk.yaml").write_text(header + "env: {_target_: my_walks.make_walk, length: 12}\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    argv = ["train", "env=walk", "agent=ppo", "--config-dir", "groups", *COMMON, "steps=256", "run_dir=run"]
    argv += ["rollout.num_envs=4", "rollout.horizon=32", "agent.minibatch=64"]
    assert "--allow my_walks" in refused(argv, capsys)
    assert not (tmp_path / "run").exists()
    assert cli.main([*argv, "--allow", "my_walks"]) == 0
    rows = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["steps"] == 256 and rows[-1]["rollout/length"] == 12.0 and rows[-1]["eval/length"] == 12.0
    assert "--allow my_walks" in refused(["evaluate", "run"], capsys)
    assert cli.main(["evaluate", "run", "--allow", "my_walks"]) == 0
