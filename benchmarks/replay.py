"""Replay against plain torch and TorchRL: ``python benchmarks/replay.py [--rows 1000000] [--csv FILE]``.

Every variant runs in turn within one process, round after round, a few milliseconds each; a ratio is the median of the
rounds' ratios of CPU time, so that other load on the machine meets both sides. Plain means what a loop over a dict of
tensors costs, its random indices included.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from tensordict import TensorDict
from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer

from unified_rl.replay import Priority, Replay, Uniform

Timed = dict[str, Callable[[], object]]


def transitions(count: int) -> TensorDict:
    """HalfCheetah's shapes: 166 bytes a row in six leaves."""
    return TensorDict(
        {
            "observation": torch.randn(count, 17),
            "action": torch.randn(count, 6),
            "reward": torch.randn(count),
            "next_observation": torch.randn(count, 17),
            "terminated": torch.zeros(count, dtype=torch.bool),
            "truncated": torch.zeros(count, dtype=torch.bool),
        },
        batch_size=[count],
    )


class Plain:
    """Six tensors, an index, and no checks."""

    def __init__(self, rows: int) -> None:
        self.leaves = {key: value.expand(rows, *value.shape[1:]).clone() for key, value in transitions(1).items()}
        self.rows, self.cursor, self.generator = rows, 0, torch.Generator()

    def sample(self, count: int) -> dict[str, torch.Tensor]:
        index = torch.randint(0, self.rows, (count,), generator=self.generator)
        return {key: leaf.index_select(0, index) for key, leaf in self.leaves.items()}

    def extend(self, batch: dict[str, torch.Tensor], count: int) -> None:
        if self.cursor + count > self.rows:
            self.cursor = 0
        for key, leaf in self.leaves.items():
            leaf[self.cursor : self.cursor + count] = batch[key]
        self.cursor += count


def fill(replay: Replay | TensorDictReplayBuffer, rows: int, chunk: int = 50_000) -> None:
    """Writes until the ring is full."""
    for first in range(0, rows, chunk):
        replay.extend(transitions(min(chunk, rows - first)))


def measure(variants: Timed, rounds: int, calls: int) -> dict[str, list[float]]:
    """CPU microseconds a call in each round, variants interleaved."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, call in variants.items():
            start = time.process_time()
            for _ in range(calls):
                call()
            times[name].append((time.process_time() - start) / calls * 1e6)
    return times


def variants(rows: int, count: int) -> Timed:
    """What is timed."""
    plain = Plain(rows)
    ours = Replay(rows, sampler=Uniform())
    priority = Replay(rows, sampler=Priority())
    stock = TensorDictReplayBuffer(storage=LazyTensorStorage(rows), batch_size=count)
    for replay in (ours, priority, stock):
        fill(replay, rows)
    batch = transitions(count)
    leaves = dict(batch.items())
    errors = torch.rand(64, count)
    step = iter(range(10**12))

    def prioritised() -> None:
        drawn = priority.sample(count)
        priority.update_priority(drawn["index"], errors[next(step) % 64])

    return {
        "plain sample": lambda: plain.sample(count),
        "our sample": lambda: ours.sample(count),
        "stock sample": lambda: stock.sample(),
        "plain extend": lambda: plain.extend(leaves, count),
        "our extend": lambda: ours.extend(batch),
        "stock extend": lambda: stock.extend(batch),
        "our priority sample and update": prioritised,
    }


RATIOS = (
    ("our sample", "plain sample", "at most", 1.3),
    ("stock sample", "our sample", "at least", 3.5),
    ("our extend", "plain extend", "at most", 1.3),
    ("stock extend", "our extend", "at least", 4.0),
    ("our priority sample and update", "plain sample", "at most", 4.5),
)


def report(times: dict[str, list[float]]) -> list[dict[str, object]]:
    """One line a ratio."""
    lines = []
    for above, below, word, target in RATIOS:
        ratio = statistics.median(a / b for a, b in zip(times[above], times[below], strict=True))
        middle = statistics.median(times[above]), statistics.median(times[below])
        met = ratio <= target if word == "at most" else ratio >= target
        lines.append(
            {
                "what": f"{above} / {below}",
                "microseconds": f"{middle[0]:.1f} / {middle[1]:.1f}",
                "ratio": round(ratio, 2),
                "target": f"{word} {target}",
                "met": met,
            }
        )
    return lines


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--calls", type=int, default=20)
    parser.add_argument("--csv", type=Path, default=None)
    options = parser.parse_args()
    torch.set_num_threads(1)
    timed = variants(options.rows, options.batch)
    measure(timed, 2, options.calls)
    lines = report(measure(timed, options.rounds, options.calls))
    for line in lines:
        print(
            f"{line['what']:<50} {line['microseconds']:>18} us   ratio {line['ratio']:>6}   "
            f"{line['target']:<13} {'met' if line['met'] else 'MISSED'}"
        )
    if options.csv is not None:
        with open(options.csv, "w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(lines[0]))
            writer.writeheader()
            writer.writerows(lines)


if __name__ == "__main__":
    main()
