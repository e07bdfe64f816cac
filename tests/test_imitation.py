"""Imitation of recorded steps: windows of them, episodes held out, averaged weights, and what comes after it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tensordict import TensorDict

import unified_rl as ur
from unified_rl.agents.behavior_cloning import BehaviorCloning
from unified_rl.config import compose
from unified_rl.errors import ConfigError
from unified_rl.policies.gaussian import GaussianPolicy
from unified_rl.replay import Replay, Uniform
from unified_rl.rollout.windows import held_out, windowed
from unified_rl.training.build import Job
from unified_rl.training.settings import check_early_stopping, check_keep_best

CLASSES = ("gaussian", "tanh_gaussian", "flow", "diffusion", "autoregressive")
SMALL: dict[str, Any] = {
    "env": "pendulum",
    "agent": "behavior_cloning",
    "policy.hidden": [16, 16],
    "eval_episodes": 2,
    "eval_every": 0,
    "rollout.rows": 64,
}


def steps(lengths: tuple[int, ...] = (3, 2), order: tuple[int, ...] | None = None) -> TensorDict:
    """Observation 10 * episode + step, action its negative."""
    episode = torch.cat([torch.full((n,), e) for e, n in enumerate(lengths)])
    step = torch.cat([torch.arange(n) for n in lengths])
    number = (10.0 * episode + step).unsqueeze(-1)
    columns = {"observation": number, "action": -number, "episode": episode, "step": step}
    rows = TensorDict(columns, batch_size=[len(episode)])
    return rows if order is None else rows[torch.tensor(order)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Thirty episodes of a pendulum, each step pushed against its angular velocity."""
    g = torch.Generator().manual_seed(0)
    angle, speed = 3 * torch.randn(600, generator=g), 4 * torch.randn(600, generator=g)
    action = (-0.25 * speed - 0.5 * angle.sin()).clamp(-2, 2)
    observation = torch.stack([angle.cos(), angle.sin(), speed], -1)
    episode, step = torch.arange(600) // 20, torch.arange(600) % 20
    replay = Replay(600, sampler=Uniform())
    replay.extend({"observation": observation, "action": action.unsqueeze(-1), "episode": episode, "step": step})
    out = tmp_path_factory.mktemp("rows") / "demos"
    replay.dumps(out)
    return str(out)


def test_windows_stay_within_their_episode() -> None:
    for rows in (steps(), steps(order=(4, 1, 0, 3, 2))):
        out = windowed(rows, 2, 3, (2, 3), "x")
        at = rows["observation"].flatten().argsort()
        assert out["observation"][at].tolist() == [[0, 0], [0, 1], [1, 2], [10, 10], [10, 11]]
        wanted = [[0, -1, -2], [-1, -2, -2], [-2, -2, -2], [-10, -11, -11], [-11, -11, -11]]
        assert out["action"][at].tolist() == wanted
    assert windowed(steps(), 2, 3, (1, 1), "x") is not None  # rows of the wanted widths stay as they are
    assert torch.equal(windowed(steps(), 2, 3, (1, 1), "x")["action"], steps()["action"])


def test_a_next_observation_is_the_history_one_step_on() -> None:
    rows = steps()
    rows["next_observation"], rows["reward"] = rows["observation"] + 1, torch.ones(5)
    out = windowed(rows, 2, 1, (2, 1), "x")
    assert out["next_observation"].tolist() == [[0, 1], [1, 2], [2, 3], [10, 11], [11, 12]]
    with pytest.raises(ConfigError, match=r"rewards of single steps.*set env\.chunk=1"):
        windowed(rows, 1, 2, (1, 2), "rollout.data=x")
    with pytest.raises(ConfigError, match="tell no episodes"):
        windowed(steps().exclude("episode"), 2, 1, (2, 1), "rollout.data=x")


