"""What a study found: the metrics of its runs, joined into tables."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from unified_rl.files import check_listed, replacing
from unified_rl.study.grid import Job
from unified_rl.study.statistics import Array, Interval, stratified_bootstrap

SCORE = "eval/score"
PLACE = ("update", "steps", "wall_seconds")
LABELS = ("domain", "correction", "staleness", "seed")
SUMMARY = ("ess/unit", "kl/k3", "clip/fraction", "staleness/mean")
"""Diagnostics of the summary, averaged over each run's logged rows."""
TRAINING = (
    "train/reward", "rollout/length", "rollout/truncated", "rollout/entropy_estimate", "ess/unit", "ess/sequence",
    "kl/k3", "clip/fraction", "grad/norm", SCORE,
)  # fmt: skip
"""What ``training.csv`` holds of every logged row."""


@dataclass(frozen=True)
class RunData:
    """One run: what it is called in tables and figures, and every row that it logged."""

    labels: dict[str, Any]
    rows: list[dict[str, Any]]
    folder: Path | None = None

    def series(self, metric: str, x: str = "steps") -> tuple[Array, Array]:
        """The finite values of a metric in order, and where they were logged: two arrays ``[points]``."""
        pairs = [(row[x], row[metric]) for row in self.rows if _finite(row.get(metric)) and _finite(row.get(x))]
        return np.array([p[0] for p in pairs], dtype=np.float64), np.array([p[1] for p in pairs], dtype=np.float64)

    def first(self, metric: str = SCORE) -> float:
        """The first value of a metric; NaN where there is none."""
        values = self.series(metric)[1]
        return float(values[0]) if values.size else math.nan

    def last(self, metric: str = SCORE) -> float:
        """The last value of a metric; NaN where there is none."""
        values = self.series(metric)[1]
        return float(values[-1]) if values.size else math.nan

    def mean(self, metric: str) -> float:
        """The mean over all logged rows; NaN where there are none."""
        values = self.series(metric)[1]
        return float(values.mean()) if values.size else math.nan


@dataclass(frozen=True)
class Cell:
    """One line of the summary: a domain, a correction and a staleness, over its seeds."""

    domain: str
    correction: str
    staleness: int
    seeds: int
    start: float
    final: Interval
    diagnostics: dict[str, float]


def read_rows(folder: Path) -> list[dict[str, Any]]:
    """The rows of ``metrics.jsonl``; a last line cut by a crash is dropped, a missing file has none.

    Raises:
        DamageError: the run's manifest lists the file, and it is missing or altered.
    """
    path = folder / "metrics.jsonl"
    check_listed(path)
    rows: list[dict[str, Any]] = []
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def read_runs(jobs: Iterable[Job]) -> list[RunData]:
    """The metrics of the given runs, those without an evaluation left out."""
    runs = [RunData(job.labels, read_rows(job.folder), job.folder) for job in jobs]
    return [run for run in runs if math.isfinite(run.last())]


def write_results(path: Path, runs: Sequence[RunData]) -> None:
    """Writes ``results.csv``: a row for each run and evaluation.

    Columns: domain, correction, staleness, seed, update, steps, score, then every diagnostic, each with the value
    that was logged nearest to the evaluation.
    """
    metrics = sorted({key for run in runs for row in run.rows for key in row} - set(PLACE) - {SCORE})
    columns = [*LABELS, "update", "steps", "score", *metrics]
    with replacing(path) as aside, open(aside, "w", newline="") as handle:
        writer = csv.writer(handle)
        writer.writerow(columns)
        for run in runs:
            writer.writerows(_evaluations(run, metrics))


def write_training(path: Path, runs: Sequence[RunData]) -> None:
    """Writes ``training.csv``: a row for each run and logged update, with what was logged of :data:`TRAINING`."""
    logged = {key for run in runs for row in run.rows for key in row}
    columns = [*PLACE, *(key for key in TRAINING if key in logged)]
    with replacing(path) as aside, open(aside, "w", newline="") as handle:
        writer = csv.writer(handle)
        writer.writerow([*LABELS, *columns])
        for run in runs:
            labels = [run.labels[key] for key in LABELS]
            writer.writerows([*labels, *(_text(row.get(key)) for key in columns)] for row in run.rows)


