"""IQL, TD3+BC and RLPD: run by name on recorded data, and equal to simpler methods in the limit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from run_cases import merged
from tensordict import TensorDict
from test_resume import COMMON, cut_run, equal, rows_of
from value_cases import IQL, batch_of, filled, make, squashed, transitions, weights

from unified_rl.agents.actor_critic import ActorCritic
from unified_rl.config import build, compose, config_root
from unified_rl.errors import ConfigError
from unified_rl.replay import Replay, Uniform, WithDataset
from unified_rl.training.checkpoint import checkpoints, read_checkpoint
from unified_rl.training.run import Job, evaluate_run, resume, train

TINY = ["env=inverted_pendulum", "policy.hidden=[8]", "agent.critic_hidden=[8]", "seed=1", "eval_episodes=2"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Rows of a short SAC run, recorded as a user records them."""
    folder = tmp_path_factory.mktemp("recorded")
    small = ["agent=sac", "agent.learning_starts=8", "agent.batch_size=8", "rollout.random_steps=8", "steps=12"]
    run = train(compose([*TINY, *small, f"run_dir={folder / 'run'}"]), progress=False)
    evaluate_run(str(run), record=str(folder / "rows"))
    return str(folder / "rows")


def part_of_recipe(name: str, *overrides: str, **options: Any) -> ActorCritic:
    """The agent of a recipe as a run builds it, around a small policy of the toy transitions."""
    node = compose(["env=inverted_pendulum", f"recipe={name}", "steps=8", *overrides])["agent"]
    sizes = {"critic_hidden": (16,), "learning_starts": 8, "batch_size": 16, "updates_per_step": 1.0}
    fixed = {"policy": squashed(), "generator": torch.Generator().manual_seed(0), "rows": 4, "length": 1}
    return build({**node, **sizes, **options}, **fixed)


# ---------------------------------------------------------------------------------------------- by name

RECIPES = {
    "iql": (["recipe=iql", "rollout.data={data}", "rollout.rows=16", "agent.learning_starts=16"], "loss/value"),
    "iql, flow": (["recipe=iql", "policy=flow", "rollout.data={data}", "agent.learning_starts=256"], "loss/value"),
    "iql, diffusion": (["recipe=iql", "policy=diffusion", "rollout.data={data}"], "policy/weight"),
    "td3_bc": (["recipe=td3_bc", "rollout.data={data}", "agent.updates_per_step=0.02"], "loss/policy"),
    "rlpd": (
        [
            "recipe=rlpd",
            "replay.data={data}",
            "agent.learning_starts=8",
            "rollout.random_steps=8",
            "agent.batch_size=8",
        ],
        "policy/entropy",
    ),
}


@pytest.mark.parametrize("name", list(RECIPES))
def test_a_recipe_runs_on_recorded_data(name: str, data: str, tmp_path: Path) -> None:
    overrides, metric = RECIPES[name]
    steps = "steps=16" if name == "rlpd" else "steps=1024"
    folder = train(
        compose([*TINY, *(o.format(data=data) for o in overrides), steps, "log_every=1", f"run_dir={tmp_path}"]),
        progress=False,
    )
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert any(metric in row for row in rows) and "eval/score" in rows[-1]


