"""SAC: the losses against plain torch, the schedule of updates, refusal of NaN."""

import copy
import math

import pytest
import torch
from tensordict import TensorDict

from unified_rl.agents.sac import SAC, prepare_batch
from unified_rl.errors import ConfigError, NonFiniteError
from unified_rl.policies.gaussian import GaussianPolicy
from unified_rl.replay import Replay, Uniform

BOUNDS = {"observation_dim": 3, "action_dim": 2, "action_low": [-2.0, -2.0], "action_high": [2.0, 2.0]}


def make(**options: object) -> SAC:
    policy = GaussianPolicy(**BOUNDS, squash=True, state_dependent_std=True, hidden=(16,))
    settings = {"critic_hidden": (16,), "learning_starts": 8, "batch_size": 16, **options}
    return SAC(policy, torch.Generator().manual_seed(0), rows=4, length=1, **settings)  # type: ignore[arg-type]


def transitions(count: int = 32) -> TensorDict:
    g = torch.Generator().manual_seed(5)
    return TensorDict(
        {
            "observation": torch.randn(count, 3, generator=g),
            "action": torch.rand(count, 2, generator=g) * 4 - 2,
            "reward": torch.randn(count, generator=g),
            "discount": torch.full((count,), 0.9),
            "terminated": torch.rand(count, generator=g) < 0.3,
            "next_observation": torch.randn(count, 3, generator=g),
        },
        batch_size=[count],
    )


def test_critic_target_bootstraps_unless_terminated_and_uses_the_smaller_critic() -> None:
    agent, rows = make(), transitions()
    batch = prepare_batch(rows, torch.device("cpu"))
    noise, alpha = torch.randn(32, 2, generator=torch.Generator().manual_seed(9)), torch.tensor(0.3)
    with torch.no_grad():
        action, log_prob = agent.policy.rsample(rows["next_observation"], noise=noise)
        q = [agent.target(rows["next_observation"], action)[i] for i in range(2)]
        soft = torch.minimum(*q) - 0.3 * log_prob
        target = torch.where(rows["terminated"], rows["reward"], rows["reward"] + 0.9 * soft)
        want = sum(
            0.5 * ((agent.critic(rows["observation"], rows["action"])[i] - target) ** 2).mean() for i in range(2)
        )
    torch.testing.assert_close(agent.critic_loss(batch, noise, alpha).detach(), want)


def test_log_prob_of_rsample_is_the_density_of_the_scaled_tanh_action() -> None:
    agent = make()
    obs = torch.randn(6, 3, generator=torch.Generator().manual_seed(2))
    noise = torch.randn(6, 2, generator=torch.Generator().manual_seed(3))
    action, log_prob = agent.policy.rsample(obs, noise=noise)
    mean, log_std = agent.policy.mean_and_log_std(obs)
    base = torch.distributions.Normal(mean, log_std.exp())
    tanh = torch.distributions.TransformedDistribution(base, [torch.distributions.transforms.TanhTransform()])
    torch.testing.assert_close(tanh.log_prob(action / 2.0).sum(-1), log_prob, atol=1e-4, rtol=1e-4)


def test_a_gradient_step_moves_targets_by_tau_and_alpha_towards_its_entropy() -> None:
    agent, batch = make(tau=0.25), prepare_batch(transitions(), torch.device("cpu"))
    before = [p.clone() for p in agent.target.parameters()]
    noise = torch.randn(2, 32, 2, generator=torch.Generator().manual_seed(1))
    metrics = agent.gradient_step(batch, noise, update_actor=True)
    for old, new, online in zip(before, agent.target.parameters(), agent.critic.parameters(), strict=True):
        torch.testing.assert_close(new, 0.75 * old + 0.25 * online)
    falls = float(metrics["policy/entropy"]) > agent.target_entropy  # more entropy than wanted: alpha must fall
    assert (float(agent.log_alpha.detach()) < 0.0) == falls


def test_the_actor_step_leaves_the_critic_without_gradient() -> None:
    agent, batch = make(), prepare_batch(transitions(), torch.device("cpu"))
    agent._actor_step(batch, torch.randn(32, 2, generator=torch.Generator().manual_seed(1)), torch.tensor(0.2))
    assert all(p.grad is None for p in agent.critic.parameters())
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in agent.policy.parameters())


def test_updates_follow_collected_steps_and_wait_for_learning_starts() -> None:
    agent = make(updates_per_step=0.5)
    replay = Replay(256, lanes=1, sampler=Uniform())
    replay.extend(transitions(4))
    assert agent.update(replay) == {} and agent.gradient_steps == 0
    replay.extend(transitions(4))
    agent.update(replay)
    assert agent.gradient_steps == 2  # four new rows, half an update each


def test_nan_in_the_loss_stops_by_name() -> None:
    agent = make()
    replay = Replay(64, lanes=1, sampler=Uniform())
    rows = transitions(32)
    rows["reward"][:] = math.nan
    replay.extend(rows)
    with pytest.raises(NonFiniteError, match="loss/critic is nan at gradient step 4"):
        agent.update(replay)


def test_state_round_trip_continues_bit_for_bit() -> None:
    first, second = make(), make()
    replay = Replay(64, lanes=1, sampler=Uniform(), seed=1)
    replay.extend(transitions(32))
    first.update(replay)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    other = Replay(64, lanes=1, sampler=Uniform(), seed=1)
    other.extend(transitions(32))
    other.load_state_dict(copy.deepcopy(replay.state_dict()))
    first.update(replay)
    second.update(other)
    assert all(torch.equal(a, b) for a, b in zip(first.policy.parameters(), second.policy.parameters(), strict=True))
    assert torch.equal(first.log_alpha, second.log_alpha)


def test_cuda_graph_without_cuda_is_refused() -> None:
    with pytest.raises(ConfigError, match="device=cuda"):
        make(cuda_graph=True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("mode", ["compile", "cuda_graph"])
def test_compiled_and_graphed_updates_give_the_eager_numbers(mode: str) -> None:
    results = []
    for options in ({}, {mode: True}):
        torch.manual_seed(0)
        policy = GaussianPolicy(**BOUNDS, squash=True, state_dependent_std=True, hidden=(16,)).cuda()  # type: ignore[arg-type]
        stream = torch.Generator(device="cuda").manual_seed(0)
        agent = SAC(policy, stream, rows=4, length=1, device="cuda", learning_starts=0, batch_size=16, **options)  # type: ignore[arg-type]
        replay = Replay(64, lanes=1, sampler=Uniform(), seed=1)
        replay.extend(transitions(32))
        for _ in range(10):
            agent.update(replay)
        results.append(torch.cat([p.detach().flatten() for p in policy.parameters()]))
    torch.testing.assert_close(results[0], results[1], atol=1e-4, rtol=1e-3)
