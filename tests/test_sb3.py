"""Stable-Baselines3 agents under our trainer: logged, evaluated, recorded, and refused where they cannot do it."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import torch

from unified_rl import cli
from unified_rl.agents.sb3 import SB3Agent
from unified_rl.config import compose
from unified_rl.envs.control import ActionChunk, GymnasiumEnv
from unified_rl.errors import ConfigError
from unified_rl.replay import read_rows
from unified_rl.training.run import evaluate_run, train
from unified_rl.training.settings import TrainSettings
from unified_rl.training.trainer import Trainer

OPTIONS = {
    "sac": ["agent.options={learning_starts: 50, batch_size: 16, policy_kwargs: {net_arch: [16]}}"],
    "ppo": ["agent.num_envs=2", "agent.options={n_steps: 50, batch_size: 20, n_epochs: 1}"],
}


@pytest.fixture(scope="module", params=["sac", "ppo"])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param) / "run"
    common = ["env=inverted_pendulum", "steps=200", "eval_every=100", "eval_episodes=2", "progress=false"]
    overrides = [f"agent=sb3_{request.param}", "agent.slice_steps=100", *OPTIONS[request.param]]
    return train(compose([*common, *overrides, f"run_dir={folder}"]))


def test_nothing_is_left_among_temporary_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    agent = SB3Agent(None, GymnasiumEnv("Pendulum-v1"), "a2c", slice_steps=10)
    assert any(key.startswith("sb3/") for key in agent.update())
    assert not list(tmp_path.iterdir())


def test_evaluations_and_their_own_numbers_are_logged(run: Path) -> None:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["steps"] for row in rows if "eval/score" in row] == [0, 100, 200]
    assert any(key.startswith("sb3/") for key in rows[-1])


def test_the_policy_of_the_checkpoint_is_what_is_evaluated(run: Path) -> None:
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert evaluate_run(str(run))["eval/score"] == pytest.approx(last["eval/score"])


def test_a_dataset_is_recorded_from_it(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["evaluate", str(run), "--record", str(tmp_path / "rows")]) == 0
    assert "recorded rows" in capsys.readouterr().out
    rows = read_rows(tmp_path / "rows")
    assert rows.numel() >= 2048 and rows["observation"].shape[-1] == 4 and rows["action"].shape[-1] == 1
    assert bool(torch.isfinite(rows["action"]).all()) and bool(rows["terminated"].any())


def test_resume_is_refused_in_one_line(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", f"resume={run}", "steps=400"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "cannot be resumed exactly" in error


class Paid(gymnasium.Env):
    """Pays 2 a step for nine steps."""

    observation_space = gymnasium.spaces.Box(-1, 1, (1,), np.float32)
    action_space = gymnasium.spaces.Box(-1, 1, (1,), np.float32)

    def reset(self, *, seed=None, options=None):  # type: ignore[no-untyped-def]
        return np.zeros(1, np.float32), {}

    def step(self, action):  # type: ignore[no-untyped-def]
        return np.zeros(1, np.float32), 2.0, False, False, {"is_success": True}


if "Paid-v0" not in gymnasium.registry:
    gymnasium.register("Paid-v0", entry_point=Paid, max_episode_steps=9)


@pytest.mark.parametrize(
    ("algorithm", "options", "reported"),
    [
        ("ppo", {"n_steps": 32, "batch_size": 32, "n_epochs": 1}, [0, 128, 200]),  # slices of two rollouts of 2 x 32
        ("sac", {"learning_starts": 500}, [0, 100, 200]),
        ("sac", {"learning_starts": 500, "n_steps": 3}, [0, 100, 200]),  # of returns, not of rollouts
    ],
)
@pytest.mark.parametrize("chunk", [1, 4])
def test_baselines_make_the_steps_that_they_report_and_no_more(
    algorithm: str, options: dict[str, int], reported: list[int], chunk: int
) -> None:
    env = GymnasiumEnv("Paid-v0", num_envs=2)
    chunked = env if chunk == 1 else ActionChunk(env, chunk, gamma=0.5)
    agent = SB3Agent(None, chunked, algorithm, 2, 100 * chunk, options=options, budget=200 * chunk)
    trainer = Trainer(TrainSettings(steps=200 * chunk, eval_every=1), None, agent, None, None, dict)
    trainer.run()
    rows = trainer.log.rows  # type: ignore[union-attr]
    assert agent.model.num_timesteps == 200 and agent.steps == agent._vec.steps == rows[-1]["steps"]
    if chunk == 1:
        assert [row["steps"] for row in rows] == reported
    else:  # nine steps are chunks of 4, 4 and 1: 200 decisions in two copies are 33 episodes each, and a chunk
        assert agent.steps == 2 * (33 * 9 + 4)
    ended = sum(row.get("rollout/episodes", 0) for row in rows)
    assert ended == 2 * (100 // 9 if chunk == 1 else 33)
    assert all(row["rollout/return"] == 18.0 and row["rollout/length"] == 9.0 for row in rows[1:]), "undiscounted"
    assert rows[-1]["rollout/success"] == 1.0


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (
            ["env=inverted_pendulum", "agent=sb3_sac", "agent.algorithm=dqnn"],
            "'dqnn'; it must be one of 'sac', 'ppo'",
        ),
        (["env=chain_mod", "agent=sb3_sac"], "control environment"),
        (["env=gymnasium", "env.id=CartPole-v1", "agent=sb3_sac"], "discrete"),
        (["env=inverted_pendulum", "agent=sb3_sac", "agent.options={batchsize: 3}"], "batchsize"),
    ],
)
def test_settings_that_do_not_fit_are_one_line(
    overrides: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["steps=100", "eval_episodes=2", "progress=false", f"run_dir={tmp_path / 'run'}"]
    assert cli.main(["train", *overrides, *common]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and words in error


def test_normalisation_is_that_of_vec_normalize_and_is_loaded_with_the_policy(tmp_path: Path) -> None:
    options = (
        "agent.options={n_steps: 64, batch_size: 32, n_epochs: 1, policy_kwargs: {activation_fn: relu, net_arch: [8]}}"
    )
    words = ["env=inverted_pendulum", "agent=sb3_ppo", "agent.normalize=true", "agent.slice_steps=64", options]
    run = train(compose([*words, "steps=128", "eval_episodes=2", "progress=false", f"run_dir={tmp_path / 'run'}"]))
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert evaluate_run(str(run))["eval/score"] == pytest.approx(last["eval/score"])

    agent = SB3Agent(None, GymnasiumEnv("Pendulum-v1"), "ppo", slice_steps=64, normalize=True, options={"n_steps": 64})
    seen = torch.tensor([[0.3, -0.2, 4.0], [1.0, 0.0, -90.0]])
    fresh = agent.policy.standardized(seen)
    agent.update()
    vec = agent.model.get_env()
    assert vec is not None and vec.ret_rms.var != 1  # type: ignore[attr-defined]
    expected = torch.from_numpy(vec.normalize_obs(seen.numpy()))  # type: ignore[attr-defined]
    torch.testing.assert_close(agent.policy.standardized(seen), expected, atol=1e-6, rtol=1e-6)
    assert not torch.allclose(fresh, expected)
    action = agent.model.predict(expected.numpy(), deterministic=True)[0]
    torch.testing.assert_close(agent.policy.sample(seen, deterministic=True)["action"], torch.from_numpy(action))


def test_an_activation_is_named_and_an_unknown_name_is_refused() -> None:
    env = GymnasiumEnv("Pendulum-v1")
    agent = SB3Agent(None, env, "ppo", options={"policy_kwargs": {"activation_fn": "elu"}})
    assert any(isinstance(module, torch.nn.ELU) for module in agent.policy.modules())
    with pytest.raises(ConfigError, match="activation 'elo' is unknown"):
        SB3Agent(None, env, "ppo", options={"policy_kwargs": {"activation_fn": "elo"}})
