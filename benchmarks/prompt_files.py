"""How long a large file of prompts takes to open, and how much of it stays in memory.

    python benchmarks/prompt_files.py --gigabytes 1.5

Writes a file of random word problems with worked answers into a temporary folder, opens it as ``env=jsonl`` does
(indexed, split and measured in one pass), draws a thousand problems, and prints resident memory before and after each.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import random
import tempfile
import time
from pathlib import Path
from typing import Any

TEXT = """farmer apples sells each remaining baskets how many does half total price buys then twice costs dollars
between friends weeks more than fewer together what is the of and"""


def write_file(path: Path, size: int, seed: int = 0) -> int:
    """Writes records until ``size`` bytes; returns their number."""
    draw, count, words = random.Random(seed), 0, TEXT.split()
    with path.open("w") as file:
        while file.tell() < size:
            block = []
            for _ in range(1000):
                asked, worked = (" ".join(draw.choices(words, k=k)) for k in (40, 150))
                answer = draw.randrange(1000)
                block.append(json.dumps({"question": f"{count} {asked}?", "answer": f"{worked}\n#### {answer}"}))
                count += 1
            file.write("\n".join(block) + "\n")
    return count


def to_parquet(path: Path, made: Path) -> None:
    """The same records in row groups of ten thousand."""
    import pyarrow
    import pyarrow.parquet as parquet

    writer = None
    block: list[dict[str, str]] = []

    def flush() -> None:
        nonlocal writer
        table = pyarrow.Table.from_pylist(block)
        writer = writer or parquet.ParquetWriter(made, table.schema)
        writer.write_table(table)
        block.clear()

    with path.open() as file:
        for line in file:
            block.append(json.loads(line))
            if len(block) == 10_000:
                flush()
    if block:
        flush()
    if writer is not None:
        writer.close()


def resident() -> float:
    """Resident memory of this process in megabytes."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def measure(path: Path, count: int) -> dict[str, Any]:
    """Opens a file and draws from it; what was measured."""
    import torch

    from unified_rl.envs.language import JsonlProblems

    before, start = resident(), time.perf_counter()
    env = JsonlProblems(str(path), vocabulary_size=512, max_prompt_length=512)
    opened, seconds = resident(), time.perf_counter() - start
    stream, start = torch.Generator().manual_seed(0), time.perf_counter()
    for _ in range(32):
        env.problems(32, stream)
    drawn = (time.perf_counter() - start) / 32
    return {
        "file": path.suffix[1:],
        "gigabytes": round(path.stat().st_size / 1e9, 2),
        "records": count,
        "opened_s": round(seconds),
        "before_mb": round(before),
        "opened_mb": round(opened),
        "drawn_mb": round(resident()),
        "draw_of_32_ms": round(1000 * drawn, 1),
    }


def main() -> None:
    """Runs it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=1.5)
    parser.add_argument("--parquet", action="store_true", help="measure the same records as Parquet instead")
    parser.add_argument("--csv", help="append a row to this file")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "prompts.jsonl"
        count = write_file(path, int(options.gigabytes * 1e9))
        if options.parquet:
            to_parquet(path, path := path.with_suffix(".parquet"))
        row = measure(path, count)
    print(", ".join(f"{name} {value}" for name, value in row.items()))
    if options.csv:
        with open(options.csv, "a", newline="") as file:
            writer = csv.DictWriter(file, row)
            if not file.tell():
                writer.writeheader()
            writer.writerow(row)


if __name__ == "__main__":
    main()
