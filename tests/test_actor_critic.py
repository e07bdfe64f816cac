"""Value-based agents as phases: each part by its formula, and what does not fit refused by its full name."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from value_cases import BOUNDS, IQL, batch_of, filled, make, squashed, transitions, weights

from unified_rl.agents.phases import Phases
from unified_rl.errors import ConfigError
from unified_rl.objectives.offline_value import least_of, squared_error
from unified_rl.policies.autoregressive import AutoregressivePolicy
from unified_rl.policies.diffusion import DiffusionPolicy
from unified_rl.policies.flow import FlowPolicy

# ---------------------------------------------------------------------------------------------- parts


def test_least_of_takes_the_smallest_of_the_members_that_were_drawn() -> None:
    t = batch_of(make(critics=5, aggregate={"name": "least_of", "members": 2}))
    q = torch.randn(5, 32, generator=torch.Generator().manual_seed(4))
    t.batch["members"] = torch.tensor([3, 1, 0, 4, 2])  # type: ignore[index]
    torch.testing.assert_close(t.aggregate(q, t), torch.minimum(q[3], q[1]))
    torch.testing.assert_close(least_of(q, t, members=5), q.amin(0))


def test_a_mean_aggregate_reaches_target_and_advantage() -> None:
    t = batch_of(make(critics=3, aggregate="mean"))
    q = t.nets.target(t.batch["observation"], t.batch["action"])
    torch.testing.assert_close(t.stored_q, q.mean(0))
    action, log_prob = t.following
    want = t.nets.target(t.batch["next_observation"], action).mean(0) - log_prob
    target = make(critics=3, aggregate="mean").phases_of.target(t)
    torch.testing.assert_close(target, t.batch["reward"] + t.batch["bootstrap"] * want)


def test_the_smoothed_target_acts_by_the_mean_with_clipped_noise_inside_the_bounds() -> None:
    agent = make(target={"name": "smoothed", "std": 1.0, "bound": 1.5})
    t = batch_of(agent)
    mean, _ = agent.policy.mean_and_log_std(t.batch["next_observation"])
    action = 2.0 * (torch.tanh(mean) + t.noise[0].clamp(-1.5, 1.5)).clamp(-1.0, 1.0)
    assert t.noise[0].abs().max() > 1.5 and action.abs().max() == 2.0  # both clips act in this batch
    q = agent.nets.target(t.batch["next_observation"], action).amin(0)
    torch.testing.assert_close(agent.phases_of.target(t), t.batch["reward"] + t.batch["bootstrap"] * q)


def test_the_conservative_term_has_the_gradient_of_fresh_minus_stored_values() -> None:
    agent = make(critic={"error": "squared_error", "low": {"name": "conservative", "coefficient": 5.0}})
    t = batch_of(agent)
    agent.phases_of.losses()["critic"](t, (1.0, 5.0)).backward()
    found = torch.cat([p.grad.flatten() for p in agent.nets.critic.parameters()])  # type: ignore[union-attr]
    agent.nets.critic.zero_grad()
    observation, stored = t.batch["observation"], t.batch["action"]
    with torch.no_grad():
        action, _ = agent.policy.rsample(observation, noise=t.noise[1])
        target = agent.phases_of.target(batch_of(agent))
    q, fresh = agent.nets.critic(observation, stored), agent.nets.critic(observation, action)
    (0.5 * (q - target).square().mean(-1).sum() + 5.0 * (fresh - q).mean(-1).sum()).backward()
    want = torch.cat([p.grad.flatten() for p in agent.nets.critic.parameters()])  # type: ignore[union-attr]
    torch.testing.assert_close(found, want)
    assert all(p.grad is None for p in agent.policy.parameters())


def test_without_a_state_value_the_advantage_is_against_a_fresh_action() -> None:
    agent = make(actor={"policy": "weighted"}, target={"name": "soft", "entropy": False}, tune_alpha=False)
    t = batch_of(agent)
    action, _ = agent.policy.rsample(t.batch["observation"], noise=t.noise[1])
    gap = t.nets.target(t.batch["observation"], t.batch["action"]).amin(0)
    gap = gap - t.nets.target(t.batch["observation"], action).amin(0)
    torch.testing.assert_close(t.advantage, gap.detach())


def test_priority_weights_scale_the_squared_errors_of_their_rows() -> None:
    t = batch_of(make())
    t.target = torch.zeros(32)
    t.batch["priority_weight"] = torch.linspace(0.0, 1.0, 32)  # type: ignore[index]
    want = sum(0.5 * (t.batch["priority_weight"] * t.q[i] ** 2).mean() for i in range(2))
    torch.testing.assert_close(squared_error(t), want)


def test_actor_terms_add_up_by_their_coefficients() -> None:
    agent = make(actor={"policy": "pathwise", "stay": {"name": "squared", "coefficient": 0.25}})
    found = agent.phases_of.losses()["actor"](batch_of(agent), (1.0, 0.25))
    t = batch_of(agent)
    mean, _ = agent.policy.mean_and_log_std(t.batch["observation"])
    stay = (torch.tanh(mean) - t.batch["action"] / 2.0).square().mean()
    torch.testing.assert_close(found, make().phases_of.losses()["actor"](t, (1.0,)) + 0.25 * stay)


def test_a_schedule_moves_a_coefficient_over_the_run() -> None:
    fade = {"name": "imitate", "coefficient": {"name": "linear", "start": 1.0, "end": 0.0}}
    agent = make(actor={"policy": "pathwise", "stay": fade})
    assert agent.phases_of.scales(0.25, 0)["actor"] == (1.0, 0.75)
    replay = filled()
    agent.update(replay, progress=1.0)  # the term is gone: the weights are those of SAC
    plain = make()
    plain.update(filled())
    assert torch.equal(weights(agent.policy), weights(plain.policy))


def test_a_controller_is_told_the_metrics_and_saved() -> None:
    node = {"name": "proportional_integral", "metric": "policy/entropy", "target": 5.0, "integral": 0.1, "high": 9.0}
    parts = {"actor": {"policy": "pathwise", "stay": {"name": "imitate", "coefficient": node}}}
    agent = make(**parts)
    before = agent.phases_of.scales(0.0, 0)["actor"][1]
    agent.update(filled())
    after = agent.phases_of.scales(0.0, 1)["actor"][1]
    again = make(**parts)
    again.load_state_dict(copy.deepcopy(agent.state_dict()))
    assert before == 0.0 and after > 0.0 and again.phases_of.scales(0.0, 1)["actor"][1] == after


@pytest.mark.parametrize("policy", [FlowPolicy, DiffusionPolicy])
def test_iql_trains_a_chain_policy_by_its_own_likelihood_loss(policy: Any) -> None:
    chain = policy(**BOUNDS, hidden=(8,), steps=3)
    agent = make(policy=chain, **IQL)
    before = weights(chain)
    metrics = agent.update(filled())
    assert float(metrics["loss/value"]) > 0 and not torch.equal(before, weights(chain))


@pytest.mark.parametrize("options", [IQL, {"critics": 4, "aggregate": "least_of"}, {"n_step": 1, "policy_delay": 2}])
def test_a_state_survives_a_copy_bit_for_bit(options: dict[str, Any]) -> None:
    agent, replay = make(**options), filled()
    agent.update(replay)
    state, rows = copy.deepcopy(agent.state_dict()), copy.deepcopy(replay)
    agent.update(replay)
    again = make(**options)
    again.load_state_dict(state)
    again.update(rows)
    assert torch.equal(weights(agent.policy, agent.nets.target), weights(again.policy, again.nets.target))


def test_moments_reach_every_network_and_move_once_a_collection() -> None:
    agent, replay = make(policy=squashed(normalize_observation=True), **IQL), filled()
    agent.update(replay)
    nets = (agent.policy, agent.nets.critic, agent.nets.target, agent.nets.value)
    normalizers = [net.normalizer for net in nets]
    assert [int(n.count) for n in normalizers] == [16] * 4  # four gradient steps, one batch of 16
    assert all(torch.equal(n.mean, normalizers[0].mean) for n in normalizers)
    x = torch.full((1, 3), 2.0)
    assert not torch.equal(agent.policy.normalize(x), x)


# ---------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": "sof"}, r"agent\.target.*'sof'.*did you mean 'soft'"),
        ({"aggregate": "lest"}, r"agent\.aggregate.*'lest'.*did you mean 'least'"),
        ({"value": "expectil"}, r"agent\.value.*'expectil'.*did you mean 'expectile'"),
        ({"actor": {"x": "pathwis"}}, r"agent\.actor\.x.*'pathwis'.*did you mean 'pathwise'"),
        ({"critic": {"x": "conservativ"}}, r"agent\.critic\.x.*'conservativ'.*did you mean 'conservative'"),
        ({"actor": {"x": {"name": "pathwise", "nosy": False}}}, r"agent\.actor\.x.*'nosy'.*did you mean 'noisy'"),
        ({"actor": {"x": None}}, r"agent\.actor leaves no term"),
        ({"actor": {"x": {"name": "imitate", "coefficient": 0}}}, r"agent\.actor: every coefficient is 0"),
        ({"target": "state_value"}, r"agent\.target need.*agent\.value=expectile"),
        ({"value": "expectile"}, r"agent\.value is learnt and nothing reads it"),
        ({"actor": {"x": "imitate"}}, r"agent\.tune_alpha=false"),
        ({"actor": {"x": {"name": "pathwise", "entropy": False}}}, r"agent\.tune_alpha=false"),
        ({"alpha": 0.0}, r"agent\.alpha=0 must be above 0 where it is tuned"),
        ({"alpha": -1.0, "tune_alpha": False}, r"agent\.alpha=-1\.0 must be at least 0"),
        ({**IQL, "alpha": 0.5}, r"agent\.alpha=0\.5 weighs an entropy that no part"),
        ({"tune_alpha": False, "target_entropy": -1.0}, r"agent\.target_entropy.*agent\.tune_alpha=true"),
        ({"n_step": 0}, r"agent\.n_step=0"),
        ({"policy_delay": 0}, r"agent\.policy_delay=0"),
        ({"batch_size": 0}, r"agent\.batch_size=0"),
        ({"tau": 0.0}, r"agent\.tau=0\.0"),
        ({"lr": -1.0}, r"agent\.lr=-1\.0"),
        ({"updates_per_step": 0.0}, r"agent\.updates_per_step=0\.0 must be above 0"),
        ({"aggregate": {"name": "least_of", "members": 0}}, r"agent\.aggregate\.members=0 must be at least 1"),
        ({"actor": {"x": {"name": "pathwise", "coefficient": "high"}}}, r"agent\.actor\.x\.coefficient 'high'"),
        (
            {"actor": {"x": {"name": "pathwise", "coefficient": {"name": "linear", "strt": 1}}}},
            r"agent\.actor\.x\.coefficient 'linear'.*'strt'",
        ),
    ],
)
def test_what_does_not_fit_is_refused_by_its_full_name(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make(**options)


def test_a_policy_without_rsample_is_refused_where_a_part_draws_actions() -> None:
    flow = FlowPolicy(**BOUNDS, hidden=(8,), steps=3)
    with pytest.raises(ConfigError, match=r"agent\.target and agent\.actor\.policy need .*FlowPolicy.*tanh_gaussian"):
        make(policy=flow)
    options = {**IQL, "actor": {"policy": "weighted", "stay": "squared"}}
    with pytest.raises(ConfigError, match=r"agent\.actor\.stay need"):
        make(policy=flow, **options)
    phases = Phases("state_value", "least", None, {"error": "squared_error"}, {"policy": "weighted"})
    with pytest.raises(ConfigError, match=r"agent\.actor\.policy need"):  # an advantage without a state value
        phases.check_policy(flow)


def test_discrete_actions_and_language_models_are_refused() -> None:
    discrete = AutoregressivePolicy(3, 1, [], [], num_actions=4)
    with pytest.raises(ConfigError, match="continuous actions, and AutoregressivePolicy has none"):
        make(policy=discrete)


def test_alpha_zero_leaves_the_entropy_out() -> None:
    agent = make(alpha=0.0, tune_alpha=False)
    metrics = agent.update(filled())
    assert float(metrics["policy/alpha"]) == 0.0
    other = make(
        target={"name": "soft", "entropy": False}, actor={"policy": {"name": "pathwise", "entropy": False}},
        tune_alpha=False,
    )  # fmt: skip
    other.update(filled())
    torch.testing.assert_close(weights(agent.policy), weights(other.policy))


def own_moments() -> Any:
    policy = squashed()
    policy.normalizer = torch.nn.Identity()
    return policy


@pytest.mark.parametrize(
    ("policy", "options", "message"),
    [
        (FlowPolicy(**BOUNDS, hidden=(8,), steps=3), IQL, r"agent\.actor\.policy draw random numbers"),
        (own_moments(), {}, "standardises observations by a module of its own"),
        (
            squashed(),
            {"actor": {"policy": {"name": "pathwise", "coefficient": {"name": "linear", "start": 1.0, "end": 2.0}}}},
            r"agent\.actor\.policy\.coefficient changes",
        ),
    ],
)
def test_a_cuda_graph_refuses_what_it_would_freeze(policy: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make(policy=policy, **options).phases_of.check_graph(policy)


def test_rows_without_rewards_are_refused_before_the_first_step() -> None:
    agent = make(**IQL)
    with pytest.raises(ConfigError, match=r"learns from reward, discount.* rows lack.*--record FOLDER"):
        agent.update(filled(transitions().select("observation", "action")))
    assert agent.gradient_steps == 0


def test_a_controller_of_a_metric_that_nothing_reports_is_refused() -> None:
    node = {"name": "proportional_integral", "metric": "policy/entrpy", "target": 5.0}
    agent = make(actor={"policy": "pathwise", "stay": {"name": "imitate", "coefficient": node}})
    with pytest.raises(
        ConfigError, match=r"agent.actor.stay.coefficient.metric 'policy/entrpy' is reported by no part"
    ):
        agent.update(filled())
