"""Whole runs on every device at hand: warm start, training, evaluation, checkpoint, resume."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from unified_rl.config import compose
from unified_rl.training.run import evaluate_run, resume, train

RUNS = {
    "flow after demonstrations": [
        "env=two_route",
        "policy=flow",
        "agent=policy_gradient",
        "correction=decoupled_ppo",
        "warm_start=demonstrations",
        "warm_start.stages=[{updates: 3}]",
        "warm_start.dataset=256",
        "rollout.num_envs=4",
        "rollout.horizon=4",
        "rollout.staleness=1",
        "steps=128",
    ],
    "language model after imitation, in bfloat16": [
        "env=chain_mod",
        "policy=causal_lm_tiny",
        "policy.autocast=true",
        "agent=policy_gradient",
        "correction=grpo",
        "warm_start=chain_of_thought",
        "warm_start.stages=[{style: chain, updates: 3}]",
        "rollout.prompts=2",
        "rollout.group_size=4",
        "steps=16",
    ],
    "sac": ["env=inverted_pendulum", "agent=sac", "agent.learning_starts=8", "rollout.random_steps=8", "steps=16"],
}


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("run", list(RUNS))
def test_a_run_trains_evaluates_and_goes_on_from_its_checkpoint(run: str, device: str, tmp_path: Path) -> None:
    overrides = [*RUNS[run], f"device={device}", "eval_episodes=4", "log_every=1", "seed=2", f"run_dir={tmp_path}"]
    folder = train(compose(overrides), progress=False)
    budget = rows_of(folder)[-1]["steps"]
    resume(str(folder), steps=2 * budget, progress=False)
    rows = rows_of(folder)
    assert rows[-1]["steps"] == 2 * budget and [r["update"] for r in rows] == sorted({r["update"] for r in rows})
    assert evaluate_run(str(folder))["eval/score"] == pytest.approx(rows[-1]["eval/score"], abs=1e-6)
