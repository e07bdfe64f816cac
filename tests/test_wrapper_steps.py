"""What acts around the optimiser step: repositioning, learning rates by ESS, gradients scaled by what clipping took."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from agent_cases import (
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
    stream,
    transitions,
)
from tensordict import TensorDict
from torch import nn

from unified_rl.agents.policy_gradient import PolicyGradient
from unified_rl.correction import load_correction
from unified_rl.errors import ConfigError
from unified_rl.interventions.steps import Reposition, log_ess_fraction, score_norm_proxy, signal_share
from unified_rl.optimizer import Optimizer


def weights(policy: Any) -> list[torch.Tensor]:
    return [p.detach().clone() for p in policy.parameters()]


def same(a: list[torch.Tensor], b: list[torch.Tensor], **tolerance: float) -> None:
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, **tolerance)  # type: ignore[arg-type]


def agent_with(correction: str, overrides: dict[str, Any], policy: Any, **options: Any) -> PolicyGradient:
    """A control agent whose correction has overrides."""
    settings = {"max_grad_norm": None, "critic_hidden": (8,), **options}
    made = load_correction(correction, **overrides)
    agent = PolicyGradient(policy, made, stream(), rows=LANES, length=HORIZON, **settings)
    agent.checked = True
    return agent


# ------------------------------------------------------------------------------------------- SFPO


@pytest.mark.parametrize(("alpha", "steps", "ordinary"), [(0.0, 3, 1), (1.0, 3, 4), (0.5, 0, 1)])
def test_repositioning_at_its_ends_is_ordinary_steps_under_adam(alpha: float, steps: int, ordinary: int) -> None:
    found = []
    for correction, overrides, epochs in (
        ("sfpo", {"wrapper.alpha": alpha, "wrapper.steps": steps}, 1),
        ("ppo", {}, ordinary),
    ):
        policy = gaussian()
        rows = transitions(policy)
        agent = agent_with(correction, overrides, policy, epochs=epochs, lr=1e-2)
        for _ in range(2):  # the second update meets moments that exist
            agent.update(filled(rows, LANES))
        found.append((weights(policy), agent.optimizer.adam.state_dict()["state"]))
    same(found[0][0], found[1][0], atol=0.0, rtol=0.0)
    for index, state in found[0][1].items():
        same(list(state.values()), list(found[1][1][index].values()), atol=0.0, rtol=0.0)


def test_a_part_of_the_way_is_kept() -> None:
    """Steps of -1 each: three fast ones, back to 0.8 of the way, one more."""
    module = nn.Linear(1, 1, bias=False)
    module.domain = "control"  # type: ignore[assignment]
    nn.init.constant_(module.weight, 10.0)
    wrapper = Reposition(module, load_correction("sfpo"), steps=3, alpha=0.8)
    wrapper.attach(Optimizer({"policy": module}, lr=1.0))

    def step() -> dict[str, Any]:
        with torch.no_grad():
            module.weight -= 1.0
        return {}

    batch = TensorDict({"mask": torch.ones(1, 1, dtype=torch.bool), "behavior_log_prob": torch.zeros(1, 1)}, [1])
    assert wrapper.around(step, batch) == {"wrapper/alpha": 0.8}
    assert float(module.weight) == pytest.approx(10.0 - 0.8 * 3 - 1.0)


def test_the_switch_falls_once_and_for_good_when_the_entropy_leaves_its_range() -> None:
    module = nn.Linear(1, 1)
    module.domain = "control"  # type: ignore[assignment]
    wrapper = Reposition(module, load_correction("sfpo"), window=4, threshold=3.0)
    wrapper.attach(Optimizer({"policy": module}, lr=1.0))
    alphas = []
    for entropy in (1.0, 1.1, 0.9, 1.0, 1.05, 2.0, 1.0, 1.0):
        batch = TensorDict(
            {"mask": torch.ones(1, 2, dtype=torch.bool), "behavior_log_prob": torch.full((1, 2), -entropy)}, [1]
        )
        alphas.append(wrapper.around(dict, batch)["wrapper/alpha"])
    assert alphas == [0.8] * 5 + [0.0] * 3
    other = Reposition(module, load_correction("sfpo"), window=4)
    other.load_state_dict(wrapper.state_dict())
    assert other.off and other.entropies == wrapper.entropies


# ------------------------------------------------------------------------------------------- VCPO


def test_the_ess_fraction_of_equal_weights_is_one_and_of_a_single_one_one_over_the_rows() -> None:
    assert float(log_ess_fraction(torch.full((8,), 3.0))) == pytest.approx(0.0, abs=1e-6)
    alone = torch.tensor([500.0, 0.0, -40.0, 3.0])  # far beyond what exp can hold
    assert float(log_ess_fraction(alone)) == pytest.approx(-math.log(4.0))
    weight = torch.tensor([1.0, 2.0, 3.0])
    assert float(log_ess_fraction(weight.log()).exp()) == pytest.approx(36.0 / (3 * 14.0))


def test_the_score_norm_is_that_of_one_hot_minus_probabilities() -> None:
    logits = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    token = torch.tensor([0, 3, 6, 2, 2])
    direct = (nn.functional.one_hot(token, 7) - logits.softmax(-1)).square().sum(-1)
    torch.testing.assert_close(score_norm_proxy(logits, token), direct)


def test_the_learning_rate_is_scaled_by_the_root_of_the_ess_for_one_step() -> None:
    policy, rows = language()
    one = torch.zeros_like(rows["behavior_log_prob"])
    first = rows["mask"].int().argmax(-1)
    one[torch.arange(len(rows)), first] = 1.0
    rows["behavior_log_prob"] -= one * torch.tensor([60.0] + [0.0] * 11)[:, None]  # one row carries all the weight
    rows["policy_version"] -= 1
    agent = language_agent(policy, rows, "vcpo", lr=1e-3)
    seen: list[float] = []
    step = agent.optimizer.adam.step
    agent.optimizer.adam.step = lambda: (seen.append(agent.optimizer.adam.param_groups[0]["lr"]), step())[1]  # type: ignore[method-assign]
    metrics = agent.update(filled(rows, 1))
    assert metrics["wrapper/lr_scale"] == pytest.approx(12**-0.5, rel=1e-5)
    assert seen == [pytest.approx(1e-3 * 12**-0.5, rel=1e-5)]
    assert agent.optimizer.adam.param_groups[0]["lr"] == 1e-3
    assert metrics["wrapper/row_ess"] == pytest.approx(1 / 12, rel=1e-5)


def test_on_policy_the_scale_is_one_and_equal_norms_give_the_group_mean() -> None:
    policy, rows = language()
    agent = language_agent(policy, rows, "vcpo")
    record = agent._draw(filled(rows, 1))
    agent.anchors.annotate(record, agent.version)
    weight = agent.wrapper.row_weight(record)
    torch.testing.assert_close(weight, record["score_norm"])
    record["score_norm"] = torch.full_like(record["score_norm"], 0.7)
    reward = rows["reward"].reshape(3, 4)
    want = (reward - reward.mean(1, keepdim=True)).reshape(-1)
    torch.testing.assert_close(
        agent.estimate.groups(record, lambda: record["behavior_log_prob"], agent.wrapper.row_weight(record))[:, 0],
        want,
        atol=1e-6,
        rtol=0.0,
    )
    assert agent.update(filled(rows, 1))["wrapper/lr_scale"] == pytest.approx(1.0, abs=1e-6)


def test_the_optimal_baseline_weighs_rows_by_squared_weight_and_norm() -> None:
    policy, rows = language()
    agent = language_agent(policy, rows, "vcpo")
    record = agent._draw(filled(rows, 1))
    agent.anchors.annotate(record, agent.version)
    last = record["mask"].shape[1] - 1 - record["mask"].flip(1).int().argmax(-1)
    shift = torch.tensor([0.5, -80.0, 0.0, 0.2] + [0.0] * 8)  # the second row has no weight to speak of
    record["proximal_log_prob"][torch.arange(12), last] += shift
    omega = ((2 * shift).exp() * record["score_norm"])[:4]
    reward = rows["reward"][:4, 0]
    baseline = float((omega * reward).sum() / omega.sum())
    torch.testing.assert_close(
        agent.estimate.groups(record, lambda: record["behavior_log_prob"], agent.wrapper.row_weight(record))[:4, 0],
        reward - baseline,
    )
    reward_of_the_second = record["reward"].clone()
    record["reward"][1] += 100.0
    moved = agent.estimate.groups(record, lambda: record["behavior_log_prob"], agent.wrapper.row_weight(record))[:4, 0]
    record["reward"] = reward_of_the_second
    torch.testing.assert_close(moved[[0, 2, 3]], (reward - baseline)[[0, 2, 3]])


def test_vcpo_without_groups_is_refused_until_its_baseline_is_given_up() -> None:
    with pytest.raises(ConfigError, match=r"vcpo is over groups(.|\n)*correction=sequence_tis"):
        control_agent(gaussian(), "vcpo")
    policy = gaussian()
    agent = agent_with("vcpo", {"advantage": None}, policy)
    assert not agent.shuffle_steps  # the ESS is over whole rows
    assert "wrapper/lr_scale" in agent.update(filled(transitions(policy), LANES))


# ------------------------------------------------------------------------------------------- S-PPO

TIGHT = {"kernel.clip_low": 0.02, "kernel.clip_high": 0.02}


@pytest.mark.parametrize("micro_batch", [None, 5])
def test_the_gradient_is_divided_by_the_size_of_what_clipping_took(micro_batch: int | None) -> None:
    start = gaussian()
    rows = transitions(start)
    nudge(start, 0.3)

    def policy_gradient(correction: str, overrides: dict[str, Any]) -> torch.Tensor:
        policy = copy.deepcopy(start)
        found = gradients(agent_with(correction, overrides, policy), filled(rows, LANES))
        return torch.cat([g.flatten() for name, g in found.items() if name.startswith("policy.")])

    clipped, unclipped = policy_gradient("ppo", TIGHT), policy_gradient("importance_sampling", {})
    taken = float((unclipped - clipped).norm())
    running = 0.1 * taken
    size = taken / (0.99 * running + 0.01 * float(clipped.norm()))
    assert size > 5.0
    policy = copy.deepcopy(start)
    agent = agent_with("s_ppo", TIGHT, policy, micro_batch=micro_batch)
    agent.wrapper.load_state_dict({"running": running})
    metrics = agent.update(filled(rows, LANES))
    assert float(metrics["wrapper/gradient_scale"]) == pytest.approx(1 / size, rel=1e-4)
    left = torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None])
    torch.testing.assert_close(left, clipped / size, atol=1e-6, rtol=1e-4)


def test_with_nothing_clipped_the_step_is_that_of_ppo() -> None:
    found = []
    for correction in ("ppo", "s_ppo"):
        policy = gaussian()
        rows = transitions(policy)
        agent = control_agent(policy, correction)
        metrics = agent.update(filled(rows, LANES))
        found.append(weights(policy))
    same(found[0], found[1], atol=0.0, rtol=0.0)
    assert metrics["wrapper/gradient_scale"] == 1.0


def test_turns_of_one_token_make_st_ppo_s_ppo() -> None:
    found = []
    for correction in ("s_ppo", "st_ppo"):
        policy = gaussian()
        rows = transitions(policy)
        nudge(policy, 0.3)
        agent = agent_with(correction, TIGHT, policy)
        agent.wrapper.load_state_dict({"running": 1e-3})
        found.append((agent.update(filled(rows, LANES))["wrapper/gradient_scale"], weights(policy)))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5) and found[0][0] < 1.0
    same(found[0][1], found[1][1], atol=1e-6, rtol=1e-5)


# ------------------------------------------------------------------------------------------- what the data side does


def weights_of_units(correction: str, rows: TensorDict, policy: Any) -> torch.Tensor:
    """The coefficient of every unit's score in the first optimiser step, through the agent."""
    agent = language_agent(copy.deepcopy(policy), rows, correction)
    agent.checked = True
    caught: list[torch.Tensor] = []
    loss = agent.correction.loss

    def spy(*args: Any) -> Any:
        out = loss(*args)
        caught.append(out.weight)
        return out

    agent.correction.loss = spy  # type: ignore[method-assign]
    agent.update(filled(rows, 1))
    return caught[0]


