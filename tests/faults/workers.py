"""Kills workers of ``engine=ray`` at drawn moments, and compares each run with an undisturbed one, bit for bit.

    python -m tests.faults.workers --kills 200 --out docs/results/faults/workers.csv

Runs of both domains with two workers at bound 2, a model of a few hundred weights and 24 updates. In each, workers are
killed behind drawn updates, by ``ray.kill``, by SIGKILL to their process, or by ``os._exit`` in the midst of a step of
the environment; now and then once more while a worker is being replaced. Final weights, optimiser, streams of every
worker, batches that wait and rows of metrics are those of the same run by workers that live in one process and never
die. A row of the file is a kill; ``recovery_seconds`` go from the kill until a new worker has the state and the batches
of the lost one, or are empty where the run ended before it was missed. Exit code 0 where every run is equal.
"""

from __future__ import annotations

import argparse
import csv
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parents[1]
sys.path.insert(0, str(TESTS))

from run_cases import CONTROL, LANGUAGE  # noqa: E402
from ticket_cases import ALLOW, differences, made, read_rows, timeless  # noqa: E402

from unified_rl.config import compose  # noqa: E402
from unified_rl.training.checkpoint import checkpoints, read_checkpoint  # noqa: E402
from unified_rl.training.run import train  # noqa: E402

UPDATES = 24
KINDS = ("ray.kill", "SIGKILL", "os._exit")
AGAIN = 0.2
"""Share of kills that meet a worker while it is being replaced."""
PAUSE = 0.08
"""Seconds behind an update within which a kill comes: about as long as a batch takes."""
RUN = (f"updates={UPDATES}", "eval_episodes=4", "progress=false", "log_every=1", "eval_every=0", "logger=[]",
       "rollout.staleness=2", "engine=ray", "engine.workers=2", "engine.restarts=1000")  # fmt: skip
DOMAINS = {
    "control": (*CONTROL, "env._target_=ray_cases.UnsteadyRoute", "agent=ppo", "agent.epochs=2",
                "policy.normalize_observation=true", "checkpoint_every=192", *RUN),
    "language": (*(w for w in LANGUAGE if "_target_" not in w), "env._target_=ray_cases.UnsteadyChain",
                 "correction=dapo", "checkpoint_every=96", *RUN),
}  # fmt: skip
DELAYS = {"control": "0.01", "language": "0.06"}


@dataclass
class Kill:
    """One kill, and what became of it."""

    run: int
    domain: str
    seed: int
    kind: str
    worker: int
    update: int
    doing: str
    seconds_behind_update: float
    recovery_seconds: float | str = ""
    equal: str = ""


class Killer:
    """A callback that kills workers of the run that it is given to.

    Args:
        number: of the run.
        domain, seed: of the run.
        most: kills in it.
        folder: whose files tell a worker to end itself.
    """

    def __init__(self, number: int, domain: str, seed: int, most: int, folder: Path) -> None:
        self.number, self.domain, self.seed, self.most, self.folder = number, domain, seed, most, folder
        self.chance = random.Random(1000 * number + seed)
        self.kills: list[Kill] = []
        self.down: dict[int, tuple[Kill, float]] = {}
        self.replacing: int | None = None
        self.timers: list[threading.Thread] = []

    def on_run_begin(self, trainer: Any) -> None:
        """Looks on where lost workers are replaced."""
        self.feed, replace, begun = trainer.feed, trainer.feed._replace, trainer.feed.cluster._actor

        def replaced(worker: int, error: Any) -> None:
            self.replacing = worker
            replace(worker, error)
            self.replacing = None
            for kill, at in [self.down.pop(worker)] if worker in self.down else []:
                kill.recovery_seconds = round(time.monotonic() - at, 3)

        def actor() -> Any:
            made = begun()
            if self.replacing is not None and self.chance.random() < AGAIN and len(self.kills) < self.most:
                delay = self.chance.random() * 2.0
                worker, update = self.replacing, trainer.updates
                kill = Kill(self.number, self.domain, self.seed, "ray.kill", worker, update, "beginning", delay)
                self.kills.append(kill)
                self._after(delay, lambda: ray_kill(made))
            return made

        trainer.feed._replace, trainer.feed.cluster._actor = replaced, actor

    def on_update_end(self, trainer: Any, metrics: Any) -> None:
        """Lets a kill come."""
        left = UPDATES - 2 - trainer.updates
        if left < 0 or len(self.kills) >= self.most:
            return
        if self.chance.random() < min(1.0, 1.5 * (self.most - len(self.kills)) / (left + 1)):
            worker, kind = self.chance.randrange(2), self.chance.choice(KINDS)
            if worker in self.down:
                worker = 1 - worker
            if worker in self.down:
                return
            delay = round(self.chance.random() * PAUSE, 4)
            kill = Kill(self.number, self.domain, self.seed, kind, worker, trainer.updates, "", delay)
            self.kills.append(kill)
            self.down[worker] = (kill, time.monotonic() + delay)
            self._after(delay, lambda: self._strike(kill))

    def _after(self, delay: float, act: Any) -> None:
        timer = threading.Timer(delay, act)
        timer.daemon = True
        timer.start()
        self.timers.append(timer)

    def _strike(self, kill: Kill) -> None:
        busy = any(ticket.worker == kill.worker for ticket in self.feed._now.open)
        kill.doing = "collecting" if busy else "waiting"
        self.down[kill.worker] = (kill, time.monotonic())
        cluster = self.feed.cluster
        if kill.kind == "ray.kill":
            ray_kill(cluster.actors[kill.worker])
        elif kill.kind == "SIGKILL":
            with suppress(ProcessLookupError):
                os.kill(cluster.told[kill.worker]["pid"], signal.SIGKILL)
        else:
            (self.folder / f"exit-pid{cluster.told[kill.worker]['pid']}").touch()


