"""Any Gymnasium id through the vector adapter."""

from __future__ import annotations

import gymnasium
import numpy as np
import pytest
import torch

from unified_rl.envs.control import ActionChunk, GymnasiumEnv
from unified_rl.errors import CheckpointError, ConfigError


class Coin(gymnasium.Env):
    """Observes entropy that no seed determines."""

    observation_space = gymnasium.spaces.Box(-1, 1, (1,))
    action_space = gymnasium.spaces.Box(-1, 1, (1,))

    def reset(self, *, seed=None, options=None):  # type: ignore[no-untyped-def]
        return np.random.default_rng().random(1, dtype=np.float32), {}

    def step(self, action):  # type: ignore[no-untyped-def]
        return np.random.default_rng().random(1, dtype=np.float32), 0.0, False, False, {}


@pytest.fixture
def coin() -> str:
    if "Coin-v0" not in gymnasium.registry:
        gymnasium.register("Coin-v0", entry_point=Coin)
    return "Coin-v0"


def test_cartpole_keeps_every_true_transition_across_ends() -> None:
    env = GymnasiumEnv("CartPole-v1", num_envs=3, seed=4)
    assert env.policy_inputs()["num_actions"] == 2
    references = [gymnasium.make("CartPole-v1") for _ in range(3)]
    for lane, reference in enumerate(references):
        reference.reset(seed=int(env.state_dict()["seeds"][lane]))
    generator, ends = torch.Generator().manual_seed(0), 0
    before = env.current_observation()
    for _ in range(120):
        action = torch.randint(2, (3, 1), generator=generator)
        step = env.step_batch(action)
        seeds = env.state_dict()["seeds"]
        for lane, reference in enumerate(references):
            observation, reward, terminated, truncated, _ = reference.step(int(action[lane]))
            assert torch.equal(step.next_observation[lane], torch.from_numpy(observation).float())
            assert (float(step.reward[lane]), bool(step.terminated[lane])) == (reward, terminated)
            if terminated or truncated:
                ends += 1
                observation, _ = reference.reset(seed=int(seeds[lane]))
            assert torch.equal(step.observation[lane], torch.from_numpy(observation).float())
        assert torch.equal(env.current_observation(), step.observation)
        assert not torch.equal(before, step.observation)
        before = step.observation
    assert ends >= 6


def test_pendulum_truncates_at_its_time_limit_in_every_copy() -> None:
    env = GymnasiumEnv("Pendulum-v1", num_envs=2, max_episode_steps=7)
    assert env.max_steps == 7
    assert env.policy_inputs() == {
        "observation_dim": 3, "action_dim": 1, "action_low": [-2.0], "action_high": [2.0]
    }  # fmt: skip
    flags = [env.step_batch(torch.zeros(2, 1)).truncated.tolist() for _ in range(15)]
    assert flags == [[True, True] if step % 7 == 0 else [False, False] for step in range(1, 16)]


@pytest.mark.parametrize("name", ["Pendulum-v1", "CartPole-v1"])
def test_a_restored_adapter_continues_bit_for_bit(name: str) -> None:
    env = GymnasiumEnv(name, num_envs=3, seed=1)
    generator = torch.Generator().manual_seed(2)
    actions = torch.randint(2, (90, 3, 1), generator=generator).float()
    for action in actions[:40]:
        env.step_batch(action)
    state = env.state_dict()
    expected = [env.step_batch(action) for action in actions[40:]]
    other = GymnasiumEnv(name, num_envs=3, seed=99)
    other.load_state_dict(state)
    for action, step in zip(actions[40:], expected, strict=True):
        again = other.step_batch(action)
        assert all(torch.equal(a, b) for a, b in zip(again[:6], step[:6], strict=True))


def test_an_environment_without_determinism_refuses_to_resume(coin: str) -> None:
    env = GymnasiumEnv(coin, max_episode_steps=5)
    env.step_batch(torch.zeros(1, 1))
    with pytest.raises(CheckpointError, match="not deterministic"):
        env.load_state_dict(env.state_dict())


def test_bad_ids_and_spaces_name_the_fix(coin: str) -> None:
    with pytest.raises(ConfigError, match=r"did you mean 'Pendulum-v1'"):
        GymnasiumEnv("Pendulun-v1")
    with pytest.raises(ConfigError, match="flatten=true"):
        GymnasiumEnv("FrozenLake-v1")
    with pytest.raises(ConfigError, match="max_episode_steps"):
        GymnasiumEnv(coin)
    with pytest.raises(ConfigError, match="chunks of length 1"):
        ActionChunk(GymnasiumEnv("Pendulum-v1"), 2).inner.advance(torch.zeros(1, 1), torch.tensor([False]))
    assert GymnasiumEnv("FrozenLake-v1", flatten=True).reset_batch().tolist() == [[1.0] + [0.0] * 15]
