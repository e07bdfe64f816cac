"""PPO end to end on HalfCheetah, collecting and updating, against Stable-Baselines3: environment steps a CPU second.

    python benchmarks/ppo_end_to_end.py [--steps 51200] [--seeds 1] [--csv FILE]

Three contestants train side by side in one process, taking turns of 2,048 environment steps: ours (``agent=ppo``),
Stable-Baselines3 at its defaults (one environment, minibatches of 64), and Stable-Baselines3 at our settings (16
environments in its ``DummyVecEnv``, 128 steps each, minibatches of 256, as many epochs, the same networks). A speed
counts only at no worse a return, so each is evaluated afterwards, outside the timing: mean action, the same start
states, by the same code.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from stable_baselines3 import PPO
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.logger import configure

from unified_rl.agents.sb3 import SB3Policy
from unified_rl.config import compose
from unified_rl.envs.control import make_mujoco
from unified_rl.training.evaluation import evaluate_control
from unified_rl.training.run import Job

TURN, SIMULATIONS, EVALUATION_SEED = 2048, 16, 10_007
EQUAL = {"n_steps": TURN // SIMULATIONS, "batch_size": 256}
Contestant = tuple[Callable[[], object], Any]


def ours(seed: int) -> Contestant:
    """One turn is what the trainer does between two looks at the clock: collect, store, update."""
    job = Job(compose(["env=half_cheetah", "agent=ppo", f"seed={seed}", "progress=false"]))
    trainer = job.make_trainer(Path(tempfile.gettempdir()))
    if trainer.per_update != TURN:
        raise SystemExit(f"agent=ppo collects {trainer.per_update} steps an update; a turn here is {TURN}")

    def turn() -> None:
        rows, _ = trainer.rollout.collect(trainer.agent.version)
        trainer.replay.extend(rows)
        trainer.agent.update(trainer.replay)

    return turn, job.policy


def peer(seed: int, simulations: int, **settings: int) -> Contestant:
    """Stable-Baselines3 with its own environments, monitors included, as its helper makes them."""
    model = PPO("MlpPolicy", make_vec_env("HalfCheetah-v5", simulations, seed), seed=seed, device="cpu", **settings)
    model.set_logger(configure(None, []))

    def turn() -> None:
        model.learn(TURN, reset_num_timesteps=model.num_timesteps == 0)

    return turn, SB3Policy(model)


def train(seed: int, steps: int) -> tuple[list[dict[str, float]], dict[str, float]]:
    """Steps a CPU second of every turn, and the return of each at the end."""
    contestants = {"ours": ours(seed), "sb3_default": peer(seed, 1), "sb3_equal": peer(seed, SIMULATIONS, **EQUAL)}
    rows, names = [], list(contestants)
    for index in range(steps // TURN):
        row = {}
        for name in names[index % 3 :] + names[: index % 3]:
            start = time.process_time()
            contestants[name][0]()
            row[name] = TURN / (time.process_time() - start)
        rows.append(row)
    env, stream = make_mujoco("HalfCheetah-v5", 10), torch.Generator().manual_seed(0)
    returns = {
        name: evaluate_control(env, policy, EVALUATION_SEED, stream)["eval/return"]
        for name, (_, policy) in contestants.items()
    }
    return rows, returns


def main() -> None:
    """Prints speeds, ratios and returns; writes every turn and the returns to ``--csv``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=51_200, help="environment steps of each contestant")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--csv", type=Path, help="where to write every turn")
    args = parser.parse_args()
    torch.set_num_threads(1)
    table: list[list[object]] = []
    speeds: list[dict[str, float]] = []
    returns: list[dict[str, float]] = []
    for seed in range(args.seeds):
        rows, score = train(seed, args.steps)
        speeds += rows[1:]  # the first turn warms up
        returns.append(score)
        table += [[seed, (i + 1) * TURN, n, round(v, 1), ""] for i, row in enumerate(rows) for n, v in row.items()]
        table += [[seed, len(rows) * TURN, name, "", round(value, 1)] for name, value in score.items()]
    for name in returns[0]:
        speed = statistics.median(row[name] for row in speeds)
        each = ", ".join(f"{score[name]:.0f}" for score in returns)
        print(f"{name:12s} {speed:8,.0f} steps per CPU second   return after {args.steps:,} steps: {each}")
    for name, target in (("sb3_default", 4.0), ("sb3_equal", 1.5)):
        ratio = statistics.median(row["ours"] / row[name] for row in speeds)
        print(f"ours / {name:12s} {ratio:5.2f}  target {target}  {'met' if ratio >= target else 'MISSED'}")
    if args.csv:
        with args.csv.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["seed", "steps", "contestant", "steps_per_cpu_second", "return"])
            writer.writerows(table)


if __name__ == "__main__":
    main()
