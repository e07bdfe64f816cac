"""Collection with a policy: the own rollout loop against bare physics with the same policy, and a TorchRL collector.

    python benchmarks/collection.py [--csv FILE] [--rounds 9] [--seconds 0.4]

HalfCheetah, 16 simulations, Gaussian policy with a 64x64 tanh network. The three take turns in short rounds within one
process; what is compared is control steps per CPU second. The bare loop reads the observation, calls the policy's
``sample`` on the batch (noise and log-probs included) and runs ``mj_step``; it computes no reward and stores nothing.
``floor`` is the same loop with the policy's arithmetic written out in plain torch, no log-prob kept.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import mujoco
import numpy as np
import torch
from torch import Tensor
from torchrl.collectors import Collector
from torchrl.envs import DoubleToFloat, GymEnv, SerialEnv, TransformedEnv

from unified_rl.envs.control import TASKS, make_mujoco
from unified_rl.policies.gaussian import GaussianPolicy
from unified_rl.rollout import ControlRollout

NAME = "HalfCheetah-v5"
Turn = Callable[[int], None]
Act = Callable[[Tensor], Tensor]


def make_policy() -> GaussianPolicy:
    """The default policy: 64x64 tanh, free standard deviation."""
    return GaussianPolicy(**make_mujoco(NAME).policy_inputs())


def own_loop(count: int, horizon: int = 128) -> Turn:
    """The package's rollout: finite checks, episode bookkeeping and every key of the record."""
    rollout = ControlRollout(
        make_mujoco(NAME, count), make_policy(), 0.99, torch.Generator().manual_seed(0), num_envs=count, horizon=horizon
    )

    def run(steps: int) -> None:
        for _ in range(steps // horizon):
            rollout.collect(0)

    return run


def physics_loop(count: int, act: Act) -> Turn:
    """``mj_step`` on each simulation, with an action for the whole batch a step."""
    task = TASKS[NAME]()
    model = task.load_model()
    data = [mujoco.MjData(model) for _ in range(count)]
    parts = [part for d in data for part in (d.qpos[1:], d.qvel)]
    observation, rng, elapsed = np.zeros((count, 17)), np.random.default_rng(0), 0

    def reset() -> None:
        for d, qpos, qvel in zip(data, *task.initial(model, rng, count), strict=True):
            mujoco.mj_resetData(model, d)
            d.qpos[:], d.qvel[:] = qpos, qvel

    reset()

    @torch.no_grad()
    def run(steps: int) -> None:
        nonlocal elapsed
        for _ in range(steps):
            np.concatenate(parts, out=observation.reshape(-1))
            action = act(torch.from_numpy(observation.astype(np.float32))).numpy()
            for d, ctrl in zip(data, action, strict=True):
                d.ctrl[:] = ctrl
                mujoco.mj_step(model, d, task.frame_skip)
            elapsed += 1
            if elapsed % task.max_steps == 0:
                reset()

    return run


def sampled(policy: GaussianPolicy) -> Act:
    """The policy's own ``sample``."""
    generator = torch.Generator().manual_seed(0)
    return lambda observation: policy.sample(observation, generator=generator)["action"]


def written_out(policy: GaussianPolicy) -> Act:
    """Mean, noise and clipping in plain torch."""
    network, generator = torch.nn.Sequential(policy.trunk, policy.head), torch.Generator().manual_seed(0)

    def act(observation: Tensor) -> Tensor:
        mean = network(observation)
        noise = torch.randn(mean.shape, generator=generator)
        return torch.addcmul(mean, policy.log_std.exp(), noise).clamp_(-1.0, 1.0)

    return act


def torchrl_collector(count: int, steps: int) -> Turn:
    """TorchRL's in-process collector over a serial batch of Gymnasium environments, with the same policy."""

    def make() -> TransformedEnv:
        return TransformedEnv(GymEnv(NAME), DoubleToFloat(in_keys=["observation"]))

    collector = Collector(SerialEnv(count, make), make_policy(), frames_per_batch=steps * count, total_frames=-1)
    batches = iter(collector)
    return lambda steps: (next(batches), None)[1]


def measure(count: int, rounds: int, seconds: float) -> list[dict[str, float]]:
    """Control steps a CPU second of each contestant in each round."""
    steps = max(1, round(seconds * 20_000 / count / 128)) * 128
    few = max(8, steps // 8)
    turns: dict[str, tuple[Turn, int]] = {
        "own": (own_loop(count), steps),
        "bare": (physics_loop(count, sampled(make_policy())), steps),
        "floor": (physics_loop(count, written_out(make_policy())), steps),
        "torchrl": (torchrl_collector(count, few), few),
    }
    rows, names = [], list(turns)
    for index in range(rounds + 1):
        row = {}
        for name in names[index % 4 :] + names[: index % 4]:
            run, number = turns[name]
            start = time.process_time()
            run(number)
            row[name] = number * count / (time.process_time() - start)
        if index:  # the first round warms up
            rows.append(row)
    return rows


def main() -> None:
    """Prints the ratios; writes every round to ``--csv``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--simulations", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=0.4, help="rough CPU time of one turn of the own loop")
    parser.add_argument("--csv", type=Path, help="where to write every round")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = measure(args.simulations, args.rounds, args.seconds)
    own = statistics.median(row["own"] for row in rows)
    print(f"own loop: {own:,.0f} control steps per CPU second")
    for name, target in (("bare", 0.9), ("floor", 0.9), ("torchrl", 6.0)):
        ratio = statistics.median(row["own"] / row[name] for row in rows)
        print(f"own / {name:8s} {ratio:6.2f}  target {target}  {'met' if ratio >= target else 'MISSED'}", flush=True)
    if args.csv:
        with args.csv.open("w", newline="") as file:
            writer = csv.writer(file)
            names = ("own", "bare", "floor", "torchrl")
            writer.writerow(["simulations", "round", *(f"{name}_steps_per_cpu_second" for name in names)])
            writer.writerows([args.simulations, i, *(round(row[n]) for n in names)] for i, row in enumerate(rows))


if __name__ == "__main__":
    main()
