"""Flow and diffusion chains against closed forms and slow, separate arithmetic."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from scipy import stats
from tensordict import TensorDict
from torch import Tensor, nn

from unified_rl.errors import ConfigError
from unified_rl.policies.chain import ChainPolicy
from unified_rl.policies.diffusion import DiffusionPolicy, cosine_alpha_bar, posterior_constants
from unified_rl.policies.flow import FlowPolicy
from unified_rl.policies.networks import time_features

MEAN, STD = 0.3, 0.25


class Exact(nn.Module):
    """Stands where the network is and returns a known function of state and time."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def condition(self, observation: Tensor) -> Tensor:
        return observation[:, :1] * 0

    def clock(self, time: Tensor) -> Tensor:
        return time.unsqueeze(-1)

    def forward(self, condition: Tensor, state: Tensor, clock: Tensor) -> Tensor:
        return self.function(state, clock)


def gaussian_velocity(state: Tensor, time: Tensor) -> Tensor:
    """``E[a - x_0 | x_t]`` for ``a ~ N(MEAN, STD^2)`` and independent ``x_0 ~ N(0, 1)``; noise head at its middle."""
    variance = (1 - time) ** 2 + (time * STD) ** 2
    velocity = MEAN + (time * STD**2 - (1 - time)) / variance * (state - time * MEAN)
    return torch.cat((velocity, torch.zeros_like(velocity)), -1)


def exact_flow(steps: int, **kwargs: float) -> FlowPolicy:
    policy = FlowPolicy(1, 1, [-1.0], [1.0], steps=steps, hidden=(4,), **kwargs)  # type: ignore[arg-type]
    policy.network = Exact(gaussian_velocity)  # type: ignore[assignment]
    return policy


def exact_diffusion(steps: int, **kwargs: float | None) -> DiffusionPolicy:
    """The best noise prediction for ``a ~ N(MEAN, STD^2)``."""
    policy = DiffusionPolicy(1, 1, [-1.0], [1.0], steps=steps, hidden=(4,), clip_prediction=None, **kwargs)  # type: ignore[arg-type]

    def noise(state: Tensor, time: Tensor) -> Tensor:
        index = (time * steps).round().to(torch.int64).squeeze(-1)
        signal, scale = policy.signal[index], policy.noise[index]
        return scale * (state - signal * MEAN) / (signal.square() * STD**2 + scale.square())

    policy.network = Exact(noise)  # type: ignore[assignment]
    return policy


def stirred(policy: ChainPolicy, size: float, seed: int = 1) -> ChainPolicy:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.network.parameters():
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))
    return policy


def sampled(policy: ChainPolicy, count: int, seed: int = 0) -> TensorDict:
    observation = torch.zeros(count, policy.observation_dim)
    return policy.sample(observation, torch.Generator().manual_seed(seed)).set("observation", observation)


# --- flow ----------------------------------------------------------------------------------------------------------


def test_exact_velocity_carries_noise_to_the_gaussian_it_belongs_to() -> None:
    start = torch.linspace(-2, 2, 9).unsqueeze(-1)
    end = exact_flow(400).integrate(torch.zeros(9, 1), start)
    torch.testing.assert_close(end, MEAN + STD * start, atol=5e-3, rtol=0)


def test_one_euler_step_of_the_exact_velocity_gives_the_mean() -> None:
    end = exact_flow(1).integrate(torch.zeros(3, 1), torch.tensor([[-1.0], [0.0], [2.0]]))
    torch.testing.assert_close(end, torch.full((3, 1), MEAN))


