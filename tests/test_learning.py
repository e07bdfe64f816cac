"""Learning, small and seeded: each test trains for seconds and asks for a clear improvement."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from unified_rl.config import compose
from unified_rl.training.run import train

pytestmark = pytest.mark.thorough

COMMON = ["progress=false", "checkpoint_every=0", "eval_every=0"]
REASONER = [
    "env=chain_mod",
    "env.modulus=5",
    "env.terms=4",
    "policy=causal_lm_tiny",
    "agent=policy_gradient",
    "correction=dapo",
]
RL = ["agent.lr=6e-4", "eval_episodes=256"]
STAGES = (
    "warm_start.stages=[{style: chain, until_loss: 0.05, updates: 4000, lr: 2e-3},"
    "{style: mixture, updates: 120, lr: 4e-4}]"
)


def rows_of(folder: Path, overrides: list[str]) -> list[dict[str, Any]]:
    run = train(compose([*COMMON, *overrides, f"run_dir={folder}"]))
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that knows both styles and mostly answers at once."""
    folder = tmp_path_factory.mktemp("warm") / "run"
    rows_of(folder, [*REASONER, "warm_start=chain_of_thought", STAGES, "steps=256", "agent.lr=0.0", "eval_episodes=2"])
    return folder


def test_reward_alone_teaches_a_reasoner_to_think_aloud(warm: Path, tmp_path: Path) -> None:
    start = ["warm_start=from_run", f"warm_start.run={warm}"]
    rows = rows_of(tmp_path / "run", [*REASONER, *start, *RL, "steps=7680"])
    first, last = rows[0], rows[-1]
    assert last["eval/accuracy"] > 0.85 and last["eval/accuracy"] - first["eval/accuracy"] >= 0.4
    assert last["eval/length"] > first["eval/length"] + 2.0  # the chain style is 8 tokens, the direct one 3


def test_shuffled_rewards_teach_nothing(warm: Path, tmp_path: Path) -> None:
    start = ["warm_start=from_run", f"warm_start.run={warm}", "env.shuffle_rewards=true"]
    rows = rows_of(tmp_path / "run", [*REASONER, *start, *RL, "steps=5120"])
    assert rows[-1]["eval/accuracy"] - rows[0]["eval/accuracy"] < 0.15


def test_ppo_balances_a_pendulum(tmp_path: Path) -> None:
    sizes = ["rollout.num_envs=8", "rollout.horizon=64", "agent.minibatch=128", "agent.epochs=8", "agent.lr=3e-3"]
    rows = rows_of(tmp_path / "run", ["env=inverted_pendulum", "agent=ppo", *sizes, "steps=8192", "eval_episodes=8"])
    assert rows[-1]["eval/return"] > 3 * rows[0]["eval/return"] > 0


def test_sac_balances_a_pendulum(tmp_path: Path) -> None:
    sizes = ["policy.hidden=[32,32]", "agent.critic_hidden=[32,32]", "agent.batch_size=64", "agent.lr=2e-3"]
    start = ["rollout.random_steps=300", "agent.learning_starts=300", "steps=2000", "eval_episodes=8"]
    rows = rows_of(tmp_path / "run", ["env=inverted_pendulum", "agent=sac", *sizes, *start])
    assert rows[-1]["eval/return"] > 4 * rows[0]["eval/return"] > 0


def test_a_cloned_flow_policy_improves_by_policy_gradient(tmp_path: Path) -> None:
    clone = ["policy=flow", "warm_start=demonstrations", "warm_start.stages=[{updates: 300, lr: 3.0e-3}]"]
    sizes = ["rollout.num_envs=64", "rollout.horizon=8", "agent.epochs=2", "agent.minibatch=256"]
    tuned = ["agent.lr=3e-4", "agent.lam=0.9", "agent.value_coef=0.25", "agent.max_grad_norm=0.5", "correction=ppo"]
    fair = ["steps=61440", "eval_episodes=128", "eval_deterministic=false"]
    rows = rows_of(tmp_path / "run", ["env=two_route", "agent=policy_gradient", *clone, *sizes, *tuned, *fair])
    assert rows[-1]["eval/return"] > rows[0]["eval/return"] + 0.15
    assert rows[-1]["eval/success"] > rows[0]["eval/success"] + 0.1
