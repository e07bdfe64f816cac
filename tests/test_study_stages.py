"""Studies of preferences and of stages: what they compare, and small runs of what they are made of."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import pytest
import torch
from run_cases import LANGUAGE, cached, merged, remembered

from unified_rl.config import compose, resolve_defaults
from unified_rl.study.grid import Study, make_jobs

NAMES = ("dpo_ppo", "light_r1", "agent_budget")


@cache
def study(name: str) -> Study:
    """A shipped study, of one seed."""
    found = Study.from_config(resolve_defaults(compose([f"study={name}"], primary="compare"), primary="compare"))
    return Study.from_config({"study": {**vars(found), "seeds": [1]}})


def cells(name: str) -> tuple[dict[tuple[str, str], dict[str, Any]], int]:
    """The configuration of each of its cells, and the number of its warm starts."""
    whole = study(name)
    with remembered():
        starts, runs = make_jobs(whole, lambda words: resolve_defaults(compose(words)))
    return {(job.labels["domain"], job.labels["correction"]): job.cfg for job in runs}, len(starts)


def overrides(name: str, label: str) -> list[str]:
    """What a study says of one of its corrections."""
    found: list[str] = next(c[label] for c in study(name).corrections if isinstance(c, dict) and label in c)
    return found


@pytest.mark.thorough
@pytest.mark.parametrize("name", NAMES)
def test_a_study_composes_and_has_its_controls(name: str) -> None:
    found, starts = cells(name)
    assert starts == {"dpo_ppo": 1, "light_r1": 2, "agent_budget": 4}[name]
    for (domain, label), cfg in found.items():
        assert (cfg["agent"]["lr"] == 0.0) == (label == "frozen")
        assert (cfg["warm_start"] is None) == (domain == "rewards")
        assert cfg["env"].get("shuffle_rewards", False) == label.startswith("shuffled")
    if name != "agent_budget":
        assert {cfg["steps"] for cfg in found.values()} == {5120}
        return
    for (domain, _), cfg in found.items():
        start = cfg["warm_start"] or {"batch_size": 0, "stages": []}
        shown = start["batch_size"] * sum(stage["updates"] for stage in start["stages"])
        assert shown + 4 * cfg["steps"] == 61440, f"{domain} has another budget"


def test_dpo_and_ppo_begin_with_the_same_clone() -> None:
    still = [*LANGUAGE, "agent.lr=0.0"]
    direct = cached(*merged(still, overrides("dpo_ppo", "dpo"))).metrics
    assert direct["loss/prefer"] == pytest.approx(math.log(2), abs=1e-6)
    by_model = cached(*merged(still, overrides("dpo_ppo", "ppo_model"))).metrics
    assert by_model["update/kl"] == pytest.approx(0.0, abs=1e-9) and by_model["reward_model/loss"] < math.log(2)


def test_a_stage_that_is_switched_off_gives_the_run_without_it() -> None:
    words = overrides("light_r1", "all_stages")
    assert all(word in overrides("light_r1", "shuffled") for word in words)
    assert words[-1].count("at: [20]") == 2 and "steps=5120" in study("light_r1").overrides, "half of 40 updates each"

    def weights(*extra: str) -> torch.Tensor:
        return torch.cat([w.flatten() for w in cached(*merged(LANGUAGE, extra)).weights.values()])

    first, both, second = (weights(*(w.replace("at: [20]", f"at: [{at}]") for w in words)) for at in (2, 1, 0))
    torch.testing.assert_close(first, weights("recipe=dpo"), atol=1e-6, rtol=0.0)
    torch.testing.assert_close(second, weights("correction=grpo"), atol=1e-6, rtol=0.0)
    assert min(float((both - other).abs().max()) for other in (first, second)) > 1e-5


def test_a_split_of_the_budget_trains_in_small() -> None:
    words = [word for word in study("agent_budget").domains["half"] if not word.startswith("steps=")]
    small = [word.replace("updates: 480", "updates: 2").replace("batch_size=64", "batch_size=4") for word in words]
    moved = cached(*merged(LANGUAGE, small, overrides("agent_budget", "grpo_fast")))
    still = cached(*merged(LANGUAGE, small, overrides("agent_budget", "frozen")))
    assert any(not torch.equal(weight, still.weights[name]) for name, weight in moved.weights.items())
