"""One process against several: ``python benchmarks/learner.py [--processes 2 4] [--rounds 5] [--csv FILE]``.

``--learner fsdp`` measures models in pieces, of the language runs alone.

Whole runs of either, in turn, each a command of its own. An update is timed in process 0 from the moment when its rows
are collected to the end of its last optimiser step, so sending the rows is part of it and collecting them is not; the
first updates are left out. A ratio is the median over the rounds. Run it where as many cores are idle as processes are
compared: on busy ones it measures the others.

Beside each stands the formula of docs/learners.md, ``max(1, N / C) (r + d / N) + m``. Its ``r + d / N`` is an update in
one process that passes the share of one of N and takes what the others would send for given; ``m`` are the messages of
such an update, sent by N processes that do nothing else. Both are measured in the same rounds.
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
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from unified_rl.shard import Shard

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


class Pretended(Shard):
    """Process 0 of several that are not there: messages bring its own values back, and are noted."""

    def __init__(self, world: int) -> None:
        super().__init__(0, world)
        self.sent: list[tuple[str, int]] = []

    def all_gather(self, x: torch.Tensor) -> list[torch.Tensor]:
        """As of :class:`Shard`."""
        self.sent.append(("gather", x.nbytes))
        return [x] * self.world

    def all_reduce(self, x: torch.Tensor) -> None:
        """As of :class:`Shard`."""
        self.sent.append(("reduce", x.nbytes))


class Clock:
    """A callback that times updates; with the variable ``PRETENDED`` set, those of a process of so many."""

    metrics = (SECONDS,)

    def __init__(self) -> None:
        self.start, self.rows = 0.0, 0
        self.shard = Pretended(int(os.environ.get("PRETENDED", 1)))

    def on_rollout_end(self, trainer: Any, rows: Any, metrics: Any) -> None:
        """The rows are there."""
        self.rows = sum(x.nbytes for x in rows.values())
        self.start = time.perf_counter()

    def on_update_end(self, trainer: Any, metrics: Any) -> None:
        """The update is made."""
        trainer.add_metrics({SECONDS: time.perf_counter() - self.start})
        if self.shard.world == 1:
            return
        if trainer.updates == 1:  # only now, since the first update checks that log-probs are those of the rollout
            trainer.agent.share(self.shard)
        else:
            sent = [("broadcast", self.rows), *self.shard.sent]
            (Path(trainer.folder) / "sent.json").write_text(json.dumps(sent))
        self.shard.sent = []


def run(words: list[str], processes: int, updates: int, folder: Path, learner: str, pretended: int = 1) -> float:
    """Median seconds of an update of one run."""
    given = [*words, *QUIET, f"updates={updates}", f"run_dir={folder}", "callbacks=learner:Clock", "--allow", "learner"]
    start = ["launch", "--processes", str(processes), "train", f"learner={learner}"] if processes > 1 else ["train"]
    environ = {**os.environ, "PYTHONPATH": str(Path(__file__).parent), "PRETENDED": str(pretended)}
    subprocess.run(
        [sys.executable, "-m", "unified_rl.cli", *start, *given], check=True, env=environ, stdout=subprocess.DEVNULL
    )
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return statistics.median([row[SECONDS] for row in rows if SECONDS in row][SKIPPED:])


def exchange(sent: Sequence[tuple[str, int]], times: int) -> None:
    """Sends the messages of an update so many times, and prints the median of the seconds (process 0)."""
    dist.init_process_group("gloo")
    world, seconds = dist.get_world_size(), []
    own = [torch.zeros(size, dtype=torch.uint8) for _, size in sent]
    others = [[torch.zeros_like(x) for _ in range(world)] if kind == "gather" else [] for (kind, _), x in
              zip(sent, own, strict=True)]  # fmt: skip
    for _ in range(times):
        dist.barrier()
        begin = time.perf_counter()
        for (kind, _), x, found in zip(sent, own, others, strict=True):
            if kind == "gather":
                dist.all_gather(found, x)
            elif kind == "reduce":  # gloo adds numbers up, so let them be such
                dist.all_reduce(x.view(torch.float32) if x.numel() % 4 == 0 else x)
            else:
                dist.broadcast(x, 0)
        seconds.append(time.perf_counter() - begin)
    if dist.get_rank() == 0:
        print(statistics.median(seconds))
    dist.destroy_process_group()


def messages(file: Path, processes: int) -> float:
    """Seconds that so many processes need for the messages of an update."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    environ = {**os.environ, "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run([*command, __file__, "--exchange", str(file)], env=environ, stdout=subprocess.PIPE,
                          stderr=subprocess.DEVNULL, check=True, text=True)  # fmt: skip
    return float(done.stdout.split()[-1])