@pytest.mark.thorough
@pytest.mark.parametrize("name", list(RECIPES))
def test_a_recipe_resumes_bit_for_bit(name: str, data: str, tmp_path: Path) -> None:
    overrides = [o.format(data=data) for o in RECIPES[name][0]]
    words = merged(TINY, COMMON, overrides, ["checkpoint_every=1", f"run_dir={tmp_path / 'whole'}"])
    whole = train(compose([*words, "updates=12" if name == "rlpd" else "updates=6"]))
    saves = checkpoints(whole / "checkpoints")
    cut_run(whole, tmp_path / "part", saves[len(saves) // 2])
    resume(str(tmp_path / "part"))
    equal(read_checkpoint(saves[-1]), read_checkpoint(checkpoints(tmp_path / "part" / "checkpoints")[-1]))
    assert rows_of(tmp_path / "part") == rows_of(whole)


@pytest.mark.parametrize("recipe", ["iql", "td3_bc"])
def test_data_without_rewards_is_refused_by_name(recipe: str, tmp_path: Path) -> None:
    bare = Replay(64, sampler=Uniform())
    bare.extend(TensorDict({"observation": torch.zeros(64, 4), "action": torch.zeros(64, 1)}, [64]))
    bare.dumps(tmp_path / "bare")
    overrides = [*TINY, f"recipe={recipe}", f"rollout.data={tmp_path / 'bare'}", f"run_dir={tmp_path / 'run'}"]
    with pytest.raises(ConfigError, match=r"learns from reward, .*--record FOLDER.*behavior_cloning"):
        train(compose([*overrides, "steps=512"]), progress=False)


def test_a_data_set_beside_the_replay_needs_rewards_too(tmp_path: Path) -> None:
    bare = filled(transitions().exclude("reward"))
    bare.dumps(tmp_path / "bare")
    replay = WithDataset(64, data=str(tmp_path / "bare"), sampler=Uniform())
    replay.extend(transitions())
    with pytest.raises(ConfigError, match=r"learns from reward, which the rows of replay\.data lack"):
        make().update(replay)


# ---------------------------------------------------------------------------------------------- limits

SMALL = ["agent.learning_starts=8", "agent.batch_size=8", "agent.lr=1e-2", "steps=16"]


def trained(overrides: list[str], data: str, folder: Path) -> torch.Tensor:
    """The weights of policy and critics after some updates, and a look that they moved."""
    words = [*TINY, *overrides, *SMALL, *([] if "rollout.data=FOLDER" in overrides else ["rollout.random_steps=8"])]
    trainer = Job(compose([word.replace("FOLDER", data) for word in words])).make_trainer(folder)
    before = weights(trainer.agent.policy)
    for _ in range(12):
        trainer.replay.extend(trainer.rollout.collect(trainer.agent.version)[0])
        trainer.agent.update(trainer.replay)
    assert not torch.equal(before, weights(trainer.agent.policy))
    return weights(trainer.agent.policy, trainer.agent.nets.critic)


@pytest.mark.parametrize("name", ["iql", "td3_bc", "rlpd"])
def test_a_recipe_is_the_other_method_in_the_limit_that_its_file_names(name: str, data: str, tmp_path: Path) -> None:
    (limit,) = yaml.safe_load((config_root() / "recipe" / f"{name}.yaml").read_text())["recipe"]["limit"]
    one = trained([f"recipe={name}", *limit["when"]], data, tmp_path)
    assert torch.equal(one, trained(limit["equals"], data, tmp_path))


def gradient_of(loss: torch.Tensor, module: torch.nn.Module) -> torch.Tensor:
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(module.parameters()))])


def test_iql_with_beta_0_imitates_and_with_expectile_one_half_regresses() -> None:
    agent = part_of_recipe("iql", "agent.actor.policy.beta=0", "agent.value.tau=0.5")
    t, losses = batch_of(agent), agent.phases_of.losses()
    found = gradient_of(losses["actor"](t, (1.0,)), agent.policy)
    assert torch.equal(found, gradient_of(agent.policy.nll(batch_of(agent).batch).sum(-1).mean(), agent.policy))
    t = batch_of(agent)
    with torch.no_grad():
        q = agent.nets.target(t.batch["observation"], t.batch["action"]).amin(0)
    half = 0.5 * (agent.nets.value(t.batch["observation"]) - q).square().mean()  # type: ignore[misc]
    state_value = agent.nets.value
    assert state_value is not None
    torch.testing.assert_close(gradient_of(losses["value"](t, (1.0,)), state_value), gradient_of(half, state_value))


def test_iql_s_expectile_and_weights_by_hand() -> None:
    agent = part_of_recipe("iql")
    t = batch_of(agent)
    d = t.stored_q - t.value.detach()
    assert (d > 0).any() and (d < 0).any()
    want = torch.where(d > 0, 0.7 * d**2, 0.3 * d**2).mean()
    torch.testing.assert_close(agent.phases_of.losses()["value"](t, (1.0,)).detach(), want)
    weight = torch.exp(3.0 * d).clamp(max=100.0)
    nll = agent.policy.nll(t.batch).sum(-1)
    torch.testing.assert_close(agent.phases_of.losses()["actor"](t, (1.0,)), (weight * nll).mean())


def test_iql_s_state_value_bootstraps_its_critic() -> None:
    agent = part_of_recipe("iql")
    rows, t = transitions(), batch_of(agent)
    with torch.no_grad():
        following = agent.nets.value(rows["next_observation"])  # type: ignore[misc]
        want = torch.where(rows["terminated"], rows["reward"], rows["reward"] + 0.9 * following)
        torch.testing.assert_close(agent.phases_of.target(t), want)


def test_td3_bc_without_improvement_imitates_and_without_staying_is_td3() -> None:
    imitates = part_of_recipe("td3_bc", "agent.actor.improve.coefficient=0")
    scales = imitates.phases_of.scales(0.0, 0)["actor"]
    t = batch_of(imitates)
    mean, _ = imitates.policy.mean_and_log_std(t.batch["observation"])
    distance = (torch.tanh(mean) - t.batch["action"] / 2.0).square().mean()
    found = gradient_of(imitates.phases_of.losses()["actor"](t, scales), imitates.policy)
    torch.testing.assert_close(found, gradient_of(distance, imitates.policy))

    td3 = part_of_recipe("td3_bc", "agent.actor.stay=null", "agent.actor.improve.normalize=false",
                         "agent.actor.improve.coefficient=1")  # fmt: skip
    t = batch_of(td3)
    mean, _ = td3.policy.mean_and_log_std(t.batch["observation"])
    gain = td3.nets.critic(t.batch["observation"], 2.0 * torch.tanh(mean)).amin(0).mean()
    found = gradient_of(td3.phases_of.losses()["actor"](t, td3.phases_of.scales(0.0, 0)["actor"]), td3.policy)
    torch.testing.assert_close(found, gradient_of(-gain, td3.policy))
    assert td3.policy_delay == 2


