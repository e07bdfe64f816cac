"""Writes mental arithmetic as a file of prompts and answers: sums, differences and products of small numbers.

    python examples/sums.py train.jsonl eval.jsonl

No problem is in both files. With SmolLM2-135M-Instruct (examples/smollm2.py) about one answer in ten is right, which is
where reinforcement learning has something to work with.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

PAIRS = {
    "+": [(a, b, a + b) for a in range(2, 100) for b in range(2, 100)],
    "-": [(a, b, a - b) for a in range(2, 100) for b in range(2, a)],
    "*": [(a, b, a * b) for a in range(2, 20) for b in range(2, 20)],
}
"""Every problem of each kind: two numbers, and what is right."""


def problems(each: int, stream: random.Random) -> list[dict[str, str]]:
    """``each`` different problems of every kind, in random order."""
    chosen = [(sign, *numbers) for sign, pairs in PAIRS.items() for numbers in stream.sample(pairs, each)]
    stream.shuffle(chosen)
    return [
        {"prompt": f"What is {a} {sign} {b}? Answer with only the number.", "answer": str(right)}
        for sign, a, b, right in chosen
    ]


def main() -> None:
    """Reads the command line and writes both files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("train", type=Path)
    parser.add_argument("evaluation", type=Path)
    parser.add_argument("--each", type=int, default=200, help="problems of every kind, at most 324")
    parser.add_argument("--held-out", type=int, default=64, help="of all of them")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    made, held_out = problems(arguments.each, random.Random(arguments.seed)), arguments.held_out
    for path, part in ((arguments.train, made[held_out:]), (arguments.evaluation, made[:held_out])):
        path.write_text("".join(json.dumps(problem) + "\n" for problem in part))
        print(f"{path}: {len(part)} problems")


if __name__ == "__main__":
    main()
