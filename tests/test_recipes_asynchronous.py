"""Recipes with workers, which live in this process here: each trains, keeps its bound, and has the limits it names."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from run_cases import LANGUAGE, merged, remembered
from test_recipes import ASYNCHRONOUS, moved
from ticket_cases import ALLOW, Flying, Here, made

from unified_rl.config import compose, config_root
from unified_rl.study import recipes

RUN = ("updates=3", "eval_episodes=0", "progress=false", "logger=[]", "checkpoint_every=1000000", "samples_rows=0")
BOUNDS = {"pipeline_rl": 4, "periodic_asynchrony": 0, "areal": 4, "llama_rl": 1, "echo_pull": 0, "echo_push": 4}
LIMITS = [(name, number) for name in ASYNCHRONOUS for number in range(len(recipes.recipe(name).limits))]


class Outcome:
    """The policy's weights behind a run, and what each update trained on: ages of units, answers of several versions.

    Attributes:
        ahead: the most batches that were begun beyond the updates made.
    """

    def __init__(self, *words: str, kind: type[Here] = Here) -> None:
        self.ages: list[set[int]] = []
        self.mixed = self.ahead = 0
        with remembered(), TemporaryDirectory() as folder:
            cfg = compose(merged(LANGUAGE, [*RUN, *words]), allow=ALLOW)
            trainer, _ = made(cfg, Path(folder) / "run", callbacks=[self], kind=kind)
        self.weights = {name: weight.clone() for name, weight in trainer.agent.policy.state_dict().items()}

    def on_run_begin(self, trainer: Any) -> None:
        agent = trainer.agent
        draw = agent._draw

        def drawn(replay: Any) -> Any:
            rows = draw(replay)
            units = rows["policy_version"], rows["mask"]
            self.ages.append(set((agent.version - units[0])[units[1]].tolist()))
            self.mixed += sum(len(set(row[mask].tolist())) > 1 for row, mask in zip(*units, strict=True))
            self.ahead = max(self.ahead, trainer.feed.admitted - trainer.updates)
            return rows

        agent._draw = drawn


outcome = cache(Outcome)


def test_the_recipes_with_workers_are_these() -> None:
    files = {name: (config_root() / "recipe" / f"{name}.yaml").read_text() for name in recipes.recipe_names()}
    with_workers = {name for name, text in files.items() if "override /engine: ray" in text}
    assert with_workers == set(ASYNCHRONOUS) == set(BOUNDS)


@pytest.mark.parametrize("name", ASYNCHRONOUS)
def test_a_recipe_trains_on_rows_as_old_as_it_says(name: str) -> None:
    known = recipes.recipe(name)
    assert recipes.summary(name) and known.source.rpartition(" ")[2].replace(".", "").isdigit() and known.confidence
    out = Outcome(f"recipe={name}", "updates=7" if name in ("areal", "pipeline_rl") else RUN[0], kind=Flying)
    assert moved(out, outcome("agent.lr=1e-30")) > 1e-5
    oldest = max(age for ages in out.ages for age in ages)
    if name == "areal":  # its rule is about what may begin; worker 1 is slow here, and nothing bounds what it brings
        assert oldest > BOUNDS[name]
    else:
        assert 0 <= oldest <= BOUNDS[name] and (oldest > 0) == (BOUNDS[name] > 0)
    assert out.ahead <= BOUNDS[name]
    assert (out.mixed > 0) == (name == "pipeline_rl")


@pytest.mark.parametrize(("name", "number"), LIMITS)
def test_a_recipe_is_the_other_run_in_its_limit(name: str, number: int) -> None:
    limit = recipes.recipe(name).limits[number]
    one, other = Outcome(f"recipe={name}", *limit.when), outcome(*limit.equals)
    assert one.ages == other.ages
    for key, weight in other.weights.items():
        torch.testing.assert_close(one.weights[key], weight, atol=1e-6, rtol=0.0)
    assert moved(other, outcome("agent.lr=1e-30")) > 1e-5