def test_flow_loss_of_the_exact_velocity_is_the_conditional_variance() -> None:
    time = (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000
    mixed = (1 - time) ** 2 + (time * STD) ** 2
    expected = (1 + STD**2 - (time * STD**2 - (1 - time)) ** 2 / mixed).mean().item()
    generator = torch.Generator().manual_seed(0)
    action = MEAN + STD * torch.randn(40_000, 1, generator=generator)
    batch = TensorDict({"observation": torch.zeros(40_000, 1), "action": action}, [40_000])
    loss = exact_flow(5).nll(batch, generator)
    assert loss.shape == (40_000, 1)
    assert loss.mean().item() == pytest.approx(expected, abs=4 * loss.std().item() / 200)


def test_noise_stays_within_its_bounds() -> None:
    policy = stirred(FlowPolicy(2, 2, [-1.0] * 2, [1.0] * 2, std_min=0.1, std_max=0.3, hidden=(16,)), 3.0)
    observation = 10 * torch.randn(100, 2, generator=torch.Generator().manual_seed(0))
    chain = policy.sample(observation, torch.Generator())["chain"]
    std = policy.transitions(observation, chain)[1].exp()
    assert std.min() >= 0.1 - 1e-6 and std.max() <= 0.3 + 1e-6 and std.std() > 0.05
    with pytest.raises(ConfigError, match="std_min"):
        FlowPolicy(2, 1, [-1.0], [1.0], std_min=0.3, std_max=0.1)


def test_flow_log_prob_is_that_of_plain_loops() -> None:
    policy = stirred(FlowPolicy(2, 3, [-1.0] * 3, [1.0] * 3, steps=4, std_min=0.1, std_max=0.4, hidden=(8, 8)), 0.3)
    observation = torch.randn(6, 2, generator=torch.Generator().manual_seed(0))
    sample = policy.sample(observation, torch.Generator().manual_seed(1))
    net, chain = policy.network, sample["chain"]
    for row in range(6):
        for k in range(4):
            time = time_features(torch.tensor(k / 4), 8)
            with torch.no_grad():
                out = net.rest(net.first(torch.cat((observation[row], chain[row, k], time))))
            std = 0.1 * 4.0 ** torch.sigmoid(out[3:])  # geometric between 0.1 and 0.4
            mean = chain[row, k] + out[:3] / 4
            expected = stats.norm.logpdf(chain[row, k + 1].numpy(), mean.numpy(), std.numpy()).sum()
            assert sample["behavior_log_prob"][row, k].item() == pytest.approx(expected, abs=1e-4)


def test_flow_entropy_is_that_of_each_steps_noise() -> None:
    policy = FlowPolicy(2, 3, [-1.0] * 3, [1.0] * 3, std_min=0.2, std_max=0.2, hidden=(8,))
    batch = sampled(policy, 4)
    expected = 3 * (math.log(0.2) + 0.5 * math.log(2 * math.pi * math.e))
    torch.testing.assert_close(policy.entropy(batch), torch.full((4, 5), expected))


def test_the_action_is_the_clipped_end_of_the_unclipped_chain() -> None:
    policy = stirred(FlowPolicy(2, 2, [0.0, -4.0], [1.0, 4.0], hidden=(16,)), 0.5)
    sample = sampled(policy, 200)
    end = sample["chain"][:, -1]
    assert (end.abs() > 1).any()
    clipped = end.clamp(-1, 1)
    expected = torch.stack((0.5 + 0.5 * clipped[:, 0], 4 * clipped[:, 1]), -1)
    torch.testing.assert_close(sample["action"], expected)


def test_deterministic_use_is_the_integral_from_the_drawn_start() -> None:
    policy = stirred(FlowPolicy(2, 2, [-1.0] * 2, [1.0] * 2, hidden=(16,)), 0.2)
    observation = torch.randn(5, 2, generator=torch.Generator().manual_seed(0))
    sample = policy.sample(observation, torch.Generator().manual_seed(1), deterministic=True)
    end = policy.integrate(observation, sample["chain"][:, 0])
    torch.testing.assert_close(policy.to_env(end), sample["action"])
    assert sample["chain"][:, 0].std() > 0.5
    centred = FlowPolicy(2, 2, [-1.0] * 2, [1.0] * 2, hidden=(16,), zero_start=True)
    other = [centred.sample(observation, torch.Generator().manual_seed(seed), deterministic=True) for seed in (1, 2)]
    assert torch.equal(other[0]["action"], other[1]["action"])


# --- diffusion -----------------------------------------------------------------------------------------------------


def test_posterior_constants_by_hand_for_two_steps() -> None:
    c1, c2, variance = posterior_constants(torch.tensor([1.0, 0.8, 0.4], dtype=torch.float64))
    # k=1: alpha .8, beta .2: the posterior is the action itself. k=2: alpha .5, beta .5, 1 - alpha_bar .6 and .2
    assert c1.tolist() == pytest.approx([1.0, 0.5 * 0.8**0.5 / 0.6])
    assert c2.tolist() == pytest.approx([0.0, 0.5**0.5 * 0.2 / 0.6])
    assert variance.tolist() == pytest.approx([0.0, 0.5 * 0.2 / 0.6])


def test_cosine_schedule_by_hand_for_two_steps() -> None:
    half, start = math.cos(math.radians(90 * 0.508 / 1.008)), math.cos(math.radians(90 * 0.008 / 1.008))
    middle = (half / start) ** 2
    # the last beta would be 1 and is capped at 0.999
    assert cosine_alpha_bar(2).tolist() == pytest.approx([1.0, middle, middle * 0.001])


def test_diffusion_kernel_by_hand_for_two_steps() -> None:
    policy = DiffusionPolicy(1, 1, [-1.0], [1.0], steps=2, std_min=0.1, hidden=(4,))
    policy._register_schedule(torch.tensor([1.0, 0.8, 0.4], dtype=torch.float64), 0.1)
    state, noise = torch.tensor([[0.5]]), torch.tensor([[0.2]])
    mean, log_std = policy._kernel(noise, state, 0)
    action = (0.5 - 0.6**0.5 * 0.2) / 0.4**0.5
    expected = 0.5 * 0.8**0.5 / 0.6 * action + 0.5**0.5 * 0.2 / 0.6 * 0.5
    assert mean.item() == pytest.approx(expected, abs=1e-6)
    assert log_std.exp().item() == pytest.approx((1 / 6) ** 0.5, abs=1e-6)
    mean, log_std = policy._kernel(torch.tensor([[-4.0]]), state, 1)
    assert mean.item() == pytest.approx(1.0)  # (0.5 + sqrt(.2) * 4) / sqrt(.8) is above 1: clipped
    assert log_std.exp().item() == pytest.approx(0.1)  # the posterior's is 0: the floor
    explained = (0.5 - 0.4**0.5) / 0.6**0.5  # the noise beside a prediction that was clipped to 1
    after = policy._noiseless(torch.tensor([[-4.0]]), state, 0)
    assert after.item() == pytest.approx(0.8**0.5 + 0.2**0.5 * explained, abs=1e-6)


def test_exact_noise_prediction_samples_the_gaussian_it_belongs_to() -> None:
    policy = exact_diffusion(400, std_min=1e-3)  # the posterior's variance falls short by a share of order 1 / steps
    end = sampled(policy, 20_000)["chain"][:, -1]
    assert end.mean().item() == pytest.approx(MEAN, abs=0.01)
    assert end.std().item() == pytest.approx(STD, rel=0.03)


def test_noiseless_diffusion_is_the_probability_flow() -> None:
    start = torch.linspace(-2, 2, 9).unsqueeze(-1)
    end = exact_diffusion(300).integrate(torch.zeros(9, 1), start)
    torch.testing.assert_close(end, MEAN + STD * start, atol=1e-2, rtol=0)


def test_diffusion_loss_of_no_prediction_is_the_noise_variance() -> None:
    policy = DiffusionPolicy(1, 2, [-1.0] * 2, [1.0] * 2, hidden=(4,))
    policy.network = Exact(lambda state, time: 0 * state)  # type: ignore[assignment]
    batch = TensorDict({"observation": torch.zeros(20_000, 1), "action": torch.zeros(20_000, 2)}, [20_000])
    loss = policy.nll(batch, torch.Generator().manual_seed(0))
    assert loss.mean().item() == pytest.approx(1.0, abs=4 / 20_000**0.5)  # chi-square mean of two: std 1


def test_diffusion_needs_a_noise_floor() -> None:
    with pytest.raises(ConfigError, match="std_min"):
        DiffusionPolicy(1, 1, [-1.0], [1.0], std_min=0.0)


# --- both ----------------------------------------------------------------------------------------------------------

KINDS = [
    lambda **kw: FlowPolicy(1, 2, [-1.0] * 2, [1.0] * 2, hidden=(16,), **{"steps": 4, **kw}),
    lambda **kw: DiffusionPolicy(1, 2, [-1.0] * 2, [1.0] * 2, hidden=(16,), std_min=0.1, **{"steps": 4, **kw}),
]


@pytest.mark.parametrize("make", KINDS)
def test_chain_ratio_is_an_importance_weight(make: Callable[..., ChainPolicy]) -> None:
    behavior, target = make(), stirred(make(), 0.02)
    batch = sampled(behavior, 20_000)
    with torch.no_grad():
        ratio = (target.log_prob(batch).log_prob - batch["behavior_log_prob"]).sum(-1).exp()
    assert ratio.std() > 0.1
    assert ratio.mean().item() == pytest.approx(1.0, abs=4 * ratio.std().item() / 20_000**0.5)
    weighted = ratio * batch["chain"][:, -1, 0]
    direct = sampled(target, 20_000, seed=1)["chain"][:, -1, 0]
    error = (weighted.var() + direct.var()).sqrt().item() / 20_000**0.5
    assert weighted.mean().item() == pytest.approx(direct.mean().item(), abs=4 * error)


@pytest.mark.parametrize("make", KINDS)
def test_mean_over_dims_divides_by_the_width_and_is_no_exact_weight(make: Callable[..., ChainPolicy]) -> None:
    total, mean = make(), make(mean_over_dims=True)
    batch = sampled(total, 8)
    torch.testing.assert_close(mean.log_prob(batch).log_prob, total.log_prob(batch).log_prob / 2)
    assert total.exact and not mean.log_prob(batch).exact


@pytest.mark.parametrize("make", KINDS)
def test_frozen_steps_neither_move_nor_count(make: Callable[..., ChainPolicy]) -> None:
    full, policy = make(), make(trained_steps=2, seed=5)
    policy.load_state_dict(full.state_dict())  # a pre-trained policy without frozen steps
    policy.end_pretraining()
    assert torch.equal(sampled(policy, 8)["action"], sampled(full, 8)["action"])
    batch = sampled(policy, 8)
    assert batch["chain"].shape == (8, 3, 2) and torch.equal(batch["chain"], sampled(full, 8)["chain"][:, 2:])
    before = policy.log_prob(batch).log_prob
    stirred(policy, 0.3)
    after = sampled(policy, 8)
    assert torch.equal(after["chain"][:, 0], batch["chain"][:, 0])
    assert not torch.allclose(after["chain"][:, 1], batch["chain"][:, 1])
    with torch.no_grad():
        changed = policy.log_prob(batch).log_prob
        for parameter in policy.frozen.parameters():  # type: ignore[union-attr]
            parameter.add_(1.0)
        assert not torch.allclose(before, changed)
        assert torch.equal(policy.log_prob(batch).log_prob, changed)
    changed = sampled(policy, 8)["chain"][:, 0]
    policy.end_pretraining()  # once: fine-tuned weights never become frozen ones
    assert torch.equal(sampled(policy, 8)["chain"][:, 0], changed)
    with pytest.raises(ConfigError, match="trained_steps"):
        make(trained_steps=5)


@pytest.mark.parametrize("make", KINDS)
def test_until_pretraining_ends_every_step_runs_the_weights_that_imitation_moves(
    make: Callable[..., ChainPolicy],
) -> None:
    full, policy = make(), make(trained_steps=2)
    for one in (full, policy):
        stirred(one, 0.3)
    assert torch.equal(sampled(policy, 8)["action"], sampled(full, 8)["action"])
    resumed = make(trained_steps=2, seed=3)
    resumed.load_state_dict(policy.state_dict())
    assert torch.equal(sampled(resumed, 8)["action"], sampled(full, 8)["action"])
    for one in (policy, resumed):
        one.end_pretraining()
        assert torch.equal(sampled(one, 8)["action"], sampled(full, 8)["action"])


@pytest.mark.parametrize("kind", [FlowPolicy, DiffusionPolicy])
def test_imitation_of_two_modes_keeps_both(kind: type[FlowPolicy] | type[DiffusionPolicy]) -> None:
    policy = kind(1, 1, [-2.0], [2.0], hidden=(64, 64), steps=10)
    optimizer = torch.optim.Adam(policy.parameters(), 3e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(1000):
        side = torch.randint(0, 2, (256, 1), generator=generator) * 2.0 - 1.0
        action = side + 0.1 * torch.randn(256, 1, generator=generator)
        loss = policy.nll(TensorDict({"observation": torch.zeros(256, 1), "action": action}, [256]), generator).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    action = policy.sample(torch.zeros(2000, 1), generator, deterministic=True)["action"]
    assert 0.35 < (action > 0).float().mean() < 0.65
    assert ((action.abs() - 1).abs() < 0.35).float().mean() > 0.75  # a Gaussian of the same moments has 0.33
