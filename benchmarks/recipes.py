"""What an update costs beside its passes: ``python benchmarks/recipes.py [--rounds N] [--csv FILE]``.

For a handful of recipes, the rows of one collection are learnt from again and again. The CPU time of a whole update is
set against the sum of the forward and backward passes that its loss needs: the policy's own with gradient, each other
policy's without, as often as the update makes them, over the same rows, with the same readers of logits, timed alone.
Updates and passes take turns in random order; a ratio is the median of the rounds' ratios.
"""

from __future__ import annotations

import argparse
import csv
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))
from run_cases import ALLOW, composed, merged, teacher

from unified_rl.training.run import Job

TARGET = 1.1
BASE = [
    "env=chain_mod", "policy=causal_lm_tiny", "policy.config.hidden_size=128", "policy.config.num_hidden_layers=2",
    "policy.config.num_attention_heads=4", "policy.config.intermediate_size=256", "env.max_turn_tokens=48",
    "rollout.prompts=8", "threads=1",
]  # fmt: skip
TAUGHT = ["agent.teacher=RUN"]
RECIPES: dict[str, list[str]] = {
    "none": ["correction=grpo"],
    "luffy": [],
    "dpo": [],
    "kdrl": TAUGHT,
    "opd": TAUGHT,
    "gkd": [*TAUGHT, "rollout.sources.demonstrations.rows=64"],
    "gepo": [],
    "sinkd": [*TAUGHT, "rollout.sources.demonstrations.rows=64"],
}


class Timed:
    """One recipe: its agent, and the rows of one collection."""

    def __init__(self, name: str, run: str) -> None:
        words = [word.replace("=RUN", f"={run}") for word in RECIPES[name]]
        job = Job(composed(merged(BASE, [f"recipe={name}", *words])), ALLOW)
        self.trainer = job.make_trainer(Path(tempfile.mkdtemp()))
        self.agent, self.rollout, self.replay = self.trainer.agent, self.trainer.rollout, self.trainer.replay
        self.rows, _ = self.rollout.collect(0)
        self.agent.version = 1
        self.update()
        self.seen = self.agent._annotate(self.agent._draw(self._filled()), {})  # the rows that some term reads

    def _filled(self) -> Any:
        self.replay.extend(self.rows)
        return self.replay

    def update(self) -> float:
        """CPU seconds of an update; filling the queue is not part of it."""
        replay = self._filled()
        start = time.process_time()
        self.agent.update(replay, 0.0)
        return time.process_time() - start

    def passes(self) -> float:
        """CPU seconds of the passes that the update needs."""
        agent, batch = self.agent, self.seen
        anchors = agent.anchors
        start = time.process_time()
        with torch.no_grad():
            for name in anchors.scored:
                anchors[name].log_prob(batch)
            if anchors.needs_proximal and bool((batch["policy_version"] != agent.version).any()):
                agent.policy.log_prob(batch)
        agent.optimizer.zero_grad()
        forward = agent.objective._forward(batch)
        value = forward.log_prob.sum() if agent.objective.scored else 0.0
        for reader in agent.objective.readers:
            value = value + forward.read(reader.name).sum()
        value.backward()
        return time.process_time() - start


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES), choices=list(RECIPES))
    parser.add_argument("--csv", type=Path, default=None)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run = teacher(Path(folder), BASE)
        timed = {name: Timed(name, run) for name in args.recipes}
    torch.set_num_threads(1)
    lines, times = [], {name: ([], []) for name in timed}  # type: ignore[var-annotated]
    for one in timed.values():
        one.update(), one.passes()
    for number in range(args.rounds):
        turns = [(name, which) for name in timed for which in (0, 1)]
        random.Random(number).shuffle(turns)
        for name, which in turns:
            times[name][which].append((timed[name].update, timed[name].passes)[which]())
    for name, (whole, passes) in times.items():
        ratio = statistics.median(a / b for a, b in zip(whole, passes, strict=True))
        rows = len(timed[name].rows)
        lines.append(
            [name, rows, f"{statistics.median(whole):.4f}", f"{statistics.median(passes):.4f}", f"{ratio:.3f}"]
        )
        print(f"{name:10} {rows:3} rows: update {statistics.median(whole) * 1e3:7.1f} ms, passes "
              f"{statistics.median(passes) * 1e3:7.1f} ms, ratio {ratio:.2f}", flush=True)  # fmt: skip
    if args.csv is not None:
        with args.csv.open("w", newline="") as file:
            csv.writer(file).writerows([["recipe", "rows", "update_cpu_s", "passes_cpu_s", "ratio"], *lines])
    worst = max(float(line[-1]) for line in lines)
    print(f"at most {worst:.2f} times the passes (at most {TARGET} wanted)")
    raise SystemExit(worst > TARGET)


if __name__ == "__main__":
    main()
