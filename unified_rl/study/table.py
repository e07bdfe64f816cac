"""A table of finished runs: ``python -m unified_rl.study.table RUN... --by agent --out FOLDER``."""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from unified_rl.errors import ConfigError, UnifiedRLError
from unified_rl.files import check_listed, replacing
from unified_rl.study.plot import load_run
from unified_rl.study.results import SCORE, RunData, group_runs
from unified_rl.study.statistics import stratified_bootstrap

COLUMNS = ("update", "steps", "wall_seconds")


def summarize(folders: Sequence[str | Path], group_by: str, metric: str = SCORE) -> list[dict[str, str]]:
    """First and last value of a metric for each value of a configuration key.

    Args:
        folders: run folders.
        group_by: a dotted key of the configuration, or a group.
        metric: the metric.

    Returns:
        One row a value: seeds, mean at the start, and mean, interquartile mean and its 95 % bootstrap interval at the
        end (no interval with one seed), and each seed's last value.

    Raises:
        ConfigError: a folder without a run, or a run without the metric.
    """
    rows = []
    for (value,), members in group_runs([load_run(Path(f), group_by) for f in folders], (group_by,)).items():
        first, last = (np.array([_end(run, metric, index) for run in members]) for index in (0, -1))
        interval = stratified_bootstrap([last])
        bounds = f"[{interval.low:.4g}, {interval.high:.4g}]" if interval.known else "one seed: none"
        rows.append(
            {
                group_by: str(value),
                "seeds": str(len(members)),
                "mean at the start": f"{first.mean():.4g}",
                "mean at the end": f"{last.mean():.4g}",
                "IQM": f"{interval.estimate:.4g}",
                "95 % interval": bounds,
                "each seed": " ".join(f"{x:.4g}" for x in last),
            }
        )
    return rows


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


def _end(run: RunData, metric: str, index: int) -> float:
    _, y = run.series(metric, "steps")
    if not y.size:
        raise ConfigError(f"{run.folder} logged no {metric}")
    return float(y[index])


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m unified_rl.study.table", description=__doc__)
    parser.add_argument("runs", nargs="+", help="run folders")
    parser.add_argument("--by", default="agent", help="configuration key that names the rows")
    parser.add_argument("--metric", default=SCORE)
    parser.add_argument("--out", type=Path, help="folder for each run's evaluations as CSV")
    options = parser.parse_args(arguments)
    try:
        print(markdown(summarize(options.runs, options.by, options.metric)))
        if options.out is not None:
            export(options.runs, options.out)
    except UnifiedRLError as error:
        print(f"table: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
