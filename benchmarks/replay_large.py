"""A memory-mapped replay of ten million rows: ``python benchmarks/replay_large.py [--rows 10000000] [--csv FILE]``.

It is filled to the brim and beyond, then drawn from and extended in turn with one of a hundredth of its size (same
schema, same process), so a ratio tells what size alone costs. Resident memory is given apart for pages of the files,
which the kernel takes back when it needs them, and for the process's own (anonymous) pages, which it cannot.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from tensordict import TensorDict

from unified_rl.replay import Replay, Uniform

CHUNK = 50_000
DRAW, WRITE = 256, 64


def transitions(count: int) -> TensorDict:
    """Pendulum's shapes: 38 bytes a row in six leaves."""
    return TensorDict(
        {
            "observation": torch.randn(count, 3),
            "action": torch.randn(count, 1),
            "reward": torch.randn(count),
            "next_observation": torch.randn(count, 3),
            "terminated": torch.zeros(count, dtype=torch.bool),
            "truncated": torch.zeros(count, dtype=torch.bool),
        },
        batch_size=[count],
    )


def memory() -> dict[str, float]:
    """MiB of this process's resident pages."""
    lines = Path("/proc/self/status").read_text().splitlines()
    status = dict(line.split(":", 1) for line in lines)
    return {name: round(int(status[name].split()[0]) / 1024, 1) for name in ("RssAnon", "RssFile")}


def filled(rows: int, folder: Path) -> Replay:
    """A full replay, overwritten by a tenth."""
    replay = Replay(capacity=rows, sampler=Uniform(), storage="memmap", path=str(folder))
    piece = transitions(min(CHUNK, rows // 10))
    for _ in range(11 * rows // (10 * len(piece))):
        replay.extend(piece)
    return replay


def seconds(f: Callable[[], object]) -> float:
    """Wall seconds of one call: a page that is not in memory costs waiting, not computing."""
    start = time.perf_counter()
    f()
    return time.perf_counter() - start


def compare(large: Replay, small: Replay, rounds: int) -> list[dict[str, object]]:
    """Medians and 99th percentiles of both calls, and the ratio of the medians' rounds."""
    piece = transitions(WRITE)
    calls: dict[str, Callable[[Replay], object]] = {
        f"draw {DRAW}": lambda replay: replay.sample(DRAW),
        f"extend {WRITE}": lambda replay: replay.extend(piece),
    }
    out: list[dict[str, object]] = []
    for name, call in calls.items():
        times = [(seconds(lambda: call(large)), seconds(lambda: call(small))) for _ in range(rounds)]  # noqa: B023
        ours = sorted(a for a, _ in times)
        out.append(
            {
                "what": name,
                "value": round(1e6 * statistics.median(ours), 1),
                "unit": "microseconds, median",
                "p99": round(1e6 * ours[int(0.99 * len(ours))], 1),
                "ratio_to_a_hundredth": round(statistics.median(a / b for a, b in times), 3),
            }
        )
    return out


def main() -> None:
    """Prints the table; writes it where asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--rounds", type=int, default=2000)
    parser.add_argument("--folder", type=Path, help="where the files go; by default a temporary folder")
    parser.add_argument("--csv", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        before = memory()
        start = time.perf_counter()
        large = filled(args.rows, Path(folder) / "large")
        took, after = time.perf_counter() - start, memory()
        small = filled(args.rows // 100, Path(folder) / "small")
        lines = compare(large, small, args.rounds)
        size = sum(file.stat().st_blocks * 512 for file in (Path(folder) / "large").rglob("*") if file.is_file())
        start = time.perf_counter()
        large.close()
        opened = Replay(capacity=args.rows, sampler=Uniform(), storage="memmap", path=str(Path(folder) / "large"))
        opened.sample(DRAW)
        again = time.perf_counter() - start
        facts = {
            "rows held": (len(opened), "rows"),
            "fill": (round(1e6 * took / (1.1 * args.rows), 3), "microseconds a row"),
            "open again": (round(again, 2), "seconds"),
            "size on disk": (round(size / 2**20, 1), "MiB"),
            "own memory, growth": (round(after["RssAnon"] - before["RssAnon"], 1), "MiB"),
            "pages of files in memory": (after["RssFile"], "MiB"),
        }
    lines += [{"what": name, "value": value, "unit": unit} for name, (value, unit) in facts.items()]
    for line in lines:
        print("  ".join(f"{key}={value}" for key, value in line.items()))
    if args.csv:
        with args.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(lines[0]))
            writer.writeheader()
            writer.writerows(lines)


if __name__ == "__main__":
    main()
