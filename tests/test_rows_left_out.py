"""Rows that do not count (masked cut answers, rows without a score): the update is that of the others, to the value."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from agent_cases import TINY, close, filled, gradients, language, language_agent, stream

from unified_rl.agents.policy_gradient import PolicyGradient
from unified_rl.correction import load_correction
from unified_rl.envs.language import ChainMod
from unified_rl.policies.causal_lm import CausalLM
from unified_rl.returns import group_advantage
from unified_rl.rollout import LanguageRollout
from unified_rl.rollout.context import Refill
from unified_rl.rollout.sources import Pool

KEPT = torch.tensor([True, True, False, True, True, False, False, True, True, True, True, False])


@pytest.mark.parametrize("correction", ["dapo", "grpo", "dr_grpo", "gspo", "opo", "reinforce", "cispo"])
@pytest.mark.parametrize("micro_batch", [None, 2])
def test_the_gradient_is_that_of_the_batch_without_them(correction: str, micro_batch: int | None) -> None:
    policy, rows = language()
    marked = rows.clone().set("counted", KEPT)
    marked["reward"][~KEPT] = 1e3  # what a row that does not count earned reaches nothing
    options: dict[str, Any] = {"micro_batch": micro_batch}
    got = gradients(language_agent(copy.deepcopy(policy), marked, correction, **options), filled(marked, 1))
    some = rows[KEPT]
    close(got, gradients(language_agent(copy.deepcopy(policy), some, correction, **options), filled(some, 1)))


def test_with_a_critic_too() -> None:
    policy, rows = language()
    marked = rows.clone().set("counted", KEPT)
    marked["reward"][~KEPT] = 1e3
    options: dict[str, Any] = {"advantage": "critic", "correction": "ppo"}
    got = gradients(language_agent(copy.deepcopy(policy), marked, **options), filled(marked, 1))
    some = rows[KEPT]
    close(got, gradients(language_agent(copy.deepcopy(policy), some, **options), filled(some, 1)))


def test_where_no_row_counts_nothing_moves_and_everything_is_finite() -> None:
    policy, rows = language()
    rows["counted"] = torch.zeros(len(rows), dtype=torch.bool)
    agent = PolicyGradient(policy, load_correction("dapo"), stream(), rows=len(rows))
    before = [p.detach().clone() for p in policy.parameters()]
    found = agent.update(filled(rows, 1))
    assert float(found["train/counted"]) == 0.0 and agent.version == 1 and agent.optimizer.steps == 0
    assert all(torch.isfinite(torch.as_tensor(value)).all() for value in found.values())
    assert all(torch.equal(a, b) for a, b in zip(before, policy.parameters(), strict=True))


def test_masked_rows_are_those_whose_budget_ran_out() -> None:
    env = ChainMod(truncated="mask", max_turn_tokens=3)
    policy = CausalLM(**env.policy_inputs(), config=TINY, seed=1)
    rows, metrics = LanguageRollout(env, policy, 1.0, stream(), stream(1), prompts=8, group_size=4).collect(0)
    cut = rows["truncated"].any(-1)
    assert 0 < int(cut.sum()) < len(rows) and torch.equal(rows["counted"], ~cut)
    assert metrics["rollout/counted"] == pytest.approx(1 - metrics["rollout/truncated"])
    plain, _ = LanguageRollout(
        ChainMod(max_turn_tokens=3), policy, 1.0, stream(), stream(1), prompts=8, group_size=4
    ).collect(0)
    assert "counted" not in plain.keys() and torch.equal(plain["tokens"], rows["tokens"])


def test_groups_are_compared_and_answers_pooled_among_the_rows_that_count() -> None:
    class Talk:
        reward = torch.tensor([[1.0], [0.0], [1.0], [0.0], [1.0], [1.0]])

    told: Any = (Talk, {"counted": torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0, 0.0])})
    assert Refill._equal(told, 2).tolist() == [0, 1, 4, 5]
    _, rows = language()
    pool = Pool(size=12)
    pool.observe(rows.clone().set("counted", KEPT))
    kept = torch.cat([row for answers in pool._answers.values() for row in answers])
    assert len(kept) == int(KEPT.sum())


def test_a_reward_that_a_row_lacks_counts_in_no_sum_mean_or_spread() -> None:
    nan, group = float("nan"), torch.tensor([0, 0, 0, 0])
    first, second = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([nan, 0.0, 1.0, nan])
    both = torch.stack([first, second], -1)
    summed = group_advantage(both, group, reward_weights=[1.0, 2.0])
    assert summed.tolist() == pytest.approx((torch.tensor([1.0, 2.0, 5.0, 4.0]) - 3.0).tolist())
    each = group_advantage(both, group, combine="normalize_first", scale="std", eps=0.0)
    alone = group_advantage(second[1:3], group[1:3], scale="std", eps=0.0)
    want = group_advantage(first, group, scale="std", eps=0.0) + torch.cat([torch.zeros(1), alone, torch.zeros(1)])
    assert each.tolist() == pytest.approx(want.tolist())
    whitened = group_advantage(both, group, combine="normalize_first", scale="whiten", eps=0.0)
    assert whitened.tolist() == pytest.approx(((want - want.mean()) / want.std()).tolist(), abs=1e-6)
