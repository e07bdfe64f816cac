"""Group advantages by configuration, through the agent: a tracker a prompt, and settings that are refused."""

from __future__ import annotations

import copy

import pytest
import torch
from agent_cases import filled, language, language_agent

from unified_rl.agents.baselines import GroupBaseline
from unified_rl.errors import ConfigError, RecordError
from unified_rl.returns import SuccessTracker


def tracked(policy, rows):
    agent = language_agent(policy, rows, "grpo")
    agent.estimate.groups = GroupBaseline({"baseline": "tracker"})
    return agent


def seen(agent, rows):
    """The advantages that the agent computes in an update on ``rows``."""
    found = []
    annotate = agent._annotate
    agent._annotate = lambda record, metrics: found.append(annotate(record, metrics)) or found[-1]
    agent.update(filled(rows, 1))
    agent._annotate = annotate
    return found[-1]["advantage"][:, 0], found[-1]


def test_a_tracker_takes_the_place_of_the_group_and_follows_each_prompt() -> None:
    policy, rows = language()
    rows["prompt_id"] = torch.arange(len(rows)) // 2 + 100  # pairs of rows share a prompt, whatever their group
    rows["reward"][:] = 0.0
    rows["reward"][::3, -1] = 1.0
    total = rows["reward"].sum(-1)
    agent = tracked(policy, rows)
    first, record = seen(agent, rows)
    torch.testing.assert_close(first, total - 0.5)  # nothing is known: counts of one half each
    by_hand = SuccessTracker()
    with torch.no_grad():
        gap = (language()[0].log_prob(record).log_prob - record["behavior_log_prob"]).abs()
    drift = torch.where(record["mask"], gap, 0.0).sum(-1) / record["mask"].sum(-1)
    by_hand.update(rows["prompt_id"], total, drift)
    second, _ = seen(agent, rows)
    torch.testing.assert_close(second, total - by_hand.value(rows["prompt_id"]), atol=1e-5, rtol=0)
    assert second.unique().numel() > 2


def test_a_tracker_never_sees_masked_steps_and_refuses_rewards_that_are_no_success_rate() -> None:
    policy, rows = language()
    rows["prompt_id"] = torch.arange(len(rows))
    rows["reward"] = torch.cat([rows["reward"], torch.full((len(rows), 1), float("nan"))], 1)
    for key in ("terminated", "truncated", "step_mask", "discount", "episode"):
        if key in rows.keys():
            rows[key] = torch.cat([rows[key], rows[key].new_zeros(len(rows), 1)], 1)
    rows["step_mask"] = torch.tensor([[True, False]]).expand(len(rows), 2).clone()
    agent = tracked(policy, rows)
    agent.update(filled(rows, 1))
    assert all(0.0 < s < s + f < 3.0 for s, f in agent.estimate.groups.tracker.counts.values())
    rows["reward"][0, 0] = 1.5
    with pytest.raises(RecordError, match="from 0 to 1"):
        tracked(language()[0], rows).update(filled(rows, 1))


def test_the_counts_of_a_tracker_go_on_from_a_checkpoint() -> None:
    policy, rows = language()
    rows["prompt_id"] = torch.arange(len(rows))
    rows["reward"][::2, -1] = 1.0
    agent = tracked(policy, rows)
    agent.update(filled(rows, 1))
    again = tracked(copy.deepcopy(policy), rows)
    again.load_state_dict(agent.state_dict())
    assert again.estimate.groups.tracker.counts == agent.estimate.groups.tracker.counts and len(
        agent.estimate.groups.tracker.counts
    ) == len(rows)


def test_a_misspelt_setting_of_the_advantage_is_named() -> None:
    policy, rows = language()
    agent = language_agent(policy, rows, "grpo")
    agent.estimate.groups = GroupBaseline({"baseline": "mean", "scael": "std"})
    with pytest.raises(ConfigError, match="scael"):
        agent.update(filled(rows, 1))
