"""Pairs of an older judgement that are turned round, pushed down or held, against autograd of what is written."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from agent_cases import close, filled, nudge
from term_cases import agent_of, both_splits, dense, joined, want
from torch import Tensor

from unified_rl.agents.policy_gradient import PolicyGradient
from unified_rl.errors import ConfigError

OLD = torch.tensor([0, 3, 1, 1, 2, 0, 1, 1, 5, 1, 1, 1])
"""The older judgement of three groups of four: pairs (1, 0), (4, 5) and (8, 9)."""
REWARD = torch.tensor([0.9, 0.0, 0, 0, 0.2, 0.4, 1, 1, 2.0, 0, 0, 0])
"""Right is above 0.5: the first pair is turned round, of the second neither is right, the third is kept."""


def setting() -> tuple[Any, Any, Tensor]:
    policy, rows = joined()
    rows["reward"], rows["old"] = REWARD[:, None].clone(), OLD.clone()
    reference = copy.deepcopy(policy)
    nudge(policy, 0.05)
    _, lp = dense(policy, rows)
    with torch.no_grad():
        _, ref = dense(reference, rows)
    return (policy, reference), rows, ((lp - ref) * rows["mask"]).sum(-1)


def got(policies: Any, rows: Any, **node: Any) -> Any:
    def with_reference(agent: PolicyGradient) -> None:
        agent.anchors["reference"].policy.load_state_dict(policies[1].state_dict())

    objectives = {"policy": None, "prefer": {"name": "triage", **node}}
    return both_splits(policies[0], rows, "reinforce", with_reference, objectives=objectives)


@pytest.mark.parametrize("impact", [0.0, 1.0])
def test_pairs_are_turned_pushed_or_held(impact: float) -> None:
    policies, rows, h = setting()
    turned = -F.logsigmoid(0.7 * (h[0] - h[1]))
    pushed = -0.5 * (F.logsigmoid(-0.3 * h[4]) + F.logsigmoid(-0.3 * h[5]))
    held = 0.5 * 0.25 * (h[8].square() + h[9].square())
    weight = torch.tensor([0.45, 0.2, 1.0]) ** impact  # mean distances from 0.5
    loss = 0.1 * (weight / weight.mean() * torch.stack([turned, pushed, held])).mean()
    node = {"link": {"name": "dpo", "beta": 0.7}, "beta": 0.3, "retain": 0.5, "impact": impact}
    close(got(policies, rows, coefficient=0.1, **node), want(agent_of(policies[0], rows), loss))


def test_a_pair_of_which_both_are_right_is_held() -> None:
    policies, rows, h = setting()
    rows["reward"][[0, 1]] = 1.0
    held = 0.25 * (h[[0, 1, 8, 9]].square()).sum()
    pushed = -0.5 * (F.logsigmoid(-0.3 * h[4]) + F.logsigmoid(-0.3 * h[5]))
    node = {"link": {"name": "dpo", "beta": 0.7}, "beta": 0.3, "impact": 0.0}
    close(got(policies, rows, **node), want(agent_of(policies[0], rows), (held + pushed) / 3))


def test_a_judgement_may_prefer_low_values() -> None:
    policies, rows, h = setting()
    rows["old"] = -OLD
    loss = -F.logsigmoid(0.7 * (h[0] - h[1])) - F.logsigmoid(-0.3 * h[4]) / 2 - F.logsigmoid(-0.3 * h[5]) / 2
    node = {"link": {"name": "dpo", "beta": 0.7}, "beta": 0.3, "impact": 0.0, "lowest": True, "retain": 0.0}
    close(got(policies, rows, **node), want(agent_of(policies[0], rows), loss / 3))


def test_what_is_kept_has_no_gradient_at_the_reference() -> None:
    policy, rows = joined()
    rows["reward"], rows["old"] = OLD[:, None].float(), OLD.clone()  # the new judgement is the old one
    agent = agent_of(
        policy, rows, "reinforce", objectives={"policy": None, "prefer": {"name": "triage", "threshold": 1.5}}
    )
    metrics = agent.update(filled(rows, 1))
    assert float(metrics["loss/total"]) == 0.0 and float(metrics["grad/norm"]) == 0.0
    assert float(metrics["prefer/pairs"]) == pytest.approx(3.0)


def test_a_judgement_that_no_row_holds_is_refused() -> None:
    policy, rows = joined()
    agent = agent_of(policy, rows, "reinforce", objectives={"policy": None, "prefer": {"name": "triage"}})
    with pytest.raises(ConfigError, match=r"prefer\.old names 'old'.*did you mean 'older'.*rollout\.columns\.old"):
        agent.check_written([0], 4, ["older"])
