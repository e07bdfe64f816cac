"""bfloat16 matrix products on a CPU against float32 ones: what a GRPO step costs, and how far log-probs drift.

    python benchmarks/bf16.py [--model FOLDER] [--steps 3] [--csv FILE]

Both policies begin from the same float32 weights and take steps of ``grpo_step.py`` in turn. Before each update the
rows just sampled are scored again: ``sampler_*`` compares the scorer with the sampler of the same precision, which is
what a correction sees as off-policy on fresh rows; ``float32_*`` compares the bfloat16 scorer with a float32 one of the
same weights on the same rows.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import time
from typing import Any

import torch
from grpo_step import Ours, Task, model_task, small_task
from tensordict import TensorDict
from torch import Tensor


def drift(prefix: str, score: Tensor, other: Tensor, mask: Tensor) -> dict[str, float]:
    """Mean and largest difference of log-probs ``[B, N]`` where ``mask``, and the k1 and k3 estimates of the KL."""
    ratio = (score - other)[mask].double()
    return {
        f"{prefix}_mean": float(ratio.abs().mean()),
        f"{prefix}_max": float(ratio.abs().max()),
        f"{prefix}_k1": float(-ratio.mean()),
        f"{prefix}_k3": float((ratio.exp() - 1 - ratio).mean()),
    }


def step(ours: Ours) -> dict[str, float]:
    """One step, timed in two parts, with the drift before its update."""
    start = time.process_time()
    batch = ours.collect()
    sampled = time.process_time()
    with torch.no_grad():
        found = drift("sampler", ours.policy.log_prob(batch).log_prob, batch["behavior_log_prob"], batch["mask"])
        if ours.policy.autocast:
            fine = _in_float32(ours, batch)
            found |= drift("float32", ours.policy.log_prob(batch).log_prob, fine, batch["mask"])
    looked = time.process_time()
    ours.optimizer.zero_grad()
    loss = ours.correction(ours.policy.log_prob(batch).log_prob, batch).loss
    loss.backward()
    ours.optimizer.step(loss)
    return {"generation_cpu_s": sampled - start, "update_cpu_s": time.process_time() - looked, **found}


def _in_float32(ours: Ours, batch: TensorDict) -> Tensor:
    ours.policy.autocast = False
    try:
        return ours.policy.log_prob(batch).log_prob
    finally:
        ours.policy.autocast = True


def main() -> None:
    """Prints seconds of both precisions, their ratio, and the drift."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder of a model; the 5M one of grpo_step.py where absent")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--csv")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    def task(bf16: bool) -> Task:
        return model_task(args.model, bf16) if args.model else small_task(bf16)

    sides = {"float32": Ours(task(False)), "bfloat16": Ours(task(True))}
    rows: list[dict[str, Any]] = []
    for number in range(args.steps + 1):
        for name, ours in sides.items():
            rows.append({"step": number, "precision": name, **step(ours)})
    rows = [row for row in rows if row["step"] > 0]  # the first one warms up
    columns = list(dict.fromkeys(key for row in rows for key in row))
    for part in ("generation_cpu_s", "update_cpu_s"):
        by = {name: [row[part] for row in rows if row["precision"] == name] for name in sides}
        ratio = statistics.median(a / b for a, b in zip(by["float32"], by["bfloat16"], strict=True))
        slow, fast = (statistics.median(by[name]) for name in sides)
        print(f"{part}: float32 {slow:.2f}, bfloat16 {fast:.2f}, ratio {ratio:.2f}")
    for name in sides:
        mine = [row for row in rows if row["precision"] == name]
        means = {key: statistics.mean(row[key] for row in mine) for key in columns[4:] if key in mine[0]}
        print(name, ", ".join(f"{key} {value:.2e}" for key, value in means.items()))
    if args.csv:
        with open(args.csv, "w", newline="") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
