"""Where the trainer's rows come from: tickets are admitted, collected somewhere, and taken in order."""

from __future__ import annotations

from collections import deque
from typing import Any, Protocol, runtime_checkable

from tensordict import TensorDict

from unified_rl.errors import ConfigError
from unified_rl.protocols import Rollout

Batch = tuple[TensorDict, dict[str, float]]
"""What one collection brought: its rows and its metrics."""


@runtime_checkable
class Feed(Protocol):
    """A source of collected batches. Ticket ``n`` is the n-th batch of a run.

    Ticket ``n`` is admitted once update ``n - staleness`` is due, so it starts with the weights of that version or
    newer ones; taken at update ``n``, its rows are at most ``staleness`` updates old, whatever the speeds.
    """

    steps_per_collect: int
    """Environment steps, or conversations, that one ticket adds to the budget: the policy's own, no joined rows."""
    staleness: int

    def publish(self, version: int) -> None:
        """The policy's weights are now those of ``version``; tickets admitted from here on start with them."""
        ...

    def admit(self, allowed: int) -> None:
        """Starts collections until ``allowed`` have been started since the run began."""
        ...

    def take(self) -> Batch:
        """The next batch, in the order of tickets; waits for it. Every admitted batch is returned exactly once."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """What a bit-exact continuation needs: waits for the tickets under way and holds what they brought."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores :meth:`state_dict`."""
        ...

    def close(self) -> None:
        """Frees what the feed holds outside this process."""
        ...


class LocalFeed:
    """A rollout in this process: a ticket is collected when it is admitted.

    Args:
        rollout: where the rows come from.

    Raises:
        ConfigError: a negative staleness.
    """

    def __init__(self, rollout: Rollout) -> None:
        self.rollout = rollout
        self.staleness, self.steps_per_collect = int(rollout.staleness), int(rollout.steps_per_collect)
        self.admitted, self.version = 0, 0
        self._waiting: deque[Batch] = deque()
        if self.staleness < 0:  # of a rollout of the user's own, which need not say its range
            raise ConfigError(f"rollout.staleness={self.staleness} must be at least 0: updates that rows may wait")

    def publish(self, version: int) -> None:
        """Notes the version; the rollout shares the policy's weights."""
        self.version = version

    def admit(self, allowed: int) -> None:
        """Collects until ``allowed`` batches have been collected since the run began."""
        while self.admitted < allowed:
            self._waiting.append(self.rollout.collect(self.version))
            self.admitted += 1

    def take(self) -> Batch:
        """The oldest batch that waits."""
        return self._waiting.popleft()

    def state_dict(self) -> dict[str, Any]:
        """The rollout, and the batches that were collected and not yet taken."""
        return {"rollout": self.rollout.state_dict(), "admitted": self.admitted, "waiting": pack(self._waiting)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores :meth:`state_dict`."""
        self.rollout.load_state_dict(state["rollout"])
        self.admitted, self._waiting = state["admitted"], unpack(state["waiting"])

    def close(self) -> None:
        """Nothing to free."""


def pack(waiting: deque[Batch]) -> list[dict[str, Any]]:
    """Batches as a checkpoint holds them."""
    return [{"rows": pack_rows(rows), "metrics": metrics} for rows, metrics in waiting]


def unpack(waiting: list[dict[str, Any]]) -> deque[Batch]:
    """The inverse of :func:`pack`."""
    return deque((unpack_rows(batch["rows"]), batch["metrics"]) for batch in waiting)


def pack_rows(rows: TensorDict) -> dict[str, Any]:
    """A flat batch as plain values and tensors."""
    return {"columns": dict(rows.items()), "shape": list(rows.batch_size)}


def unpack_rows(packed: dict[str, Any]) -> TensorDict:
    """The inverse of :func:`pack_rows`."""
    return TensorDict(packed["columns"], batch_size=packed["shape"])
