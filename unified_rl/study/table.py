"""A table of finished runs: ``python -m unified_rl.study.table RUN... --by agent --out FOLDER``.

In place of run folders it takes the ``results.csv`` of a study (``--by correction``), and in place of last values
(``--at end``) means over the run (``mean``) or what it took to get to a score (``reach=0.9``), over answers or steps
(``--over steps``) or over generated tokens (``tokens``), up to the budget that all the runs have.
"""

from __future__ import annotations

import argparse
import csv
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from unified_rl.errors import ConfigError, UnifiedRLError
from unified_rl.files import check_listed, replacing
from unified_rl.study.plot import chosen_runs
from unified_rl.study.results import SCORE, RunData, group_runs
from unified_rl.study.statistics import Array, Interval, stratified_bootstrap

COLUMNS = ("update", "steps", "wall_seconds")


def summarize(
    folders: Sequence[str | Path],
    group_by: str,
    metric: str = SCORE,
    at: str = "end",
    over: str = "steps",
    where: Mapping[str, str] | None = None,
) -> list[dict[str, str]]:
    """First and last value of a metric for each value of a configuration key, or another reading of its curve.

    Args:
        folders: run folders, or files ``results.csv`` of studies.
        group_by: a dotted key of the configuration, or a group; of a study's file one of its first columns.
        metric: the metric.
        at: ``end``; ``mean``, the mean over the curve up to the budget of the run that has least; or ``reach=VALUE``,
            what was spent when the curve first is as high, straight lines between evaluations.
        where: labels that runs of a study's file must have, such as ``{"domain": "language"}``.
        over: what the curve is drawn over, ``steps`` or generated ``tokens`` (of answers: their mean lengths times
            their number).

    Returns:
        One row a value: seeds, mean at the start, then mean, interquartile mean and its 95 % bootstrap interval of the
        reading (no interval with one seed), and each seed's. A seed that never reaches a value is counted, and is
        in no mean.

    Raises:
        ConfigError: a folder without a run, a run without the metric, no run left, runs of one value that differ in
            more than their seed, or an unknown ``at`` or ``over``.
    """
    runs = chosen_runs(folders, group_by, where)
    curves = {id(run): _curve(run, metric, over) for run in runs}
    budget = min(x[-1] for x, _ in curves.values())
    rows = []
    for (value,), members in group_runs(runs, (group_by,)).items():
        first = np.array([curves[id(run)][1][0] for run in members])
        read = np.array([_read(*curves[id(run)], at, budget) for run in members])
        known = read[np.isfinite(read)]
        interval = stratified_bootstrap([known]) if known.size else None
        name = "mean at the end" if at == "end" else f"{at} of {over}"
        rows.append(
            {
                group_by: str(value),
                "seeds": str(len(members)),
                "mean at the start": _spelled(first.mean()),
                name: _spelled(known.mean()) if known.size else "",
                "IQM": _spelled(interval.estimate) if interval else "",
                "95 % interval": _bounds(interval) if known.size == read.size else f"{known.size} of {read.size} seeds",
                "each seed": " ".join(_spelled(x) if np.isfinite(x) else "never" for x in read),
            }
        )
    return rows


def _spelled(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 10_000 else f"{value:.4g}"


def _bounds(interval: Interval | None) -> str:
    if interval is None or not interval.known:
        return "one seed: none"
    return f"[{_spelled(interval.low)}, {_spelled(interval.high)}]"


def _curve(run: RunData, metric: str, over: str) -> tuple[Array, Array]:
    """The metric's values, and what had been spent on each."""
    x, y = run.series(metric)
    if not y.size:
        raise ConfigError(f"{run.folder or run.labels} logged no {metric}")
    if over == "steps":
        return x, y
    if over != "tokens":
        raise ConfigError(f"over={over!r} is unknown; known: steps, tokens")
    at, length = run.series("rollout/length")
    if not at.size:
        raise ConfigError(f"{run.folder or run.labels} logged no rollout/length, which tokens are counted by")
    spent = np.concatenate([[0.0], np.cumsum(length * np.diff(at, prepend=0.0))])
    return np.interp(x, np.concatenate([[0.0], at]), spent), y


def _read(x: Array, y: Array, at: str, budget: float) -> float:
    """One number of a curve; infinity where it never gets to the value asked for."""
    if at == "end":
        return float(y[-1])
    if at == "mean":
        grid = np.linspace(x[0], budget, 257)
        return float(np.interp(grid, x, y).mean())
    word, _, text = at.partition("=")
    try:
        wanted = float(text)
    except ValueError:
        wanted = math.nan
    if word != "reach" or not math.isfinite(wanted):
        raise ConfigError(f"at={at!r} is unknown; known: end, mean, reach=VALUE")
    above = np.flatnonzero(y >= wanted)
    if not above.size:
        return math.inf
    k = int(above[0])
    return float(x[0] if k == 0 else np.interp(wanted, y[k - 1 : k + 1], x[k - 1 : k + 1]))


def export(folders: Sequence[str | Path], out: Path) -> None:
    """Writes each run's evaluations (and its training return) to ``out/RUN.csv``."""
    out.mkdir(parents=True, exist_ok=True)
    for folder in map(Path, folders):
        check_listed(folder / "metrics.csv")
        with (folder / "metrics.csv").open(newline="") as handle:
            reader = csv.DictReader(handle)
            kept = [k for k in reader.fieldnames or [] if k in COLUMNS or k.startswith(("eval/", "rollout/"))]
            rows = [{k: row[k] for k in kept} for row in reader if row.get(SCORE)]
        with replacing(out / f"{folder.name}.csv") as aside, aside.open("w", newline="") as handle:
            writer = csv.DictWriter(handle, kept)
            writer.writeheader()
            writer.writerows(rows)


def markdown(rows: Sequence[dict[str, str]]) -> str:
    """The rows as a Markdown table."""
    lines = ["| " + " | ".join(rows[0]) + " |", "|" + " --- |" * len(rows[0])]
    return "\n".join([*lines, *("| " + " | ".join(row.values()) + " |" for row in rows)])


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m unified_rl.study.table", description=__doc__)
    parser.add_argument("runs", nargs="+", help="run folders, or results.csv of studies")
    parser.add_argument("--by", default="agent", help="configuration key that names the rows")
    parser.add_argument("--metric", default=SCORE)
    parser.add_argument("--at", default="end", help="end, mean, or reach=VALUE")
    parser.add_argument("--over", default="steps", help="steps, or tokens")
    parser.add_argument("--where", action="append", default=[], metavar="LABEL=VALUE", help="of a study's runs")
    parser.add_argument("--out", type=Path, help="folder for each run's evaluations as CSV")
    options = parser.parse_args(arguments)
    where = dict(one.partition("=")[::2] for one in options.where)
    try:
        print(markdown(summarize(options.runs, options.by, options.metric, options.at, options.over, where)))
        if options.out is not None:
            export(options.runs, options.out)
    except UnifiedRLError as error:
        print(f"table: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