def test_thinned_units_are_left_out_and_the_others_weigh_more() -> None:
    policy, rows = language()
    full = weights_of_units("grpo", rows, policy)
    half = weights_of_units("nat_uniform", rows, policy)
    live = full != 0
    kept = live & (half != 0)
    assert 0.2 < float(kept.sum() / live.sum()) < 0.8
    torch.testing.assert_close(half[kept], 2 * full[kept])
    prefix = weights_of_units("nat_prefix", rows, policy)
    inside = (prefix != 0) & live
    assert bool((prefix[inside] / full[inside] >= 1 - 1e-6).all()) and bool((live & ~inside).any())
    for row in (live & ~inside).long() - inside.long():
        assert row[row != 0].tolist() == sorted(row[row != 0].tolist())  # what is left out comes last


def test_surplus_bad_answers_are_dropped() -> None:
    policy, rows = language()
    rows["reward"] = torch.tensor([1.0, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0])[:, None]
    weight = weights_of_units("red_drop", rows, policy)
    trained = (weight != 0).any(-1)
    assert trained[[0, 4, 8]].all() and int(trained.sum()) == 6


def test_the_moving_average_is_the_proximal_policy_of_ppo_ewma() -> None:
    policy = gaussian()
    rows = transitions(policy)
    agent = control_agent(policy, "ppo_ewma", lr=1e-2)
    first = weights(policy)
    agent.update(filled(rows, LANES))
    mean = [(0.9 * a + b) / 1.9 for a, b in zip(first, weights(policy), strict=True)]
    assert agent.anchors.average is not None
    same(weights(agent.anchors.average.module), mean, atol=1e-6, rtol=1e-5)
    record = agent._draw(filled(rows, LANES))
    agent.anchors.annotate(record, agent.version)
    want = agent.anchors.average.module.log_prob(record).log_prob
    torch.testing.assert_close(record["proximal_log_prob"], want)
    assert not torch.allclose(record["proximal_log_prob"], record["behavior_log_prob"], atol=1e-3)


