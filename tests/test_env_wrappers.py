"""env.frame_stack, env.action_repeat and env.chunk around any control environment."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from gymnasium.wrappers import FrameStackObservation
from run_cases import ALLOW
from tensordict import TensorDict

import unified_rl as ur
from unified_rl.config import build, compose
from unified_rl.envs.control import ActionChunk, ActionRepeat, FrameStack, GymnasiumEnv
from unified_rl.errors import ConfigError
from unified_rl.protocols import Demonstrates
from unified_rl.wrapping import Wrapping, wrap

SMALL: dict[str, Any] = {
    "env": "pendulum",
    "agent": "ppo",
    "policy.hidden": [8],
    "agent.critic_hidden": [8],
    "rollout.num_envs": 2,
    "rollout.horizon": 8,
    "eval_episodes": 2,
    "eval_every": 0,
}


def pendulum(count: int = 2, limit: int = 7) -> GymnasiumEnv:
    return GymnasiumEnv("Pendulum-v1", num_envs=count, max_episode_steps=limit)


def test_a_history_is_that_of_gymnasium() -> None:
    env = FrameStack(pendulum(1), 3)
    theirs = FrameStackObservation(pendulum(1)._pool.copies[0].env, 3)
    assert env.space.observation.shape == (9,)
    env.reset_batch(seed=4)
    first, _ = theirs.reset(seed=int(env.inner._seeds[0]))
    torch.testing.assert_close(env.current_observation()[0], torch.as_tensor(first).flatten())
    for t in range(6):
        action = torch.tensor([[0.3 * t - 1.0]])
        step = env.step_batch(action)
        seen, reward, *_ = theirs.step(action[0].numpy())
        torch.testing.assert_close(step.next_observation[0], torch.as_tensor(seen).flatten())
        assert float(step.reward[0]) == pytest.approx(float(reward), rel=1e-5)


def test_histories_stand_still_with_their_simulation_and_begin_anew() -> None:
    env = FrameStack(pendulum(), 2)
    env.reset_batch(seed=0)
    before = env.current_observation()
    env.advance(torch.zeros(2, 1), torch.tensor([True, False]))
    after = env.current_observation()
    assert torch.equal(after[1], before[1])
    assert torch.equal(after[0, :3], before[0, 3:]) and not torch.equal(after[0, 3:], before[0, 3:])
    fresh = env.restart(torch.tensor([True, False]))
    assert torch.equal(fresh[0, :3], fresh[0, 3:]) and torch.equal(env.current_observation()[1], before[1])
    assert torch.equal(env.current_observation()[0], fresh[0])
    state = env.state_dict()
    env.step_batch(torch.ones(2, 1))
    moved = env.current_observation()
    env.load_state_dict(state)
    env.step_batch(torch.ones(2, 1))
    assert torch.equal(env.current_observation(), moved)


def test_a_repeated_action_is_a_chunk_of_equal_ones_cut_at_the_end() -> None:
    repeat, plain = ActionRepeat(pendulum(), 3, gamma=0.9), pendulum()
    repeat.reset_batch(seed=1), plain.reset_batch(seed=1)
    for executed in (3, 3, 1):  # seven steps an episode
        step = repeat.advance(torch.tensor([[0.5], [-1.0]]))
        singles = [plain.advance(torch.tensor([[0.5], [-1.0]])) for _ in range(executed)]
        reward = sum(0.9**i * one.reward for i, one in enumerate(singles))
        torch.testing.assert_close(step.reward, reward)
        torch.testing.assert_close(step.plain_reward, sum(one.reward for one in singles))
        assert torch.equal(step.next_observation, singles[-1].next_observation)
        assert step.executed.tolist() == [executed] * 2
    assert step.truncated.all() and repeat.max_steps == 3 and repeat.steps_per_action == 3


def test_a_run_says_them_of_its_environment() -> None:
    options = {"env.action_repeat": 2, "env.frame_stack": 3, "env.chunk": 2, "agent.gamma": 0.9}
    run = ur.assemble(**{**SMALL, **options}, steps=128)
    chunk = run.env
    assert isinstance(chunk, ActionChunk) and isinstance(chunk.inner, FrameStack)
    assert isinstance(chunk.inner.inner, ActionRepeat)
    assert chunk.gamma == chunk.inner.inner.gamma == 0.9
    assert run.policy.observation_dim == 9 and run.policy.action_dim == 2
    rows = run.run()
    assert run.steps == 128 and rows[-1]["eval/length"] == 200  # both in steps of the environment inside
    made = ur.make_env("pendulum", frame_stack=2, num_envs=3)
    assert made.current_observation().shape == (3, 6)


class Shown(GymnasiumEnv):
    """With an expert of single steps."""

    def demonstrations(self, count: int, generator: torch.Generator) -> TensorDict:
        return TensorDict({"observation": torch.zeros(count, 3), "action": torch.zeros(count, 1)}, batch_size=[count])


def test_an_expert_of_single_steps_is_none_of_histories_and_plans() -> None:
    env = Shown("Pendulum-v1")
    assert isinstance(env, Demonstrates)
    for option in ("action_repeat", "frame_stack", "chunk"):
        around = wrap(env, Wrapping(**{option: 2}), build, 0.9)
        assert not isinstance(around, Demonstrates) and around.inner is env


@pytest.mark.parametrize("option", ["env.action_repeat", "env.frame_stack", "env.chunk"])
def test_a_run_in_one_is_resumed_bit_for_bit(option: str, tmp_path: Path) -> None:
    settings = {**SMALL, option: 2}
    whole = ur.assemble(**settings, updates=4, folder=tmp_path / "whole")
    whole.run()
    first = ur.assemble(**settings, updates=4, folder=tmp_path / "part")
    for _ in range(2):
        first.update()
    first.save()
    again = ur.assemble(**settings, updates=4, folder=tmp_path / "part", resume_existing=True)
    again.update(), again.update()
    for a, b in zip(whole.policy.parameters(), again.policy.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["env=chain_mod", "env.frame_stack=2"], "frame_stack"),
        (["env=pendulum", "agent=ppo", "env.frame_stack=0"], r"env\.frame_stack"),
        (["env=pendulum", "agent=ppo", "env.frame_stak=2"], "frame_stack"),
    ],
)
def test_what_does_not_fit_is_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        compose(overrides, allow=ALLOW)
