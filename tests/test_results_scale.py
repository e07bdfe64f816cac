"""The figures of the pages on workers and learners are those of their files."""

from __future__ import annotations

import csv
import re
from collections import defaultdict
from pathlib import Path
from statistics import median

import pytest

WAYS = (("0", "0"), ("1", "0"), ("1", "1"), ("2", "2"))
"""Workers and bound, in the order of the page's columns."""


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def cells(page: str, first: str) -> list[str]:
    """Of the table's line that begins with some words."""
    line = next(line for line in page.splitlines() if line.startswith(f"| {first}"))
    return [cell.strip() for cell in line.strip("|").split("|")][1:]


@pytest.mark.parametrize(("domain", "first"), [("control", "PPO in HalfCheetah"), ("language", "DAPO of a 0.5M model")])
def test_batches_a_second_of_workers_and_their_formula(domain: str, first: str, source: Path) -> None:
    found = defaultdict(list)
    for row in rows_of(source / "docs/results/benchmarks/scale.csv"):
        if row["domain"] == domain:
            found[row["workers"], row["bound"]].append((float(row["batches_per_second"]), float(row["formula"])))
    told = cells((source / "docs/scale.md").read_text(), first)
    for way, cell in zip(WAYS, told, strict=True):
        measured, formula = median(rate for rate, _ in found[way]), found[way][0][1]
        assert cell == f"{measured:.1f} ({formula:.1f})"
        assert abs(measured / formula - 1) < 0.2, "the page says that the formula holds"


def test_seconds_of_learners_and_their_formula(source: Path) -> None:
    page = (source / "docs/learners.md").read_text()
    for row in rows_of(source / "docs/results/benchmarks/learner.csv"):
        told = cells(page, f"{row['case']} | {row['processes']} ")
        assert told[1:] == [row["ms_one"], row["ms_several"], row["ms_formula"], f"{float(row['times_as_fast']):.2f}"]
        if row["processes"] == "2":  # as many as there were cores
            off = float(row["ms_several"]) / float(row["ms_formula"]) - 1
            assert abs(off) < 1 / 12, "the page says how well the formula holds"
    assert re.search(r"benchmarks/learner\.py --rounds \d+ --updates \d+", page)
