"""Value scans against TorchRL's loop versions: ``python benchmarks/scans.py [--csv FILE]``.

Each pair runs in turn within one process, round after round; a ratio is the median of the rounds' ratios of CPU time.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torchrl.objectives.value.functional import generalized_advantage_estimate, vtrace_advantage_estimate

from unified_rl.returns import gae, retrace, vtrace

Timed = Callable[[], object]


def seconds(f: Timed, repeat: int) -> float:
    """CPU seconds of one call, over ``repeat`` of them."""
    start = time.process_time()
    for _ in range(repeat):
        f()
    return (time.process_time() - start) / repeat


def pairs(rows: int, steps: int) -> dict[str, tuple[Timed, Timed]]:
    """Ours and TorchRL's on the same data; Retrace, which TorchRL lacks, is set against its V-trace."""
    g = torch.Generator().manual_seed(0)

    def normal() -> torch.Tensor:
        return torch.randn(rows, steps, generator=g)

    reward, value, log_ratio = normal(), normal(), 0.3 * normal()
    done = torch.rand(rows, steps, generator=g) < 0.02
    terminated = done & (torch.rand(rows, steps, generator=g) < 0.5)
    following = torch.where(done, normal(), torch.cat([value[:, 1:], normal()[:, :1]], 1))
    column = [x.unsqueeze(-1).contiguous() for x in (value, following, reward, done, terminated)]
    log_pi, log_mu = log_ratio.unsqueeze(-1), torch.zeros(rows, steps, 1)
    args = (reward, value, following, terminated, done)

    def their_vtrace() -> object:
        return vtrace_advantage_estimate(0.99, log_pi, log_mu, *column)

    return {
        "gae": (lambda: gae(*args, 0.99, 0.95), lambda: generalized_advantage_estimate(0.99, 0.95, *column)),
        "vtrace": (lambda: vtrace(*args, log_ratio, 0.99), their_vtrace),
        "retrace (against V-trace)": (lambda: retrace(*args, log_ratio, 0.99), their_vtrace),
    }


def measure(rows: int, steps: int, rounds: int) -> list[dict[str, object]]:
    """One line a scan: milliseconds of both, and how many times faster ours is."""
    out: list[dict[str, object]] = []
    for name, (ours, theirs) in pairs(rows, steps).items():
        ours()
        theirs()
        both = [(seconds(ours, 5), seconds(theirs, 1)) for _ in range(rounds)]
        out.append(
            {
                "scan": name,
                "shape": f"[{rows}, {steps}]",
                "ours_ms": round(1e3 * statistics.median(a for a, _ in both), 3),
                "torchrl_ms": round(1e3 * statistics.median(b for _, b in both), 3),
                "times_faster": round(statistics.median(b / a for a, b in both), 1),
                "target": 5.0,
            }
        )
    return out


def main() -> None:
    """Prints the table and writes it where asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--csv", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    table = measure(64, 512, args.rounds)
    for row in table:
        print("  ".join(f"{key}={value}" for key, value in row.items()))
    if args.csv:
        with args.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(table[0]))
            writer.writeheader()
            writer.writerows(table)


if __name__ == "__main__":
    main()
