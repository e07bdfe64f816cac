"""Rewards by the running deviation of discounted returns, and PopArt: numbers, effect, resume, refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from agent_cases import LANES, control_agent, filled, gaussian, transitions
from tensordict import TensorDict
from torch import nn

import unified_rl as ur
from unified_rl.agents.return_scale import ReturnScale, RewardScale
from unified_rl.errors import ConfigError

SMALL: dict[str, Any] = {
    "env": "pendulum",
    "agent": "ppo",
    "policy.hidden": [8],
    "agent.critic_hidden": [8],
    "agent.epochs": 2,
    "rollout.num_envs": 4,
    "rollout.horizon": 16,
    "eval_episodes": 2,
    "eval_every": 0,
    "log_every": 64,
}


def collection(reward: torch.Tensor, episode: torch.Tensor, done: torch.Tensor) -> TensorDict:
    full = torch.ones_like(done)
    rows = {"reward": reward, "episode": episode, "terminated": done, "truncated": ~full, "step_mask": full}
    return TensorDict(rows | {"discount": torch.full_like(reward, 0.9)}, batch_size=[len(reward)])


def test_the_reward_scale_is_that_of_vec_normalize() -> None:
    from stable_baselines3.common.running_mean_std import RunningMeanStd

    g = torch.Generator().manual_seed(0)
    reward, done = torch.randn(3, 40, generator=g) * 7 + 2, torch.rand(3, 40, generator=g) < 0.2
    episode = torch.cat([torch.zeros(3, 1), done.long().cumsum(1)[:, :-1]], 1).long() * 3 + torch.arange(3)[:, None]
    theirs, running = RunningMeanStd(epsilon=0.0), np.zeros(3)
    for t in range(40):  # the loop of VecNormalize.step_wait
        running = running * 0.9 + reward[:, t].double().numpy()
        theirs.update(running)
        running[done[:, t].numpy()] = 0.0
    scale = RewardScale()
    for part in (slice(0, 7), slice(7, 23), slice(23, 40)):  # episodes go on from one collection to the next
        scale.observe(collection(reward[:, part], episode[:, part], done[:, part]))
    assert scale.moments.var == pytest.approx(float(theirs.var), rel=1e-6)
    assert scale.moments.mean == pytest.approx(float(theirs.mean), rel=1e-6)
    np.testing.assert_allclose(scale(reward).numpy(), reward.numpy() / np.sqrt(theirs.var + 1e-8), rtol=1e-5)
    assert float(scale(torch.tensor(1e9))) == 10.0


def test_values_stay_where_the_moments_of_returns_move() -> None:
    last = nn.Linear(5, 1)
    scale, x = ReturnScale(last), torch.randn(9, 5)
    before = scale.value(last(x))
    for size in (3.0, 400.0):
        scale.observe(torch.randn(64) * size + size)
        torch.testing.assert_close(scale.value(last(x)), before, atol=1e-3, rtol=1e-4)
        value = torch.randn(6) * size
        torch.testing.assert_close(scale.value(scale.output(value)), value)


@pytest.mark.parametrize("name", ["normalize_reward", "normalize_return"])
def test_the_critic_learns_numbers_of_size_one(name: str) -> None:
    policy = gaussian()
    rows = transitions(policy)
    rows["reward"] = 1000 * rows["reward"]
    plain, scaled = control_agent(policy), control_agent(policy, **{name: True})
    shown: list[TensorDict] = []
    scaled.watch = shown.append
    losses = [float(agent.update(filled(rows, LANES))["loss/value"]) for agent in (plain, scaled)]
    assert losses[1] < 5.0 < 1e4 < losses[0]
    torch.testing.assert_close(shown[0]["reward"], rows["reward"].T)  # rows keep their own


@pytest.mark.parametrize("name", ["normalize_reward", "normalize_return"])
def test_a_run_is_resumed_with_its_scale_bit_for_bit(name: str, tmp_path: Path) -> None:
    settings = {**SMALL, f"agent.{name}": True}
    whole = ur.assemble(**settings, steps=256, folder=tmp_path / "whole")
    rows = whole.run()
    assert rows[-1][f"train/{name.removeprefix('normalize_')}_std"] > 1.0
    first = ur.assemble(**settings, steps=256, folder=tmp_path / "part")
    for _ in range(2):
        first.update()
    first.save()
    again = ur.assemble(**settings, steps=256, folder=tmp_path / "part", resume_existing=True)
    for _ in range(2):
        again.update()
    for a, b in zip(whole.policy.parameters(), again.policy.parameters(), strict=True):
        assert torch.equal(a, b)
    mine, theirs = (run.agent.state_dict()["scales"] for run in (whole, again))
    assert mine == theirs


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"agent.normalize_reward": True, "replay": "uniform"}, "use replay=fresh"),
        ({"agent.normalize_reward": True, "agent.advantage": "group"}, r"agent\.normalize_reward scales what a critic"),
        ({"agent.normalize_return": True, "agent.advantage": "group"}, r"agent\.normalize_return scales what a critic"),
        ({"agent": "sac", "agent.normalize_reward": True}, "normalize_reward"),
    ],
)
def test_a_scale_without_effect_is_refused(settings: dict[str, Any], message: str) -> None:
    small = {key: value for key, value in SMALL.items() if key != "agent.epochs" or settings.get("agent") != "sac"}
    with pytest.raises(ConfigError, match=message):
        ur.assemble(**{**small, **settings}, steps=128)
