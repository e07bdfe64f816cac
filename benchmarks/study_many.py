"""A study of 500 tiny runs: ``python benchmarks/study_many.py [--seeds 25] [--csv FILE]``.

Two domains, five corrections, two stalenesses, 25 seeds: 500 runs of two updates each. What a run itself logs as its
time is taken away from what the study took; the rest is what the library asks for a run: composing, building,
checkpoints, processes, bookkeeping. Then the report is written again, apart, and measured.
"""

from __future__ import annotations

import argparse
import csv
import json
import resource
import tempfile
import time
from pathlib import Path

import yaml

import unified_rl as ur
from unified_rl.config import reading_once
from unified_rl.study import Study
from unified_rl.study.compare import _compose
from unified_rl.study.grid import make_jobs
from unified_rl.study.report import write_report
from unified_rl.study.results import read_runs

STUDY = {
    "name": "many",
    "domains": {
        "language": [
            "env=chain_mod", "policy=causal_lm_tiny", "rollout.prompts=2", "rollout.group_size=4", "steps=16",
            "eval_episodes=8",
        ],
        "control": [
            "env=two_route", "policy=gaussian", "policy.hidden=[16]", "rollout.num_envs=8", "rollout.horizon=4",
            "steps=64", "eval_episodes=8",
        ],
    },
    "corrections": ["ppo", "tis", "icepop", "cispo", "vespo"],
    "staleness": [0, 1],
    "overrides": ["agent=policy_gradient", "replay=fresh", "checkpoint_every=0"],
}  # fmt: skip


def logged(folder: Path) -> float:
    """Seconds between the start of a run's trainer and its last row."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return float(json.loads(lines[-1])["wall_seconds"])


def size(folder: Path) -> float:
    """MiB of all files."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / 2**20


def main() -> None:
    """Prints the table; writes it where asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=25)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--csv", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        node = {**STUDY, "seeds": list(range(args.seeds)), "workers": args.workers, "folder": f"{folder}/many"}
        options = Path(folder) / "options"
        (options / "study").mkdir(parents=True)
        text = yaml.safe_dump({"study": {"_target_": "unified_rl.study.Study", **node}})
        (options / "study" / "many.yaml").write_text("# @package _global_\n# Many tiny runs\n" + text)
        start = time.perf_counter()
        path = ur.compare("many", config_dirs=[str(options)], progress=False)
        whole = time.perf_counter() - start
        start = time.perf_counter()
        study = Study.from_config({"study": node})
        with reading_once():
            _, jobs = make_jobs(study, lambda overrides: _compose(overrides, [], [str(options)]))
        composing = time.perf_counter() - start
        start = time.perf_counter()
        runs = read_runs(jobs)
        reading = time.perf_counter() - start
        start = time.perf_counter()
        report = write_report(study, runs, command="unified-rl compare study=many")
        reporting = time.perf_counter() - start
        training = sum(logged(job.folder) for job in jobs)
        lines = [
            ("runs", len(jobs), ""),
            ("whole study", round(whole, 1), "seconds"),
            ("logged by the runs themselves", round(training, 1), "seconds, all together"),
            ("overhead a run", round((args.workers * whole - training) / len(jobs), 3), "seconds of a worker"),
            ("composing the grid", round(composing, 1), "seconds"),
            ("reading the results", round(reading, 2), "seconds"),
            ("writing the report", round(reporting, 2), "seconds"),
            ("report", round(report.stat().st_size / 2**20, 2), "MiB"),
            ("folder", round(size(path), 1), "MiB"),
            ("a run folder", round(size(jobs[0].folder), 2), "MiB, the first one's"),
            ("peak memory of a worker", resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // 1024, "MiB"),
        ]
    for line in lines:
        print("  ".join(map(str, line)))
    if args.csv:
        with args.csv.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(("what", "value", "unit"))
            writer.writerows(lines)


if __name__ == "__main__":
    main()
