"""The policy-gradient agent against plain torch, and what its settings do."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from agent_cases import (
    BOUNDS,
    HORIZON,
    LANES,
    close,
    control_agent,
    filled,
    gaussian,
    gradients,
    language,
    language_agent,
    nudge,
    transitions,
)
from tensordict import TensorDict
from torch import Tensor

from unified_rl.errors import ConfigError, NonFiniteError
from unified_rl.policies.diffusion import DiffusionPolicy

# ------------------------------------------------------------------------------------------- against plain torch


def plain_gae(rows: TensorDict, value: Tensor, following: Tensor, lam: float) -> Tensor:
    advantage, later = torch.zeros(HORIZON, LANES), torch.zeros(LANES)
    for t in reversed(range(HORIZON)):
        alive = (~rows["terminated"][t]).float()
        delta = rows["reward"][t] + 0.9 * following[t] * alive - value[t]
        later = delta + 0.9 * lam * (~(rows["terminated"][t] | rows["truncated"][t])).float() * later
        advantage[t] = later
    return advantage


def test_ppo_with_a_critic_has_the_gradient_of_the_textbook_loss() -> None:
    policy = gaussian()
    rows = transitions(policy)
    nudge(policy)
    agent = control_agent(policy, lam=0.8, value_coef=0.3)
    assert agent.baseline is not None
    critic = agent.baseline.module
    with torch.no_grad():
        value, following = critic(rows["observation"]), critic(rows["next_observation"])
        advantage = plain_gae(rows, value, following, 0.8)
        target = advantage + value
        advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
    mean, log_std = policy.mean_and_log_std(rows["observation"])
    log_prob = torch.distributions.Normal(mean, log_std.exp()).log_prob(rows["raw_action"]).sum(-1)
    ratio = (log_prob - rows["behavior_log_prob"].squeeze(-1)).exp()
    surrogate = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage).mean()
    assert bool((ratio > 1.2).any()) and bool((ratio < 0.8).any())
    loss = -surrogate + 0.3 * 0.5 * (critic(rows["observation"]) - target).square().mean()
    names = [name for name, _ in agent.optimizer.named]
    want = dict(zip(names, torch.autograd.grad(loss, agent.optimizer.parameters), strict=True))
    close(gradients(agent, filled(rows, LANES)), want)


def test_dapo_on_groups_has_the_gradient_of_the_textbook_loss() -> None:
    policy, rows = language()
    nudge(policy, 0.05)
    reward = rows["reward"].reshape(3, 4)
    advantage = ((reward - reward.mean(1, keepdim=True)) / (reward.std(1, keepdim=True) + 1e-6)).reshape(-1, 1)
    logits = policy.model(input_ids=rows["tokens"]).logits[:, :-1]
    log_prob = logits.log_softmax(-1).gather(-1, rows["tokens"][:, 1:, None]).squeeze(-1)
    mask = rows["mask"][:, 1:]
    ratio = torch.where(mask, log_prob - rows["behavior_log_prob"][:, 1:], 0.0).exp()
    assert bool((ratio > 1.28).any()) and bool((ratio < 0.8).any())
    surrogate = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.28) * advantage)
    loss = -(surrogate * mask).sum() / mask.sum()
    agent = language_agent(policy, rows)
    names = [name for name, _ in agent.optimizer.named]
    want = dict(zip(names, torch.autograd.grad(loss, agent.optimizer.parameters), strict=True))
    close(gradients(agent, filled(rows, 1)), want)


@pytest.mark.parametrize("correction", ["dapo", "p3o", "m2po", "gspo", "k1_mean_reject"])
def test_micro_batches_of_rows_add_up_to_the_whole_gradient(correction: str) -> None:
    policy, rows = language()
    twin = copy.deepcopy(policy)
    nudge(policy, 0.02), nudge(twin, 0.02)
    whole = language_agent(policy, rows, correction)
    parts = language_agent(twin, rows, correction, micro_batch=5)
    close(gradients(parts, filled(rows, 1)), gradients(whole, filled(rows, 1)))
    for a, b in zip(policy.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=0.0)  # Adam's first step enlarges rounding


@pytest.mark.parametrize("correction", ["ppo", "p3o", "m2po"])
def test_micro_batches_of_steps_add_up_to_the_whole_gradient(correction: str) -> None:
    found = []
    for micro_batch in (None, 5):
        policy = gaussian()
        rows = transitions(policy)
        nudge(policy)
        agent = control_agent(policy, correction, micro_batch=micro_batch, entropy_coef=0.1)
        found.append(gradients(agent, filled(rows, LANES)))
    close(found[1], found[0])


# ------------------------------------------------------------------------------------------- settings


def test_the_first_update_checks_that_fresh_rows_have_ratio_one() -> None:
    policy = gaussian()
    rows = transitions(policy)
    metrics = control_agent(policy).update(filled(rows, LANES))
    assert float(metrics["identity/max_log_ratio"]) < 1e-5
    policy = gaussian()
    rows = transitions(policy)
    nudge(policy)
    with pytest.raises(ConfigError, match=r"sample\(\) and log_prob\(\) disagree"):
        control_agent(policy).update(filled(rows, LANES))


def test_target_kl_ends_the_epochs() -> None:
    steps = {}
    for target in (None, 1e-6, 1e6):
        policy = gaussian()
        agent = control_agent(policy, epochs=6, minibatch=16, lr=1e-2, target_kl=target)
        agent.update(filled(transitions(policy), LANES))
        steps[target] = agent.optimizer.steps
    assert steps == {None: 12, 1e-6: 2, 1e6: 12}


def test_anneal_lr_follows_the_share_of_the_run_that_is_left() -> None:
    policy = gaussian()
    agent = control_agent(policy, lr=0.4, anneal_lr=True)
    agent.update(filled(transitions(policy), LANES), progress=0.75)
    assert agent.optimizer.adam.param_groups[0]["lr"] == pytest.approx(0.1)


def test_dropped_groups_leave_the_gradient_and_its_denominator() -> None:
    policy, rows = language()
    rows["reward"][4:8] = 1.0
    mixed = rows[torch.tensor([0, 1, 2, 3, 8, 9, 10, 11])]
    alone = gradients(language_agent(copy.deepcopy(policy), mixed), filled(mixed, 1))
    kept = gradients(language_agent(copy.deepcopy(policy), rows), filled(rows, 1))
    dropping = language_agent(copy.deepcopy(policy), rows, drop_equal_groups=True)
    close(gradients(dropping, filled(rows, 1)), alone)
    share = float(mixed["mask"].sum() / rows["mask"].sum())
    close(kept, {name: g * share for name, g in alone.items()})


def test_an_update_of_which_every_group_is_dropped_changes_nothing() -> None:
    policy, rows = language()
    rows["reward"][:] = 1.0
    agent = language_agent(policy, rows, drop_equal_groups=True)
    before = [p.detach().clone() for p in policy.parameters()]
    metrics = agent.update(filled(rows, 1))
    assert float(metrics["train/groups_kept"]) == 0.0 and agent.version == 1 and agent.optimizer.steps == 0
    assert all(torch.equal(a, b) for a, b in zip(before, policy.parameters(), strict=True))


def test_the_entropy_bonus_pushes_each_log_std_by_its_coefficient() -> None:
    found = []
    for coefficient in (0.0, 0.5):
        policy = gaussian()
        agent = control_agent(policy, entropy_coef=coefficient)
        found.append(gradients(agent, filled(transitions(policy), LANES)))
    name = next(n for n in found[0] if "log_std" in n)  # the entropy of a Gaussian is the sum of its log-stds + const
    torch.testing.assert_close(found[1][name], found[0][name] - 0.5)


def test_sequence_levels_see_rows_that_end_with_their_episode() -> None:
    policy = gaussian()
    agent = control_agent(policy, "gspo")
    assert not agent.shuffle_steps and control_agent(gaussian(), "ppo").shuffle_steps
    rows = transitions(policy)
    record = agent._draw(filled(rows, LANES))
    assert record["reward"].shape == (2 * LANES, 6)  # every lane holds two episodes, the longest piece six steps
    for row in record:
        assert len(set(row["episode"][row["step_mask"]].tolist())) == 1
    assert int(record["step_mask"].sum()) == LANES * HORIZON
    assert sorted(record["reward"][record["step_mask"]].tolist()) == sorted(rows["reward"].flatten().tolist())


def test_gspo_on_control_weighs_whole_episodes() -> None:
    """The ratio of a row is the geometric mean over its episode's steps alone."""
    policy = gaussian()
    rows = transitions(policy)
    nudge(policy, 0.001)
    agent = control_agent(policy, "gspo", normalize_advantage=False)
    agent.checked = True
    caught: dict[str, Any] = {}
    loss = agent.correction.loss

    def spy(log_prob: Tensor, part: TensorDict, stats: TensorDict) -> Any:
        out = loss(log_prob, part, stats)
        caught.update(log_prob=log_prob.detach(), part=part, weight=out.weight)
        return out

    agent.correction.loss = spy  # type: ignore[method-assign]
    agent.update(filled(rows, LANES))
    part, mask = caught["part"], caught["part"]["mask"]
    drift = torch.where(mask, caught["log_prob"] - part["behavior_log_prob"], 0.0)
    ratio = (drift.sum(-1) / mask.sum(-1)).exp()[:, None]
    inside = torch.where(part["advantage"] > 0, ratio < 1.0004, ratio > 0.9997) & mask
    want = ratio * part["advantage"] / mask.sum(-1, keepdim=True) / len(part)
    torch.testing.assert_close(caught["weight"], torch.where(inside, want, 0.0), atol=1e-6, rtol=1e-4)
    assert bool(inside.any()) and bool((mask & ~inside).any())


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: control_agent(gaussian(), advantage="grupo"), "auto, critic, group"),
        (lambda: control_agent(gaussian(), "gspo", shuffle_steps=True), "needs whole"),
        (lambda: control_agent(DiffusionPolicy(**BOUNDS), entropy_coef=0.1), "DiffusionPolicy has none"),
        (lambda: control_agent(gaussian(), "dppo_tv"), "densities"),
    ],
)
def test_settings_that_do_not_fit_are_refused(make: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        make()


def test_a_broken_weight_is_named_and_nothing_moves() -> None:
    policy = gaussian()
    rows = transitions(policy)
    agent = control_agent(policy)
    agent.checked = True
    assert agent.baseline is not None
    weight = agent.baseline.module.get_parameter("network.0.weight")
    with torch.no_grad():
        weight[0, 0] = float("nan")
    before = [p.detach().clone() for p in policy.parameters()]
    with pytest.raises(NonFiniteError, match="optimiser step 0"):
        agent.update(filled(rows, LANES))
    assert all(torch.equal(a, b) for a, b in zip(before, policy.parameters(), strict=True))
