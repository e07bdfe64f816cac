"""``unified-rl compare``: trains a grid of runs and reports on it. A restarted study trains only what is missing."""

from __future__ import annotations

import math
import os
import shlex
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from unified_rl.errors import UnifiedRLError
from unified_rl.files import write_atomically
from unified_rl.study.display import StudyDisplay
from unified_rl.study.grid import Compose, Job, Study, make_jobs
from unified_rl.study.report import write_report
from unified_rl.study.results import Cell, read_runs, summarise, write_results, write_summary, write_training
from unified_rl.study.workers import Train, run_jobs


class StudyError(UnifiedRLError, RuntimeError):
    """Some runs of a study failed; the others are finished and reported."""


def compare(
    cfg: dict[str, Any],
    allow: Sequence[str] = (),
    *,
    config_dirs: Sequence[str] = (),
    progress: bool = True,
    train: Train | None = None,
    compose: Compose | None = None,
) -> Path:
    """Trains every run of a study and writes its tables (``results``, ``training``, ``summary``), report and PNGs.

    Args:
        cfg: a configuration with a ``study`` node (see :class:`~unified_rl.study.grid.Study`).
        allow: prefixes that configuration may build beside ``unified_rl.``.
        config_dirs: the user's own folders of configuration groups.
        progress: show progress bars.
        train: replaces the trainer (``train(cfg, allow, progress=False)``).
        compose: replaces the composition of a run's overrides.

    Returns:
        The study's folder.

    Raises:
        ConfigError: a study or an override that cannot be composed; nothing has run then.
        CheckpointError: another process runs this study.
        StudyError: some runs failed; everything else is finished and in the report.
        KeyboardInterrupt: Ctrl-C; runs under way are checkpointed, and the same command goes on with them.
    """
    from unified_rl.config import reading_once
    from unified_rl.training.checkpoint import lock_run

    study = Study.from_config(cfg)
    with reading_once():
        warm, runs = make_jobs(study, compose or partial(_compose, allow=allow, config_dirs=config_dirs))
    study.path.mkdir(parents=True, exist_ok=True)
    with lock_run(study.path):
        write_atomically(study.path / "study.yaml", yaml.safe_dump(cfg, sort_keys=False))
        with StudyDisplay(study.name, [*warm, *runs], shown=progress) as display:
            failed = run_jobs(
                [*warm, *runs],
                workers=study.workers,
                folder=study.path,
                allow=allow,
                train=train,
                watch=display.update,
            )
        _report(study, warm, runs, failed, allow)
    if failed:
        lines = "".join(f"\n  {slug}: {error}" for slug, error in failed.items())
        raise StudyError(
            f"{len(failed)} of {len(warm) + len(runs)} runs failed; the others are in {study.path}:{lines}"
        )
    return study.path


def _compose(overrides: list[str], allow: Sequence[str], config_dirs: Sequence[str]) -> dict[str, Any]:
    from unified_rl.config import compose, resolve_defaults

    return resolve_defaults(compose(overrides, config_dirs=config_dirs, allow=allow), allow=allow)


def _report(
    study: Study, warm: Sequence[Job], jobs: Sequence[Job], failed: dict[str, str], allow: Sequence[str]
) -> None:
    """Writes tables, figures and the report of whatever finished, and prints the summary."""
    runs = read_runs(job for job in jobs if job.slug not in failed)
    if not runs:
        return
    cells = summarise(runs)
    write_results(study.path / "results.csv", runs)
    write_training(study.path / "training.csv", runs)
    write_summary(study.path / "summary.csv", cells)
    command = shlex.join([os.path.basename(sys.argv[0]), *sys.argv[1:]])
    report = write_report(study, runs, command=command, failed=failed, allow=allow)
    console = Console(width=None if sys.stdout.isatty() else 110)  # a file need not cut names short
    console.print(summary_table(study.name, cells))
    if not all(cell.final.known for cell in cells):
        console.print("one seed: no interval", style="dim")
    left = {path.name for path in (study.path / "runs").iterdir()} - {job.slug for job in [*warm, *jobs]}
    if left:
        console.print(f"{len(left)} run folders of an earlier configuration are not part of this report", style="dim")
    console.print(f"report: {report}")


def summary_table(name: str, cells: Sequence[Cell]) -> Table:
    """The printed table: scores with intervals, effective sample size and KL; 80 columns wide."""
    seeds = sorted({cell.seeds for cell in cells})
    note = f"{'-'.join(map(str, seeds))} seed{'s' if seeds != [1] else ''}"
    table = Table(title=f"{name}: held-out score, {note}", box=SIMPLE_HEAD, title_justify="left", pad_edge=False)
    for column in ("domain", "correction", "stale", "start", "final", "95 %", "ESS", "KL"):
        table.add_column(column, justify="left" if column in ("domain", "correction") else "right", no_wrap=True)
    for index, cell in enumerate(cells):
        here = (cell.domain, cell.staleness)
        if index and here != (cells[index - 1].domain, cells[index - 1].staleness):
            table.add_section()
        ess, kl = (_number(cell.diagnostics[key], 2) for key in ("ess/unit", "kl/k3"))
        interval = f"{_number(cell.final.low)}…{_number(cell.final.high)}" if cell.final.known else "-"
        names = (cell.domain, cell.correction, str(cell.staleness), _number(cell.start))
        table.add_row(*names, f"[bold]{_number(cell.final.estimate)}[/bold]", interval, ess, kl)
    return table


def _number(value: float, digits: int = 3) -> str:
    if not math.isfinite(value):
        return "-"
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.{digits}g}"
