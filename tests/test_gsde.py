"""Generalised state-dependent exploration: its density, what a rollout holds, and runs with it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensordict import TensorDict
from test_rollout import ENDS, Counters

import unified_rl as ur
from unified_rl.errors import ConfigError
from unified_rl.policies.gaussian import GaussianPolicy
from unified_rl.recordings.making import rolled
from unified_rl.rollout import ControlRollout, StepResult

LOW, HIGH = [-2.0, 0.0], [2.0, 10.0]
SMALL = {"progress": False, "policy.hidden": [8], "rollout.num_envs": 2, "rollout.horizon": 16, "eval_every": 0}


def policy(every: int | None = None, **options: Any) -> GaussianPolicy:
    options = {"hidden": (8,), "initial_log_std": -0.5, **options}
    return GaussianPolicy(3, 2, LOW, HIGH, gsde=True, gsde_every=every, **options)


def stream(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def steps(rollout: ControlRollout, number: int) -> TensorDict:
    rollout.horizon = number
    return rollout.collect(0)[0]


def units(rows: TensorDict, made_by: GaussianPolicy) -> torch.Tensor:
    """What was added to the mean, ``[T, K, a]``."""
    flat = rows["observation"].flatten(0, 1)
    mean = made_by.mean_and_log_std(made_by.normalize(flat))[0]
    return rows["raw_action"] - mean.reshape(rows["raw_action"].shape)


def test_noise_under_drawn_matrices_has_the_density_that_is_scored() -> None:
    made = policy()
    with torch.no_grad():
        made.log_std.copy_(torch.linspace(-2.0, 0.3, 16).reshape(8, 2))
    count = 40_000
    observation = torch.tensor([0.4, -1.0, 2.0]).expand(count, 3)
    sample = made.sample_held(observation, made.draw_noise(count, stream())).set("observation", observation)
    features = made.trunk(observation[:1])[0].detach().numpy()
    variance = (features[:, None] ** 2 * np.exp(2 * made.log_std.detach().numpy())).sum(0)
    np.testing.assert_allclose(sample["raw_action"].var(0).numpy(), variance, rtol=0.03)
    density = torch.distributions.Normal(made.mean_and_log_std(observation)[0], torch.tensor(variance**0.5))
    expected = density.log_prob(sample["raw_action"]).sum(-1)
    torch.testing.assert_close(sample["behavior_log_prob"][:, 0], expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(made.log_prob(sample).log_prob, sample["behavior_log_prob"])
    torch.testing.assert_close(made.entropy(observation[:1])[0], density.entropy()[0].sum(-1, keepdim=True))


def test_constant_features_make_it_a_plain_gaussian() -> None:
    made, plain = policy(), GaussianPolicy(3, 2, LOW, HIGH, hidden=(8,), initial_log_std=-0.5)
    with torch.no_grad():
        for one in (made, plain):
            one.trunk[0].weight.zero_()
            one.trunk[0].bias.fill_(30.0)  # tanh of it is 1
    observation = torch.randn(7, 3, generator=stream())
    expected = plain.sample(observation, stream(1))
    for key, got in made.sample(observation, stream(1)).items():
        torch.testing.assert_close(got, expected[key])
    torch.testing.assert_close(made.entropy(observation), plain.entropy(observation))


def test_a_bound_on_the_deviation_holds_for_held_noise() -> None:
    made = policy(log_std_low=-3.0, log_std_high=-0.5)
    with torch.no_grad():
        made.log_std[:, 0], made.log_std[:, 1] = 9.0, -30.0
    observation = torch.ones(20_000, 3)
    sample = made.sample_held(observation, made.draw_noise(20_000, stream())).set("observation", observation)
    expected = [math.exp(-0.5), math.exp(-3.0)]
    np.testing.assert_allclose(sample["raw_action"].std(0).numpy(), expected, rtol=0.03)
    torch.testing.assert_close(made.log_prob(sample).log_prob, sample["behavior_log_prob"])


class Same(Counters):
    """Observations that never change, so that what differs is the noise."""

    def observe(self) -> torch.Tensor:
        super().observe()
        return torch.ones(2, 3)

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {"time": self.time.clone()}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        self.time = state["time"].clone()


class Endless(Same):
    def step_batch(self, action: torch.Tensor) -> StepResult:
        never = torch.zeros(2, dtype=torch.bool)
        return super().step_batch(action)._replace(terminated=never, truncated=never)


def test_a_matrix_is_held_for_its_steps_and_at_most_for_an_episode() -> None:
    for every in (4, None):
        made = policy(every)
        rows = steps(ControlRollout(Same(), made, 0.9, stream()), 24)
        noise = units(rows, made)
        for lane, length in enumerate(ENDS):
            age = 0
            for t in range(1, 24):
                age += 1
                fresh = t % length == 0 or age == (every or math.inf)
                age = 0 if fresh else age
                same = torch.allclose(noise[t, lane], noise[t - 1, lane], atol=1e-6)
                assert same != fresh, (every, lane, t)
        assert not torch.isclose(noise[:, 0], noise[:, 1]).any()


def test_noise_correlates_within_a_hold_and_across_nothing_else() -> None:
    """Over many matrices: steps of one hold 1, the next hold and the other simulation 0."""
    made = policy(2)
    rows = steps(ControlRollout(Endless(), made, 0.9, stream()), 2000)
    noise = units(rows, made)[..., 0].detach().numpy()
    first, second = noise[0::2], noise[1::2]
    assert np.corrcoef(first[:, 0], second[:, 0])[0, 1] > 0.999
    assert abs(np.corrcoef(second[:-1, 0], first[1:, 0])[0, 1]) < 0.13
    assert abs(np.corrcoef(first[:, 0], first[:, 1])[0, 1]) < 0.13


def test_data_sets_are_drawn_anew_at_every_step() -> None:
    """Off-policy evaluation multiplies the ratios of an episode's steps, which says nothing of noise they share."""
    made = policy()
    density = rolled(Same(), made, 20, 0)["behavior_log_prob"].reshape(2, 10)
    assert not torch.isclose(density[:, 1:], density[:, :-1]).any()


