"""Asynchronous collection by workers: which worker collects which batch, from which weights, and what a dead one costs.

Tickets go to workers in turn, ticket ``n`` starts from the weights that were newest when it was admitted, and batches
are taken in the order of tickets. So what a run learns depends on its seed, the number of workers and the bound, and
not on timing: a worker that is slow, or dies and is replaced, changes nothing. No row is older than the bound, however
slow a worker is, and none is thrown away. Instead of one batch each, workers may collect a part of every batch.

Where workers live and how they are reached is a :class:`Cluster`.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, Protocol

import torch
from tensordict import TensorDict

from unified_rl.errors import CheckpointError, RestoreError, RolloutError, UnifiedRLError
from unified_rl.rollout.feed import Batch, pack, unpack
from unified_rl.stopping import say

Order = Literal["ticket", "completion", "periodic"]
WAITED, LOST = "engine/wait_seconds", "engine/lost_workers"
"""Seconds that an update waited for its batch (``/K`` behind it: for worker K's), and workers lost so far."""
COUNTS = frozenset({"rollout/resampled"})
"""Metrics of a collection that add up over its parts; the others are means over conversations."""
OF_TOKENS = frozenset({"rollout/entropy_estimate"})
"""Those that are means over tokens."""


class WorkerLostError(Exception):
    """A worker, or what it made, is gone: its process died, its machine is not reachable. The text says why."""


class Collected(NamedTuple):
    """What a worker brought.

    Attributes:
        batch: rows and metrics.
        state: of its rollout behind them, as a checkpoint can hold it.
    """

    batch: Batch
    state: dict[str, Any]


class Cluster(Protocol):
    """Workers by number, each with a rollout of its own, that collect one ticket after the other."""

    def open(self) -> None:
        """Starts the workers; called again, it does nothing.

        Raises:
            ConfigError: they cannot be had, or one of them cannot build the run's rollout.
        """
        ...

    def replace(self, worker: int) -> None:
        """Ends what is left of a worker and starts it anew, from where a run begins.

        Raises:
            WorkerLostError: the new one died as well.
        """
        ...

    def restore(self, worker: int, state: dict[str, Any], restart: int | None) -> None:
        """Puts a worker's rollout to a state, or behind it with new episodes from the seed ``restart``.

        Raises:
            RestoreError: it cannot be put back, and ``restart`` is None.
            WorkerLostError: it died.
        """
        ...

    def put(self, version: int) -> Any:
        """A handle to the policy's weights as they are now, which are those of ``version``."""
        ...

    def submit(self, worker: int, version: int, weights: Any) -> Any:
        """Lets a worker collect behind what it was asked for before; returns a handle at once."""
        ...

    def swap(self, worker: int, version: int, weights: Any) -> None:
        """Gives a worker newer weights while it collects; returns at once, and a lost worker is none's concern yet."""
        ...

    def result(self, pending: Any, ticket: int, worker: int) -> Collected:
        """What a submission brought; waits for it, and may be asked again.

        Raises:
            WorkerLostError: it will never come.
            UnifiedRLError: the collection failed; the message names worker and ticket.
        """
        ...

    def first(self, pending: Sequence[Any]) -> int:
        """The place of one that is done, or lost; waits for it."""
        ...

    def is_done(self, pending: Any) -> bool:
        """Whether :meth:`result` would not wait."""
        ...

    def close(self) -> None:
        """Ends all workers; called again, it does nothing."""
        ...


class Ticket(NamedTuple):
    """A batch under way, or a worker's part of one."""

    number: int
    worker: int
    version: int
    weights: Any
    pending: Any


class Origin(NamedTuple):
    """Where a worker goes on from: a state, and the seed of new episodes, if those begin; or the run's start."""

    state: dict[str, Any] | None = None
    restart: int | None = None


class Now(NamedTuple):
    """All that changes, replaced as one: a signal's exception comes anywhere."""

    taken: int
    waiting: tuple[Batch, ...]
    open: tuple[Ticket, ...]
    origins: tuple[Origin, ...]


class TicketFeed:
    """A :class:`~unified_rl.rollout.feed.Feed` whose batches are collected by the workers of a cluster.

    Args:
        cluster: the workers.
        workers: how many.
        steps_per_collect: of a batch, see :class:`~unified_rl.rollout.feed.Feed`.
        staleness: the bound.
        order: ``ticket``, or ``completion``: whichever batch is done first. Then a slow one is overtaken again and
            again, so neither its age is bounded nor is a run the same twice. ``periodic``: every worker collects its
            part of each batch, and the parts are joined in the order of workers; the bound is 0.
        restarts: workers that may be lost.
        seed: of new episodes, where a lost worker's environment cannot be put back.
        in_flight: new weights are given to batches under way too, so their rows hold several versions and are younger
            than the bound; then no run is the same twice.

    Attributes:
        lost: workers that were, since the run began or was resumed.
    """

    def __init__(
        self,
        cluster: Cluster,
        workers: int,
        steps_per_collect: int,
        staleness: int,
        order: Order = "ticket",
        restarts: int = 10,
        seed: int = 0,
        in_flight: bool = False,
    ) -> None:
        self.cluster, self.workers = cluster, workers
        self.steps_per_collect, self.staleness = steps_per_collect, staleness
        self.order, self.restarts, self.seed, self.in_flight = order, restarts, seed, in_flight
        self.version, self.lost, self._hurried = 0, 0, False
        self._now = Now(0, (), (), (Origin(),) * workers)
        self._weights: tuple[int, Any] | None = None

    @property
    def admitted(self) -> int:
        """Collections that were started and whose rows were taken, wait, or are under way."""
        return self._now.taken + len(self._now.waiting) + len({ticket.number for ticket in self._now.open})

    def open(self) -> None:
        """Starts the workers.

        Raises:
            ConfigError: one cannot be started.
        """
        self.cluster.open()

    def publish(self, version: int) -> None:
        """Notes the version; weights are sent with the next ticket, and in flight to those under way."""
        self.version = version
        if self.in_flight:
            for worker in sorted({ticket.worker for ticket in self._now.open if ticket.version < version}):
                self.cluster.swap(worker, *self._sent())

    def _sent(self) -> tuple[int, Any]:
        """The version, and a handle to its weights."""
        if self._weights is None or self._weights[0] != self.version:
            self._weights = (self.version, self.cluster.put(self.version))
        return self._weights

    def admit(self, allowed: int) -> None:
        """Lets workers collect until ``allowed`` batches have been started since the run began; waits for none."""
        while self.admitted < allowed:
            self.cluster.open()
            number, sent = self.admitted, self._sent()
            begun = tuple(Ticket(number, k, *sent, self.cluster.submit(k, *sent)) for k in self._next_workers())
            self._now = self._now._replace(open=(*self._now.open, *begun))

    def _next_workers(self) -> Sequence[int]:
        """Those that collect the next batch."""
        if self.order == "periodic":
            return range(self.workers)
        if self.order == "ticket":
            return [self.admitted % self.workers]
        busy = [ticket.worker for ticket in self._now.open]
        return [min(range(self.workers), key=lambda worker: (busy.count(worker), worker))]

    def peek(self) -> Batch:
        """The batch that :meth:`take` returns next; waits for it.

        Raises:
            UnifiedRLError: its collection failed, or more workers were lost than ``restarts`` allows.
        """
        if not self._now.waiting:
            self._fetch()
        return self._now.waiting[0]

    def take(self) -> Batch:
        """The next batch; waits for it."""
        batch = self.peek()
        self._now = self._now._replace(taken=self._now.taken + 1, waiting=self._now.waiting[1:])
        return batch

    def _fetch(self) -> None:
        """Waits for a batch under way; a worker that is lost is replaced, and collects what it had again."""
        begun, found, times = time.monotonic(), dict[int, Collected](), dict[str, float]()
        while True:
            tickets = self._choose()
            ticket = next(ticket for ticket in tickets if ticket.worker not in found)
            try:
                found[ticket.worker] = self.cluster.result(ticket.pending, ticket.number, ticket.worker)
            except WorkerLostError as error:
                self._replace(ticket.worker, error)
                continue
            except KeyboardInterrupt:  # somebody who would not wait for this batch
                self._hurried = True
                raise
            times[f"{WAITED}/{ticket.worker}"] = time.monotonic() - begun - sum(times.values())
            if len(found) == len(tickets):
                break
        brought = [found[worker] for worker in sorted(found)]
        rows, metrics = brought[0].batch if len(brought) == 1 else join([one.batch for one in brought])
        metrics = {**metrics, WAITED: time.monotonic() - begun, LOST: float(self.lost)}
        metrics |= times if self.workers > 1 else {}
        now = self._now
        self._now = now._replace(
            waiting=(*now.waiting, (rows, metrics)),
            open=tuple(one for one in now.open if one.number != ticket.number),
            origins=tuple(
                Origin(found[worker].state) if worker in found else origin for worker, origin in enumerate(now.origins)
            ),
        )

    def _choose(self) -> Sequence[Ticket]:
        """The oldest batch, in all its parts; by completion one that is done, the oldest of its worker."""
        tickets: tuple[Ticket, ...] = self._now.open
        if self.order != "completion":
            return [ticket for ticket in tickets if ticket.number == tickets[0].number]
        oldest: list[Ticket] = list({ticket.worker: ticket for ticket in reversed(tickets)}.values())
        place = self.cluster.first([ticket.pending for ticket in oldest])
        return [oldest[place]]

    def _replace(self, worker: int, error: WorkerLostError) -> None:
        """A new worker where one was lost, with the state behind its last batch that was brought, and its tickets."""
        self.lost += 1
        while True:
            if self.lost > self.restarts:
                raise RolloutError(
                    f"worker {worker} was lost ({error}), the last of {self.lost} in this run, and engine.restarts="
                    f"{self.restarts} allows no more: look for what ends it (memory, a machine), or raise it"
                ) from error
            say(f"worker {worker} was lost ({error}); what it was collecting is collected again")
            try:
                self.cluster.replace(worker)
                self._put_back(worker, self._now.origins[worker])
                break
            except WorkerLostError as again:
                error, self.lost = again, self.lost + 1
        redone = tuple(
            ticket._replace(pending=self.cluster.submit(worker, ticket.version, ticket.weights))
            if ticket.worker == worker
            else ticket
            for ticket in self._now.open
        )
        self._now = self._now._replace(open=redone)

    def _put_back(self, worker: int, origin: Origin) -> None:
        if origin.state is None:
            return
        try:
            self.cluster.restore(worker, origin.state, origin.restart)
        except RestoreError as error:
            say(f"worker {worker} goes on with new episodes, not bit for bit: {error}")
            self.cluster.restore(worker, origin.state, (self.seed + self.admitted * self.workers + worker) % 2**31)

    def state_dict(self) -> dict[str, Any]:
        """Waits for the batches under way, and holds them and the workers' states behind them.

        Raises:
            CheckpointError: a collection from older weights failed, or is not waited for since somebody interrupted it;
                those weights are gone, so it could not be made again.
        """
        while self._now.open:
            why: Exception | str = "interrupted"
            try:
                first = self._now.open[0].number
                parts = [ticket for ticket in self._now.open if ticket.number == first]
                if not self._hurried or all(self.cluster.is_done(ticket.pending) for ticket in parts):
                    self._fetch()
                    continue
            except UnifiedRLError as error:
                why = error
            if any(ticket.version != self.version for ticket in self._now.open):
                raise CheckpointError(f"batches of older weights are under way and cannot be waited for ({why})")
            break  # a resumed run collects these from the very weights that it is saved with
        waiting = tuple((rows, _lasting(metrics)) for rows, metrics in self._now.waiting)
        admitted = self._now.taken + len(waiting)
        kind = {"order": self.order} if self.order == "periodic" else {}
        workers = [list(one) for one in self._now.origins]
        return {"workers": workers, "admitted": admitted, "waiting": pack(waiting), **kind}

    def load_state_dict(self, state: dict[str, Any], restart: int | None = None) -> None:
        """Restores :meth:`state_dict`, of as many workers.

        Args:
            state: of such a feed.
            restart: seed of new episodes, in place of those under way.

        Raises:
            CheckpointError: the run has another engine, or another number of workers.
            RestoreError: an environment cannot be put back, and ``restart`` is None.
        """
        if "workers" not in state:
            raise CheckpointError(
                f"this run was made with engine=local, and cannot go on with engine=ray engine.workers={self.workers}: "
                "resume it with engine=local"
            )
        if len(state["workers"]) != self.workers:
            made = len(state["workers"])
            raise CheckpointError(
                f"this run was made with engine.workers={made}, and cannot go on with engine.workers={self.workers}, "
                f"since each has episodes of its own under way: resume it with engine.workers={made}"
            )
        if (state.get("order") == "periodic") != (self.order == "periodic"):
            raise CheckpointError(
                f"this run was made with engine.order={state.get('order', 'ticket')}, and cannot go on with "
                f"engine.order={self.order}, since workers draw other problems there: resume it with the same order"
            )
        origins = tuple(Origin(*one) for one in state["workers"])
        if restart is not None:
            origins = tuple(one._replace(restart=restart + worker) for worker, one in enumerate(origins))
        if any(one.state is not None for one in origins):
            self.open()
        for worker, origin in enumerate(origins):
            if origin.state is not None:
                try:
                    self.cluster.restore(worker, origin.state, origin.restart)
                except WorkerLostError as error:
                    raise RolloutError(f"worker {worker} was lost while it was put back ({error})") from error
        waiting = unpack(state["waiting"])
        self._now = Now(state["admitted"] - len(waiting), waiting, (), origins)

    def close(self) -> None:
        """Ends the workers."""
        self.cluster.close()


def join(parts: Sequence[Batch]) -> Batch:
    """One batch of its parts, in their order.

    Metrics are means over all rows (of tokens, where that is what they are of), and quantiles those of the parts; shown
    samples are those of the first part.
    """
    named = dict.fromkeys(key for _, metrics in parts for key in metrics if key != "samples")
    told: dict[str, Any] = {}
    for name in named:
        held = [(metrics[name], _weight(name, rows)) for rows, metrics in parts if name in metrics]
        whole = 1.0 if name in COUNTS else sum(weight for _, weight in held)
        told[name] = sum(value * weight for value, weight in held) / whole
    if "samples" in parts[0][1]:
        told["samples"] = parts[0][1]["samples"]
    return torch.cat([rows for rows, _ in parts]), told


def _weight(name: str, rows: TensorDict) -> float:
    """Of a part's metric in the whole batch's."""
    if name in COUNTS:
        return 1.0
    return float(rows["mask"].sum()) if name in OF_TOKENS else float(len(rows))


def _lasting(metrics: dict[str, Any]) -> dict[str, Any]:
    """Metrics without those of time, which a batch that was waited for in order to save it would tell falsely."""
    return {key: value for key, value in metrics.items() if not key.startswith((WAITED, LOST))}
