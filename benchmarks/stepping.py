"""Environment stepping: the batched MuJoCo environment against a bare physics loop and Gymnasium's SyncVectorEnv.

All contestants simulate the same number of copies of one task, act with the same uniform random actions, reset ended
episodes, and take turns in short rounds within one process. What is compared is control steps per CPU second.

    python benchmarks/stepping.py --csv stepping.csv
"""

from __future__ import annotations

import argparse
import csv
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import gymnasium
import mujoco
import numpy as np
import torch

from unified_rl.envs.control import TASKS, make_mujoco

TARGETS = {"HalfCheetah-v5": (0.95, 1.4), "Ant-v5": (0.95, 1.3)}
Round = Callable[[np.ndarray], None]


def bare_loop(name: str, count: int) -> Round:
    """The floor: ``mj_step`` on each of ``count`` simulations, with resets at Gymnasium's bounds, reading nothing."""
    task = TASKS[name]()
    model = task.load_model()
    data = [mujoco.MjData(model) for _ in range(count)]
    height = [d.qpos[2:3] for d in data] if name == "Ant-v5" else None
    rng, elapsed = np.random.default_rng(0), 0

    def reset(d: mujoco.MjData) -> None:
        mujoco.mj_resetData(model, d)
        qpos, qvel = task.initial(model, rng, 1)
        d.qpos[:], d.qvel[:] = qpos[0], qvel[0]
        mujoco.mj_forward(model, d)

    for d in data:
        reset(d)

    def run(actions: np.ndarray) -> None:
        nonlocal elapsed
        for action in actions:
            elapsed += 1
            for index, d in enumerate(data):
                d.ctrl[:] = action[index]
                mujoco.mj_step(model, d, task.frame_skip)
                if elapsed % task.max_steps == 0 or (height and not 0.2 <= height[index][0] <= 1.0):
                    reset(d)

    return run


def batched(name: str, count: int) -> Round:
    """Our environment, through its native protocol."""
    env = make_mujoco(name, count)
    env.reset_batch(seed=0)

    def run(actions: np.ndarray) -> None:
        for action in torch.from_numpy(actions):
            env.step_batch(action)

    return run


def vector_env(name: str, count: int) -> Round:
    """Gymnasium's synchronous vector environment."""
    env = gymnasium.make_vec(name, count, vectorization_mode="sync")
    env.reset(seed=0)

    def run(actions: np.ndarray) -> None:
        for action in actions:
            env.step(action)

    return run


CONTESTANTS: dict[str, Callable[[str, int], Round]] = {"bare": bare_loop, "batched": batched, "gymnasium": vector_env}


def measure(name: str, count: int, rounds: int, seconds: float) -> list[dict[str, float]]:
    """CPU seconds of each contestant in each interleaved round of the same actions."""
    runs = {key: make(name, count) for key, make in CONTESTANTS.items()}
    bound = make_mujoco(name).policy_inputs()["action_high"]
    rng = np.random.default_rng(1)
    speed = 30_000 if name == "HalfCheetah-v5" else 4_000
    steps = max(10, int(seconds * speed / count))
    rows = []
    for index in range(rounds + 1):
        actions = (rng.uniform(-1, 1, (steps, count, len(bound))) * bound).astype(np.float32)
        row = {}
        keys = list(runs)
        for key in keys[index % 3 :] + keys[: index % 3]:
            start = time.process_time()
            runs[key](actions)
            row[key] = steps * count / (time.process_time() - start)
        if index:  # the first round warms up
            rows.append(row)
    return rows


def main() -> None:
    """Prints one table of ratios; writes every round to ``--csv``."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--csv", type=Path, help="where to write every round")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=0.3, help="rough CPU time of one turn")
    args = parser.parse_args()
    torch.set_num_threads(1)
    table: list[list[object]] = []
    print(
        f"{'task':16s} {'K':>3s} {'steps/CPU-s':>12s} {'/bare':>7s} {'target':>7s} {'/gymnasium':>11s} {'target':>7s}"
    )
    for name, (floor, peer) in TARGETS.items():
        for count in (16, 64):
            rows = measure(name, count, args.rounds, args.seconds)
            middle = {key: statistics.median(row[key] for row in rows) for key in CONTESTANTS}
            ratio = {key: statistics.median(row["batched"] / row[key] for row in rows) for key in ("bare", "gymnasium")}
            print(
                f"{name:16s} {count:3d} {middle['batched']:12,.0f} {ratio['bare']:7.2f} {floor:7.2f} "
                f"{ratio['gymnasium']:11.2f} {peer:7.2f}",
                flush=True,
            )
            table += [[name, count, index, *(round(row[key]) for key in CONTESTANTS)] for index, row in enumerate(rows)]
    if args.csv:
        with args.csv.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["task", "simulations", "round", *(f"{key}_steps_per_cpu_second" for key in CONTESTANTS)])
            writer.writerows(table)


if __name__ == "__main__":
    main()
