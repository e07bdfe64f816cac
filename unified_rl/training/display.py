"""What a run shows of its progress: a bar at a terminal, else a line for each logged row."""

from __future__ import annotations

import sys
import time
from contextlib import suppress
from typing import Any, Protocol

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column

SHOWN = {
    "eval/score": "score",
    "eval/accuracy": "accuracy",
    "rollout/return": "return",
    "rollout/reward": "reward",
    "ess/unit": "ESS",
    "kl/k3": "KL",
}


LINE = {
    "rollout/reward": "reward",
    "rollout/return": "return",
    "loss/total": "loss",
    "loss/nll": "loss",
    "loss/critic": "critic loss",
    "eval/score": "eval score",
    "eval/accuracy": "eval accuracy",
}
"""What a line shows, in this order."""
WARM_SECONDS = 10.0
"""Between two lines about a warm start."""


class Follows(Protocol):
    """A trainer, as far as lines look at it."""

    updates: int
    planned: int


def make_display(name: str) -> Display | Lines:
    """What shows a run's progress where standard output is."""
    display = Display(name)
    console = display.progress.console
    return display if console.is_terminal or console.is_jupyter else Lines()


class Lines:
    """A line on standard error for each logged row, as a log file or a build server wants it.

    ``update 12/100  steps 1536/12800  reward 0.31  loss -0.012  eval score 0.4  left 0:04:10``; the time that is left
    follows from the updates since this process began.
    """

    def __init__(self) -> None:
        self.steps = 0
        self.trainer: Follows | None = None
        self._began, self._from = time.monotonic(), 0
        self._stage, self._said = -1, 0.0

    def __enter__(self) -> Lines:
        """Nothing to begin."""
        return self

    def __exit__(self, *error: Any) -> None:
        """Nothing to end."""

    def follow(self, trainer: Follows) -> None:
        """Tells whose updates are counted, once the trainer stands where it begins."""
        self.trainer, self._began, self._from = trainer, time.monotonic(), trainer.updates

    def warm_start(self, stage: int, update: int, budget: int, loss: float, threshold: float | None) -> None:
        """Tells of a warm start, now and then."""
        now = time.monotonic()
        if stage == self._stage and now - self._said < WARM_SECONDS:
            return
        self._stage, self._said = stage, now
        goal = "" if threshold is None else f" (until {threshold})"
        _print(f"warm start {stage + 1}  step {update}/{budget}  loss {loss:.3f}{goal}")

    def update(self, steps: int, metrics: dict[str, float]) -> None:
        """Tells of a logged row."""
        parts = [f"steps {steps}/{self.steps}"]
        if self.trainer is not None:
            parts.insert(0, f"update {self.trainer.updates}/{self.trainer.planned}")
        parts += [f"{name} {metrics[key]:.4g}" for key, name in LINE.items() if key in metrics]
        _print("  ".join([*parts, *self._left()]))

    def _left(self) -> list[str]:
        made = 0 if self.trainer is None else self.trainer.updates - self._from
        if self.trainer is None or made <= 0:
            return []
        seconds = round((time.monotonic() - self._began) / made * (self.trainer.planned - self.trainer.updates))
        return [f"left {seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"]


def _print(text: str) -> None:
    with suppress(OSError, ValueError):  # a log that is gone is no reason to fail
        print(text, file=sys.stderr, flush=True)


class Display:
    """A rich progress bar with the latest score, effective sample size and KL.

    Args:
        name: the run's name.
        steps: the budget, which is known before the first row.
    """

    def __init__(self, name: str, steps: int = 0) -> None:
        cut: Any = {"overflow": "ellipsis", "no_wrap": True}
        named = Column(**cut, min_width=min(len(name), 16), max_width=20)
        self.progress = Progress(
            TextColumn("[bold]{task.description}", table_column=named),
            BarColumn(bar_width=10),
            MofNCompleteColumn(table_column=Column(no_wrap=True, min_width=2 * len(str(steps)) + 1)),
            TimeElapsedColumn(table_column=Column(no_wrap=True, min_width=7)),
            TimeRemainingColumn(table_column=Column(no_wrap=True, min_width=7)),
            TextColumn("{task.fields[note]}", table_column=Column(**cut)),
        )
        self.name, self.steps = name, steps
        self.task: Any = None
        self.stage: Any = None
        self.latest: dict[str, float] = {}

    def __enter__(self) -> Display:
        """Drawing starts with the first row, so that a run refused before it leaves no empty line."""
        return self

    def __exit__(self, *error: Any) -> None:
        """Stops drawing."""
        if self.progress.tasks:
            self.progress.stop()

    def follow(self, trainer: Follows) -> None:
        """Its updates say nothing that the bar shows."""

    def warm_start(self, stage: int, update: int, budget: int, loss: float, threshold: float | None) -> None:
        """Shows a step of the warm start."""
        if self.stage is None or self.stage[0] != stage:
            self.progress.start()
            self.stage = (stage, self.progress.add_task(f"warm start {stage + 1}", total=None, note=""))
        goal = "" if threshold is None else f" (until {threshold})"
        self.progress.update(self.stage[1], completed=update, total=budget, note=f"loss {loss:.3f}{goal}")

    def update(self, steps: int, metrics: dict[str, float]) -> None:
        """Shows a logged row."""
        if self.task is None:
            self.progress.start()
            self.task = self.progress.add_task(self.name, total=self.steps, note="")
        self.latest |= {SHOWN[key]: value for key, value in metrics.items() if key in SHOWN}
        note = "  ".join(f"{key} {value:.3g}" for key, value in self.latest.items())
        self.progress.update(self.task, completed=min(steps, self.steps), note=note)
