"""Moments of a normaliser are weights: at learning rate 0 every ratio is 1, however old the rows."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from agent_cases import LANES, control_agent, filled, gaussian, stream, transitions
from value_cases import IQL, make, squashed

import unified_rl as ur
from unified_rl.agents import policy_gradient
from unified_rl.config import compose, resolve_defaults
from unified_rl.policies.gaussian import GaussianPolicy
from unified_rl.policies.normalizer import RunningNormalizer
from unified_rl.training.run import Job
from unified_rl.training.trainer import Trainer
from unified_rl.units import record_from_steps

pytestmark = pytest.mark.thorough

SMALL = ["progress=false", "agent.lr=0.0", "rollout.num_envs=4", "rollout.horizon=16", "agent.epochs=2"]
IMITATED = ["warm_start=demonstrations", "warm_start.stages=[{updates: 20, lr: 3.0e-3}]", "warm_start.dataset=512"]
CLASSES = ("gaussian", "tanh_gaussian", "flow", "diffusion", "autoregressive")
CASES = {
    "gaussian": ["env=half_cheetah", "policy=gaussian", "agent=ppo"],
    "flow": ["env=two_route", "policy=flow", "agent=policy_gradient", "correction=tis"],
    "diffusion": ["env=two_route", "policy=diffusion", "agent=policy_gradient", "correction=tis"],
    "bins": ["env=pendulum", "policy=autoregressive", "agent=policy_gradient", "correction=tis"],
    "gsde": ["env=half_cheetah", "policy=gaussian", "policy.gsde=true", "policy.gsde_every=5", "agent=ppo"],
    "squashed": ["env=pendulum", "policy=tanh_gaussian", "agent=ppo"],
    "imitated": ["env=two_route", "policy=flow", "agent=policy_gradient", "correction=tis", *IMITATED],
    "imitated afresh": [
        "env=two_route",
        "policy=flow",
        "agent=policy_gradient",
        "correction=tis",
        *IMITATED[:2],
        "warm_start.dataset=null",
    ],
    "reference": [
        "env=half_cheetah",
        "policy=gaussian",
        "agent=ppo",
        "correction.penalty=[{name: k3, anchor: reference}]",
    ],
    "average": ["env=half_cheetah", "policy=gaussian", "agent=policy_gradient", "correction=ppo_ewma"],
}


def trained(
    overrides: list[str], staleness: int, folder: Path, updates: int = 6
) -> tuple[Trainer, list[dict[str, float]]]:
    cfg = resolve_defaults(
        compose([*overrides, *SMALL, f"rollout.staleness={staleness}", "policy.normalize_observation=true"])
    )
    job = Job(cfg)
    job.warm_start(lambda *args: None)
    trainer = job.make_trainer(folder)
    seen = []
    while len(seen) < updates:
        trainer.collect()
        seen.append({k: float(v) for k, v in trainer.agent.update(trainer.replay).items()})
        trainer.updates += 1
    return trainer, seen


CASES |= {
    f"imitated {name}": ["env=two_route", f"policy={name}", "agent=policy_gradient", "correction=tis", *IMITATED]
    for name in CLASSES
    if name != "flow"
}


@pytest.mark.parametrize("staleness", [0, 3])
@pytest.mark.parametrize("name", list(CASES))
def test_every_ratio_is_one_at_learning_rate_zero(name: str, staleness: int, tmp_path: Path) -> None:
    trainer, seen = trained(CASES[name], staleness, tmp_path)
    for metrics in seen:
        assert metrics["ess/unit"] == pytest.approx(1.0, abs=1e-5)
        assert abs(metrics["update/kl"]) < 1e-8 and abs(metrics["kl/k3"]) < 1e-8
        if name == "reference":
            assert abs(metrics["loss/penalty"]) < 1e-6
    assert float(trainer.agent.policy.normalizer.count) > 0
    moved = int(trainer.agent.policy.normalizer.used)
    assert (
        moved == 1 if name.startswith("imitated") else moved >= 5
    )  # the null control: without imitation moments did move


@pytest.mark.parametrize("name", CLASSES)
def test_a_clone_stays_what_it_is_at_learning_rate_zero(name: str, tmp_path: Path) -> None:
    small = {"policy.hidden": [16, 16], "eval_episodes": 8, "progress": False}
    parts = {"env": "two_route", "policy": name}
    clone = ur.assemble(**parts, agent={"name": "behavior_cloning", "lr": 1e-2}, folder=tmp_path, updates=5, **small)
    clone.run()
    start = {"name": "from_run", "run": str(tmp_path)}
    more = {"rollout.num_envs": 4, "rollout.horizon": 16, "updates": 3, "agent.lr": 0.0}
    tuned = ur.assemble(**parts, agent="ppo", warm_start=start, **more, **small)
    rows = tuned.run()
    assert rows[-1]["eval/score"] == rows[0]["eval/score"] == clone.trainer.log.rows[-1]["eval/score"]
    assert float(tuned.policy.normalizer.count) == float(clone.policy.normalizer.count) > 0


def test_the_critic_of_a_clone_sees_what_the_clone_sees(tmp_path: Path) -> None:
    """It learns from nothing, but the moments of its policy are known and fixed: its own would move its values."""
    trainer, seen = trained([*CASES["imitated"], "agent.advantage=critic"], 0, tmp_path, updates=3)
    policy, critic = trainer.agent.policy.normalizer, trainer.agent.baseline.module.normalizer
    assert bool(critic.frozen) and float(critic.count) == float(policy.count) > 0 and len(seen) == 3
    observation = trainer.rollout.env.current_observation()
    assert torch.equal(critic(observation), policy(observation))
    assert not torch.equal(critic(observation), observation)


def test_every_policy_class_standardises_by_default() -> None:
    for name in CLASSES:
        assert compose(["env=pendulum", "agent=ppo", f"policy={name}"])["policy"]["normalize_observation"] is True


def test_the_null_control_fails_where_rows_forget_their_moments(tmp_path: Path) -> None:
    trainer, _ = trained(CASES["flow"], 0, tmp_path)
    rows = trainer.rollout.collect(trainer.agent.version)[0]
    trainer.agent.policy.update_normalizer(rows["observation"] + 1.0)
    policy, stored = trainer.agent.policy, rows["behavior_log_prob"].flatten(1)
    torch.testing.assert_close(policy.log_prob(rows).log_prob, stored, atol=1e-4, rtol=1e-4)
    assert (policy.log_prob(rows.exclude("moments")).log_prob - stored).abs().max() > 0.1


def test_value_based_agents_keep_the_moments_of_an_imitated_policy(tmp_path: Path) -> None:
    small = ["progress=false", "rollout.random_steps=0", "agent.learning_starts=8", "agent.batch_size=8", "steps=64"]
    case = ["env=two_route", "agent=sac", "policy.normalize_observation=true", *IMITATED]
    job = Job(resolve_defaults(compose([*case, *small])))
    job.warm_start(lambda *args: None)
    seen = float(job.policy.normalizer.count)
    trainer = job.make_trainer(tmp_path)
    for _ in range(16):
        trainer.update()
    assert float(job.policy.normalizer.count) == seen > 0
    fresh = Job(resolve_defaults(compose([*case[:3], *small])))
    trainer = fresh.make_trainer(tmp_path)
    for _ in range(16):
        trainer.update()
    assert int(fresh.policy.normalizer.used) >= 3  # the control: without imitation they move


def test_frozen_moments_stay_and_untouched_ones_do_not_freeze() -> None:
    normalizer = RunningNormalizer(2)
    normalizer.freeze()
    assert not bool(normalizer.frozen)
    normalizer.update(torch.tensor([[1.0, 2.0], [3.0, 6.0]]))
    normalizer.freeze()
    normalizer.update(torch.full((100, 2), 50.0))
    torch.testing.assert_close(normalizer(torch.tensor([[3.0, 6.0]])), torch.ones(1, 2))


def test_an_entry_that_never_varied_is_not_scaled() -> None:
    normalizer, seen = RunningNormalizer(3), torch.randn(200, 3)
    seen[:, 1], seen[:, 2] = 0.3, 1e-3 * seen[:, 2]
    normalizer.update(seen)
    moved = seen.mean(0) + torch.tensor([0.0, 0.01, 1e-3])
    assert normalizer(moved).tolist() == pytest.approx([0.0, 0.01, 1.0], abs=0.2)
    assert float(normalizer(moved)[1]) == pytest.approx(0.01, abs=1e-5)  # not 100, and not the limit of 10


def test_sets_of_moments_are_few_and_loaded_whole() -> None:
    normalizer = RunningNormalizer(3)
    for _ in range(2000):
        normalizer.update(torch.randn(10, 3) * 2 + 1)
    assert 300 < int(normalizer.used) < 900
    x, number = torch.randn(5, 3), torch.tensor([0, 1, 7, 100, int(normalizer.used)])
    other = RunningNormalizer(3)
    other.load_state_dict(normalizer.state_dict())
    assert torch.equal(other(x, number), normalizer(x, number)) and torch.equal(other(x), normalizer(x))
    assert torch.equal(normalizer(x, number)[0], x[0])  # number 0: nothing seen yet
    old = {key: value for key, value in normalizer.state_dict().items() if key in ("count", "mean", "var")}
    older = RunningNormalizer(3)
    older.load_state_dict(old)  # a checkpoint from before sets were kept
    torch.testing.assert_close(older(x), (x - normalizer.mean.float()) * normalizer.var.float().rsqrt())


def test_a_sample_says_its_moments_only_where_observations_are_standardised() -> None:
    sizes = (2, 1, [-1.0], [1.0])
    assert "moments" not in GaussianPolicy(*sizes).sample(torch.zeros(3, 2)).keys()
    policy = GaussianPolicy(*sizes, normalize_observation=True)
    assert policy.sample(torch.zeros(3, 2))["moments"].tolist() == [0, 0, 0]
    policy.update_normalizer(torch.randn(9, 2))
    assert policy.sample(torch.zeros(3, 2))["moments"].tolist() == [1, 1, 1]


def test_moments_in_use_are_written_in_place_and_follow_a_load() -> None:
    normalizer = RunningNormalizer(2)
    held = normalizer.mean_used, normalizer.scale_used  # what a captured CUDA graph reads
    normalizer.update(torch.tensor([[0.0, 2.0], [2.0, 6.0]]))
    assert held[0].tolist() == [1.0, 4.0] and held[1].tolist() == pytest.approx([1.0, 0.5])
    other = RunningNormalizer(2)
    read = other.mean_used, other.scale_used
    other.load_state_dict(normalizer.state_dict())
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(read, held, strict=True))
    torch.testing.assert_close(other(torch.tensor([3.0, 6.0])), torch.tensor([2.0, 1.0]))


def test_critics_see_what_the_policy_sees_and_a_batch_counts_once() -> None:
    policy = squashed(normalize_observation=True)
    agent = make(policy, **IQL)
    nets, seen = agent.nets, 5 + 3 * torch.randn(64, policy.observation_dim)
    agent._update_normalizers(seen)
    assert nets.value is not None and float(policy.normalizer.count) == 64
    for net in (nets.critic, nets.target, nets.value):
        assert torch.equal(net.normalize(seen), policy.normalize(seen)) and not torch.equal(net.normalize(seen), seen)


@pytest.mark.parametrize("settings", [{"minibatch": 6}, {"shuffle_steps": False, "minibatch": 2, "entropy_coef": 0.1}])
def test_what_is_seen_once_an_update_is_what_was_seen_at_every_step(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows under older moments included, and copies of the policy, which have moments of their own."""
    found = []
    for once in (True, False):
        if not once:
            monkeypatch.setattr(policy_gradient, "keep_seen", lambda *given: None)
        policy = gaussian(normalize_observation=True)
        policy.update_normalizer(5 + 3 * torch.randn(50, 3, generator=stream(1)))
        rows = transitions(policy, seed=2)
        agent = control_agent(policy, epochs=2, lr=1e-2, **settings)
        calls = 0
        plain = policy.normalizer.forward

        def counted(*given: Any, plain: Any = plain) -> torch.Tensor:
            nonlocal calls
            calls += 1
            return plain(*given)

        monkeypatch.setattr(policy.normalizer, "forward", counted)
        for version in range(3):  # the moments move after each, the rows keep theirs
            agent.update(filled(rows, LANES))
            assert agent.version == version + 1
        found.append((calls, list(policy.parameters()), list(agent.baseline.module.parameters())))
    assert found[0][0] < found[1][0]
    for one, other in zip(found[0][1] + found[0][2], found[1][1] + found[1][2], strict=True):
        assert torch.equal(one, other)


def test_a_copy_of_a_policy_does_not_see_through_its_eyes() -> None:
    policy = gaussian(normalize_observation=True)
    policy.update_normalizer(torch.randn(50, 3, generator=stream(1)))
    other = copy.deepcopy(policy)
    rows = record_from_steps(transitions(policy).transpose(0, 1).contiguous())
    other.normalizer.means.add_(1.0)
    plain = other.log_prob(rows).log_prob
    policy.keep_seen(rows)
    assert torch.equal(other.log_prob(rows).log_prob, plain)
    assert not torch.equal(policy.log_prob(rows).log_prob, plain)