@pytest.mark.parametrize("every", [5, None])
def test_a_rollout_goes_on_from_its_state(every: int | None) -> None:
    made = policy(every)
    whole = ControlRollout(Same(), made, 0.9, stream())
    steps(whole, 7)
    state = whole.state_dict()
    assert set(state["noise"]) == {"noise", "age", "due"}
    expected = steps(whole, 9)
    again = ControlRollout(Same(), made, 0.9, stream(5))
    again.load_state_dict(state)
    torch.testing.assert_close(steps(again, 9)["raw_action"], expected["raw_action"], rtol=0, atol=0)


def test_acting_without_a_rollout_draws_from_the_same_density_and_moves_nothing() -> None:
    made = policy(4)
    rollout = ControlRollout(Counters(), made, 0.9, stream())
    steps(rollout, 3)
    assert rollout.noise is not None and rollout.noise.noise is not None
    held, single = rollout.noise.noise.clone(), np.zeros(3)
    np.testing.assert_array_equal(made(single), made(single))
    assert made(single).shape == (2,)
    sample = made.sample(torch.zeros(3), stream()).set("observation", torch.zeros(3))
    assert sample["raw_action"].shape == (2,)
    assert torch.equal(rollout.noise.noise, held)
    with pytest.raises(RuntimeError):
        made.sample_held(torch.zeros(5, 3), held)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"gsde": True, "state_dependent_std": True}, "policy.state_dependent_std=false"),
        ({"gsde_every": 4}, "policy.gsde=true"),
        ({"gsde_learn_features": True}, "policy.gsde=true"),
    ],
)
def test_what_does_not_go_together_is_refused(options: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        GaussianPolicy(3, 2, LOW, HIGH, **options)


def test_the_gradient_reaches_the_features_where_it_was_asked_for() -> None:
    observation = torch.randn(6, 3, generator=stream())
    for learn in (False, True):
        made = policy(gsde_learn_features=learn)
        made.entropy(observation).sum().backward()
        assert made.log_std.grad is not None and bool((made.log_std.grad != 0).all())
        assert (made.trunk[0].weight.grad is not None) == learn


def test_sac_learns_under_it_and_the_policy_leaves(tmp_path: Path) -> None:
    ur.train(
        {
            **SMALL,
            "env": "inverted_pendulum",
            "agent": "sac",
            "agent.critic_hidden": [8],
            "agent.batch_size": 8,
            "agent.learning_starts": 16,
            "rollout.random_steps": 8,
            "rollout.horizon": 1,
            "policy.state_dependent_std": False,
            "policy.gsde": True,
            "policy.gsde_every": 4,
            "steps": 64,
            "run_dir": str(tmp_path / "run"),
        }
    )
    made = ur.load_policy(str(tmp_path / "run"))
    observation = np.zeros((3, 4), np.float32)
    action = made(observation)
    assert action.shape == (3, 1)
    ur.export(str(tmp_path / "run"), str(tmp_path / "policy.pt2"))
    exported = torch.export.load(str(tmp_path / "policy.pt2")).module()(torch.from_numpy(observation))
    np.testing.assert_allclose(exported.detach().numpy(), action, atol=1e-5)