def test_whole_episodes_are_held_out() -> None:
    rows = steps((4,) * 10)
    train, apart = held_out(rows, 0.3, torch.Generator().manual_seed(0), "x")
    assert len(apart["episode"].unique()) == 3 and len(train["episode"].unique()) == 7
    assert not set(train["episode"].tolist()) & set(apart["episode"].tolist()) and len(train) + len(apart) == 40
    with pytest.raises(ConfigError, match="one alone"):
        held_out(steps((4,)), 0.5, torch.Generator(), "x")


@pytest.mark.parametrize("name", CLASSES)
def test_every_class_imitates_histories_and_plans(name: str, folder: str) -> None:
    options = {"env.frame_stack": 2, "env.chunk": 3, "agent.ema": 0.9, "rollout.validation": 0.2, "agent.lr": 3e-3}
    run = ur.assemble(**SMALL, **options, policy=name, updates=40, **{"rollout.data": folder})
    assert run.policy.observation_dim == 6 and run.policy.action_dim == 3
    rows = run.run()
    assert rows[-1]["eval/nll"] < rows[0]["eval/nll"]
    held = run.rollout.held_out
    assert len(held) == 120 and len(run.rollout.pool) == 480
    assert float(run.policy.normalizer.count) == 600  # moments of the whole data set


def test_moments_of_pretrained_weights_stay_and_ones_of_the_users_own_are_told(folder: str) -> None:
    settings = {**SMALL, "rollout.data": folder, "policy": "gaussian", "updates": 1}
    fresh, pretrained = ur.assemble(**settings), ur.assemble(**settings)
    pretrained.policy.update_normalizer(torch.ones(7, 3))
    fresh.update(), pretrained.update()
    assert [float(run.policy.normalizer.count) for run in (fresh, pretrained)] == [600.0, 7.0]
    told: list[torch.Tensor] = []
    own = ur.assemble(**{**settings, "policy.normalize_observation": False})
    own.policy.update_normalizer = told.append
    own.update()
    assert len(told[0]) == 600


def test_the_held_out_loss_is_the_same_of_the_same_weights(folder: str) -> None:
    still = {"agent.lr": 0.0, "rollout.validation": 0.1, "rollout.data": folder, "eval_every": 64}
    run = ur.assemble(**{**SMALL, **still}, policy="flow", updates=4)
    found = {row["eval/nll"] for row in run.run() if "eval/nll" in row and row["update"] > 0}
    assert len(found) == 1
    control = ur.assemble(**{**SMALL, **still, "agent.lr": 1e-2}, policy="flow", updates=4)
    assert len({row["eval/nll"] for row in control.run() if "eval/nll" in row and row["update"] > 0}) > 1


def test_the_best_of_a_loss_is_the_smallest(folder: str, tmp_path: Path) -> None:
    assert check_keep_best("eval/nll")["mode"] == check_early_stopping({"metric": "loss/nll"})["mode"] == "min"
    assert check_keep_best("eval/score")["mode"] == check_keep_best({"metric": "eval/nll", "mode": "max"})["mode"]
    options = {"rollout.validation": 0.1, "rollout.data": folder, "eval_every": 64, "keep_best": "eval/nll"}
    run = ur.assemble(**{**SMALL, **options}, policy="gaussian", updates=6, folder=tmp_path)
    rows = [row for row in run.run() if "eval/nll" in row]
    assert run.trainer.watch.best.value == min(row["eval/nll"] for row in rows)


def test_averaged_weights_are_those_of_the_formula() -> None:
    bounds: dict[str, Any] = {"observation_dim": 1, "action_dim": 1, "action_low": [-50.0], "action_high": [50.0]}
    policy = GaussianPolicy(**bounds, hidden=(4,), seed=1)
    agent = BehaviorCloning(policy, torch.Generator(), rows=5, ema=0.15, lr=0.1)
    average = [p.detach().clone() for p in policy.parameters()]
    for step in range(1, 4):
        agent.step(steps())
        decay = min(0.15, (1 + step) / (10 + step))
        for kept, live in zip(average, agent.live.parameters(), strict=True):
            kept.lerp_(live.detach(), 1 - decay)
    for kept, mine, live in zip(average, policy.parameters(), agent.live.parameters(), strict=True):
        torch.testing.assert_close(mine.detach(), kept)
        assert not torch.equal(mine, live)


