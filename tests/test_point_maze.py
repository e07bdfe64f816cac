"""The point maze: its ways and rewards by hand, an expert that always arrives, walls that hold, sets of data."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torchrl.envs.utils import check_env_specs

import unified_rl as ur
from unified_rl.envs.control import PointMazeEnv
from unified_rl.envs.control.point_maze import GOAL_RADIUS, MAZES, expert, plan_of
from unified_rl.errors import ConfigError
from unified_rl.protocols import ControlEnv


def placed(env: PointMazeEnv, *states: tuple[float, float, float, float]) -> torch.Tensor:
    """Puts points and goals where they are told, at rest."""
    qpos = np.array(states)
    return env.restart_at(np.arange(len(qpos)), qpos, np.zeros_like(qpos))


def test_the_way_around_the_walls_is_that_of_a_ruler() -> None:
    plan = plan_of("umaze")  # cells in x: -1, 0, 1; in y: 1 above, 0 (only at x = 1), -1 below
    place = np.array([[-1.0, 1.0], [-1.2, 1.0], [0.9, 0.8], [1.0, 0.0], [-1.0, -1.0]])
    goal = np.array([[-1.0, -1.0], [-1.0, -1.1], [1.0, 0.0], [0.0, -1.0], [-0.8, -1.0]])
    np.testing.assert_allclose(
        plan.left(place, goal), [6.0, 1.2 + 4 + np.hypot(1.0, 0.1), np.hypot(0.1, 0.8), 1 + 1, 0.2], atol=1e-12
    )
    np.testing.assert_allclose(plan.ahead(place, goal)[:3], [[0.0, 1.0], [0.0, 1.0], [1.0, 0.0]])
    assert np.array_equal(plan.steps, plan.steps.T) and plan.steps.max() == 6


def test_rewards_by_hand() -> None:
    still = torch.zeros(2, 2)
    states = ((-1.0, 1.0, -1.0, -1.0), (0.1, -1.0, 0.0, -1.0))
    rewards = {"sparse": [0.0, 1.0], "dense": [np.exp(-2.0), np.exp(-0.1)], "path": [0.0, 1.0]}
    for reward, expected in rewards.items():
        env = PointMazeEnv(2, reward=reward)
        placed(env, *states)
        step = env.advance(still)
        np.testing.assert_allclose(step.reward, expected, atol=1e-6, err_msg=reward)
        assert step.terminated.tolist() == step.info["success"].tolist() == [False, True]
    env = PointMazeEnv(1)
    placed(env, (-1.0, 1.0, -1.0, -1.0))
    step = env.advance(torch.tensor([[1.0, 0.0]]))
    assert float(step.reward) == pytest.approx(float(step.observation[0, 0]) + 1.0, abs=1e-6), "what was gone"
    assert step.observation[0, 4:].tolist() == [-1.0, -1.0], "the goal stays"


@pytest.mark.parametrize("maze", list(MAZES))
def test_the_expert_arrives_in_every_maze_and_its_return_is_the_way(maze: str) -> None:
    env = PointMazeEnv(24, seed=3, maze=maze, max_steps=400)  # type: ignore[arg-type]
    way = plan_of(maze).left(env.observation64[:, :2], env.observation64[:, 4:])
    running, total = torch.ones(24, dtype=torch.bool), np.zeros(24)
    for _ in range(400):
        step = env.advance(torch.from_numpy(expert(env.observation64, maze).astype(np.float32)), running)
        total += np.where(running, step.reward, 0.0)
        running &= ~step.terminated
        if not bool(running.any()):
            break
    assert not bool(running.any()) and way.min() > 0.4
    assert np.all(total > way + 1 - GOAL_RADIUS - 1e-5) and np.all(total < way + 1)


def test_walls_hold_and_starts_and_goals_are_free() -> None:
    env = PointMazeEnv(32, seed=1, maze="medium")
    stream, plan, rows = torch.Generator().manual_seed(0), plan_of("medium"), MAZES["medium"]
    push = torch.rand(32, 2, generator=stream) * 2 - 1
    for number in range(150):
        seen = env.observation64
        for x, y in np.concatenate((seen[:, :2], seen[:, 4:])):
            assert rows[int(len(rows) / 2 - y)][int(x + len(rows[0]) / 2)] == "."
        away = np.abs(seen[:, :2] - plan.middle[plan.at(seen[:, :2])])
        assert away.max() <= 0.5 and np.abs(seen[:, 2:4]).max() < 2.6
        if number % 15 == 0:
            push = torch.rand(32, 2, generator=stream) * 2 - 1
        env.step_batch(push.sign())


def test_it_meets_both_contracts_and_goes_on_where_it_was() -> None:
    env, other = PointMazeEnv(3, seed=1, max_steps=20), PointMazeEnv(3, seed=9, max_steps=20)
    assert isinstance(env, ControlEnv)
    check_env_specs(env, seed=0)
    env.reset_batch(seed=4)
    actions = torch.rand(60, 3, 2, generator=torch.Generator().manual_seed(0)) * 2 - 1
    for action in actions[:30]:
        env.step_batch(action)
    other.load_state_dict(env.state_dict())
    for action in actions[30:]:
        ours, theirs = env.step_batch(action), other.step_batch(action)
        assert torch.equal(ours.observation, theirs.observation) and torch.equal(ours.reward, theirs.reward)


def test_a_picture_shows_the_point_and_the_goal() -> None:
    env = PointMazeEnv(1)
    placed(env, (-1.0, 1.0, 1.0, -1.0))
    drawn = env.render_lane(0)
    assert drawn.shape == (200, 200, 3)
    assert drawn[60, 60].tolist() == [50, 90, 220] and drawn[140, 140].tolist() == [120, 205, 130], "up is y"
    assert drawn[100, 60].tolist() == [150, 150, 160], "the wall between"


def test_the_expert_can_be_cloned_and_sets_hold_success(tmp_path: Path) -> None:
    env = PointMazeEnv(2)
    pairs = env.demonstrations(300)
    assert pairs["observation"].shape == (300, 6) and float(pairs["action"].abs().max()) <= 1
    wanted = expert(pairs["observation"].double().numpy(), "umaze")
    assert np.abs(pairs["action"].numpy() - wanted).mean() < 0.1, "noise of 0.1, cut at the bounds"
    maze = {"env.maze": "open", "env.max_steps": 100}
    told = ur.data("make", "point_maze", "random", tmp_path / "rows", steps=1600, **maze)
    assert told["columns"]["success"] == ["bool", []] and 0 < told["success"] < 1
    assert told["success"] == told["episodes"]["terminated"] / told["episodes"]["whole"], "cut ones are not counted"
    assert told["about"]["made"] == "data make point_maze random env.max_steps=100 env.maze=open"
    assert ur.data("check", tmp_path / "rows", **{"env": "point_maze", "env.maze": "open"})["fits"]
    plain = ur.data("make", "inverted_pendulum", "random", tmp_path / "plain", steps=64)
    assert "success" not in plain["columns"] and plain["success"] is None


def test_a_run_s_own_maze_is_recorded_and_no_other(tmp_path: Path) -> None:
    """Its configuration has every default written out, and the command line has not."""
    words = ["env=point_maze", "policy.hidden=[8]", "agent=behavior_cloning", "rollout.rows=16", "steps=32"]
    run = ur.train([*words, "progress=false", "eval_every=0", "eval_episodes=1", f"run_dir={tmp_path / 'run'}"])
    told = ur.data("make", "point_maze", "expert", tmp_path / "rows", steps=64, policy=run.folder)
    assert told["rows"] == 64
    with pytest.raises(ur.ConfigError, match=r"maze=umaze .*, and env=point_maze is .*maze=medium"):
        ur.data("make", "point_maze", "expert", tmp_path / "no", steps=64, policy=run.folder, **{"env.maze": "medium"})


def test_rows_of_another_maze_are_told_by_what_the_set_says(tmp_path: Path) -> None:
    """The widths are equal, and so are the sizes of the numbers."""
    for maze in ("umaze", "medium"):
        ur.data("make", "point_maze", "random", tmp_path / maze, steps=32, **{"env.maze": maze})
    ours = ur.data("check", tmp_path / "medium", env="point_maze", **{"env.maze": "medium"})
    assert not any("recorded with" in one["text"] for one in ours["findings"])
    other = ur.data("check", tmp_path / "umaze", env="point_maze", **{"env.maze": "medium"})
    (told,) = [one for one in other["findings"] if "recorded with" in one["text"]]
    assert told["level"] == "warning" and other["fits"]
    assert "with maze=umaze (" in told["text"] and "dataset.json), and this environment has maze=medium" in told["text"]
    parts = {str(tmp_path / maze): 0.5 for maze in ("umaze", "medium")}
    with pytest.raises(ConfigError, match=r"--part .*umaze was recorded with maze=umaze .*, and env has maze=medium"):
        ur.data("make", "point_maze", "mixed", tmp_path / "mixed", parts=parts, **{"env.maze": "medium"})
    (tmp_path / "umaze" / "dataset.json").unlink()
    ur.data("make", "point_maze", "mixed", tmp_path / "mixed", parts=parts, **{"env.maze": "medium"})
