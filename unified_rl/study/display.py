"""The progress display of a study: all runs, and those under way."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from unified_rl.study.grid import Job

TAIL = 65536
"""Bytes read from the end of a metrics file; many times a row's length."""


class StudyDisplay:
    """One bar for the study and one for each run under way, fed from the runs' own metrics files.

    Args:
        name: of the study.
        jobs: all of its jobs.
        shown: False draws nothing.
    """

    def __init__(self, name: str, jobs: Sequence[Job], shown: bool = True) -> None:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=28),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[note]}"),
        )
        self.progress = Progress(*columns, disable=not shown)
        self.total = self.progress.add_task(f"[bold]{name}[/bold] runs", total=len(jobs), note="")
        self.tasks: dict[str, TaskID] = {}

    def __enter__(self) -> StudyDisplay:
        """Starts drawing."""
        self.progress.start()
        return self

    def __exit__(self, *error: Any) -> None:
        """Stops drawing."""
        self.progress.stop()

    def update(self, running: Sequence[Job], ended: int) -> None:
        """Shows which runs are under way and how far they are."""
        self.progress.update(self.total, completed=ended)
        for slug in [s for s in self.tasks if s not in {job.slug for job in running}]:
            self.progress.remove_task(self.tasks.pop(slug))
        for job in running:
            row = last_row(job.folder / "metrics.jsonl")
            if job.slug not in self.tasks:
                total = job.cfg.get("steps") or None
                self.tasks[job.slug] = self.progress.add_task("  " + job.slug.rsplit("-", 1)[0], total=total, note="")
            score = row.get("eval/score")
            note = "warm start" if job.cfg.get("steps") == 0 else "" if score is None else f"score {score:.3g}"
            self.progress.update(self.tasks[job.slug], completed=row.get("steps", 0), note=note)


def last_row(path: Path) -> dict[str, Any]:
    """The last values that a run logged, later rows over earlier ones; empty before the first."""
    found: dict[str, Any] = {}
    try:
        with open(path, "rb") as handle:
            handle.seek(-min(TAIL, handle.seek(0, os.SEEK_END)), os.SEEK_END)
            lines = handle.read().decode(errors="replace").splitlines()
    except OSError:
        return found
    for line in lines:
        try:
            found.update(json.loads(line))
        except (json.JSONDecodeError, ValueError):
            continue
    return found
