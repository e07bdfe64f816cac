"""TorchRL on either side: its collectors, environments and loss interface."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torchrl.collectors import Collector
from torchrl.data import (
    Binary,
    Bounded,
    Categorical,
    Composite,
    MultiCategorical,
    MultiOneHot,
    NonTensor,
    OneHot,
    TensorSpec,
    Unbounded,
)
from torchrl.envs import EnvBase, GymEnv, TransformedEnv
from torchrl.envs.transforms import DoubleToFloat, StepCounter
from torchrl.objectives import LossModule

from unified_rl.agents.policy_gradient import PolicyGradient
from unified_rl.correction import load_correction
from unified_rl.envs.control import make_mujoco
from unified_rl.errors import ConfigError
from unified_rl.interop.loss_module import CorrectedPolicyLoss
from unified_rl.policies.autoregressive import AutoregressivePolicy
from unified_rl.policies.gaussian import GaussianPolicy
from unified_rl.replay import Fresh, Replay
from unified_rl.rollout import ControlRollout, TorchRLControlEnv, as_environment
from unified_rl.spaces import Box, Discrete, MultiDiscrete
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


class Doors(EnvBase):
    """Its action is whatever spec it is given; it keeps what it receives."""

    def __init__(self, spec: TensorSpec) -> None:
        super().__init__(device="cpu", batch_size=[])
        self.observation_spec = Composite(observation=Unbounded((2,)))
        self.action_spec, self.reward_spec = spec, Unbounded((1,))
        flags = {key: Categorical(2, shape=(1,), dtype=torch.bool) for key in ("done", "terminated", "truncated")}
        self.done_spec = Composite(flags)
        self.got: list[torch.Tensor] = []

    def _reset(self, td: TensorDict | None = None, **kwargs: Any) -> TensorDict:
        return TensorDict({"observation": torch.zeros(2)}, [])

    def _step(self, td: TensorDict) -> TensorDict:
        assert self.action_spec.is_in(td["action"]), td["action"]
        self.got.append(td["action"])
        no = torch.zeros(1, dtype=torch.bool)
        out = {"observation": torch.zeros(2), "reward": torch.ones(1), "done": no, "terminated": no}
        return TensorDict({**out, "truncated": no.clone()}, [])

    def _set_seed(self, seed: int | None) -> None: ...


@pytest.mark.parametrize(
    ("spec", "part", "chosen", "arrives"),
    [
        (Categorical(3), Discrete(3), [2], 2),
        (OneHot(3), Discrete(3), [2], [False, False, True]),
        (MultiCategorical([2, 3]), MultiDiscrete((2, 3)), [1, 2], [1, 2]),
        (MultiOneHot([2, 3]), MultiDiscrete((2, 3)), [1, 0], [False, True, True, False, False]),
        (Binary(2), MultiDiscrete((2, 2)), [1, 0], [1, 0]),
    ],
)
def test_choices_of_an_env_base_are_one_space_whatever_its_encoding(
    spec: TensorSpec, part: Discrete | MultiDiscrete, chosen: list[int], arrives: Any
) -> None:
    env = TorchRLControlEnv(Doors(spec))
    assert env.space.action == part
    env.step_batch(torch.tensor([chosen]))
    assert env.env.got[0].tolist() == arrives  # type: ignore[attr-defined]
    policy = AutoregressivePolicy(**env.policy_inputs(), hidden=(4,))
    rows, _ = ControlRollout(env, policy, 0.99, torch.Generator().manual_seed(0), horizon=3).collect(0)
    assert rows["action"].shape == (3, 1, len(chosen)) and rows["action"].dtype == torch.int64


def test_vectors_of_an_env_base_keep_bounds_and_dtype() -> None:
    low, high = torch.tensor([-0.1, -0.7]).double(), torch.tensor([0.1, 0.7]).double()
    env = TorchRLControlEnv(Doors(Bounded(low, high, (2,), dtype=torch.float64)))
    assert env.space.action == Box((2,), "float64", tuple(low.tolist()), tuple(high.tolist()))
    env.step_batch(torch.tensor([[5.0, -5.0]]))
    assert env.env.got[0].tolist() == [high[0].item(), low[1].item()]  # type: ignore[attr-defined]
    assert TorchRLControlEnv(Doors(Unbounded((2,)))).space.action == Box((2,))
    with pytest.raises(ConfigError, match="acts in a NonTensor"):
        TorchRLControlEnv(Doors(NonTensor(())))