@pytest.mark.parametrize("micro_batch", [None, 5])
def test_the_interpolated_proximal_policy_reaches_every_micro_batch(micro_batch: int | None) -> None:
    policy, rows = language()
    nudge(policy, 0.05)
    agent = language_agent(policy, rows, "a3po", micro_batch=micro_batch)
    agent.checked, agent.version = True, 2
    seen: list[TensorDict] = []
    loss = agent.correction.loss
    agent.correction.loss = lambda lp, part, stats: (seen.append((part, lp.detach())), loss(lp, part, stats))[1]  # type: ignore
    agent.update(filled(rows, 1))
    assert len(seen) == (1 if micro_batch is None else 3)
    for part, log_prob in seen:  # a lag of 2 is halfway
        mask = part["mask"]
        middle = 0.5 * (part["behavior_log_prob"] + log_prob)
        torch.testing.assert_close(part["proximal_log_prob"][mask], middle[mask], atol=1e-5, rtol=1e-5)


def test_micro_batches_give_the_step_of_the_whole() -> None:
    for correction in ("vcpo", "lp_reg", "troll", "mdpo", "fixpo"):
        policy, rows = language()
        twin = copy.deepcopy(policy)
        nudge(policy, 0.02), nudge(twin, 0.02)
        whole = gradients(language_agent(policy, rows, correction), filled(rows, 1))
        close(gradients(language_agent(twin, rows, correction, micro_batch=5), filled(rows, 1)), whole)