def compared(
    case: str, words: list[str], counts: Sequence[int], rounds: int, updates: int, learner: str
) -> Iterator[dict[str, Any]]:
    """One process and several in turn, beginning with another one in every round, and what the formula needs.

    The formula is of ``data_parallel``: of models in pieces it has nothing.
    """
    sides = [1, *counts, *(-count for count in counts if learner == "data_parallel")]
    """Of processes; below 0 of those of which one is pretended."""
    found: dict[int, list[float]] = {side: [] for side in sides}
    sent: dict[int, list[float]] = {count: [] for count in counts}
    with tempfile.TemporaryDirectory() as made:
        for number in range(rounds):
            at = number % len(sides)
            for side in sides[at:] + sides[:at]:
                folder = Path(made) / f"{number}-{side}"
                found[side].append(run(words, max(side, 1), updates, folder, learner, pretended=max(-side, 1)))
                if side < 0:
                    sent[-side].append(messages(folder / "sent.json", -side))
    ms = {side: 1e3 * statistics.median(seconds) for side, seconds in found.items()}
    for count in counts:
        ratio = statistics.median(one / several for one, several in zip(found[1], found[count], strict=True))
        line = {
            "case": case, "learner": learner, "processes": count, "ms_one": round(ms[1], 2),
            "ms_several": round(ms[count], 2), "times_as_fast": round(ratio, 3),
        }  # fmt: skip
        if sent[count]:
            share, message = ms[-count], 1e3 * statistics.median(sent[count])
            formula = max(1.0, count / (os.cpu_count() or 1)) * share + message
            line |= {"ms_share": round(share, 2), "ms_messages": round(message, 2), "ms_formula": round(formula, 2)}
        yield {**line, "rounds": rounds, "updates": updates}


def main() -> None:
    """Prints how many times as fast an update is."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--learner", choices=("data_parallel", "fsdp"), default="data_parallel")
    parser.add_argument("--processes", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--updates", type=int, default=12, help="of a run")
    parser.add_argument("--cases", nargs="+", default=[""], help="beginnings of the names of those to run")
    parser.add_argument("--small", action="store_true", help="sizes of seconds, to try the benchmark itself")
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--exchange", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.exchange:
        exchange(json.loads(args.exchange.read_text()), times=20)
        return
    table = []
    for case, words in (SMALL if args.small else CASES).items():
        if not case.startswith(tuple(args.cases)):
            continue
        if args.learner == "fsdp" and "policy=causal_lm_tiny" not in words:
            continue  # of language models
        for line in compared(case, words, args.processes, args.rounds, args.updates, args.learner):
            table.append(line)
            told = f"{line['times_as_fast']:.2f} times as fast in {line['processes']} processes"
            spent = f"{line['ms_one']} ms and {line['ms_several']} ms an update"
            spent += f", by the formula {line['ms_formula']} ms" if "ms_formula" in line else ""
            print(f"{case}: {told} ({spent})", flush=True)
    if args.csv:
        with args.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(table[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(table)


if __name__ == "__main__":
    main()
