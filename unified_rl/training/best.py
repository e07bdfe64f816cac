"""What a run makes of the metrics that it logs: which checkpoint is the best, and when nothing gets better any more."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from unified_rl.errors import ConfigError
from unified_rl.instantiate import nearest
from unified_rl.stopping import say
from unified_rl.training.checkpoint import BEST, checkpoints, remove_checkpoint, step_of
from unified_rl.training.metric_names import MetricNames
from unified_rl.training.settings import TrainSettings, check_early_stopping, check_keep_best

__all__ = ["BEST", "Best", "Watch", "drop_best", "has_best"]


def drop_best(run: Path, which: Callable[[int], bool]) -> None:
    """Removes the best checkpoints of the updates for which ``which`` says so."""
    for path in checkpoints(run / BEST):
        if which(step_of(path)):
            remove_checkpoint(path)


def has_best(run: Path, update: int) -> bool:
    """Whether the best checkpoint is that of an update."""
    return update in map(step_of, checkpoints(run / BEST))


class Best:
    """The best value of a metric so far.

    Args:
        metric: its name, such as ``eval/accuracy``.
        mode: ``max`` or ``min``.
        setting: that names it, for errors.
        min_delta: what a better value must exceed the best one by.

    Attributes:
        value: the best so far; None before the first.
        update: that gave it.
    """

    def __init__(self, metric: str, mode: str, setting: str, min_delta: float = 0.0) -> None:
        self.metric, self.mode, self.setting, self.min_delta = metric, mode, setting, min_delta
        self.value: float | None = None
        self.update = -1

    def better(self, metrics: Mapping[str, Any], update: int) -> bool | None:
        """Whether a row holds a better value, which then is the best; None where it holds none.

        A value that is not finite is never better.
        """
        found = metrics.get(self.metric)
        if found is None:
            return None
        sign = 1.0 if self.mode == "max" else -1.0
        if not math.isfinite(found):
            return False
        if self.value is None or sign * (found - self.value) > self.min_delta:
            self.value, self.update = float(found), update
            return True
        return False

    def state_dict(self) -> dict[str, Any]:
        """Value and update."""
        return {"value": self.value, "update": self.update}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores :meth:`state_dict`."""
        self.value, self.update = state["value"], int(state["update"])


class Watch:
    """``keep_best`` and ``early_stopping`` of a run.

    Args:
        settings: of the run.

    Attributes:
        best: the best value, and the update whose checkpoint is kept; None without ``keep_best``.
        names: of the run's metrics, where they are known; the first evaluation completes them.
    """

    def __init__(self, settings: TrainSettings) -> None:
        self.names: MetricNames | None = None
        self.best: Best | None = None
        self.stopper: Best | None = None
        self.patience = self.waited = 0
        if settings.keep_best is not None:
            self.best = Best(**check_keep_best(settings.keep_best), setting="keep_best")
        if settings.early_stopping is not None:
            found = check_early_stopping(settings.early_stopping)
            self.patience = found.pop("patience")
            self.stopper = Best(**found, setting="early_stopping.metric")

    def see(self, metrics: Mapping[str, Any], update: int, evaluated: bool) -> tuple[bool, str]:
        """Looks at a logged row.

        Args:
            metrics: of the row.
            update: its number.
            evaluated: whether an evaluation is in it.

        Returns:
            Whether it holds the best value, and why the run ends now (empty where it does not).

        Raises:
            ConfigError: a metric that evaluation does not give, or that the run does not have; names the nearest.
        """
        for one in (self.best, self.stopper):
            if one is not None and evaluated and one.metric.startswith("eval/") and one.metric not in metrics:
                known = [key for key in metrics if key.startswith("eval/")]
                raise ConfigError(
                    f"{one.setting}={one.metric} is no metric of this evaluation; {nearest(one.metric, known)}"
                )
        if evaluated and self.names is not None and self.names.late:
            self.names = self.names.completed(metrics)
            self.check(self.names)
        is_best = self.best is not None and bool(self.best.better(metrics, update))
        return is_best, "" if self.stopper is None else self._patience(self.stopper, metrics, update)

    def check(self, names: MetricNames) -> None:
        """Refuses to wait for a metric that a run will not have.

        Raises:
            ConfigError: names the setting and the nearest metric.
        """
        self.names = names
        for one in (self.best, self.stopper):
            fault = "" if one is None else names.fault(one.metric)
            if one is not None and fault:
                raise ConfigError(
                    f"{one.setting}={one.metric} {fault} (a callback names metrics of its own in its attribute metrics)"
                )

    def _patience(self, stopper: Best, metrics: Mapping[str, Any], update: int) -> str:
        better = stopper.better(metrics, update)
        if better is None:
            return ""
        self.waited = 0 if better else self.waited + 1
        if self.waited < self.patience:
            return ""
        value = "no finite value" if stopper.value is None else f"{stopper.value:g} of update {stopper.update}"
        return f"early stopping: {self.waited} values of {stopper.metric} were not better than {value}"

    def go_on(self) -> None:
        """Forgets how long nothing got better: somebody asked for more steps."""
        self.waited = 0

    def forget_best(self) -> None:
        """Forgets the best value, whose checkpoint is gone: the next one is the best again."""
        if self.best is not None:
            say(f"the best checkpoint, of update {self.best.update}, is gone; the next evaluation is the best again")
            self.best.load_state_dict({"value": None, "update": -1})

    def state_dict(self) -> dict[str, Any]:
        """Both, and how long nothing got better."""
        return {
            "best": None if self.best is None else self.best.state_dict(),
            "stopper": None if self.stopper is None else self.stopper.state_dict(),
            "waited": self.waited,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores :meth:`state_dict`."""
        for one, key in ((self.best, "best"), (self.stopper, "stopper")):
            if one is not None and state.get(key) is not None:
                one.load_state_dict(state[key])
        self.waited = int(state.get("waited", 0))
