"""Killed anywhere, goes on: the short form of ``python -m tests.faults.kill``, and that it would see a loss."""

from __future__ import annotations

import csv
import errno
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from faults.kill import Plan, Reference, Trial, trial, undisturbed, write
from faults.points import Points, failing
from faults.scenarios import Scenario, differences

pytestmark = pytest.mark.thorough

SHORT = ("language_stale3", "gymnasium_sac", "replay")


def test_runs_and_replays_that_are_killed_again_and_again_end_as_undisturbed_ones(tmp_path: Path) -> None:
    """At most a minute; the long form with its figures is in docs/results/faults.md."""
    table = tmp_path / "kills.csv"
    options = ["--kills", "40", "--minutes", "0.5", "--processes", "2", "--errors", "0.2", "--out", str(table)]
    command = [sys.executable, "-m", "tests.faults.kill", *options, "--scenarios", ",".join(SHORT), "--seed", "11"]
    root = Path(__file__).parents[1]
    done = subprocess.run(
        [*command, "--place", str(tmp_path / "place")], cwd=root, env={**os.environ}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    with open(table, newline="") as handle:
        rows = list(csv.DictReader(handle))
    assert [row["different"] for row in rows] == ["0"] * len(SHORT)
    assert all(int(row["kills"]) + int(row["errors"]) >= 1 for row in rows)  # more where the machine has time


def counting(write_number: str) -> Scenario:
    """A program that counts to two in a file, and notes every count in another."""
    code = f"""
import json, os
def go(folder):
    number = folder / "number"
    while (n := json.loads(number.read_text()) if number.exists() else 0) < 2:
        {write_number}
        with open(folder / "notes", "a") as notes:
            notes.write(f"{{n}}\\n")
    (folder / "notes").write_text("".join(f"{{i}}\\n" for i in range(2)))
"""
    space: dict[str, object] = {}
    exec(code, space)
    return Scenario("counting", space["go"], lambda folder: (folder / "number").read_text())  # type: ignore[arg-type]


def sweep(scenario: Scenario, place: Path) -> list[Trial]:
    """A kill at each fault point in turn, and nowhere else."""
    reference = undisturbed(scenario, place)
    assert isinstance(reference, Reference) and reference.points > 10
    plan = Plan(reference, seed=0)
    plan.again, plan.timed = 0.0, 0.0
    found = [trial(scenario, reference, plan, place, number) for number in range(reference.points)]
    write(place / "table.csv", found)
    return found


def test_a_file_that_is_rewritten_in_place_is_found_by_kills_at_fault_points(tmp_path: Path) -> None:
    in_place = sweep(counting("number.write_text(json.dumps(n + 1))"), tmp_path / "in_place")
    problems = {t.problem.split(":")[0] for t in in_place if t.problem}
    assert problems == {"ended with 1"}  # an empty file that json cannot read
    aside = "aside = folder / 'aside'; aside.write_text(json.dumps(n + 1)); os.replace(aside, number)"
    assert not any(t.problem for t in sweep(counting(aside), tmp_path / "aside"))
    with open(tmp_path / "aside" / "table.csv", newline="") as handle:
        row = next(csv.DictReader(handle))
    assert int(row["by_point"]) == int(row["programs"]) and row["different"] == "0" and int(row["replace before"]) > 0


def test_a_torn_write_leaves_half_and_a_full_disk_raises(tmp_path: Path) -> None:
    file = tmp_path / "file"
    with Points(tmp_path, lambda label: label == "write file torn", failing(errno.ENOSPC)):
        with pytest.raises(OSError, match="No space left"):
            file.write_text("0123456789")
        os.mkdir(tmp_path / "other")
    assert file.read_text() == "01234"
    with Points(tmp_path, 1, failing(errno.EROFS), stays=True):
        (tmp_path / "read").exists()
        for _ in range(2):
            with pytest.raises(OSError, match="Read-only"):
                file.write_text(json.dumps(time.time()))
    assert Path(tmp_path / "file").read_text() == ""


def test_a_difference_is_named_by_its_place() -> None:
    import torch

    a = {"x": [1, {"y": torch.tensor([1.0, float("nan")])}], "z": 1.5}
    b = {"x": [1, {"y": torch.tensor([1.0, float("nan")])}], "z": 1.5}
    assert differences(a, b) == []
    b["x"][1]["y"][0] += 1e-7  # type: ignore[index]
    assert differences(a, {**b, "w": 0}) == ["/w is in one only", "/x/1/y"]
    assert differences([1], [1, 2])[0].startswith(": 1 and 2 entries")
