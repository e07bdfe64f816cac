"""Hindsight experience replay: whose goal a row gets, what it is worth then, and who may use it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from tensordict import TensorDict

import unified_rl as ur
from unified_rl.envs.control import GymnasiumEnv, PointMazeEnv
from unified_rl.envs.control.goals import goals_of
from unified_rl.errors import ConfigError, RecordError
from unified_rl.protocols import Goals
from unified_rl.replay import HindsightReplay, Uniform

ID = "GoalPoint-v0"
SMALL: dict[str, Any] = {
    "env": "gymnasium",
    "env.id": ID,
    "env.flatten": True,
    "agent": "sac",
    "replay": "her",
    "replay.capacity": 4096,
    "policy.hidden": [8],
    "agent.critic_hidden": [8],
    "agent.batch_size": 16,
    "agent.learning_starts": 8,
    "rollout.num_envs": 2,
    "rollout.horizon": 8,
    "rollout.random_steps": 0,
    "agent.updates_per_step": 0.25,
    "eval_episodes": 2,
    "eval_every": 0,
}


class GoalPoint(gymnasium.Env):  # type: ignore[type-arg]
    """A point on a line moves by its action; reward 0 within 0.1 of the goal, else -1."""

    def __init__(self, shaped: bool = False, ends: bool = False) -> None:
        goal = gymnasium.spaces.Box(-3.0, 3.0, (1,), np.float32)
        spaces = {"observation": gymnasium.spaces.Box(-9.0, 9.0, (2,), np.float32)}
        self.observation_space = gymnasium.spaces.Dict({**spaces, "achieved_goal": goal, "desired_goal": goal})
        self.action_space = gymnasium.spaces.Box(-1.0, 1.0, (1,), np.float32)
        self.shaped = shaped
        if ends:
            self.compute_terminated = lambda achieved, desired, info: np.abs(achieved - desired)[..., 0] < 0.1

    def compute_reward(self, achieved: Any, desired: Any, info: Any) -> Any:
        return -(np.abs(achieved - desired)[..., 0] >= 0.1).astype(np.float32)

    def _seen(self) -> dict[str, Any]:
        at = np.array([self.x], np.float32)
        return {
            "observation": np.array([self.x, self.t], np.float32),
            "achieved_goal": at,
            "desired_goal": self.goal.copy(),
        }

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.x, self.t = 0.0, 0.0
        self.goal = self.np_random.uniform(-1, 1, 1).astype(np.float32)
        return self._seen(), {}

    def step(self, action: Any) -> Any:
        self.x, self.t = float(np.clip(self.x + 0.3 * action[0], -2.9, 2.9)), self.t + 1
        seen = self._seen()
        reward = float(self.compute_reward(seen["achieved_goal"], seen["desired_goal"], {})) - self.shaped
        return seen, reward, False, False, {}


@pytest.fixture(autouse=True)
def registered() -> None:
    if ID not in gymnasium.registry:
        gymnasium.register(ID, entry_point=f"{__name__}:GoalPoint", max_episode_steps=8)


GOALS = Goals(torch.tensor([0]), torch.tensor([1]), lambda a, d: -(a != d).float().squeeze(-1))


def numbered(strategy: Any = "future", capacity: int = 24, slots: int = 9, **more: Any) -> HindsightReplay:
    """Two lanes of episodes of four steps; a row's next observation achieved ``100 lane + 10 episode + step``."""
    replay = HindsightReplay(capacity, k=3, strategy=strategy, lanes=2, sampler=Uniform(), **more)
    replay.goals = GOALS
    t, lane = torch.arange(slots).unsqueeze(-1), torch.arange(2).expand(slots, 2)
    number = (100 * lane + 10 * (t // 4) + t % 4).float()
    rows = {"observation": torch.stack([number - 0.5, 0 * number - 1], -1)}
    rows["next_observation"] = torch.stack([number, 0 * number - 1], -1)
    rows |= {"reward": -torch.ones(slots, 2), "terminated": torch.zeros(slots, 2, dtype=torch.bool)}
    whole = TensorDict({**rows, "episode": 2 * (t // 4) + lane}, batch_size=[slots, 2])
    for part in whole.split(8):
        replay.extend(part)
    return replay


@pytest.mark.parametrize(("capacity", "slots"), [(24, 9), (24, 12), (16, 15)])
@pytest.mark.parametrize("strategy", ["future", "final"])
def test_goals_are_of_the_rest_of_the_same_episode(strategy: str, capacity: int, slots: int) -> None:
    rows = numbered(strategy, capacity, slots).sample(4000)
    own, goal = rows["next_observation"].unbind(-1)
    assert torch.equal(rows["observation"][:, 1], goal)  # both observations tell it
    kept = goal == -1
    assert abs(float(kept.float().mean()) - 0.25) < 0.03
    assert (rows["reward"][kept] == -1).all()
    own, goal, reward = own[~kept], goal[~kept], rows["reward"][~kept]
    assert torch.equal((own // 10), (goal // 10)) and bool((goal >= own).all())
    assert torch.equal(reward, torch.where(own == goal, 0.0, -1.0))
    last = torch.where(own % 100 // 10 == (slots - 1) // 4, (slots - 1) % 4, 3).float()
    if strategy == "final":
        assert torch.equal(goal % 10, last)
    else:
        first = own % 10 == 0
        counts = torch.bincount((goal % 10)[first & (last == 3)].long(), minlength=4).float()
        assert float((counts / counts.sum() - 0.25).abs().max()) < 0.08  # each as often


def test_only_what_was_asked_for_comes_and_the_stream_survives_a_copy(tmp_path: Path) -> None:
    replay = numbered()
    rows = replay.sample(5, keys=["observation"])
    assert set(rows.keys()) == {"observation", "index"}
    replay.dumps(tmp_path)
    again = HindsightReplay(24, k=3, lanes=2, sampler=Uniform())
    again.loads(tmp_path)
    again.goals = GOALS
    for _ in range(3):
        a, b = replay.sample(50), again.sample(50)
        assert torch.equal(a["observation"], b["observation"]) and torch.equal(a["reward"], b["reward"])
    with pytest.raises(RecordError, match="single rows"):
        replay.sample(4, length=2)


def test_goals_are_found_in_a_flat_observation() -> None:
    goals = GymnasiumEnv(ID, flatten=True).goals
    assert goals is not None and goals.achieved.tolist() == [0] and goals.desired.tolist() == [1]
    assert goals.reward(torch.tensor([[0.0], [1.0]]), torch.tensor([[0.05], [0.0]])).tolist() == [0.0, -1.0]
    assert goals.terminated is None
    ends = GymnasiumEnv(ID, flatten=True, make_kwargs={"ends": True}).goals
    assert ends is not None and ends.terminated is not None
    assert ends.terminated(torch.tensor([[0.0], [1.0]]), torch.zeros(2, 1)).tolist() == [True, False]
    assert GymnasiumEnv("Pendulum-v1").goals is None


def test_answers_for_one_row_are_asked_for_row_by_row() -> None:
    class OneAnswer(GoalPoint):
        def compute_terminated(self, achieved: Any, desired: Any, info: Any) -> bool:
            return bool(np.linalg.norm(achieved - desired) < 0.1)

    goals = goals_of(OneAnswer())
    assert goals is not None and goals.terminated is not None
    places = torch.tensor([[0.0], [1.0], [2.0]])
    assert goals.terminated(places, torch.tensor([[0.0], [0.0], [2.05]])).tolist() == [True, False, True]
    assert goals.terminated(places[:1], places[:1]).tolist() == [True]


def test_rows_of_bytes_have_no_goals() -> None:
    class Seeing(GoalPoint):
        def __init__(self) -> None:
            super().__init__()
            image = gymnasium.spaces.Box(0, 255, (8, 8, 3), np.uint8)
            self.observation_space = gymnasium.spaces.Dict({**self.observation_space.spaces, "camera": image})

        def _seen(self) -> dict[str, Any]:
            return {**super()._seen(), "camera": np.zeros((8, 8, 3), np.uint8)}

    assert GymnasiumEnv(make=Seeing, num_envs=1, max_episode_steps=5).goals is None
    assert GymnasiumEnv(make=GoalPoint, num_envs=1, max_episode_steps=5).goals is not None


@pytest.mark.parametrize("reward", ["sparse", "dense"])
def test_goals_of_mazes_are_worth_what_a_step_pays(reward: Any) -> None:
    env, g = PointMazeEnv(16, seed=3, maze="open", reward=reward, max_steps=40), torch.Generator().manual_seed(0)
    goals, ended = env.goals, 0
    assert goals is not None and goals.terminated is not None
    for _ in range(60):
        step = env.step_batch(2 * torch.rand(16, 2, generator=g) - 1)
        places = step.next_observation[:, goals.achieved], step.next_observation[:, goals.desired]
        torch.testing.assert_close(goals.reward(*places), step.reward, atol=1e-5, rtol=0)
        assert torch.equal(goals.terminated(*places), step.terminated)
        ended += int(step.terminated.sum())
    assert ended > 0
    assert PointMazeEnv(reward="path").goals is None


def test_a_run_learns_from_other_goals_and_is_resumed_bit_for_bit(tmp_path: Path) -> None:
    whole = ur.assemble(**SMALL, updates=6, folder=tmp_path / "whole")
    rows = whole.run()
    assert "loss/critic" in rows[-1]
    drawn, stored = (x["reward"] == 0 for x in (whole.replay.sample(200), whole.replay.storage[:]))
    assert float(drawn.float().mean()) > 0.15 > float(stored.float().mean())
    first = ur.assemble(**SMALL, updates=6, folder=tmp_path / "part")
    for _ in range(3):
        first.update()
    first.save()
    again = ur.assemble(**SMALL, updates=6, folder=tmp_path / "part", resume_existing=True)
    for _ in range(3):
        again.update()
    assert all(torch.equal(a, b) for a, b in zip(whole.policy.parameters(), again.policy.parameters(), strict=True))


def test_rewards_that_nobody_can_compute_are_refused() -> None:
    run = ur.assemble(**SMALL, **{"env.make_kwargs": {"shaped": True}}, updates=4)
    with pytest.raises(ConfigError, match=r"computes rewards anew by compute_reward, which gives -1 where .* gave -2"):
        run.run()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"env": "pendulum", "env.id": None, "env.flatten": None}, "needs observations with achieved_goal"),
        ({"env.chunk": 2}, r"none of env\.frame_stack, env\.action_repeat, env\.chunk"),
        ({"agent.n_step": 2}, "single rows, which have no windows of 2 steps"),
        ({"replay.sampler": {"_target_": "unified_rl.replay.Priority"}}, "single rows, which have no priorities"),
    ],
)
def test_who_cannot_use_it_is_told(changed: dict[str, Any], message: str) -> None:
    settings = {key: value for key, value in {**SMALL, **changed}.items() if value is not None}
    with pytest.raises(ConfigError, match=message):
        ur.assemble(**settings, updates=2)


def test_other_agents_refuse_it() -> None:
    few = {key: value for key, value in SMALL.items() if key in ("env", "env.id", "env.flatten", "replay")}
    with pytest.raises(ConfigError, match="replay=her exchanges goals, and agent=ppo learns from"):
        ur.assemble(**{**few, "agent": "ppo"}, updates=2)