def test_td3_bc_weighs_improvement_by_the_mean_size_of_q() -> None:
    agent = part_of_recipe("td3_bc")
    t = batch_of(agent)
    mean, _ = agent.policy.mean_and_log_std(t.batch["observation"])
    action = torch.tanh(mean)
    q = agent.nets.critic(t.batch["observation"], 2.0 * action).amin(0)
    want = -2.5 * q.mean() / q.abs().mean().detach() + (action - t.batch["action"] / 2.0).square().mean()
    torch.testing.assert_close(agent.phases_of.losses()["actor"](t, agent.phases_of.scales(0.0, 0)["actor"]), want)


def test_rlpd_without_its_four_changes_is_sac_bit_for_bit(tmp_path: Path) -> None:
    filled().dumps(tmp_path / "rows")
    off = ["agent.critics=2", "agent.layer_norm=false", "agent.aggregate=least", "agent.actor.policy.mean=false"]
    agent = part_of_recipe("rlpd", *off, f"replay.data={tmp_path / 'rows'}")
    replay = WithDataset(64, data=str(tmp_path / "rows"), share=0.0, sampler=Uniform())
    replay.extend(transitions())
    plain, own = make(), filled()
    for _ in range(3):
        agent.update(replay)
        plain.update(own)
    for a, b in ((agent.policy, plain.policy), (agent.nets.critic, plain.nets.critic)):
        assert torch.equal(weights(a), weights(b))
    assert torch.equal(agent.nets.log_alpha, plain.nets.log_alpha)


def test_rlpd_draws_two_of_ten_members_and_improves_on_their_mean(tmp_path: Path) -> None:
    filled().dumps(tmp_path / "rows")
    agent = part_of_recipe("rlpd", f"replay.data={tmp_path / 'rows'}")
    t = batch_of(agent, alpha=0.5)
    action, log_prob = agent.policy.rsample(t.batch["observation"], noise=t.noise[1])
    q = agent.nets.critic(t.batch["observation"], action)
    assert q.shape == (10, 32)
    torch.testing.assert_close(agent.phases_of.losses()["actor"](t, (1.0,)), (0.5 * log_prob - q.mean(0)).mean())
    seen = []
    step = agent.gradient_step
    agent.gradient_step = lambda batch, *rest: (seen.append(batch["members"]), step(batch, *rest))[1]  # type: ignore[method-assign]
    agent.update(filled())
    assert len(seen) == 4 and all(sorted(m.tolist()) == list(range(10)) for m in seen)
    assert len({tuple(m.tolist()) for m in seen}) > 1


# ---------------------------------------------------------------------------------------------- learning


def bandit(count: int = 512) -> TensorDict:
    """One-step episodes with reward ``1 - (a - 0.5)^2``; the actions stored are uniform in [-1, 1]."""
    g = torch.Generator().manual_seed(0)
    action = torch.rand(count, 1, generator=g) * 2 - 1
    zeros = torch.zeros(count, 1)
    return TensorDict(
        {
            "observation": zeros,
            "action": action,
            "reward": 1.0 - (action[:, 0] - 0.5).square(),
            "discount": torch.full((count,), 0.9),
            "terminated": torch.ones(count, dtype=torch.bool),
            "next_observation": zeros,
        },
        [count],
    )


@pytest.mark.parametrize("name", ["imitation", "iql", "td3_bc"])
def test_offline_methods_find_the_better_action_that_imitation_misses(name: str) -> None:
    from unified_rl.policies.gaussian import GaussianPolicy

    torch.manual_seed(0)
    options: dict[str, Any] = {
        "imitation": {**IQL, "actor": {"policy": {"name": "weighted", "beta": 0.0}}},
        "iql": {**IQL, "actor": {"policy": {"name": "weighted", "beta": 20.0}}},
        "td3_bc": {
            "target": "smoothed",
            "actor": {
                "improve": {
                    "name": "pathwise",
                    "entropy": False,
                    "normalize": True,
                    "noisy": False,
                    "coefficient": 2.5,
                },
                "stay": "squared",
            },
            "tune_alpha": False,
        },
    }[name]
    policy = GaussianPolicy(1, 1, [-1.0], [1.0], squash=name == "td3_bc", state_dependent_std=True, hidden=(16,))
    agent = make(policy=policy, rows=300, lr=5e-3, tau=0.1, batch_size=64, critic_hidden=(32,), **options)
    replay = Replay(512, sampler=Uniform())
    replay.extend(bandit())
    agent.update(replay)
    action = float(policy.sample(torch.zeros(1, 1), deterministic=True)["action"])
    low, high = (-0.2, 0.2) if name == "imitation" else (0.3, 0.7)
    assert low < action < high
