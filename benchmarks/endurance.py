"""Memory, files and threads of runs that go on for long: ``python benchmarks/endurance.py --minutes 30 --csv FILE``.

Each domain trains in a process of its own, without an end, until the time is over; then it is interrupted as Ctrl-C
would. Every few seconds one row is written: what the kernel says of the process, and how far the run is. A run that
leaks shows memory that grows with its updates; the summary compares the last third of the time with the
middle one, when replay and allocator have filled.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

RUNS = {
    "language": (
        "env=chain_mod policy=causal_lm_tiny agent=policy_gradient correction=grpo rollout.staleness=2 "
        "agent.lr=3e-4 eval_every=4000 log_every=400 checkpoint_every=4000 eval_episodes=64"
    ),
    "control": (
        "env=pendulum agent=sac rollout.num_envs=4 replay.capacity=20000 rollout.random_steps=400 "
        "agent.learning_starts=400 eval_every=4000 log_every=400 checkpoint_every=4000 eval_episodes=8"
    ),
}
"""The replay of control is full after a few minutes, so that what grows afterwards is not it."""
FIELDS = ("domain", "seconds", "own_mib", "file_mib", "open_files", "threads", "steps", "updates")
"""``own_mib``: the process's own memory; ``file_mib``: pages of files, which the kernel keeps for it or takes back."""


def usage(process: int) -> dict[str, float]:
    """What the kernel says of a process."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    status = dict(line.split(":", 1) for line in lines)
    return {
        "own_mib": round(int(status["RssAnon"].split()[0]) / 1024, 1),
        "file_mib": round(int(status["RssFile"].split()[0]) / 1024, 1),
        "open_files": len(os.listdir(f"/proc/{process}/fd")),
        "threads": int(status["Threads"]),
    }


def progress(folder: Path) -> dict[str, int]:
    """The last logged row."""
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.is_file() else []
    last = json.loads(lines[-1]) if lines else {"steps": 0, "update": 0}
    return {"steps": last["steps"], "updates": last["update"]}


def start(domain: str, folder: Path) -> subprocess.Popen[bytes]:
    """A run without an end."""
    command = [sys.executable, "-m", "unified_rl.cli", "train", *RUNS[domain].split()]
    settings = ["steps=1000000000", "progress=false", f"run_dir={folder}"]
    return subprocess.Popen([*command, *settings], stdout=subprocess.DEVNULL)


def watch(minutes: float, every: float, folder: Path, out: Path | None) -> list[dict[str, object]]:
    """One row a domain and interval; written to ``out`` as they come."""
    runs = {domain: start(domain, folder / domain) for domain in RUNS}
    begin, rows = time.monotonic(), []
    while time.monotonic() - begin < 60 * minutes and all(run.poll() is None for run in runs.values()):
        time.sleep(every)
        for domain, run in runs.items():
            measured = {**usage(run.pid), **progress(folder / domain)}
            rows.append({"domain": domain, "seconds": round(time.monotonic() - begin, 1), **measured})
        write(rows, out)
    for domain, run in runs.items():
        if run.poll() is not None:
            raise SystemExit(f"the {domain} run ended by itself with {run.returncode}")
        run.send_signal(signal.SIGINT)
    for domain, run in runs.items():
        if run.wait(timeout=300) != 130:
            raise SystemExit(f"the {domain} run ended with {run.returncode}, not as interrupted runs do")
    return rows


def write(rows: list[dict[str, object]], out: Path | None) -> None:
    """The rows as CSV, where asked."""
    if out is not None:
        with out.open("w", newline="") as file:
            writer = csv.DictWriter(file, FIELDS)
            writer.writeheader()
            writer.writerows(rows)


def summary(rows: list[dict[str, object]]) -> list[str]:
    """For each domain: median of the middle and of the last third, and the growth between them."""
    out = []
    for domain in RUNS:
        part = [row for row in rows if row["domain"] == domain]
        third = len(part) // 3
        middle, last = part[third : 2 * third], part[2 * third :]
        for name in ("own_mib", "open_files", "threads"):
            before, after = (statistics.median(float(str(row[name])) for row in some) for some in (middle, last))
            out.append(
                f"{domain} {name}: {before:g} in the middle third, {after:g} in the last ({after / before - 1:+.2%})"
            )
        out.append(f"{domain}: {part[-1]['updates']} updates, {part[-1]['steps']} steps in {part[-1]['seconds']} s")
    return out


def main() -> None:
    """Prints the summary; writes the rows where asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--every", type=float, default=10, help="seconds between two rows")
    parser.add_argument("--csv", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = watch(args.minutes, args.every, Path(folder), args.csv)
    print("\n".join(summary(rows)))


if __name__ == "__main__":
    main()
