"""The progress display of one run."""

from __future__ import annotations

from typing import Any

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
