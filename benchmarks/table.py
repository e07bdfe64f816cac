"""One table of ratios from the CSV files that the benchmarks wrote: ``python benchmarks/table.py FOLDER``.

The files are named after their benchmark (``stepping.csv`` and so on); a missing one is said to be missing.
"""

from __future__ import annotations

import argparse
import csv
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path

Row = dict[str, str]
Line = tuple[str, str, float, str, float]
"""What, against what, the measured ratio, ``at least`` or ``at most`` (empty without a target), the target."""


def middle(rows: list[Row], above: str, below: str) -> float:
    """Median over the rounds of the ratio of two columns."""
    return statistics.median(float(row[above]) / float(row[below]) for row in rows)


def stepping(rows: list[Row]) -> Iterator[Line]:
    """Environment steps."""
    unit = "_steps_per_cpu_second"
    for task, count in dict.fromkeys((row["task"], row["simulations"]) for row in rows):
        part = [row for row in rows if (row["task"], row["simulations"]) == (task, count)]
        what, peer = f"stepping {task}, {count} simulations", 1.4 if task.startswith("Half") else 1.3
        yield what, "bare mj_step loop", middle(part, "batched" + unit, "bare" + unit), "at least", 0.95
        yield what, "Gymnasium SyncVectorEnv", middle(part, "batched" + unit, "gymnasium" + unit), "at least", peer


def collection(rows: list[Row]) -> Iterator[Line]:
    """Steps with a policy."""
    unit = "_steps_per_cpu_second"
    for name, against, target in (
        ("floor", "mj_step loop in plain torch", 0.9),
        ("bare", "mj_step loop with the policy's sample", 0.9),
        ("torchrl", "TorchRL Collector over SerialEnv", 6.0),
    ):
        yield "collection, 16 simulations", against, middle(rows, "own" + unit, name + unit), "at least", target


def replay(rows: list[Row]) -> Iterator[Line]:
    """Times of calls, so for the plain versions less is better."""
    for row in rows:
        above, below = row["what"].split(" / ")
        word, target = row["target"].rsplit(" ", 1)
        yield f"time of replay: {above}", below, float(row["ratio"]), word, float(target)


def sac_update(rows: list[Row]) -> Iterator[Line]:
    """Updates a second."""
    yield "SAC update", "Stable-Baselines3", middle(rows, "sb3_cpu_ms", "ours_cpu_ms"), "at least", 1.25


def ppo_end_to_end(rows: list[Row]) -> Iterator[Line]:
    """Environment steps a second, pairs of the same turn; the first turn of a seed warms up."""
    speed = {
        (row["contestant"], row["seed"], row["steps"]): float(row["steps_per_cpu_second"])
        for row in rows
        if row["steps_per_cpu_second"]
    }
    first = min(int(steps) for _, _, steps in speed)
    for name, against, target in (
        ("sb3_default", "Stable-Baselines3, defaults", 4.0),
        ("sb3_equal", "Stable-Baselines3, 16 environments, equal settings", 1.5),
    ):
        turns = [k[1:] for k in speed if k[0] == name and int(k[2]) > first]
        ratio = statistics.median(speed[("ours", *turn)] / speed[(name, *turn)] for turn in turns)
        yield "PPO end to end", against, ratio, "at least", target


def scans(rows: list[Row]) -> Iterator[Line]:
    """Scans against TorchRL's loops; it has no Retrace, which is set against its V-trace."""
    for row in rows:
        name, stand_in = row["scan"].split(" ")[0], "against" in row["scan"]
        against = "TorchRL's loop" + " for V-trace" * stand_in
        yield f"{name} {row['shape']}", against, float(row["times_faster"]), "at least", 5.0


def grpo_step(rows: list[Row]) -> Iterator[Line]:
    """Whole steps."""
    yield "GRPO step, 5M Qwen3", "TRL GRPOTrainer", middle(rows, "trl_cpu_s", "ours_cpu_s"), "at least", 1.4


def grpo_step_135m(rows: list[Row]) -> Iterator[Line]:
    """Whole steps of a real model."""
    yield "GRPO step, SmolLM2-135M", "TRL GRPOTrainer", middle(rows, "trl_cpu_s", "ours_cpu_s"), "at least", 1.3


def correction(rows: list[Row]) -> Iterator[Line]:
    """The middle and the slowest preset of each shape."""
    for shape in dict.fromkeys(row["shape"] for row in rows):
        ratios = [float(row["ratio"]) for row in rows if row["shape"] == shape]
        against = "plain PPO loss"
        yield f"time of a correction {shape}, median preset", against, statistics.median(ratios), "at most", 1.5
        yield f"time of a correction {shape}, slowest preset", against, max(ratios), "at most", 3.0
    shares = [float(row["percent_of_lm_step"]) for row in rows if row.get("percent_of_lm_step")]
    if shares:
        yield "percent of a step, slowest preset", "5M language model [64, 512]", max(shares), "at most", 2.0


def generation(rows: list[Row]) -> Iterator[Line]:
    """Tokens a second."""
    for row in rows:
        what = f"generation, {row['model']} model, batch {row['batch']}, {row['note']}"
        yield what, "transformers generate", float(row["ratio_cpu"]), "", 0.0


def draw(rows: list[Row]) -> Iterator[Line]:
    """Milliseconds of a draw of 32 rows."""
    for words in dict.fromkeys(row["words"] for row in rows):
        mine = [row for row in rows if row["words"] == words]
        what = f"draw of 32 rows from {int(words):,} tokens"
        yield what, "Gumbel noise for every token", middle(mine, "noise_cpu_ms", "own_cpu_ms"), "", 0.0


def pool(rows: list[Row]) -> Iterator[Line]:
    """Milliseconds of a draw of 256 answers over the two that it may take."""
    large = max(rows, key=lambda row: int(row["rows"]))
    what = f"time of drawing {large['draw']} of {int(large['rows']):,} kept answers"
    yield what, "2 ms", float(large["median_ms"]) / 2, "at most", 1.0


def divergences(rows: list[Row]) -> Iterator[Line]:
    """Memory of whole-vocabulary divergences at the largest batch."""
    large = max(int(row["rows"]) for row in rows)
    for row in rows:
        if int(row["rows"]) == large:
            what = f"memory of {row['loss']}, {int(row['units']):,} units, {int(row['vocabulary']):,} words"
            yield what, "one [rows, tokens, vocabulary] tensor", float(row["peak_tensors"]), "at most", 2.0


def recipes(rows: list[Row]) -> Iterator[Line]:
    """Time of an update."""
    for row in rows:
        what = f"time of an update, recipe={row['recipe']}"
        yield what, "its forward and backward passes", float(row["ratio"]), "at most", 1.1


PARTS = (
    stepping, collection, replay, sac_update, ppo_end_to_end, scans, grpo_step, grpo_step_135m, correction, generation,
    draw, pool, divergences, recipes,
)  # fmt: skip
READERS: dict[str, Callable[[list[Row]], Iterator[Line]]] = {f.__name__: f for f in PARTS}


def main() -> None:
    """Prints the table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    print("| what | against | measured ratio | target | |\n|---|---|---|---|---|")
    for name, read in READERS.items():
        path = folder / f"{name}.csv"
        if not path.is_file():
            print(f"| {name} | | not measured | | |")
            continue
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
        for what, against, ratio, word, target in read(rows):
            met = ratio <= target if word == "at most" else ratio >= target
            goal = f"{word} {target:g} | {'met' if met else '**missed**'}" if word else "none | "
            print(f"| {what} | {against} | {ratio:.2f} | {goal} |")


if __name__ == "__main__":
    main()
