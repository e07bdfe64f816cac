"""One loop for every agent and domain: collect, store, update, log, evaluate, checkpoint; and stop when told to."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from copy import copy
from pathlib import Path
from typing import Any

from tensordict import TensorDict
from torch import Tensor

from unified_rl.errors import CheckpointError, ConfigError, NonFiniteError, UnifiedRLError
from unified_rl.protocols import Agent, Collects, Rollout, ShowsRows, Store, TellsResumable
from unified_rl.rollout.control import STEPS
from unified_rl.rollout.conversation import Told
from unified_rl.rollout.feed import Feed, LocalFeed
from unified_rl.shard import local
from unified_rl.spaces import Space
from unified_rl.stopping import Interrupted, StopSignal, say, stopping
from unified_rl.training.best import BEST, Watch, drop_best, has_best
from unified_rl.training.callbacks import Callbacks
from unified_rl.training.checkpoint import EXTENSION, FOLDER, checkpoint_name, set_aside_newer, tidy, write_checkpoint
from unified_rl.training.failures import RunFolder, foreign
from unified_rl.training.growing import Row
from unified_rl.training.loggers import Logger
from unified_rl.training.metrics import Means, MetricLog
from unified_rl.training.ranks import Ranks
from unified_rl.training.restoring import policy_state, restoring
from unified_rl.training.samples import SampleBook
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
        samples: makes the rows of ``samples.jsonl``; None writes none.
        answered: the conversations of the last evaluation, for ``samples``.
        callbacks: the user's own code, see :mod:`unified_rl.training.callbacks`.
        loggers: where metrics go beside the record; by default TensorBoard and CSV.
        config: the run's configuration, for loggers that show it.
        space: of a control environment; checkpoints hold it, so that a policy acts where its environment is not.
        ranks: the processes that train this run; by default this one alone.

    Attributes:
        log: the logged rows.
        stopped: why the run ends before its budget; empty where it does not.
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
        *,
        samples: SampleBook | None = None,
        answered: Callable[[], Told | None] = lambda: None,
        callbacks: Callbacks | None = None,
        loggers: Sequence[Logger] | None = None,
        config: Mapping[str, Any] | None = None,
        space: Space | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        self.settings, self.folder, self.agent = settings, folder, agent
        self.ranks = ranks or Ranks()
        self.feed, self.replay, self.evaluate = feed, replay, evaluate
        self.display = display or (lambda steps, metrics: None)
        self.samples, self.answered, self.callbacks = samples, answered, callbacks or Callbacks()
        self.loggers, self.config, self.space = loggers, config, space
        self.watch = Watch(settings)
        self.stopped = ""
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
        self._told_idle = False
        """Whether the row of the last update, if it is due, is in the metrics."""
        self._open: dict[str, Any] | None = None
        self._told = False
        self._known: list[Any] = []
        """What the rollout tells of some rows of the batch that was taken last."""
        self._unwritten: list[Row] = []
        """Samples of the last update that wait for its row."""
        if samples is not None and hasattr(self.rollout, "shows"):
            self.rollout.shows = samples.of_collection  # type: ignore[union-attr]

    @property
    def steps(self) -> int:
        """Environment steps that were really made (or conversations) behind the updates so far."""
        return self._steps if self.feed is not None else int(self.agent.steps)  # type: ignore[attr-defined]

    @property
    def rollout(self) -> Rollout | None:
        """The rollout of a feed in this process, else None."""
        return self.feed.rollout if isinstance(self.feed, LocalFeed) else None

    def run(self) -> None:
        """Trains until the budget is used or somebody asks for a :meth:`stop`, from wherever the state is.

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
                if self.feed is not None and self.ranks.leads and self.updates < self.planned:
                    self.feed.open()
                with self.present.writes():
                    if self.folder is not None:
                        for place in (FOLDER, EXTENSION, BEST):
                            tidy(self.folder / place)  # a run that is killed behind its last checkpoint writes no other
                        set_aside_newer(self.folder / FOLDER, self.updates)
                        self._find_best(self.folder)
                    until = self.updates - (not self._logged)
                    self.log = MetricLog(self.folder, until, self.loggers, self.config)
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
        self.callbacks("on_run_begin", self)
        relogged = -1 if self._logged else self.updates  # its checkpoint still holds what waited for the row
        if not self._logged:
            self._finish_update()
        while self.updates < self.planned and not self.stopped:
            self._iterate()
            self.ranks.agree(stop, self)
        if self.stopped:
            say(f"{self.folder or 'the run'} ends at update {self.updates} of {self.planned}: {self.stopped}")
        if self._saved != self.updates or relogged == self.updates:
            self.save()
            self._tell_inexact()
        if self.watch.best is not None and self.watch.best.value is None:
            say(f"keep_best={self.watch.best.metric} was in no logged row: there is no best checkpoint")
        self.ranks.serve()
        self.callbacks("on_run_end", self)

    def stop(self, reason: str = "a stop was asked for") -> None:
        """Ends the run after the update under way, with an evaluation and a checkpoint, as if its budget were used."""
        self.stopped = self.stopped or reason

    def _iterate(self) -> None:
        self._keep_for_extension()
        self.update()
        self._finish_update()

    def update(self) -> None:
        """Collects what is missing and trains once; the metrics wait in :attr:`means` to be logged."""
        self._admit()  # until it ends, the state is that after the last update: see LocalFeed
        if self.feed is not None and self.ranks.leads:
            rows, told = self.feed.peek()  # waits for it
            self.callbacks("on_rollout_end", self, rows, {k: v for k, v in told.items() if k != "samples"})
        self._clean = self._logged = False
        taken = self._take()
        # counted before it runs: rows that met a NaN are spent, and a resumed run goes on behind them
        self.updates += 1
        due = self.samples is not None and self._crossed(self.settings.samples_every)
        with self._watching(due) as trained, self.ranks.updating():
            metrics = self.agent.update(self.replay, (self.updates - 1) / self.planned)
        self.ranks.updated(self.agent)
        self.means.add(metrics)
        self._clean = True
        if due:
            self._unwritten = self._samples_of(taken, trained)
        self.callbacks("on_update_end", self, metrics)

    @contextmanager
    def _watching(self, due: bool) -> Iterator[list[TensorDict]]:
        """The rows that the agent trains on within it, where they are wanted."""
        seen: list[TensorDict] = []
        if not due or not isinstance(self.agent, ShowsRows):
            yield seen
            return
        self.agent.watch = seen.append
        try:
            yield seen
        finally:
            self.agent.watch = None

    def _samples_of(self, taken: TensorDict | None, trained: list[TensorDict]) -> list[Row]:
        assert self.samples is not None
        if taken is None or "tokens" not in taken.keys() or "episode" not in taken.keys():  # of supervised rows
            return []
        with foreign("writing samples"):
            return self.samples.of_update(taken, self._known, trained[-1] if trained else None, self.updates)

    def _tell_idle(self, row: Mapping[str, float]) -> None:
        """Says once that no row took part since the last logged one: nothing fails then, and nothing is learnt."""
        if row.get("rollout/counted") == 0.0 and not self._told_idle:
            self._told_idle = True
            say(
                f"update {self.updates}: no answer took part (rollout/counted=0), so nothing is learnt: every reward "
                "was None, or every answer was cut under env.truncated=mask"
            )

    def _finish_update(self) -> None:
        """Evaluates, logs and saves where the intervals say so; until then the update's row counts as not logged."""
        if not self.ranks.leads:
            self._logged = True
            self.means.pop_tensors()
            return
        first, settings = self.updates == 0, self.settings
        last = self.updates == self.planned or (bool(self.stopped) and not first)
        if self.updates == self.planned:
            self._open = self._pending()
        evaluate = settings.eval_episodes != 0 and (first or last or self._crossed(settings.eval_every))
        logs = evaluate or (not first and (last or self._crossed(settings.log_every)))
        row: dict[str, float] | None = None
        is_best, why = False, ""
        if logs or self._unwritten:
            found = self._evaluated() if evaluate else {}
            means, pending = copy(self.means), self._pending(means=False)
            try:
                self._write_samples(evaluate)
                if logs:
                    row = {**({} if first else self.means.pop()), **found}
                    self._log(row)
                    self._tell_idle(row)
                    is_best, why = self.watch.see(row, self.updates, evaluate)
            except BaseException:
                self.means = means
                self._restore_pending(pending)
                raise
        self._logged = True
        if is_best:
            self._save_best()
        if why:
            self.stop(why)
        if evaluate and row is not None:
            self.callbacks("on_evaluation_end", self, row)
        if not first and not last and self._crossed(settings.checkpoint_every):
            self.save()
            self._tell_inexact()
        elif self.updates == 1 and not last:
            self._tell_inexact(early=True)

    def _write_samples(self, evaluated: bool) -> None:
        """Writes the samples that wait, and those of the evaluation that was just made."""
        rows = self._unwritten
        told = self.answered() if evaluated and self.samples is not None else None
        if told is not None and self.samples is not None:
            with foreign("writing samples"):
                rows = [*rows, *self.samples.of_evaluation(told, self.agent.version)]
        if rows:
            assert self.log is not None
            with self.present.writes():
                self.log.write_samples([{"update": self.updates, "steps": self.steps, **row} for row in rows])
        self._unwritten = []

    def _pending(self, means: bool = True) -> dict[str, Any]:
        """What waits for the next row, and what the watch knew before it."""
        waits = {"samples": self._unwritten, "watch": self.watch.state_dict()}
        return {**waits, "means": self.means.state_dict()} if means else waits

    def _restore_pending(self, state: Mapping[str, Any]) -> None:
        self._unwritten = list(state["samples"])
        self.watch.load_state_dict(state["watch"])

    def _evaluated(self) -> dict[str, float]:
        """Evaluation reads the policy and streams of its own, so the first signal ends it."""
        with stopping() as stop, stop.tolerating(0), foreign("the evaluation"):
            return self.evaluate()

    def add_metrics(self, metrics: Mapping[str, float | Tensor]) -> None:
        """Metrics of somebody else's, a callback's for example: the next logged row has the mean of each.

        Args:
            metrics: floats or scalar tensors by name, such as ``mine/share``; not ``eval/`` ones.
        """
        self.means.add(dict(metrics))

    def collect(self) -> None:
        """Admits the tickets that the next update allows, and puts the oldest batch into the replay."""
        self._admit()
        self._take()

    def _admit(self) -> None:
        feed = self.feed
        if feed is None or not self.ranks.leads:
            return
        feed.publish(self.agent.version)
        with foreign("collecting rows"):
            feed.admit(min(self.planned, self.updates + 1 + feed.staleness))

    def _take(self) -> TensorDict | None:
        if self.feed is None:
            return None
        assert self.replay is not None
        rows, metrics = self.ranks.taken(self.feed.take)
        with self.present.writes():  # a memory-mapped replay may meet a full disk
            self.replay.extend(rows)
        self._steps += int(metrics.get(STEPS, self.per_update))
        self._known = metrics.get("samples", [])  # type: ignore[assignment]
        self.means.add({key: value for key, value in metrics.items() if key not in (STEPS, "samples")})
        return rows

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

    def save_if_new(self) -> None:
        """Writes a checkpoint where none is of the last update."""
        if self._saved != self.updates:
            self.save()

    def _rescue(self, error: BaseException) -> None:
        """Saves the last whole update, and lets the error say which checkpoint there is."""
        self.ranks.serve(error)
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
        return f"update {self._saved} is saved, go on with '{self.ranks.command} resume={self.folder}'"

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
        self._prune_best()
        return path

    def _save_best(self) -> None:
        """Writes the best checkpoint; those before it stay until a checkpoint is saved that knows of this one."""
        if self.folder is None:
            return
        self._write(BEST, keep=2**31)
        if self._saved < 0:
            self._prune_best()

    def _prune_best(self) -> None:
        if self.folder is None or self.watch.best is None:
            return
        kept = {self.watch.best.update}
        if self._open is not None and self.updates == self.planned:  # a longer run goes back to what was known before
            kept.add((self._open["watch"]["best"] or {}).get("update", -1))
        with suppress(OSError):  # the next checkpoint finds what stays
            drop_best(self.folder, lambda update: update not in kept)

    def _find_best(self, folder: Path) -> None:
        """Removes best checkpoints of a future that is made again, and forgets a best one that is lost."""
        drop_best(folder, lambda update: update > self.updates)
        best = self.watch.best
        if best is None or best.value is None or has_best(folder, best.update):
            return
        if best.update == self.updates:  # the disk was full when it was to be written
            self._save_best()
        else:
            self.watch.forget_best()

    def _tell_inexact(self, early: bool = False) -> None:
        """Says once, as soon as it is known, that a resumed run will begin new episodes.

        Args:
            early: few steps are made, in which an environment may not have shown yet that it remembers more.
        """
        env = getattr(self.rollout, "env", None)
        if self._told or not isinstance(env, TellsResumable):
            return
        with foreign("putting the environment back"):
            why = env.resumable()
        self._told = isinstance(why, str) or (bool(why) and not early)
        if isinstance(why, str):
            say(f"{self.folder} can be resumed with new episodes only, not bit for bit: {why}")

    def _write(self, place: str, keep: int) -> Path:
        assert self.folder is not None
        replay = self.replay if self.settings.checkpoint_replay else None
        if self._clock is not None:
            self.elapsed = time.monotonic() - self._clock
        with self.present.writes():
            return write_checkpoint(
                self.folder / place, self.updates, self.state_dict(), replay, keep, pieces=self.ranks.write
            )

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
        """Agent, feed, counters, what waits for the next logged row and whether the last one is logged, and callbacks.

        ``open`` is what waited before the row that a used-up budget asks for, where a longer run may have none.
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
            "samples": self._unwritten,
            "watch": self.watch.state_dict(),
            "callbacks": self.callbacks.state_dict(),
            "stopped": self.stopped,
            "planned": self.planned,
            "space": None if self.space is None else self.space.plain(),
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
            self.ranks.load(self.agent, state["agent"], folder)
            if self.replay is not None and state["has_replay"]:
                self.replay.loads(folder / "replay")
            self.updates, self.elapsed = int(state["updates"]), float(state["elapsed"])
            self._steps = int(state.get("steps", self.updates * self.per_update))
            self.means.load_state_dict(state["means"])
            self._logged, self._saved = bool(state.get("logged", True)), self.updates
            if "watch" in state:
                self._restore_pending(state)
                self.callbacks.load_state_dict(state["callbacks"])
            self._stop_again(state)
            if state.get("open") is not None and self.updates < self.planned:  # the row of an end that is none any more
                self._reopen(state["open"])

    def _stop_again(self, state: Mapping[str, Any]) -> None:
        """A run that was stopped stays so until it is given more steps."""
        if not state.get("stopped"):
            return
        if self.planned > state["planned"]:
            self.watch.go_on()
        else:
            self.stopped = str(state["stopped"])

    def _reopen(self, pending: Mapping[str, Any]) -> None:
        """Goes back to before the row of a smaller budget's end."""
        if "means" in pending:
            self._restore_pending(pending)
        self.means.load_state_dict(dict(pending.get("means", pending)))
        self._logged = False


def _finite(agent: Agent) -> bool:
    """Whether the policy's weights are worth keeping."""
    state = agent.state_dict()
    weights = [w for part in ("policy", "critic") for w in (state.get(part) or {}).values() if isinstance(w, Tensor)]
    return all(bool(local(w).isfinite().all()) for w in weights if w.is_floating_point())


def _per_update(agent: Agent, feed: Feed | None) -> int:
    """Environment steps, or conversations, behind one update."""
    if feed is not None:
        return feed.steps_per_collect
    if not isinstance(agent, Collects):
        raise ConfigError(f"{type(agent).__name__} does not collect by itself; give it a rollout")
    return agent.steps_per_update
