"""What an update logs does not depend on how its batches were split for memory."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from agent_cases import LANES, control_agent, filled, gaussian, language, language_agent, nudge, transitions

from unified_rl.objectives.metrics import Mean, Sums


def logs(agent: Any, rows: Any, lanes: int) -> dict[str, float]:
    agent.checked = True
    return {key: float(value) for key, value in agent.update(filled(rows, lanes)).items()}


def same(found: list[dict[str, float]]) -> None:
    for other in found[1:]:
        assert other.keys() == found[0].keys()
        for key, value in found[0].items():
            assert other[key] == pytest.approx(value, rel=1e-5, abs=1e-5), key


@pytest.mark.parametrize("correction", ["dapo", "p3o", "icepop", "k1_mean_reject", "opmd", "mdpo", "troll", "vcpo"])
def test_a_language_models_logs_are_those_of_the_whole_batch(correction: str) -> None:
    policy, rows = language()
    nudge(policy, 0.02)
    found = []
    for micro_batch in (None, 5, 1):
        extra = {} if correction in ("mdpo", "troll") else {"entropy_coef": 0.01}
        objectives = {"imitate": {"name": "nll", "rows": "own", "coefficient": 0.1}}
        options: dict[str, Any] = {"micro_batch": micro_batch, "objectives": objectives, "lr": 0.0, **extra}
        agent = language_agent(copy.deepcopy(policy), rows, correction, epochs=2, minibatch=8, **options)
        found.append(logs(agent, rows, 1))
    assert {"loss/policy", "loss/imitate", "loss/total", "update/kl"} <= found[0].keys()
    same(found)


@pytest.mark.parametrize("correction", ["ppo", "p3o", "tis", "k1_unit_reject", "fixpo"])
def test_a_control_policys_logs_are_those_of_the_whole_batch(correction: str) -> None:
    found = []
    for micro_batch in (None, 7, 1):
        policy = gaussian()
        rows = transitions(policy)
        nudge(policy, 0.02)
        options: dict[str, Any] = {"micro_batch": micro_batch, "entropy_coef": 0.01, "lr": 0.0, "value_clip": 0.2}
        found.append(logs(control_agent(policy, correction, epochs=2, minibatch=16, **options), rows, LANES))
    assert {"loss/policy", "loss/value", "policy/entropy", "loss/total", "update/kl"} <= found[0].keys()
    same(found)


def test_the_terms_of_a_loss_add_up_to_its_total() -> None:
    policy = gaussian()
    rows = transitions(policy)
    metrics = logs(control_agent(policy, value_coef=0.5, entropy_coef=0.1, micro_batch=5), rows, LANES)
    total = metrics["loss/policy"] + 0.5 * metrics["loss/value"] - 0.1 * metrics["policy/entropy"]
    assert metrics["loss/total"] == pytest.approx(total, abs=1e-5)


def test_shares_of_a_sum_add_up_and_means_are_over_all_entries() -> None:
    sums = Sums()
    sums.add({"loss": torch.tensor(1.0), "mean": Mean(torch.tensor(6.0), torch.tensor(2))})
    sums.add({"loss": torch.tensor(0.5), "mean": Mean(torch.tensor(3.0), torch.tensor(1)), "late": 2.0})
    sums.add({"empty": Mean(torch.tensor(0.0), torch.tensor(0))})
    assert {key: float(value) for key, value in sums.values().items()} == {
        "loss": 1.5,
        "mean": 3.0,
        "late": 2.0,
        "empty": 0.0,
    }