# ------------------------------------------------------------------------------------------- OBLR-PO


def test_the_share_of_signal_is_that_of_gradients_whose_mean_and_variance_are_known() -> None:
    """``|g|^2 / (|g|^2 + Var)`` without bias: its two averages are linear in both, here written out."""

    def averages(gradients: torch.Tensor, decay: float) -> tuple[float, float]:
        mean, square = torch.zeros(gradients.shape[1]), 0.0
        for gradient in gradients:
            mean = decay * mean + (1 - decay) * gradient
            square = decay * square + (1 - decay) * float(gradient.square().sum())
        return float(mean.square().sum()), square

    constant = torch.full((7, 3), 0.5)
    assert signal_share(*averages(constant, 0.9), 0.9, 7) == pytest.approx(1.0)
    torch.manual_seed(0)
    noise = torch.randn(400, 2000)  # mean 0: no signal
    assert signal_share(*averages(noise, 0.9), 0.9, 400) < 0.05
    half = torch.randn(400, 2000) + 1.0  # |g|^2 = Var
    assert signal_share(*averages(half, 0.9), 0.9, 400) == pytest.approx(0.5, abs=0.05)
    early = torch.randn(3, 20000) + 1.0
    assert signal_share(*averages(early, 0.9), 0.9, 3) == pytest.approx(0.5, abs=0.05)
    assert signal_share(4.0, 4.0, 0.9, 1) == 1.0 and signal_share(4.0, 4.0, 0.0, 9) == 1.0


