"""One process against several: ``python benchmarks/learner.py [--processes 2] [--rounds 5] [--csv FILE]``.

``--learner fsdp`` measures models in pieces, of the language runs alone.

Whole runs of either, in turn, each a command of its own. An update is timed in process 0 from the moment when its rows
are collected to the end of its last optimiser step, so sending the rows is part of it and collecting them is not; the
first updates are left out. A ratio is the median over the rounds. Run it where as many cores are idle as processes are
compared: on busy ones it measures the others.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

SECONDS = "bench/update_seconds"
SKIPPED = 2
"""Updates at the beginning that warm up."""
QUIET = ["progress=false", "logger=[]", "eval_episodes=1", "eval_every=0", "log_every=1", "checkpoint_every=0"]


def model(width: int, layers: int) -> list[str]:
    """Settings of a language model of so many layers."""
    sizes = {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "intermediate_size": 2 * width,
    }
    return [f"policy.config.{key}={value}" for key, value in sizes.items()]


LANGUAGE = ["env=chain_mod", "policy=causal_lm_tiny", "agent=policy_gradient", "rollout.group_size=8"]
SAC = ["agent=sac", "rollout.random_steps=0"]
CASES: dict[str, list[str]] = {
    "GRPO, tiny language model, 128 rows": [*LANGUAGE, "correction=grpo", "rollout.prompts=16"],
    "GRPO, 6 layers of 256, 128 rows": [*LANGUAGE, "correction=grpo", "rollout.prompts=16", *model(256, 6)],
    "the same, 2 epochs of 64, DAPO": [*LANGUAGE, "correction=dapo", "rollout.prompts=16", *model(256, 6),
                                       "agent.epochs=2", "agent.minibatch=64"],
    "PPO, half_cheetah, 16 x 128, 4 epochs": ["env=half_cheetah", "agent=ppo", "rollout.num_envs=16",
                                              "rollout.horizon=128", "agent.epochs=4"],
    "SAC, half_cheetah, ten critics of 512": [*SAC, "env=half_cheetah", "rollout.num_envs=16", "agent.critics=10",
                                              "agent.critic_hidden=[512,512]", "agent.learning_starts=16"],
}  # fmt: skip
SMALL: dict[str, list[str]] = {
    "GRPO, tiny language model, 16 rows": [*LANGUAGE, "correction=grpo", "rollout.prompts=2", *model(32, 1)],
    "PPO, two_route, 4 x 16": ["env=two_route", "agent=ppo", "rollout.num_envs=4", "rollout.horizon=16"],
    "SAC, two_route": [*SAC, "env=two_route", "rollout.num_envs=4", "agent.learning_starts=4", "agent.batch_size=32"],
}


class Clock:
    """A callback that times updates."""

    metrics = (SECONDS,)

    def __init__(self) -> None:
        self.start = 0.0

    def on_rollout_end(self, trainer: Any, rows: Any, metrics: Any) -> None:
        """The rows are there."""
        self.start = time.perf_counter()

    def on_update_end(self, trainer: Any, metrics: Any) -> None:
        """The update is made."""
        trainer.add_metrics({SECONDS: time.perf_counter() - self.start})


def run(words: list[str], processes: int, updates: int, folder: Path, learner: str) -> float:
    """Median seconds of an update of one run."""
    given = [*words, *QUIET, f"updates={updates}", f"run_dir={folder}", "callbacks=learner:Clock", "--allow", "learner"]
    start = ["launch", "--processes", str(processes), "train", f"learner={learner}"] if processes > 1 else ["train"]
    environ = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    subprocess.run(
        [sys.executable, "-m", "unified_rl.cli", *start, *given], check=True, env=environ, stdout=subprocess.DEVNULL
    )
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return statistics.median([row[SECONDS] for row in rows if SECONDS in row][SKIPPED:])


def compared(case: str, words: list[str], processes: int, rounds: int, updates: int, learner: str) -> dict[str, Any]:
    """One process and several in turn, beginning with the other one in every second round."""
    found: dict[int, list[float]] = {1: [], processes: []}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(rounds):
            for count in (1, processes) if number % 2 == 0 else (processes, 1):
                found[count].append(run(words, count, updates, Path(folder) / f"{number}-{count}", learner))
    ratio = statistics.median(one / several for one, several in zip(found[1], found[processes], strict=True))
    ms = {count: round(1e3 * statistics.median(seconds), 2) for count, seconds in found.items()}
    spent = {"ms_one": ms[1], "ms_several": ms[processes], "times_as_fast": round(ratio, 3)}
    return {"case": case, "learner": learner, "processes": processes, **spent, "rounds": rounds, "updates": updates}


def main() -> None:
    """Prints how many times as fast an update is."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--learner", choices=("data_parallel", "fsdp"), default="data_parallel")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--updates", type=int, default=12, help="of a run")
    parser.add_argument("--small", action="store_true", help="sizes of seconds, to try the benchmark itself")
    parser.add_argument("--csv", type=Path)
    args = parser.parse_args()
    table = []
    for case, words in (SMALL if args.small else CASES).items():
        if args.learner == "fsdp" and "policy=causal_lm_tiny" not in words:
            continue  # of language models
        table.append(compared(case, words, args.processes, args.rounds, args.updates, args.learner))
        line = table[-1]
        told = f"{line['times_as_fast']:.2f} times as fast in {args.processes} processes"
        print(f"{case}: {told} ({line['ms_one']} ms and {line['ms_several']} ms an update)", flush=True)
    if args.csv:
        with args.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(table[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(table)


if __name__ == "__main__":
    main()
