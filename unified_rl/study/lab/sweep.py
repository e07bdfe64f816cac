"""Every correction in every situation: the rows of the lab's table."""

from __future__ import annotations

import csv
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unified_rl.errors import UnifiedRLError
from unified_rl.files import replacing
from unified_rl.study.lab.drift import ascent, situations
from unified_rl.study.lab.exact import exact_moments
from unified_rl.study.lab.measure import BATCHES, measure
from unified_rl.study.lab.plan import GROUP, ROW, Plan, make_plan
from unified_rl.study.lab.policies import POLICIES, Policy
from unified_rl.study.lab.problems import PROBLEMS, Problem
from unified_rl.study.lab.sampled import sampled_moments
from unified_rl.study.lab.scene import Scene

NOISE = (0.01, 0.03, 0.1, 0.3, 1.0)
LAGS = (1, 4, 16, 64)
SETTINGS = (("tokens", "group"), ("tokens", "critic"), ("tokens_steps", "critic"), ("corridor", "critic"))
"""Problems, and the advantage used there: rewards against their group, or the true Q - V."""

GROUP_SIZE, ROWS = 8, 128
"""Rows of a group; rows of a sampled batch."""

NOT_APPLICABLE = "not applicable"


@dataclass(frozen=True)
class Setting:
    """A problem with a policy class, and its situations."""

    problem: Problem
    policy: Policy
    advantage: str
    scenes: list[Scene]


def make_settings(
    noise: Sequence[float] = NOISE, lags: Sequence[int] = LAGS, steps: int = 64, seed: int = 0
) -> Iterator[Setting]:
    """Every problem with every policy class; what does not depend on the advantage is computed once."""
    made: dict[tuple[str, str], Setting] = {}
    for problem_name, advantage in SETTINGS:
        for policy_name, build in POLICIES.items():
            key = (problem_name, policy_name)
            if key not in made:
                problem = PROBLEMS[problem_name]()
                policy = build(problem)
                path = ascent(problem, policy, steps=steps, seed=seed)
                drifts = situations(problem, policy, path, noise=noise, lags=lags, seed=seed)
                made[key] = Setting(problem, policy, advantage, [Scene(problem, policy, d) for d in drifts])
            one = made[key]
            yield Setting(one.problem, one.policy, advantage, one.scenes)


def evaluate(setting: Setting, scene: Scene, plan: Plan, batches: int) -> dict[str, Any]:
    """One row of the table."""
    row: dict[str, Any] = {
        "problem": setting.problem.name,
        "policy": setting.policy.name,
        "advantage": setting.advantage,
        "drift": scene.drift.kind,
        "amount": scene.drift.amount,
        "kl": scene.drift.kl,
        "correction": plan.name,
        "how": NOT_APPLICABLE if plan.reason else plan.route,
        "intended_bias": plan.intent,
        "note": plan.reason or plan.note,
    }
    if plan.reason:
        return row
    try:
        return row | _numbers(plan, scene, batches)
    except UnifiedRLError as error:  # a correction that refuses the setting says why
        return row | {"how": NOT_APPLICABLE, "note": str(error)}


def _numbers(plan: Plan, scene: Scene, batches: int) -> dict[str, Any]:
    """The measured columns of a row."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what a rule rejects shows in the table
        if plan.route in (ROW, GROUP):
            moments = exact_moments(plan, scene, GROUP_SIZE)
        else:
            moments = sampled_moments(plan, scene, group=GROUP_SIZE, rows=ROWS, batches=batches)
    found = measure(moments, scene.truth)
    row = {
        "bias2": found.bias2,
        "variance": found.variance,
        "mean_norm": found.mean_norm,
        "true_norm": found.true_norm,
        "cosine": found.cosine,
        "cosine_se": found.cosine_error,
        "bias2_any_rate": found.free_bias2,
        "variance_best_rate": found.free_variance,
    }
    return row | {f"error_{n}": found.error(n) for n in BATCHES}


def sweep(
    names: Sequence[str], *, batches: int = 16, seed: int = 0, watch: Callable[[str, int, int], None] | None = None
) -> list[dict[str, Any]]:
    """Every correction of ``names`` in every setting and situation.

    Args:
        names: presets.
        batches: sampled batches of the corrections that need Monte Carlo.
        seed: of initial policies and noise.
        watch: told the setting, how many rows are done and how many there are.

    Raises:
        ConfigError: an unknown preset.
    """
    rows: list[dict[str, Any]] = []
    total = len(names) * len(SETTINGS) * len(POLICIES) * (1 + len(NOISE) + len(LAGS))
    for setting in make_settings(seed=seed):
        plans = [make_plan(name, setting.advantage, binary=setting.problem.binary) for name in names]
        for scene in setting.scenes:
            for plan in plans:
                rows.append(evaluate(setting, scene, plan, batches))
            if watch is not None:
                watch(f"{setting.problem.name}, {setting.policy.name}, {setting.advantage}", len(rows), total)
    return rows


def write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Writes rows of numbers and words; numbers with six digits."""
    fields = list(dict.fromkeys(key for row in rows for key in row if key != "note"))
    fields += ["note"] if any("note" in row for row in rows) else []
    with replacing(path) as aside, aside.open("w", newline="") as handle:
        writer = csv.DictWriter(handle, fields, lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})