def ray_kill(actor: Any) -> None:
    """As the name says."""
    import ray

    with suppress(Exception):
        ray.kill(actor)


def state_of(run: Path) -> tuple[Any, list[dict[str, Any]]]:
    """What a run ended with: agent and feed, and its rows."""
    state = read_checkpoint(checkpoints(run / "checkpoints")[-1])
    return {"agent": state["agent"], "feed": state["feed"], "updates": state["updates"]}, timeless(
        read_rows(run / "metrics.jsonl")
    )


def runs(kills: int, each: int, seed: int) -> Iterator[list[Kill]]:
    """Runs with kills until there were so many; those of each."""
    number = total = 0
    calm: dict[tuple[str, int], Any] = {}
    while total < kills:
        domain, draw = list(DOMAINS)[number % 2], seed + number // 2 % 4
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place)
            given = (*DOMAINS[domain], f"seed={draw}")
            if (domain, draw) not in calm:
                made(compose([*given], allow=ALLOW), folder / "calm")
                calm[domain, draw] = state_of(folder / "calm")
            (folder / "files").mkdir()
            killer = Killer(number, domain, draw, min(each, kills - total), folder / "files")
            rough = f"engine.env_vars={{RAY_CASES_FOLDER: '{folder / 'files'}', RAY_CASES_DELAY: '{DELAYS[domain]}'}}"
            cfg = compose([*given, rough, f"run_dir={folder / 'run'}"], allow=ALLOW)
            problem = ""
            try:
                train(cfg, ALLOW, callbacks=[killer])
            except Exception as error:
                problem = " ".join(str(error).split())
            for timer in killer.timers:
                timer.join()
            if not problem:
                (one, rows), (other, others) = calm[domain, draw], state_of(folder / "run")
                problem = ", ".join(differences(one, other)[:3]) or ("" if rows == others else "rows of metrics")
            for kill in killer.kills:
                kill.equal = "no" if problem else "yes"
            if problem:
                print(f"run {number}, {domain}, seed {draw}: {problem}", flush=True)
            total, number = total + len(killer.kills), number + 1
            yield killer.kills


def main() -> int:
    """Kills, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--each", type=int, default=8, help="kills in one run, at most")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    try:
        import ray
    except ImportError:
        parser.error("needs Ray: pip install 'unified-rl[ray]'")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray.init(address="local", num_cpus=8, include_dashboard=False, log_to_driver=False, logging_level="error",
             object_store_memory=2 * 10**8)  # fmt: skip
    began, rows = time.monotonic(), []
    for found in runs(arguments.kills, arguments.each, arguments.seed):
        rows += [asdict(kill) for kill in found]
        print(f"{len(rows)} kills, {time.monotonic() - began:.0f} s", flush=True)
        if arguments.out is not None and rows:
            with arguments.out.open("w", newline="") as file:
                writer = csv.DictWriter(file, list(rows[0]))
                writer.writeheader()
                writer.writerows(rows)
    ray.shutdown()
    took = sorted(row["recovery_seconds"] for row in rows if row["recovery_seconds"] != "")
    different = sorted({row["run"] for row in rows if row["equal"] == "no"})
    recovery = f"median {took[len(took) // 2]} s, most {took[-1]} s" if took else "none was missed"
    print(f"{len(rows)} kills, {len(different)} runs differ {different}; recovery: {recovery}")
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
