"""Transport between blocks of distributions: against Sinkhorn's iterates written out, for every split of the batch."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from agent_cases import close, control_agent, gaussian, nudge
from term_cases import agent_of, both_splits, dense, joined, want

from unified_rl.errors import ConfigError


def written_out(s: torch.Tensor, t: torch.Tensor, smoothing: float, iterations: int) -> torch.Tensor:
    """The loss of one block ``[n, V]``, a sum over its units; the plan has no gradient."""
    cost = (s[:, None] - t[None]).abs().sum(-1)
    plan = (-cost.detach() / smoothing).exp()
    for _ in range(iterations):
        plan = plan / plan.sum(1, keepdim=True)
        plan = plan / plan.sum(0, keepdim=True)
    return (plan * cost).sum()


@pytest.mark.parametrize("block", [1, 3])
def test_blocks_of_every_row_are_carried_to_those_of_the_other_policy(block: int) -> None:
    policy, rows = joined()
    reference = copy.deepcopy(policy)
    nudge(policy, 0.2)
    node = {"name": "transport", "anchor": "reference", "block": block, "smoothing": 0.3, "iterations": 7}

    def prepare(agent: Any) -> None:
        agent.anchors["reference"].policy.load_state_dict(reference.state_dict())
        agent.checked = True

    got = both_splits(policy, rows, "reinforce", prepare, objectives={"policy": None, "carry": node})
    s, _ = dense(policy, rows)
    with torch.no_grad():
        t, _ = dense(reference, rows)
    s, t = ((x / 2.0).softmax(-1) for x in (s, t))  # tempering log-probs is tempering logits
    total = torch.zeros(())
    for row, mask in enumerate(rows["mask"]):
        for part in mask.nonzero().flatten().split(block):
            total = total + written_out(s[row, part], t[row, part], 0.3, 7)
    close(got, want(agent_of(policy, rows), total / rows["mask"].sum()))


def test_densities_have_no_logits_to_carry() -> None:
    with pytest.raises(ConfigError, match=r"objectives\.c reads the logits of every unit, and GaussianPolicy has none"):
        control_agent(gaussian(), objectives={"c": {"name": "transport", "anchor": "reference"}})
