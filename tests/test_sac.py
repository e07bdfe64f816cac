"""SAC, the actor-critic's default: the losses against plain torch, the schedule of updates, refusal of NaN."""

import copy
import math

import pytest
import torch
from value_cases import batch_of, filled, make, squashed, transitions, weights

from unified_rl.errors import ConfigError, NonFiniteError
from unified_rl.objectives.transitions import prepare_batch
from unified_rl.replay import Replay, Uniform


def test_critic_target_bootstraps_unless_terminated_and_uses_the_smaller_critic() -> None:
    agent, rows = make(), transitions()
    t = batch_of(agent, alpha=0.3)
    with torch.no_grad():
        action, log_prob = agent.policy.rsample(rows["next_observation"], noise=t.noise[0])
        q = [agent.nets.target(rows["next_observation"], action)[i] for i in range(2)]
        soft = torch.minimum(*q) - 0.3 * log_prob
        target = torch.where(rows["terminated"], rows["reward"], rows["reward"] + 0.9 * soft)
        critic = agent.nets.critic(rows["observation"], rows["action"])
        want = sum(0.5 * ((critic[i] - target) ** 2).mean() for i in range(2))
    torch.testing.assert_close(agent.phases_of.losses()["critic"](t, (1.0,)).detach(), want)


def test_actor_loss_is_alpha_log_prob_minus_the_smaller_critic() -> None:
    agent, rows = make(), transitions()
    t = batch_of(agent, alpha=0.3)
    action, log_prob = agent.policy.rsample(rows["observation"], noise=t.noise[1])
    q = agent.nets.critic(rows["observation"], action)
    want = (0.3 * log_prob - torch.minimum(q[0], q[1])).mean()
    torch.testing.assert_close(agent.phases_of.losses()["actor"](t, (1.0,)), want)
    torch.testing.assert_close(t.metrics["policy/entropy"], -log_prob.mean())


def test_log_prob_of_rsample_is_the_density_of_the_scaled_tanh_action() -> None:
    policy = squashed()
    obs = torch.randn(6, 3, generator=torch.Generator().manual_seed(2))
    noise = torch.randn(6, 2, generator=torch.Generator().manual_seed(3))
    action, log_prob = policy.rsample(obs, noise=noise)
    mean, log_std = policy.mean_and_log_std(obs)
    base = torch.distributions.Normal(mean, log_std.exp())
    tanh = torch.distributions.TransformedDistribution(base, [torch.distributions.transforms.TanhTransform()])
    torch.testing.assert_close(tanh.log_prob(action / 2.0).sum(-1), log_prob, atol=1e-4, rtol=1e-4)


def test_a_gradient_step_moves_the_slow_copy_by_tau_and_alpha_towards_its_entropy() -> None:
    agent, batch = make(tau=0.25), prepare_batch(transitions(), torch.device("cpu"))
    before = [p.clone() for p in agent.nets.target.parameters()]
    noise = torch.randn(2, 32, 2, generator=torch.Generator().manual_seed(1))
    metrics = agent.gradient_step(batch, noise, update_actor=True)
    for old, new, online in zip(before, agent.nets.target.parameters(), agent.nets.critic.parameters(), strict=True):
        torch.testing.assert_close(new, 0.75 * old + 0.25 * online)
    falls = float(metrics["policy/entropy"]) > agent.target_entropy  # more entropy than wanted: alpha must fall
    assert (float(agent.nets.log_alpha.detach()) < 0.0) == falls


def test_the_actor_step_leaves_the_critic_without_gradient() -> None:
    agent, batch = make(), prepare_batch(transitions(), torch.device("cpu"))
    noise = torch.randn(2, 32, 2, generator=torch.Generator().manual_seed(1))
    agent.phases["actor"].step(batch, noise, torch.tensor(0.2), (1.0,))
    assert all(p.grad is None for p in agent.nets.critic.parameters())
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in agent.policy.parameters())


def test_policy_delay_makes_one_actor_step_in_so_many() -> None:
    agent, replay, moved = make(rows=1, policy_delay=3), filled(), []
    for _ in range(6):
        before = weights(agent.policy)
        agent.update(replay)
        moved.append(not torch.equal(before, weights(agent.policy)))
    assert moved == [False, False, True] * 2


