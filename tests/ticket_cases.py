"""Clusters without processes: one that only counts, and one whose workers are real and live in this process."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tensordict import TensorDict
from torch import Tensor

from unified_rl.errors import RestoreError
from unified_rl.rollout.tickets import Collected, WorkerLostError
from unified_rl.training.callbacks import Callbacks
from unified_rl.training.checkpoint import read_checkpoint
from unified_rl.training.collector import Collector, collected, valued
from unified_rl.training.engine import RayEngine
from unified_rl.training.run import Job

ALLOW = ["run_cases", "ray_cases"]


def step(state: int, version: int) -> int:
    """What the counting worker brings: it depends on all that the worker did before."""
    return (31 * state + version + 1) % 1_000_003


@dataclass
class Counting:
    """Workers that are a number each; every submission may be the death of its worker.

    Attributes:
        dies: whether the worker dies in the next submission; draws.
        exact: whether a state can be put back.
        pick: of the places of tickets that may be done first, the one that is.
    """

    workers: int
    dies: Callable[[], bool] = lambda: False
    exact: bool = True
    pick: Callable[[Sequence[int]], int] = lambda workers: 0
    alive: list[bool] = field(default_factory=list)
    state: list[int] = field(default_factory=list)
    swapped: list[tuple[int, int]] = field(default_factory=list)
    deaths: int = 0
    opened: int = 0

    def open(self) -> None:
        if not self.alive:
            self.alive, self.state = [True] * self.workers, list(range(self.workers))
            self.opened += 1

    def replace(self, worker: int) -> None:
        self.alive[worker], self.state[worker] = True, worker

    def restore(self, worker: int, state: dict[str, Any], restart: int | None) -> None:
        if not self.exact and restart is None:
            raise RestoreError("it remembers what it does not tell")
        self.state[worker] = state["x"] if restart is None else 1000 + restart

    def put(self, version: int) -> Any:
        return version

    def submit(self, worker: int, version: int, weights: Any) -> Any:
        assert weights == version
        if self.alive[worker] and self.dies():
            self.alive[worker], self.deaths = False, self.deaths + 1
        if not self.alive[worker]:
            return (worker, None)
        self.state[worker] = step(self.state[worker], version)
        return (worker, Collected(((version, self.state[worker]), {}), {"x": self.state[worker]}))  # type: ignore[arg-type]

    def swap(self, worker: int, version: int, weights: Any) -> None:
        self.swapped.append((worker, version))

    def result(self, pending: Any, ticket: int, worker: int) -> Collected:
        if pending[1] is None:
            raise WorkerLostError("it died")
        found: Collected = pending[1]
        return found

    def first(self, pending: Sequence[Any]) -> int:
        return self.pick([worker for worker, _ in pending])

    def is_done(self, pending: Any) -> bool:
        return True

    def close(self) -> None:
        self.alive = []


class Here:
    """Real workers, one after the other in this process; they are asked as actors are.

    Args:
        settings, pack: as of :class:`~unified_rl.training.ray_cluster.RayCluster`.
        workers: how many.
        dies: ``worker -> whether it dies in this submission``.
    """

    def __init__(
        self, settings: dict[str, Any], pack: Callable[[], Any], workers: int, dies: Callable[[int], bool]
    ) -> None:
        self.settings, self.pack, self.workers, self.dies = settings, pack, workers, dies
        self.actors: list[Collector | None] = []

    def open(self) -> None:
        if not self.actors:
            self.actors = [None] * self.workers
            for worker in range(self.workers):
                self.replace(worker)

    def replace(self, worker: int) -> None:
        actor = self.actors[worker] = Collector()
        valued(actor.ask("begin", {**self.settings, "worker": worker}), f"worker {worker}")

    def restore(self, worker: int, state: dict[str, Any], restart: int | None) -> None:
        actor = self.actors[worker]
        assert actor is not None
        valued(actor.ask("restore", state, restart), f"worker {worker}")

    def put(self, version: int) -> Any:
        return tuple(self.pack())

    def submit(self, worker: int, version: int, weights: Any) -> Any:
        if self.dies(worker):
            self.actors[worker] = None
        actor = self.actors[worker]
        answer = None if actor is None else actor.ask("collect", version, weights)
        if answer is not None and "value" in answer:
            for array in (*answer["value"]["rows"].values(), *answer["value"]["state"]["arrays"].values()):
                array.flags.writeable = False  # as shared memory is
        return answer

    def swap(self, worker: int, version: int, weights: Any) -> None:
        """Nothing is under way in one process."""

    def result(self, pending: Any, ticket: int, worker: int) -> Collected:
        if pending is None:
            raise WorkerLostError("it died")
        return collected(valued(pending, f"worker {worker}, batch {ticket}"))

    def first(self, pending: Sequence[Any]) -> int:
        return 0

    def is_done(self, pending: Any) -> bool:
        return True

    def close(self) -> None:
        self.actors = []


class Flying(Here):
    """Collects when it is asked for a batch; weights that came meanwhile arrive one by one, at every third token."""

    newer: dict[int, list[tuple[int, Any]]]

    def open(self) -> None:
        if not self.actors:
            self.newer = {worker: [] for worker in range(self.workers)}
        super().open()

    def submit(self, worker: int, version: int, weights: Any) -> Any:
        return {"given": (worker, version, weights)}

    def swap(self, worker: int, version: int, weights: Any) -> None:
        self.newer[worker].append((version, weights))

    def result(self, pending: Any, ticket: int, worker: int) -> Collected:
        if "answer" not in pending:
            actor = self.actors[worker]
            assert actor is not None and actor.job is not None
            swaps, asked, refresh = self.newer[worker], [0], actor._refresh

            def refreshed() -> int:
                asked[0] += 1
                if swaps and asked[0] % 3 == 0:
                    actor.swap(*swaps.pop(0))
                return refresh()

            if actor.in_flight:
                actor.job.policy.refresh = refreshed
            pending["answer"] = super().submit(*pending["given"])
        return super().result(pending["answer"], ticket, worker)


class Inside(RayEngine):
    """Settings of ``engine=ray`` whose workers live in this process."""

    dies: Callable[[int], bool] = staticmethod(lambda worker: False)
    kind: type[Here] = Here

    def check_installed(self) -> None:
        """Nothing is needed."""

    def make_cluster(self, settings: Any, pack: Callable[[], Any]) -> Here:  # type: ignore[override]
        return self.kind(dict(settings), pack, self.workers, self.dies)


def job_of(
    cfg: dict[str, Any], dies: Callable[[int], bool] | None = None, allow: Sequence[str] = (), kind: type[Here] = Here
) -> Job:
    """A job whose workers, if it has any, live in this process."""
    job = Job(cfg, allow)
    if job.engine is not None:
        node = {key: value for key, value in cfg["engine"].items() if key != "_target_"}
        job.engine = Inside(**node)
        job.engine.kind = kind
        if dies is not None:
            job.engine.dies = dies  # type: ignore[method-assign]
    return job


def made(
    cfg: dict[str, Any], folder: Path, found: Any = None, callbacks: Sequence[Any] = (), **options: Any
) -> tuple[Any, list[dict[str, Any]]]:
    """The trainer behind a run, from a checkpoint if one is given, and its logged rows."""
    folder.mkdir()
    trainer = job_of(cfg, allow=ALLOW, **options).make_trainer(folder)
    trainer.callbacks = Callbacks(callbacks)
    if found is not None:
        trainer.load_state_dict(read_checkpoint(found), found)
    trainer.run()
    return trainer, timeless(read_rows(folder / "metrics.jsonl"))


def flat(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every leaf of nested state."""
    if isinstance(value, TensorDict):
        value = dict(value.items())
    if isinstance(value, dict):
        for key, item in value.items():
            yield from flat(item, f"{path}/{key}")
    elif isinstance(value, list | tuple):
        for number, item in enumerate(value):
            yield from flat(item, f"{path}/{number}")
    else:
        yield path, value


def differences(one: Any, other: Any) -> list[str]:
    """Paths of leaves that are not equal bit for bit."""
    left, right = dict(flat(one)), dict(flat(other))
    return sorted({*left} ^ {*right}) + [path for path in left if path in right and not same(left[path], right[path])]


def same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor | np.ndarray):
        left, right = np.asarray(one), np.asarray(other)
        return left.dtype == right.dtype and left.shape == right.shape and left.tobytes() == right.tobytes()
    return type(one) is type(other) and (one == other or one != one)


def timeless(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Logged rows without what a clock or a lost worker puts into them."""
    return [
        {k: v for k, v in row.items() if not k.startswith(("engine/", "wall")) and "seconds" not in k} for row in rows
    ]


def read_rows(path: Any) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]
