"""TorchRL on either side: its collectors, environments and loss interface."""

from pathlib import Path

import pytest
import torch
from tensordict import TensorDict
from torchrl.collectors import Collector
from torchrl.envs import GymEnv, TransformedEnv
from torchrl.envs.transforms import DoubleToFloat, StepCounter
from torchrl.objectives import LossModule

from unified_rl.agents.policy_gradient import PolicyGradient
from unified_rl.correction import load_correction
from unified_rl.envs.control import make_mujoco
from unified_rl.errors import ConfigError
from unified_rl.interop.loss_module import CorrectedPolicyLoss
from unified_rl.policies.gaussian import GaussianPolicy
from unified_rl.replay import Fresh, Replay
from unified_rl.rollout import ControlRollout, TorchRLControlEnv, as_environment
from unified_rl.training.evaluation import evaluate_control
from unified_rl.units import record_from_steps


def pendulum() -> TransformedEnv:
    return TransformedEnv(GymEnv("Pendulum-v1"), DoubleToFloat()).append_transform(StepCounter(20))


def test_a_torchrl_collector_fills_our_replay_and_ratios_are_one() -> None:
    env = make_mujoco(name="InvertedPendulum-v5", num_envs=4, seed=0)
    policy = GaussianPolicy(**env.policy_inputs())
    replay = Replay(256, lanes=4, sampler=Fresh())
    collector = Collector(env, policy, frames_per_batch=64, total_frames=128)
    for batch in collector:
        replay.extend(batch)
    collector.shutdown()
    segments = replay.sample(4, length=16)
    record = record_from_steps(segments)
    scored = policy.log_prob(record)
    torch.testing.assert_close(scored.log_prob, record["behavior_log_prob"], atol=1e-5, rtol=1e-5)


def test_any_env_base_trains_with_our_agent() -> None:
    env = as_environment(pendulum())
    assert isinstance(env, TorchRLControlEnv) and env.num_envs == 1
    policy = GaussianPolicy(**env.policy_inputs())
    stream = torch.Generator().manual_seed(0)
    rollout = ControlRollout(env, policy, 0.99, stream, num_envs=1, horizon=32)
    agent = PolicyGradient(policy, load_correction("ppo"), stream, rows=1, length=32, minibatch=16, epochs=2)
    replay = Replay(64, lanes=1, sampler=Fresh(), cut=False)
    before = [p.detach().clone() for p in policy.parameters()]
    for _ in range(2):
        rows, metrics = rollout.collect(agent.version)
        assert metrics.get("rollout/length", 20.0) == 20.0
        assert bool(rows["truncated"].any()) and not bool(rows["terminated"].any())
        replay.extend(rows)
        agent.update(replay)
    assert any(not torch.equal(a, b) for a, b in zip(before, policy.parameters(), strict=True))
    score = evaluate_control(env, policy, 0, stream)
    assert score["eval/length"] == 20.0


def test_true_final_observation_of_an_env_base_is_kept_across_its_reset() -> None:
    env = as_environment(pendulum())
    observation = env.reset_batch(0)
    for _ in range(20):
        result = env.step_batch(torch.zeros(1, 1))
        successor, observation = result.next_observation, result.observation
    assert bool(result.truncated) and not torch.equal(successor, observation)


def test_our_policy_loss_is_a_loss_module_with_the_same_gradient() -> None:
    policy = GaussianPolicy(observation_dim=3, action_dim=1, action_low=[-1.0], action_high=[1.0])
    generator = torch.Generator().manual_seed(0)
    obs = torch.randn(6, 5, 3, generator=generator)
    with torch.no_grad():
        sample = policy.sample(obs.reshape(30, 3), generator=generator)
    segment = TensorDict(
        {
            "observation": obs,
            **{key: value.reshape(6, 5, *value.shape[1:]) for key, value in sample.items()},
            "reward": torch.zeros(6, 5),
            "policy_version": torch.zeros(6, 5, dtype=torch.int64),
        },
        batch_size=[6, 5],
    )
    record = record_from_steps(segment)
    record["advantage"] = torch.randn(6, 5, generator=generator)
    loss_module = CorrectedPolicyLoss(policy, load_correction("reinforce"))
    assert isinstance(loss_module, LossModule)
    loss_module(record)["loss_objective"].backward()
    got = torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None])
    policy.zero_grad()
    (-(policy.log_prob(record).log_prob * record["advantage"]).mean()).backward()
    want = torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None])
    torch.testing.assert_close(got, want)


def test_what_is_no_environment_is_refused() -> None:
    with pytest.raises(ConfigError, match="PosixPath is neither"):
        as_environment(Path("x"))
