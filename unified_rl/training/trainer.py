"""One loop for every agent and domain: collect, store, update, log, evaluate, checkpoint."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import suppress
from copy import copy
from pathlib import Path
from typing import Any

from torch import Tensor

from unified_rl.errors import CheckpointError, ConfigError, NonFiniteError, UnifiedRLError
from unified_rl.protocols import Agent, Collects, Rollout, Store, TellsResumable
from unified_rl.rollout.control import STEPS
from unified_rl.rollout.feed import Feed, LocalFeed
from unified_rl.stopping import Interrupted, StopSignal, say, stopping
from unified_rl.training.checkpoint import EXTENSION, FOLDER, checkpoint_name, set_aside_newer, tidy, write_checkpoint
from unified_rl.training.failures import RunFolder, foreign
from unified_rl.training.metrics import Means, MetricLog
from unified_rl.training.restoring import policy_state, restoring
from unified_rl.training.settings import TrainSettings


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
        self.present = RunFolder(folder)
        self._clock: float | None = None
        self._saved = -1
        self._clean = True
        """Whether the state is that after a whole update."""
        self._logged = False
        """Whether the row of the last update, if it is due, is in the metrics."""
        self._open: dict[str, Any] | None = None
        self._told = False

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

        Whatever ends it early, the state after the last whole update is saved: only inside an update, between the
        replay's write and the optimiser's last step, there is none, and the checkpoint before it stands.

        Raises:
            NonFiniteError: a NaN.
            RolloutError: the environment, a reward or a source raised; the message says where.
            CheckpointError: the folder cannot be written, or is gone; earlier checkpoints are intact.
            Interrupted: a signal: the first after the update under way, a second one at once.
        """
        if isinstance(self.feed, LocalFeed):
            self.feed.keeps_state = self.folder is not None
        self.present = RunFolder(self.folder)
        with stopping() as stop:
            try:
                with self.present.writes():
                    if self.folder is not None:
                        for place in (FOLDER, EXTENSION):
                            tidy(self.folder / place)  # a run that is killed behind its last checkpoint writes no other
                        set_aside_newer(self.folder / FOLDER, self.updates)
                    self.log = MetricLog(self.folder, keep_until=self.updates - (not self._logged))
                self._clock = time.monotonic() - self.elapsed
                with stop.tolerating(1):
                    self._loop(stop)
            except BaseException as error:
                stop.shield()
                self._rescue(error)
                raise
            finally:
                stop.shield()
                self._close()

    def _loop(self, stop: StopSignal) -> None:
        if not self._logged:
            self._finish_update()
        while self.updates < self.planned:
            self._iterate()
            if stop.requested:
                raise stop.error()
        if self._saved != self.updates:
            self.save()
            self._tell_inexact()

    def _iterate(self) -> None:
        self._keep_for_extension()
        self.update()
        self._finish_update()

    def update(self) -> None:
        """Collects what is missing and trains once; the metrics wait in :attr:`means` to be logged."""
        self._admit()  # until it ends, the state is that after the last update: see LocalFeed
        self._clean = self._logged = False
        self._take()
        # counted before it runs: rows that met a NaN are spent, and a resumed run goes on behind them
        self.updates += 1
        self.means.add(self.agent.update(self.replay, (self.updates - 1) / self.planned))
        self._clean = True

    def _finish_update(self) -> None:
        """Evaluates, logs and saves where the intervals say so; until then the update's row counts as not logged."""
        first, last, settings = self.updates == 0, self.updates == self.planned, self.settings
        if last:
            self._open = self.means.state_dict()
        evaluate = first or last or self._crossed(settings.eval_every)
        if evaluate or self._crossed(settings.log_every):
            found = self._evaluated() if evaluate else {}
            waiting, metrics = copy(self.means), {} if first else self.means.pop()
            try:
                self._log({**metrics, **found})
            except BaseException:
                self.means = waiting
                raise
        self._logged = True
        if not first and not last and self._crossed(settings.checkpoint_every):
            self.save()
            self._tell_inexact()

    def _evaluated(self) -> dict[str, float]:
        """Evaluation reads the policy and streams of its own, so the first signal ends it."""
        with stopping() as stop, stop.tolerating(0), foreign("the evaluation"):
            return self.evaluate()

    def collect(self) -> None:
        """Admits the tickets that the next update allows, and puts the oldest batch into the replay."""
        self._admit()
        self._take()

    def _admit(self) -> None:
        feed = self.feed
        if feed is None:
            return
        feed.publish(self.agent.version)
        with foreign("collecting rows"):
            feed.admit(min(self.planned, self.updates + 1 + feed.staleness))

    def _take(self) -> None:
        if self.feed is None:
            return
        assert self.replay is not None
        rows, metrics = self.feed.take()
        with self.present.writes():  # a memory-mapped replay may meet a full disk
            self.replay.extend(rows)
        self._steps += int(metrics.get(STEPS, self.per_update))
        self.means.add({key: value for key, value in metrics.items() if key != STEPS})

    def _crossed(self, every: int | None) -> bool:
        """Whether the last update passed a multiple of ``every`` steps of the budget."""
        if not every:
            return False
        planned = self.updates * self.per_update  # chunks that an episode's end cut short made fewer
        return planned // every > (planned - self.per_update) // every

    def _log(self, metrics: dict[str, float]) -> None:
        assert self.log is not None and self._clock is not None
        self.elapsed = time.monotonic() - self._clock
        with self.present.writes():
            self.log.write(self.updates, self.steps, self.elapsed, metrics)
        self.display(self.steps, metrics)

    # ------------------------------------------------------------------ how it ends

    def _rescue(self, error: BaseException) -> None:
        """Saves the last whole update, and lets the error say which checkpoint there is."""
        if isinstance(error, NonFiniteError):
            # the update is spent; weights that are lost are kept only where there is nothing else to look at
            self._clean = self._saved < 0 or _finite(self.agent)
        untouched = self.updates == 0 and not self._logged  # a new start loses nothing, and may have half collected
        if self.folder is None or self.log is None:
            return
        if self._clean and self._saved != self.updates and not untouched:
            try:
                self.save()
            except (CheckpointError, OSError) as failed:
                if not isinstance(error, UnifiedRLError):
                    error.add_note(str(failed))
        if not self.folder.is_dir():
            return
        if isinstance(error, Interrupted):
            error.saved = self._whereabouts()
        elif isinstance(error, UnifiedRLError):
            error.args = (f"{error}; {self._whereabouts()}",)

    def _whereabouts(self) -> str:
        if self._saved < 0:
            return f"{self.folder} holds no checkpoint yet"
        return f"update {self._saved} is saved, go on with 'unified-rl train resume={self.folder}'"

    def _close(self) -> None:
        if self.feed is not None:
            self.feed.close()
        if self.log is not None:
            with suppress(OSError):
                self.log.close()

    # ------------------------------------------------------------------ state

    def save(self) -> Path | None:
        """Writes a checkpoint of everything, where there is a folder.

        Raises:
            CheckpointError: the disk is full, or the folder is gone; earlier checkpoints are intact.
        """
        if self.folder is None:
            return None
        if self.log is not None:
            self.log.record(checkpoint_name(self.updates))
        path = self._write(FOLDER, self.settings.keep_checkpoints)
        if self.log is not None:
            self.log.complete(path.name)
        self._saved = self.updates
        return path

    def _tell_inexact(self) -> None:
        """Says once, at the first checkpoint, that a resumed run will begin new episodes."""
        env = getattr(self.rollout, "env", None)
        if self._told or not isinstance(env, TellsResumable):
            return
        with foreign("putting the environment back"):
            why = env.resumable()
        self._told = bool(why)
        if isinstance(why, str):
            say(f"{self.folder} can be resumed with new episodes only, not bit for bit: {why}")

    def _write(self, place: str, keep: int) -> Path:
        assert self.folder is not None
        replay = self.replay if self.settings.checkpoint_replay else None
        if self._clock is not None:
            self.elapsed = time.monotonic() - self._clock
        with self.present.writes():
            return write_checkpoint(self.folder / place, self.updates, self.state_dict(), replay, keep)

    def _keep_for_extension(self) -> None:
        """Keeps the last state that a longer run passes through too.

        From here on rows of updates beyond the budget would be collected. They are not, so that every run of a budget
        has as many environment samples as it says; a run that is extended goes on from here, see :meth:`cut_short`.
        """
        if self.folder is None or self.feed is None or self.feed.staleness == 0:
            return
        if self.updates == max(self.planned - self.feed.staleness, 0):
            self._write(EXTENSION, keep=1)

    def cut_short(self, state: dict[str, Any]) -> bool:
        """Whether a state lacks rows that this run would have collected by then: it was saved near a budget's end."""
        if self.feed is None or state["feed"] is None or not state["updates"]:
            return False
        return bool(state["feed"]["admitted"] < min(self.planned, state["updates"] + self.feed.staleness))

    def state_dict(self) -> dict[str, Any]:
        """Agent, feed, counters, the means that wait for the next logged row, and whether the last one is logged.

        ``open`` are the means before the row that a used-up budget asks for, where a longer run may have none.
        """
        return {
            "agent": self.agent.state_dict(),
            "feed": self.feed.state_dict() if self.feed is not None else None,
            "updates": self.updates,
            "steps": self._steps,
            "elapsed": self.elapsed,
            "means": self.means.state_dict(),
            "logged": self._logged,
            "open": self._open if self.updates == self.planned else None,
            "has_replay": self.replay is not None and self.settings.checkpoint_replay,
        }

    def load_state_dict(self, state: dict[str, Any], folder: Path, restart: int | None = None) -> None:
        """Restores :meth:`state_dict`; the replay is read from ``folder/replay``.

        Args:
            state: of a trainer.
            folder: of the checkpoint.
            restart: seed of new episodes in place of those under way.

        Raises:
            CheckpointError: the state is another run's.
            RestoreError: the environment cannot be put back, and ``restart`` is None.
        """
        with restoring(folder):
            if "policy" in state["agent"]:
                policy_state(state, folder)
            if self.feed is not None:
                self.feed.load_state_dict(state["feed"], restart)
            self.agent.load_state_dict(state["agent"])
            if self.replay is not None and state["has_replay"]:
                self.replay.loads(folder / "replay")
            self.updates, self.elapsed = int(state["updates"]), float(state["elapsed"])
            self._steps = int(state.get("steps", self.updates * self.per_update))
            self.means.load_state_dict(state["means"])
            self._logged, self._saved = bool(state.get("logged", True)), self.updates
            if state.get("open") is not None and self.updates < self.planned:  # the row of an end that is none any more
                self.means.load_state_dict(state["open"])
                self._logged = False


def _finite(agent: Agent) -> bool:
    """Whether the policy's weights are worth keeping."""
    state = agent.state_dict()
    weights = [w for part in ("policy", "critic") for w in (state.get(part) or {}).values() if isinstance(w, Tensor)]
    return all(bool(w.isfinite().all()) for w in weights if w.is_floating_point())


def _per_update(agent: Agent, feed: Feed | None) -> int:
    """Environment steps, or conversations, behind one update."""
    if feed is not None:
        return feed.steps_per_collect
    if not isinstance(agent, Collects):
        raise ConfigError(f"{type(agent).__name__} does not collect by itself; give it a rollout")
    return agent.steps_per_update
