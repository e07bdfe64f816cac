"""Drawing from a pool of a million answers: ``python benchmarks/pool.py [--rows 1000000] [--csv FILE]``.

A draw is 256 prompts by the weights of their levels, and the newest answer of each, copied with all its columns. The
same from a pool of a hundredth of the size says what size alone costs.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import time
from pathlib import Path

import numpy as np
import torch
from tensordict import TensorDict

from unified_rl.replay.pool import AnswerPool

ANSWERS, LEVELS, WIDTH, DRAW = 4, 8, 32, 256


def answers(count: int) -> TensorDict:
    """Rows of a short answer, with the columns of a language record: 29 bytes a token and 60 more."""
    shape = (count, WIDTH)
    return TensorDict(
        {
            "tokens": torch.randint(50_000, shape),
            "token_mask": torch.ones(shape, dtype=torch.bool),
            "mask": torch.ones(shape, dtype=torch.bool),
            "behavior_log_prob": torch.randn(shape),
            "step_index": torch.zeros(shape, dtype=torch.int64),
            "policy_version": torch.zeros(shape, dtype=torch.int64),
            "reward": torch.ones(count, 1),
            "discount": torch.ones(count, 1),
            **{name: torch.ones(count, 1, dtype=torch.bool) for name in ("step_mask", "terminated", "truncated")},
            "episode": torch.zeros(count, 1, dtype=torch.int64),
            **{name: torch.zeros(count, dtype=torch.int64) for name in ("group", "source", "prompt_id")},
        },
        batch_size=[count],
    )


def filled(rows: int) -> AnswerPool:
    """A pool of so many answers, four to a prompt, prompts spread over the levels."""
    pool = AnswerPool(rows // ANSWERS, ANSWERS, LEVELS)
    place = torch.arange(pool.prompts)
    level = 1 + place % (LEVELS - 1)
    lists = [place[level == one] for one in range(LEVELS)]
    state = {"problems": [None] * len(place), "free": [], "next": 0, "known": place.tolist(), "rows": answers(rows)}
    arrays = {"numbers": place, "level": level, "written": torch.full_like(place, ANSWERS)}
    arrays["at"] = place // (LEVELS - 1)  # its number in its level's list
    pool.load_state_dict({**state, **arrays, "lists": lists, "uses": torch.zeros(rows, dtype=torch.int64)})
    return pool


def seconds(pool: AnswerPool, draws: int, rng: np.random.Generator) -> list[float]:
    """Process seconds of each draw."""
    weights = np.exp(-((np.arange(LEVELS) - LEVELS / 2) ** 2) / 2) * (np.arange(LEVELS) > 0)
    found = []
    for _ in range(draws):
        start = time.process_time()
        places = pool.draw(DRAW, weights, rng)
        rows = pool.read(pool.newest(places))
        found.append(time.process_time() - start)
        assert len(rows) == DRAW
    return found


def main() -> None:
    """Prints median and worst decile of both pools."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--draws", type=int, default=200)
    parser.add_argument("--csv", type=Path)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    lines = []
    for rows in (chosen.rows // 100, chosen.rows):
        pool = filled(rows)
        times = sorted(seconds(pool, chosen.draws, np.random.default_rng(0)))
        median, late = statistics.median(times), times[int(0.9 * len(times))]
        lines.append({"rows": rows, "draw": DRAW, "median_ms": round(1e3 * median, 3), "p90_ms": round(1e3 * late, 3)})
        print(f"{DRAW} of {rows:,} answers: {1e3 * median:.2f} ms, nine of ten below {1e3 * late:.2f} ms")
    if chosen.csv:
        with chosen.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, lines[0])
            writer.writeheader()
            writer.writerows(lines)


if __name__ == "__main__":
    main()