def test_an_averaged_run_is_resumed_bit_for_bit(folder: str, tmp_path: Path) -> None:
    settings = {**SMALL, "agent.ema": 0.99, "rollout.data": folder, "rollout.validation": 0.1, "policy": "diffusion"}
    whole = ur.assemble(**settings, updates=4, folder=tmp_path / "whole")
    whole.run()
    first = ur.assemble(**settings, updates=4, folder=tmp_path / "part")
    first.update(), first.update()
    first.save()
    again = ur.assemble(**settings, updates=4, folder=tmp_path / "part", resume_existing=True)
    again.update(), again.update()
    for a, b in ((whole.policy, again.policy), (whole.agent.live, again.agent.live)):
        assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
    assert torch.equal(whole.rollout.held_out["observation"], again.rollout.held_out["observation"])
    left = ur.load_policy(tmp_path / "whole")
    assert all(torch.equal(x, y) for x, y in zip(left.parameters(), whole.policy.parameters(), strict=True))


@pytest.mark.parametrize("name", ["flow", "diffusion"])
def test_a_clone_with_a_frozen_prefix_scores_as_one_without(name: str, folder: str, tmp_path: Path) -> None:
    sized = {**SMALL, "rollout.data": folder, "policy": name, "policy.steps": 6, "agent.lr": 3e-3}
    plain, cut = ({**sized, **more} for more in ({}, {"policy.trained_steps": 2}))
    scores = []
    for number, settings in enumerate((plain, cut)):
        run = ur.assemble(**settings, updates=10, folder=tmp_path / str(number))
        scores.append(run.run()[-1]["eval/score"])
    assert scores[0] == scores[1]  # imitation trains every step
    tuned = {**SMALL, "agent": "ppo", "policy": name, "policy.steps": 6, "policy.trained_steps": 2, "updates": 2}
    del tuned["rollout.rows"]
    start = {"name": "from_run", "run": str(tmp_path / "1")}
    more = {"rollout.num_envs": 2, "rollout.horizon": 4, "agent.critic_hidden": [4]}
    after = ur.assemble(**tuned, warm_start=start, **more)
    assert after.evaluate()["eval/score"] == scores[0]
    after.run()
    own = dict(after.policy.named_parameters())
    assert bool(after.policy.prefix_frozen)
    assert not torch.equal(own["network.first.weight"], own["frozen.first.weight"])  # only the prefix stayed


def test_a_warm_start_hands_on_averaged_weights() -> None:
    stage = ["warm_start=demonstrations", "warm_start.stages=[{updates: 3, lr: 0.1}]", "warm_start.dataset=64"]
    run = ["env=two_route", "policy=gaussian", "policy.hidden=[8]", "agent=ppo", *stage]
    weights = []
    for more in ([], ["warm_start.ema=0.99"]):
        job = Job(compose([*run, *more]))
        before = next(job.policy.parameters()).detach().clone()
        job.warm_start(lambda *progress: None)
        weights.append((next(job.policy.parameters()) - before).abs().max())
    assert 0 < weights[1] < weights[0]  # the first averages hold the initial weights back


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"env": "two_route", "rollout.validation": 0.1}, r"holds out episodes of a robot's rollout\.data"),
        ({"recipe": "iql", "rollout.validation": 0.1, "agent": None}, "is of imitation"),
    ],
)
def test_a_validation_without_effect_is_refused(options: dict[str, Any], message: str, folder: str) -> None:
    settings = {**SMALL, "steps": 64, **({} if "env" in options else {"rollout.data": folder}), **options}
    with pytest.raises(ConfigError, match=message):
        ur.assemble(**{key: value for key, value in settings.items() if value is not None})


def test_averages_are_of_control_policies() -> None:
    tiny = ["env=chain_mod", "policy=causal_lm_tiny", "agent=sft", "agent.ema=0.9", "steps=64"]
    with pytest.raises(ConfigError, match=r"agent\.ema=0\.9 averages the weights of control policies"):
        Job(compose(tiny)).make_trainer(Path("nowhere"))