def test_updates_follow_collected_steps_and_wait_for_learning_starts() -> None:
    agent = make(updates_per_step=0.5)
    replay = Replay(256, lanes=1, sampler=Uniform())
    replay.extend(transitions(4))
    assert agent.update(replay) == {} and agent.gradient_steps == 0
    replay.extend(transitions(4))
    agent.update(replay)
    assert agent.gradient_steps == 2  # four new rows, half an update each


def test_nan_in_the_loss_stops_by_name() -> None:
    rows = transitions(32)
    rows["reward"][:] = math.nan
    with pytest.raises(NonFiniteError, match=r"loss/critic is nan at gradient step 4: .*agent\.lr"):
        make().update(filled(rows))


# weights and metrics of the stand-alone SAC that this agent replaced, after 5 updates of 4 gradient steps
FINGERPRINTS = {
    "plain": ({}, [2.448868, 3.675721, 3.683667, 1.016268, -0.7878, 1.106313, 0.994328]),
    "delayed": (
        {"critics": 3, "layer_norm": True, "policy_delay": 2, "lr": 1e-2},
        [2.39097, 8.183674, 8.190614, 1.200571, -1.573782, 1.393631, 0.914006],
    ),
    "fixed alpha": (
        {"tune_alpha": False, "alpha": 0.3, "tau": 0.1},
        [2.448833, 3.676965, 3.679528, 0.694766, -0.009778, 1.104864, 0.3],
    ),
}


@pytest.mark.parametrize("name", list(FINGERPRINTS))
def test_the_default_parts_keep_the_numbers_of_soft_actor_critic(name: str) -> None:
    options, want = FINGERPRINTS[name]
    agent, replay = make(**options), filled()
    for _ in range(5):
        metrics = agent.update(replay)
    found = [weights(agent.policy).norm(), weights(agent.nets.critic).norm(), weights(agent.nets.target).norm()]
    found += [metrics["loss/critic"], metrics["loss/policy"], metrics["policy/entropy"], metrics["policy/alpha"]]
    torch.testing.assert_close(torch.stack(found), torch.tensor(want), atol=1e-4, rtol=1e-4)


def test_state_round_trip_continues_bit_for_bit() -> None:
    first, second = make(), make()
    replay = filled(seed=1)
    first.update(replay)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    other = filled(seed=1)
    other.load_state_dict(copy.deepcopy(replay.state_dict()))
    first.update(replay)
    second.update(other)
    assert torch.equal(weights(first.policy, first.nets.target), weights(second.policy, second.nets.target))
    assert torch.equal(first.nets.log_alpha, second.nets.log_alpha)


def test_cuda_graph_without_cuda_is_refused() -> None:
    with pytest.raises(ConfigError, match="device=cuda"):
        make(cuda_graph=True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("mode", ["compile", "cuda_graph"])
def test_compiled_and_graphed_updates_give_the_eager_numbers(mode: str) -> None:
    from unified_rl.agents.actor_critic import ActorCritic
    from unified_rl.replay import Priority

    parts = {"critics": 3, "aggregate": "least_of"}
    results = []
    for options in ({}, {mode: True}):
        torch.manual_seed(0)
        policy = squashed().cuda()
        stream = torch.Generator(device="cuda").manual_seed(0)
        agent = ActorCritic(
            policy, stream, rows=4, length=1, device="cuda", learning_starts=0, batch_size=16, **parts, **options
        )
        replay = filled(sampler=Priority(), seed=1)
        for _ in range(10):
            agent.update(replay)
        results.append(weights(policy))
    torch.testing.assert_close(results[0], results[1], atol=1e-4, rtol=1e-3)


def test_no_network_keeps_the_history_of_its_updates() -> None:
    agent, replay = make(), filled()
    for _ in range(3):
        agent.update(replay)
    modules = (agent.policy, agent.nets.critic, agent.nets.target)
    assert agent.gradient_steps == 12
    assert all(p.is_leaf for module in modules for p in module.parameters())  # else memory grows with every step