def _text(value: Any) -> str:
    return _digits(value) if isinstance(value, float) else "" if value is None else str(value)


def _evaluations(run: RunData, metrics: Sequence[str]) -> Iterable[list[Any]]:
    series = {metric: run.series(metric, "update") for metric in metrics}
    for row in run.rows:
        if _finite(row.get(SCORE)):
            near = [_nearest(*series[metric], row["update"]) for metric in metrics]
            labels = [run.labels[key] for key in LABELS]
            yield [*labels, row["update"], row["steps"], _digits(row[SCORE]), *near]


def _nearest(x: Array, y: Array, at: float) -> str:
    return _digits(y[np.abs(x - at).argmin()]) if x.size else ""


def _digits(value: float) -> str:
    return f"{value:.6g}"


def read_results(path: Path) -> list[RunData]:
    """Runs out of a ``results.csv``, for figures of published results."""
    found: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    with open(path, newline="") as handle:
        for line in csv.DictReader(handle):
            key = (line["domain"], line["correction"], int(line["staleness"]), int(line["seed"]))
            row = {k: float(v) for k, v in line.items() if k not in (*LABELS, "score") and v}
            found.setdefault(key, []).append({**row, SCORE: float(line["score"])})
    return [RunData(dict(zip(LABELS, key, strict=True)), rows) for key, rows in found.items()]


def summarise(runs: Sequence[RunData]) -> list[Cell]:
    """One cell for each (domain, correction, staleness) in the order in which they appear."""
    return [_cell(members) for members in group_runs(runs, LABELS[:3]).values()]


def _cell(runs: Sequence[RunData]) -> Cell:
    domain, correction, staleness = (runs[0].labels[key] for key in LABELS[:3])
    final = stratified_bootstrap([[run.last() for run in runs]])
    start = float(np.mean([run.first() for run in runs]))
    diagnostics = {metric: _mean([run.mean(metric) for run in runs]) for metric in SUMMARY}
    return Cell(domain, correction, staleness, len(runs), start, final, diagnostics)


def _mean(values: Sequence[float]) -> float:
    finite = [v for v in values if math.isfinite(v)]
    return float(np.mean(finite)) if finite else math.nan


def write_summary(path: Path, cells: Sequence[Cell]) -> None:
    """Writes ``summary.csv``: one line a cell."""
    with replacing(path) as aside, open(aside, "w", newline="") as handle:
        writer = csv.writer(handle)
        writer.writerow(["domain", "correction", "staleness", "seeds", "start", "final_iqm", "low", "high", *SUMMARY])
        for c in cells:
            numbers = [c.start, c.final.estimate, c.final.low, c.final.high, *c.diagnostics.values()]
            shown = [_digits(n) if math.isfinite(n) else "" for n in numbers]
            writer.writerow([c.domain, c.correction, c.staleness, c.seeds, *shown])


def group_runs(runs: Iterable[RunData], keys: Sequence[str]) -> dict[tuple[Any, ...], list[RunData]]:
    """Runs by the values of some labels, in the order in which they appear."""
    groups: dict[tuple[Any, ...], list[RunData]] = {}
    for run in runs:
        groups.setdefault(tuple(run.labels.get(key) for key in keys), []).append(run)
    return groups


def unique(runs: Iterable[RunData], key: str) -> list[Any]:
    """The values of one label in the order in which they appear."""
    return list(dict.fromkeys(run.labels.get(key) for run in runs))


def scores_by_task(runs: Iterable[RunData]) -> dict[tuple[str, int], dict[int, float]]:
    """Final scores as ``(domain, staleness)`` to (seed to score)."""
    found: dict[tuple[str, int], dict[int, float]] = {}
    for run in runs:
        found.setdefault((run.labels["domain"], run.labels["staleness"]), {})[run.labels["seed"]] = run.last()
    return found


def strata(scores: Mapping[Any, Mapping[int, float]], tasks: Iterable[Any]) -> list[list[float]]:
    """The scores of each task, for :mod:`unified_rl.study.statistics`."""
    return [list(scores[task].values()) for task in tasks]


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
