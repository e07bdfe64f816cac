"""Drawing tokens on a CPU: one number a row against noise for every token (``python benchmarks/draw.py [--csv FILE]``).

32 rows of normal logits, both ways in turn; milliseconds of CPU time, medians over the rounds.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import time

import torch
from torch import Tensor

from unified_rl.policies.sampling import draw

ROWS = 32
VOCABULARIES = (1024, 8192, 49152, 151936)


def noise(logits: Tensor, generator: torch.Generator) -> Tensor:
    """The Gumbel-max trick over every token."""
    return (logits - torch.empty_like(logits).exponential_(generator=generator).clamp_min_(1e-30).log_()).argmax(-1)


def main() -> None:
    """Prints milliseconds and ratios, and writes every round."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--csv")
    args = parser.parse_args()
    torch.set_num_threads(1)
    generator, rows = torch.Generator().manual_seed(0), []
    for words in VOCABULARIES:
        logits = torch.randn(ROWS, words, generator=generator)
        for turn in range(-1, args.rounds):  # the first one warms up
            row = {"words": words, "round": turn}
            for name, way in (("noise_cpu_ms", noise), ("own_cpu_ms", draw)):
                start = time.process_time()
                way(logits, generator)
                row[name] = 1e3 * (time.process_time() - start)
            rows += [row] if turn >= 0 else []
        mine = [row for row in rows if row["words"] == words]
        slow, fast = (statistics.median(row[name] for row in mine) for name in ("noise_cpu_ms", "own_cpu_ms"))
        print(f"{words:7d} tokens: noise {slow:.1f} ms, one number a row {fast:.1f} ms, ratio {slow / fast:.1f}")
    if args.csv:
        with open(args.csv, "w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
