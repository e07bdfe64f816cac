"""Preferences between rows of a group: the textbook gradient for every split, and pairs among the chosen rows alone."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from agent_cases import close, control_agent, filled, gaussian, gradients, nudge
from term_cases import agent_of, both_splits, dense, joined, want

from unified_rl.agents.policy_gradient import PolicyGradient
from unified_rl.errors import ConfigError
from unified_rl.objectives.pairs import best_worst
from unified_rl.rollout.sources import Demonstrations


def test_dpo_has_the_textbook_gradient_for_every_split() -> None:
    policy, rows = joined()
    reference = copy.deepcopy(policy)
    nudge(policy, 0.05)
    objectives = {"policy": None, "prefer": {"name": "preference", "link": {"name": "dpo", "beta": 0.7}}}

    def with_reference(agent: PolicyGradient) -> None:
        agent.anchors["reference"].policy.load_state_dict(reference.state_dict())

    got = both_splits(policy, rows, "reinforce", with_reference, objectives=objectives)
    agent = agent_of(policy, rows)
    _, lp = dense(policy, rows)
    with torch.no_grad():
        _, ref = dense(reference, rows)
    h = ((lp - ref) * rows["mask"]).sum(-1)
    pairs = [(0, 1), (4, 6)]  # the third group has no winner
    loss = -torch.stack([F.logsigmoid(0.7 * (h[w] - h[l])) for w, l in pairs]).mean()
    close(got, want(agent, loss))


def test_dpo_at_the_reference_costs_log_2() -> None:
    policy, rows = joined()
    objectives = {"policy": None, "prefer": {"name": "preference"}}
    metrics = agent_of(policy, rows, "reinforce", objectives=objectives, micro_batch=5).update(filled(rows, 1))
    assert float(metrics["loss/total"]) == pytest.approx(0.693147, abs=1e-5)


def test_rows_that_a_preference_does_not_read_are_in_no_pair() -> None:
    policy, rows = joined(demonstrations=Demonstrations(per_group=1))
    own = rows[rows["source"] == 0]
    assert float(rows["reward"][rows["source"] == 2].min()) == 1.0  # else no demonstration could win
    nudge(policy, 0.05)
    objectives = {
        "policy": None,
        "prefer": {"name": "preference", "rows": "own", "anchor": "none", "link": {"name": "dpo", "beta": 0.7}},
    }
    hold = {"hold": {"name": "nll", "coefficient": 1e-30}}
    want = gradients(agent_of(copy.deepcopy(policy), own, "reinforce", objectives=objectives), filled(own, 1))
    close(both_splits(policy, rows, "reinforce", objectives=objectives | hold), want)


def test_a_column_may_say_which_rows_are_better() -> None:
    policy, rows = joined()
    nudge(policy, 0.05)
    rows["said"] = torch.tensor([0, 1, 0, 0, 5, 0, 0, 2, 3, 3, 3, 3])
    node = {"name": "preference", "anchor": "none", "link": {"name": "dpo", "beta": 0.7}, "order": "said"}
    got = both_splits(policy, rows, "reinforce", objectives={"policy": None, "prefer": node})
    _, lp = dense(policy, rows)
    h = (lp * rows["mask"]).sum(-1)
    loss = -torch.stack([F.logsigmoid(0.7 * (h[w] - h[l])) for w, l in [(1, 0), (4, 5)]]).mean()
    close(got, want(agent_of(policy, rows), loss))
    agent = agent_of(policy, rows, "reinforce", objectives={"policy": None, "prefer": {**node, "order": "sayed"}})
    with pytest.raises(ConfigError, match=r"prefer\.order names 'sayed'.*did you mean 'said'.*rollout\.columns\.sayed"):
        agent.check_written([0], 4, ["said"])


def test_scores_without_a_reference_need_no_other_policy() -> None:
    policy, rows = joined()
    agent = agent_of(
        policy, rows, "reinforce", objectives={"policy": None, "p": {"name": "preference", "anchor": "none"}}
    )
    assert len(agent.anchors) == 0


def test_optimiser_batches_hold_whole_groups() -> None:
    policy, rows = joined()
    objectives = {"policy": None, "prefer": {"name": "preference"}}
    agent = agent_of(policy, rows, "reinforce", objectives=objectives, minibatch=8)
    seen = agent.batches.epoch(rows, agent.objective.whole_groups)
    assert [len(batch) for batch in seen] == [8, 4]
    for batch in seen:
        assert all(int((batch["group"] == g).sum()) == 4 for g in batch["group"])
    agent = agent_of(policy, rows, "reinforce", objectives=objectives, minibatch=6)
    with pytest.raises(ConfigError, match=r"agent\.minibatch=6 cuts groups .*\(4 rows each\): set it to a multiple"):
        agent.update(filled(rows, 1))
    assert agent.optimizer.steps == 0


def test_rows_alone_in_their_groups_are_refused_before_the_first_step() -> None:
    policy, rows = joined()
    rows["group"] = torch.arange(len(rows))
    agent = agent_of(policy, rows, "reinforce", objectives={"policy": None, "prefer": {"name": "preference"}})
    with pytest.raises(ConfigError, match=r"agent\.objectives\.prefer compares rows of one group.*rollout\.group_size"):
        agent.update(filled(rows, 1))
    assert agent.optimizer.steps == 0


def test_steps_are_not_cut_out_of_rows_that_a_preference_compares() -> None:
    prefer = {"prefer": {"name": "preference"}}
    assert control_agent(gaussian()).shuffle_steps and not control_agent(gaussian(), objectives=prefer).shuffle_steps
    with pytest.raises(ConfigError, match=r"shuffle_steps cuts groups that agent\.objectives\.prefer needs whole"):
        control_agent(gaussian(), objectives=prefer, shuffle_steps=True)


def test_the_margin_is_a_mean_over_pairs_whatever_the_split() -> None:
    policy, rows = joined()
    found = []
    for micro_batch in (None, 5, 1):
        agent = agent_of(copy.deepcopy(policy), rows, "reinforce", micro_batch=micro_batch,
                         objectives={"policy": None, "prefer": {"name": "preference", "anchor": "none"}})  # fmt: skip
        metrics = agent.update(filled(rows, 1))
        found.append([float(metrics[f"prefer/{name}"]) for name in ("pairs", "margin")])
    with torch.no_grad():
        score = (dense(agent_of(copy.deepcopy(policy), rows).policy, rows)[1] * rows["mask"]).sum(-1)
    want = [2.0, float(((score[0] - score[1]) + (score[4] - score[6])) / 2)]
    for one in found:
        assert one == pytest.approx(want, abs=1e-4)


def test_the_first_best_and_the_first_worst_of_every_group_whose_rewards_differ() -> None:
    reward = torch.tensor([0.0, 1.0, 1.0, 0.0, 3.0, 3.0, 0.5, 2.0, 0.4])
    group = torch.tensor([7, 7, 7, 7, 2, 2, 5, 5, 5])
    better, worse = best_worst(reward, group)
    assert better.tolist() == [7, 1] and worse.tolist() == [8, 0]  # by group id; group 2 has no pair
    better, worse = best_worst(reward, group, least_gap=1.0)
    assert better.tolist() == [7] and worse.tolist() == [8]  # a gap of exactly 1 is none
    assert [len(x) for x in best_worst(torch.ones(3), torch.zeros(3, dtype=torch.int64))] == [0, 0]
