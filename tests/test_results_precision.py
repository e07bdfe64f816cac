"""The table of docs/results/precision.md is that of its files, and the study has its controls."""

from __future__ import annotations

import csv
import re
from pathlib import Path

from unified_rl.study.results import group_runs, read_results, summarise


def test_the_table_is_that_of_the_files(source: Path) -> None:
    page = (source / "docs/results/precision.md").read_text()
    told = {}
    for line in re.findall(r"^\| `\w+` \|.*$", page, flags=re.MULTILINE):
        name, *cells = [cell.strip(" `") for cell in line.strip("|").split("|")]
        told[name] = cells
    runs = read_results(source / "docs/results/precision/results.csv")
    found = {}
    for (name,), members in group_runs(runs, ["correction"]).items():
        cell = summarise(members)[0]
        scores = " ".join(f"{run.last():.3f}" for run in members)
        interval = f"[{cell.final.low:.3f}, {cell.final.high:.3f}]"
        found[name] = [scores, f"{cell.final.estimate:.3f}", interval]
    assert {name: cells[:3] for name, cells in told.items()} == found
    with (source / "docs/results/precision/summary.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    means = {row["correction"]: [f"{float(row['ess/unit']):.4f}", f"{float(row['kl/k3']):.1e}"] for row in rows}
    assert {name: cells[3:] for name, cells in told.items()} == means
    assert found["same"] == found["full"] and told["same"] == told["full"]
    still = [run for run in runs if run.labels["correction"] == "frozen"]
    assert still and all(run.first() == run.last() for run in still)
