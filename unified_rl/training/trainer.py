"""One loop for every agent and domain: collect, store, update, log, evaluate, checkpoint."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from unified_rl.errors import ConfigError, NonFiniteError
from unified_rl.protocols import Agent, Collects, Rollout, Store
from unified_rl.rollout.control import STEPS
from unified_rl.rollout.feed import Feed, LocalFeed
from unified_rl.training.checkpoint import FOLDER, checkpoint_name, set_aside_newer, write_checkpoint
from unified_rl.training.metrics import Means, MetricLog
from unified_rl.training.restoring import policy_state, restoring
from unified_rl.training.settings import TrainSettings


class StopSignal:
    """Makes the first Ctrl-C (or SIGTERM) a request to stop after the update under way; a second one stops at once."""

    def __init__(self) -> None:
        self.requested = False
        self._old: dict[int, Any] = {}

    def __enter__(self) -> StopSignal:
        """Installs the handlers (in the main thread only)."""
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._old[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *error: Any) -> None:
        """Puts the old handlers back."""
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: Any) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True


class Trainer:
    """Runs an agent to its budget.

    The rows of an update are ``rollout.staleness`` updates old: the loop lets that many collected batches wait in the
    feed, so every update trains on rows that an older policy really sampled, whatever the replay's sampler, and every
    run of the same budget sees the same number of environment samples and gradient steps.

    Args:
        settings: intervals and budget.
        folder: the run folder; None keeps metrics in memory and writes no checkpoint.
        agent: what is trained.
        feed: where rows come from, or None where the agent collects by itself.
        replay: the replay, or None likewise.
        evaluate: ``() -> metrics`` on held-out problems or seeds.
        display: called with ``(steps, metrics)`` for progress.
    """

    def __init__(
        self,
        settings: TrainSettings,
        folder: Path | None,
        agent: Agent,
        feed: Feed | None,
        replay: Store | None,
        evaluate: Callable[[], dict[str, float]],
        display: Callable[[int, dict[str, float]], None] | None = None,
    ) -> None:
        self.settings, self.folder, self.agent = settings, folder, agent
        self.feed, self.replay, self.evaluate = feed, replay, evaluate
        self.display = display or (lambda steps, metrics: None)
        self.per_update = _per_update(agent, feed)
        self.planned = math.ceil(settings.steps / self.per_update)
        self.updates = 0
        self._steps = 0
        self.elapsed = 0.0
        self.means = Means()
        self.log: MetricLog | None = None
        self._saved = -1
        self._clean = True

    @property
    def steps(self) -> int:
        """Environment steps that were really made (or conversations) behind the updates so far."""
        return self._steps if self.feed is not None else int(self.agent.steps)  # type: ignore[attr-defined]

    @property
    def rollout(self) -> Rollout | None:
        """The rollout of a feed in this process, else None."""
        return self.feed.rollout if isinstance(self.feed, LocalFeed) else None

    def run(self) -> None:
        """Trains until the budget is used, from wherever the state is.

        Raises:
            NonFiniteError: a NaN; a checkpoint from before it exists.
            KeyboardInterrupt: after a checkpoint was written.
        """
        if self.folder is not None:
            set_aside_newer(self.folder / FOLDER, self.updates)
        self.log = MetricLog(self.folder, keep_until=self.updates)
        self._clock = time.monotonic() - self.elapsed
        try:
            with StopSignal() as stop:
                if self.updates == 0 and not self.log.rows:
                    self._log(self.evaluate())
                while self.updates < self.planned:
                    self._iterate()
                    if stop.requested:
                        raise KeyboardInterrupt
        except NonFiniteError:
            self.save()
            raise
        finally:
            if self._clean and self._saved != self.updates:
                self.save()
            if self.feed is not None:
                self.feed.close()
            self.log.close()

    def update(self) -> None:
        """Collects what is missing and trains once; the metrics wait in :attr:`means` to be logged."""
        self._clean = False
        if self.feed is not None:
            self.collect()
        # counted before it runs: rows that met a NaN are spent, and a resumed run goes on behind them
        self.updates += 1
        self.means.add(self.agent.update(self.replay, (self.updates - 1) / self.planned))
        self._clean = True

    def _iterate(self) -> None:
        self.update()
        last = self.updates == self.planned
        settings = self.settings
        evaluate = last or self._crossed(settings.eval_every)
        if evaluate or self._crossed(settings.log_every):
            metrics = self.means.pop()
            self._log({**metrics, **(self.evaluate() if evaluate else {})})
        if not last and self._crossed(settings.checkpoint_every):
            self.save()

    def collect(self) -> None:
        """Admits the tickets that the next update allows, and puts the oldest batch into the replay."""
        feed, replay = self.feed, self.replay
        assert feed is not None and replay is not None
        feed.publish(self.agent.version)
        feed.admit(min(self.planned, self.updates + 1 + feed.staleness))
        rows, metrics = feed.take()
        replay.extend(rows)
        self._steps += int(metrics.get(STEPS, self.per_update))
        self.means.add({key: value for key, value in metrics.items() if key != STEPS})

    def _crossed(self, every: int | None) -> bool:
        """Whether the last update passed a multiple of ``every`` steps of the budget."""
        if not every:
            return False
        planned = self.updates * self.per_update  # chunks that an episode's end cut short made fewer
        return planned // every > (planned - self.per_update) // every

    def _log(self, metrics: dict[str, float]) -> None:
        assert self.log is not None
        self.elapsed = time.monotonic() - self._clock
        self.log.write(self.updates, self.steps, self.elapsed, metrics)
        self.display(self.steps, metrics)

    # ------------------------------------------------------------------ state

    def save(self) -> Path | None:
        """Writes a checkpoint of everything, where there is a folder.

        Raises:
            CheckpointError: the disk is full; earlier checkpoints are intact.
        """
        if self.folder is None:
            return None
        replay = self.replay if self.settings.checkpoint_replay else None
        if self.log is not None:
            self.log.record(checkpoint_name(self.updates))
        path = write_checkpoint(
            self.folder / FOLDER, self.updates, self.state_dict(), replay, self.settings.keep_checkpoints
        )
        self._saved = self.updates
        return path

    def state_dict(self) -> dict[str, Any]:
        """Agent, feed, counters and the means that wait for the next logged row."""
        return {
            "agent": self.agent.state_dict(),
            "feed": self.feed.state_dict() if self.feed is not None else None,
            "updates": self.updates,
            "steps": self._steps,
            "elapsed": self.elapsed,
            "means": self.means.state_dict(),
            "has_replay": self.replay is not None and self.settings.checkpoint_replay,
        }

    def load_state_dict(self, state: dict[str, Any], folder: Path) -> None:
        """Restores :meth:`state_dict`; the replay is read from ``folder/replay``."""
        with restoring(folder):
            if "policy" in state["agent"]:
                policy_state(state, folder)
            self.agent.load_state_dict(state["agent"])
            if self.feed is not None:
                self.feed.load_state_dict(state["feed"])
            if self.replay is not None and state["has_replay"]:
                self.replay.loads(folder / "replay")
            self.updates, self.elapsed = int(state["updates"]), float(state["elapsed"])
            self._steps = int(state.get("steps", self.updates * self.per_update))
            self.means.load_state_dict(state["means"])
        self._saved = self.updates


def _per_update(agent: Agent, feed: Feed | None) -> int:
    """Environment steps, or conversations, behind one update."""
    if feed is not None:
        return feed.steps_per_collect
    if not isinstance(agent, Collects):
        raise ConfigError(f"{type(agent).__name__} does not collect by itself; give it a rollout")
    return agent.steps_per_update
