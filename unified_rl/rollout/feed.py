"""Where the trainer's rows come from: tickets are admitted, collected somewhere, and taken in order."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from tensordict import TensorDict
from torch import Tensor

from unified_rl.errors import CheckpointError, ConfigError, RestoreError
from unified_rl.protocols import Opens, Restarts, Rollout

Batch = tuple[TensorDict, dict[str, Any]]
"""What one collection brought: its rows and its metrics (and ``samples``, where somebody asked for them)."""


@runtime_checkable
class Feed(Protocol):
    """A source of collected batches. Ticket ``n`` is the n-th batch of a run.

    Ticket ``n`` is admitted once update ``n - staleness`` is due, so it starts with the weights of that version or
    newer ones; taken at update ``n``, its rows are at most ``staleness`` updates old, whatever the speeds.
    """

    steps_per_collect: int
    """Environment steps, or conversations, that one ticket adds to the budget: the policy's own, no joined rows."""
    staleness: int

    def open(self) -> None:
        """Makes ready whatever collects, before anything is spent; called again, it does nothing.

        Raises:
            ConfigError: it cannot be had.
        """
        ...

    def publish(self, version: int) -> None:
        """The policy's weights are now those of ``version``; tickets admitted from here on start with them."""
        ...

    def admit(self, allowed: int) -> None:
        """Starts collections until ``allowed`` have been started since the run began."""
        ...

    def take(self) -> Batch:
        """The next batch, in the order of tickets; waits for it. Every admitted batch is returned exactly once."""
        ...

    def peek(self) -> Batch:
        """The batch that :meth:`take` returns next; it stays."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """What a bit-exact continuation needs: waits for the tickets under way and holds what they brought.

        It has ``admitted``, how many collections have been started.
        """
        ...

    def load_state_dict(self, state: dict[str, Any], restart: int | None = None) -> None:
        """Restores :meth:`state_dict`; with ``restart``, a seed, episodes begin anew."""
        ...

    def close(self) -> None:
        """Frees what the feed holds outside this process."""
        ...


SHARE, GRACE = 0.01, 0.1
"""Of the run's time that keeping the rollout's state before each collection may take, and seconds beside that. Rows do
not depend on it: only whether a run that ended inside a collection goes on bit for bit."""


class LocalFeed:
    """A rollout in this process: a ticket is collected when it is admitted.

    The feed's state is at any moment that of its last whole collection, also while one is under way or after it
    raised: before each one the rollout's state is kept, where that costs under :data:`SHARE` of the run's time.
    Elsewhere an older one is kept, and a continuation from it begins new episodes.

    Args:
        rollout: where the rows come from.

    Attributes:
        keeps_state: whether that is done; a run without a folder has no use for it.

    Raises:
        ConfigError: a negative staleness.
    """

    def __init__(self, rollout: Rollout) -> None:
        self.rollout = rollout
        self.staleness, self.steps_per_collect = int(rollout.staleness), int(rollout.steps_per_collect)
        self.version, self.keeps_state = 0, False
        self._tickets: tuple[int, tuple[Batch, ...], bool] = (0, (), False)  # replaced as one: signals come anywhere
        self._before: dict[str, Any] | None = None
        self._born, self._spent = time.monotonic(), 0.0
        if self.staleness < 0:  # of a rollout of the user's own, which need not say its range
            raise ConfigError(f"rollout.staleness={self.staleness} must be at least 0: updates that rows may wait")

    @property
    def admitted(self) -> int:
        """Collections since the run began."""
        return self._tickets[0]

    def open(self) -> None:
        """Looks whether the rollout finds what it needs outside this process."""
        if isinstance(self.rollout, Opens):
            self.rollout.open()

    def publish(self, version: int) -> None:
        """Notes the version; the rollout shares the policy's weights."""
        self.version = version

    def admit(self, allowed: int) -> None:
        """Collects until ``allowed`` batches have been collected since the run began."""
        while self.admitted < allowed:
            admitted, waiting, _ = self._tickets
            self._keep_state()
            self._tickets = (admitted, waiting, True)
            batch = self.rollout.collect(self.version)
            self._tickets = (admitted + 1, (*waiting, batch), False)

    def take(self) -> Batch:
        """The oldest batch that waits."""
        admitted, waiting, under_way = self._tickets
        self._tickets = (admitted, waiting[1:], under_way)
        return waiting[0]

    def peek(self) -> Batch:
        """The oldest batch that waits, which goes on waiting."""
        return self._tickets[1][0]

    def _keep_state(self) -> None:
        now = time.monotonic()
        if self.keeps_state and (self._before is None or self._spent <= GRACE + SHARE * (now - self._born)):
            self._before = {**copied(self.rollout.state_dict()), "admitted": self.admitted}
            self._spent += time.monotonic() - now

    def state_dict(self) -> dict[str, Any]:
        """The rollout, the batches that were collected and not yet taken, and whether the former is exact."""
        admitted, waiting, under_way = self._tickets
        kept = self._before or {}
        rollout = {k: v for k, v in kept.items() if k != "admitted"} if under_way else self.rollout.state_dict()
        exact = not under_way or kept.get("admitted") == admitted
        return {"rollout": rollout, "exact": exact, "admitted": admitted, "waiting": pack(waiting)}

    def load_state_dict(self, state: dict[str, Any], restart: int | None = None) -> None:
        """Restores :meth:`state_dict`.

        Args:
            state: of a feed.
            restart: seed of new episodes, in place of those under way.

        Raises:
            RestoreError: the rollout cannot be put back, and ``restart`` is None.
            CheckpointError: the state is of a run with workers.
        """
        if "workers" in state:
            made = len(state["workers"])
            raise CheckpointError(
                f"this run was made with engine=ray engine.workers={made}, and cannot go on with engine=local, since "
                "each worker has episodes of its own under way: resume it with the same engine"
            )
        if restart is None and not state.get("exact", True):
            raise RestoreError("the run ended inside a collection, whose environment state was not kept")
        if restart is None:
            self.rollout.load_state_dict(state["rollout"])
        elif not isinstance(self.rollout, Restarts):
            raise CheckpointError(f"{type(self.rollout).__name__} cannot begin new episodes: it has no restart()")
        else:
            self.rollout.restart(state["rollout"], restart)
        self._tickets = (state["admitted"], unpack(state["waiting"]), False)

    def close(self) -> None:
        """Nothing to free."""


def copied(value: Any) -> Any:
    """Nested state whose tensors and arrays are nobody else's."""
    if isinstance(value, dict):
        return {key: copied(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(copied(item) for item in value)
    if isinstance(value, Tensor):
        return value.clone()
    return value.copy() if isinstance(value, np.ndarray) else value


def pack(waiting: Sequence[Batch]) -> list[dict[str, Any]]:
    """Batches as a checkpoint holds them."""
    return [{"rows": pack_rows(rows), "metrics": metrics} for rows, metrics in waiting]


def unpack(waiting: list[dict[str, Any]]) -> tuple[Batch, ...]:
    """The inverse of :func:`pack`."""
    return tuple((unpack_rows(batch["rows"]), batch["metrics"]) for batch in waiting)


def pack_rows(rows: TensorDict) -> dict[str, Any]:
    """A flat batch as plain values and tensors."""
    return {"columns": dict(rows.items()), "shape": list(rows.batch_size)}


def unpack_rows(packed: dict[str, Any]) -> TensorDict:
    """The inverse of :func:`pack_rows`."""
    return TensorDict(packed["columns"], batch_size=packed["shape"])
