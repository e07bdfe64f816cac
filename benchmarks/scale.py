"""Collection by Ray actors against collection in the run's own process, and against the formula of docs/scale.md.

    python benchmarks/scale.py [--csv FILE] [--rounds 5] [--updates 40] [--small]

PPO in HalfCheetah (16 simulations, 128 steps, one epoch) and DAPO with a 0.5M model on sums modulo (16 prompts, 8
samples), each in-process, with one actor at bounds 0 and 1, and with two at bound 2. They take turns in rounds; a turn
makes some updates untimed until as many batches are under way as the bound allows, then the timed ones, and waits for
what is under way. Rates are batches a second of wall time, so other load on the machine meets them all and shows.

What the formula needs is measured in the same rounds: ``g``, ``u``, ``p`` and ``t`` at bound 0, CPU seconds in-process.
"""

from __future__ import annotations

import argparse
import csv
import os
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from unified_rl.config import compose
from unified_rl.training.run import Job

COMMON = ("updates=1000000", "progress=false", "logger=[]", "eval_episodes=1", "samples_rows=0")
RUNS = {
    "control": ("env=half_cheetah", "agent=ppo", "agent.epochs=1", "rollout.num_envs=16", "rollout.horizon=128"),
    "language": ("env=chain_mod", "policy=causal_lm_tiny", "correction=dapo", "rollout.prompts=16",
                 "rollout.group_size=8"),
}  # fmt: skip
SMALL = {
    "control": ("rollout.horizon=16",),
    "language": ("rollout.prompts=4", "policy.config.num_hidden_layers=1"),
}
HERE, ALONE = (0, 0), (1, 0)
"""Workers and bound: in-process, and one actor that overlaps nothing."""
SIDES = (HERE, ALONE, (1, 1), (2, 2))


@dataclass
class Side:
    """One way to collect, and what its rounds took.

    Attributes:
        rates: batches a second, one a round.
        parts: seconds by name, one an update.
    """

    workers: int
    bound: int
    trainer: Any
    job: Job
    rates: list[float] = field(default_factory=list)
    parts: dict[str, list[float]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """For the table."""
        return f"{self.workers} actor(s), bound {self.bound}" if self.workers else "in-process"

    def turn(self, updates: int) -> None:
        """One round: fills what may be under way, times, and waits for the rest."""
        for _ in range(self.bound + 2):
            self.trainer.update()
        wall, cpu = time.perf_counter(), time.process_time()
        for _ in range(updates):
            self._update()
        wall = time.perf_counter() - wall
        self.rates.append(updates / wall)
        self._note("cpu", (time.process_time() - cpu) / updates)
        self.trainer.means.pop()
        if self.workers:
            self.trainer.feed.state_dict()

    def _update(self) -> None:
        """What :meth:`Trainer.update` does, by parts."""
        trainer, times = self.trainer, [time.perf_counter()]
        trainer._admit()
        times.append(time.perf_counter())
        pending = trainer.feed._now.open[0].pending if (self.workers, self.bound) == ALONE else None
        trainer.feed.peek()
        times.append(time.perf_counter())
        if pending is not None:  # what fetching costs where nothing need be waited for
            trainer.feed.cluster.result(pending, 0, 0)
        times.append(time.perf_counter())
        trainer.update()
        times.append(time.perf_counter())
        for name, begin in zip(("admit", "wait", "take", "update"), range(4), strict=True):
            self._note(name, times[begin + 1] - times[begin])

    def _note(self, name: str, seconds: float) -> None:
        self.parts.setdefault(name, []).append(seconds)

    def median(self, name: str) -> float:
        """Seconds of a part."""
        return statistics.median(self.parts[name])


def make_sides(domain: str, small: bool) -> list[Side]:
    """The four trainers of a domain, their workers started."""
    out = []
    for workers, bound in SIDES:
        engine = ("engine=ray", f"engine.workers={workers}", f"rollout.staleness={bound}") if workers else ()
        given = dict(
            word.split("=", 1) for word in (*COMMON, *RUNS[domain], *(SMALL[domain] if small else ()), *engine)
        )
        job = Job(compose([f"{key}={value}" for key, value in given.items()]))
        trainer = job.make_trainer(None)  # type: ignore[arg-type]
        trainer.feed.open()
        out.append(Side(workers, bound, trainer, job))
    return out


def predicted(workers: int, bound: int, sides: Sequence[Side]) -> float:
    """Batches a second by the formula; in-process, the sum of both parts."""
    here, alone = sides[0], sides[1]
    if not workers:
        return 1 / (here.median("admit") + here.median("update"))
    p, t, u = alone.median("admit"), alone.median("take"), alone.median("update")
    g = max(alone.median("wait") - t, 1e-9)
    if bound == 0:
        return 1 / (g + u + p + t)
    cores = (os.cpu_count() or 1) / (here.median("cpu") + p + t)
    return min(workers / g, (bound + 1) / (g + u + p), 1 / (u + p + t), cores)


def measured(domain: str, rounds: int, updates: int, small: bool) -> Iterator[dict[str, Any]]:
    """A row a side and round."""
    sides = make_sides(domain, small)
    try:
        for number in range(rounds):
            for side in sides[number % len(sides) :] + sides[: number % len(sides)]:
                side.turn(updates)
        alone = sides[1]
        print(f"{domain}: " + ", ".join(f"{name} {1e3 * alone.median(name):.1f} ms" for name in alone.parts))
        for side in sides:
            formula = predicted(side.workers, side.bound, sides)
            print(f"  {side.name:22s} {statistics.median(side.rates):7.2f} batches/s   formula {formula:7.2f}")
            for number, rate in enumerate(side.rates):
                yield {"domain": domain, "workers": side.workers, "bound": side.bound, "round": number,
                       "batches_per_second": round(rate, 4), "formula": round(formula, 4)}  # fmt: skip
    finally:
        for side in sides:
            side.job.close()


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--updates", type=int, default=40)
    parser.add_argument("--domains", nargs="+", default=list(RUNS), choices=list(RUNS))
    parser.add_argument("--small", action="store_true", help="smaller batches, to see whether it runs")
    arguments = parser.parse_args()
    try:
        import ray
    except ImportError:
        parser.error("needs Ray: pip install 'unified-rl[ray]'")
    ray.init(address="local", num_cpus=8, include_dashboard=False, log_to_driver=False, logging_level="error")
    rows = [
        row
        for domain in arguments.domains
        for row in measured(domain, arguments.rounds, arguments.updates, arguments.small)
    ]
    ray.shutdown()
    if arguments.csv is not None:
        with arguments.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
