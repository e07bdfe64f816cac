"""Four data sets of a robot task, of random, medium, expert and mixed steps, by a policy that is trained for them.

``python examples/data_sets.py hopper sets`` trains PPO and writes ``sets/hopper_random``, ``_medium``, ``_expert`` and
``_mixed``. Medium is the first checkpoint that got a third of the way from a random policy's return to the best one,
as in D4RL (arXiv:2004.07219); expert is the best; mixed holds whole episodes of the three in equal shares.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

import unified_rl as ur

SHARE = 1 / 3
"""Of the way from random to expert that medium has gone."""
EVALUATIONS = 20


def trained(env: str, folder: Path, steps: int, overrides: Sequence[str]) -> dict[int, float]:
    """Trains, and keeps a checkpoint of every evaluation: the updates behind each, and its mean return."""
    every = max(steps // EVALUATIONS, 1)
    kept = [f"eval_every={every}", f"checkpoint_every={every}", f"keep_checkpoints={EVALUATIONS + 2}"]
    words = [f"env={env}", "agent=ppo", f"steps={steps}", *kept, "checkpoint_replay=false", f"run_dir={folder}"]
    run = ur.train([*words, *overrides])
    saved = {int(path.name.rpartition("_")[2]) for path in (folder / "checkpoints").iterdir()}
    return {
        row["update"]: row["eval/return"] for row in run.metrics() if "eval/return" in row and row["update"] in saved
    }


def chosen(returns: dict[int, float], random: float) -> dict[str, int]:
    """The checkpoints that deserve the names ``medium`` and ``expert``."""
    best = max(returns, key=lambda update: returns[update])
    lowest = min(returns.values()) if math.isnan(random) else random  # nan: no random episode ended
    bar = lowest + SHARE * (returns[best] - lowest)
    return {"medium": min(update for update, score in returns.items() if score >= bar), "expert": best}


def main(words: Sequence[str] | None = None) -> dict[str, float]:
    """Makes the sets of one task; returns the mean return of each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("env", help="half_cheetah, hopper, walker2d, point_maze, or another control environment")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=500_000, help="of training")
    parser.add_argument("--rows", type=int, default=100_000, help="of each set")
    parser.add_argument("overrides", nargs="*", help="of the run and its environment, as of unified-rl train")
    given = parser.parse_intermixed_args(words)
    pairs = (word.partition("=") for word in given.overrides if word.startswith("env."))
    inside = {key: yaml.safe_load(value) for key, _, value in pairs}
    folders = {kind: str(given.folder / f"{given.env}_{kind}") for kind in ("random", "medium", "expert", "mixed")}

    def make(kind: str, **how: Any) -> float:
        made = ur.data("make", given.env, kind, folders[kind], **how, **inside)
        found = float((made["returns"] or {}).get("mean", math.nan))
        print(f"{folders[kind]}: {made['rows']} rows, mean return {found:.1f}", flush=True)
        return found

    found = {"random": make("random", steps=given.rows)}
    run = given.folder / f"{given.env}_run"
    returns = trained(given.env, run, given.steps, given.overrides)
    for kind, update in chosen(returns, found["random"]).items():
        found[kind] = make(kind, steps=given.rows, policy=run, checkpoint=update)
    parts = {folders[kind]: 1 / 3 for kind in found}
    return {**found, "mixed": make("mixed", parts=parts)}


if __name__ == "__main__":
    main()