def test_the_rate_follows_the_gradients_signal_and_resumes_bit_for_bit() -> None:
    policy, rows = language()
    node = {"name": "snr_learning_rate", "decay": 0.5}

    def made() -> PolicyGradient:
        correction = load_correction("reinforce", advantage={"baseline": "weighted"}, wrapper=node)
        agent = PolicyGradient(copy.deepcopy(policy), correction, stream(), rows=len(rows), lr=1e-2, max_grad_norm=0.01)
        agent.checked = True
        return agent

    agent = made()
    seen: list[list[torch.Tensor]] = []
    look = agent.optimizer.after_clip

    def watched(shrunk: float) -> None:
        assert shrunk < 1.0, "the bound on the norm is undone, or it would be measured"
        seen.append([p.grad / shrunk for p in agent.policy.parameters()])
        look(shrunk)

    agent.optimizer.after_clip = watched
    scales = [float(agent.update(filled(rows, 1))["wrapper/lr_scale"]) for _ in range(3)]
    assert scales[0] == 1.0 and agent.optimizer.rate == pytest.approx(1e-2)
    flat = torch.stack([torch.cat([g.flatten() for g in gradient]) for gradient in seen]).double()
    mean = 0.125 * flat[0] + 0.25 * flat[1] + 0.5 * flat[2]
    square = float(0.125 * flat[0].square().sum() + 0.25 * flat[1].square().sum() + 0.5 * flat[2].square().sum())
    held, own = 0.875, 0.5 * 1.125 / (1.5 * 0.875)
    expected = (float(mean.square().sum()) / (square * held) - own) / (1 - own)
    assert scales[2] == pytest.approx(min(1.0, max(0.0, expected)), abs=1e-3)
    again = made()
    again.load_state_dict(copy.deepcopy(agent.state_dict()))
    agent.optimizer.after_clip = look
    for one in (agent, again):
        one.update(filled(rows, 1))
    same(weights(agent.policy), weights(again.policy), atol=0.0, rtol=0.0)
