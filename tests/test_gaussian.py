"""Gaussian policies against torch.distributions, scipy and numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats
from tensordict import TensorDict
from torch.distributions import Independent, Normal, TransformedDistribution
from torch.distributions.transforms import TanhTransform

from unified_rl.errors import ConfigError
from unified_rl.policies.gaussian import GaussianPolicy
from unified_rl.policies.normalizer import RunningNormalizer

LOW, HIGH = [-2.0, 0.0], [2.0, 10.0]


def sac_actor(**kwargs: object) -> GaussianPolicy:
    policy = GaussianPolicy(
        3, 2, LOW, HIGH, squash=True, state_dependent_std=True, hidden=(16,), orthogonal=False, **kwargs
    )  # type: ignore[arg-type]
    return policy


def observations(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, 3, generator=torch.Generator().manual_seed(0))


def test_stored_log_prob_is_the_normal_density_of_the_raw_action() -> None:
    policy = sac_actor()
    observation = observations(50)
    sample = policy.sample(observation, torch.Generator().manual_seed(1))
    mean, log_std = policy.mean_and_log_std(observation)
    expected = stats.norm.logpdf(
        sample["raw_action"].numpy(), mean.detach().numpy(), log_std.detach().exp().numpy()
    ).sum(-1)
    np.testing.assert_allclose(sample["behavior_log_prob"][:, 0].numpy(), expected, atol=1e-5)


def test_per_dimension_units_sum_to_the_single_unit() -> None:
    joint, split = sac_actor(), sac_actor(per_dimension=True)
    split.load_state_dict(joint.state_dict())
    observation = observations(20)
    sample = split.sample(observation, torch.Generator().manual_seed(1)).set("observation", observation)
    torch.testing.assert_close(split.log_prob(sample).log_prob.sum(-1), joint.log_prob(sample).log_prob[:, 0])


def test_rsample_log_prob_is_that_of_the_squashed_action() -> None:
    policy = sac_actor()
    observation = observations(200)
    action, log_prob = policy.rsample(observation, torch.Generator().manual_seed(1))
    mean, log_std = policy.mean_and_log_std(observation)
    squashed = TransformedDistribution(Independent(Normal(mean, log_std.exp()), 1), [TanhTransform()])
    scaled = (action - torch.tensor([0.0, 5.0])) / torch.tensor([2.0, 5.0])
    torch.testing.assert_close(log_prob, squashed.log_prob(scaled), atol=2e-3, rtol=1e-4)  # atanh costs digits


def test_rsample_gradient_equals_that_of_torch_distributions() -> None:
    policy = sac_actor()
    observation, noise = observations(64), torch.randn(64, 2, generator=torch.Generator().manual_seed(4))
    action, log_prob = policy.rsample(observation, noise=noise)
    (log_prob.sum() + action.square().sum()).backward()
    got = [parameter.grad.clone() for parameter in policy.parameters() if parameter.grad is not None]
    policy.zero_grad()
    mean, log_std = policy.mean_and_log_std(observation)
    squashed = TransformedDistribution(Normal(mean, log_std.exp()), [TanhTransform(cache_size=1)])
    raw = mean + log_std.exp() * noise
    unit = squashed.transforms[0](raw)
    by_library = torch.tensor([0.0, 5.0]) + torch.tensor([2.0, 5.0]) * unit
    (squashed.log_prob(unit).sum() + by_library.square().sum()).backward()
    for mine, parameter in zip(got, policy.parameters(), strict=True):
        torch.testing.assert_close(mine, parameter.grad, atol=1e-3, rtol=1e-4)


def test_rsample_is_finite_far_out_in_the_tails() -> None:
    policy = sac_actor()
    with torch.no_grad():
        policy.head.bias.copy_(torch.tensor([60.0, -60.0, -900.0, 900.0]))
    action, log_prob = policy.rsample(observations(10), torch.Generator().manual_seed(1))
    (action.sum() + log_prob.sum()).backward()
    assert torch.isfinite(log_prob).all()
    assert all(torch.isfinite(parameter.grad).all() for parameter in policy.parameters() if parameter.grad is not None)


def test_unsquashed_rsample_has_the_plain_density() -> None:
    policy = GaussianPolicy(3, 2, LOW, HIGH)
    observation, noise = observations(4), torch.tensor([[0.0, 1.0]]).expand(4, 2)
    _, log_prob = policy.rsample(observation, noise=noise)
    # std 1: minus log(2 pi) for two dimensions, minus 1/2 for the one that is off by 1
    torch.testing.assert_close(log_prob, torch.full((4,), -np.log(2 * np.pi) - 0.5, dtype=torch.float32))


def test_std_bounds_hold_in_sampling_and_scoring() -> None:
    policy = GaussianPolicy(3, 2, LOW, HIGH, log_std_low=-1.0, log_std_high=1.0)
    policy.log_std.data.fill_(-50.0)
    observation = observations(4000)
    sample = policy.sample(observation, torch.Generator().manual_seed(1)).set("observation", observation)
    spread = (sample["raw_action"] - policy.mean_and_log_std(observation)[0]).std()
    assert spread.item() == pytest.approx(np.exp(-1.0), rel=0.03)
    torch.testing.assert_close(policy.log_prob(sample).log_prob, sample["behavior_log_prob"])


def test_entropy_is_the_closed_form() -> None:
    policy = sac_actor()
    observation = observations(5, 4)
    mean, log_std = policy.mean_and_log_std(observation.reshape(20, 3))
    expected = Normal(mean, log_std.exp()).entropy().sum(-1).reshape(5, 4)
    torch.testing.assert_close(policy.entropy(observation), expected)
    torch.testing.assert_close(policy.entropy(TensorDict({"observation": observation}, [5])), expected)


def test_supervised_loss_inverts_squashing_and_scaling() -> None:
    policy = sac_actor()
    observation = observations(30)
    sample = policy.sample(observation, torch.Generator().manual_seed(1))
    inside = (sample["raw_action"].abs() < 3).all(-1)  # within the clip before atanh
    loss = policy.nll(TensorDict({"observation": observation, "action": sample["action"]}, [30]))
    torch.testing.assert_close(-loss[inside], sample["behavior_log_prob"][inside], atol=1e-3, rtol=1e-3)
    at_bound = TensorDict({"observation": observation, "action": torch.tensor([HIGH]).expand(30, 2)}, [30])
    assert torch.isfinite(policy.nll(at_bound)).all()


def test_the_middle_of_the_bounds_is_the_raw_zero() -> None:
    policy = GaussianPolicy(3, 2, LOW, HIGH, hidden=())
    with torch.no_grad():
        policy.head.weight.zero_()
        policy.head.bias.copy_(torch.tensor([0.5, -3.0]))
    action = policy.sample(observations(1), deterministic=True)["action"]
    torch.testing.assert_close(action, torch.tensor([[1.0, 0.0]]))  # 0 + 2 * 0.5; 5 - 15 clipped to 0


def test_unbounded_actions_pass_unscaled_but_cannot_be_squashed() -> None:
    infinite = float("inf")
    policy = GaussianPolicy(3, 1, [-infinite], [infinite])
    sample = policy.sample(observations(5), torch.Generator().manual_seed(0))
    assert torch.equal(sample["action"], sample["raw_action"])
    with pytest.raises(ConfigError, match="squash"):
        GaussianPolicy(3, 1, [-infinite], [infinite], squash=True)


def test_running_moments_equal_those_of_all_data() -> None:
    generator = np.random.default_rng(0)
    data = 1e3 + 0.1 * generator.standard_normal((1000, 4))
    normalizer = RunningNormalizer(4)
    untouched = torch.randn(2, 4)
    torch.testing.assert_close(normalizer(untouched), untouched)
    for part in np.split(data, [1, 2, 300, 301]):
        normalizer.update(torch.from_numpy(part))
    np.testing.assert_allclose(normalizer.mean.numpy(), data.mean(0), rtol=1e-12)
    np.testing.assert_allclose(normalizer.var.numpy(), data.var(0), rtol=1e-6)
    assert normalizer(torch.full((1, 4), 2e3)).max() == 10.0
