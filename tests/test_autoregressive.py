"""Action tokens: bins, the chain rule, and the sampling transform."""

from __future__ import annotations

import itertools

import pytest
import torch
from tensordict import TensorDict

from unified_rl.errors import ConfigError
from unified_rl.policies.autoregressive import AutoregressivePolicy, from_bins, to_bins

LOW, HIGH = [-2.0, 0.0, 1.0], [2.0, 10.0, 3.0]


def stirred(bins: int = 3, **kwargs: float) -> AutoregressivePolicy:
    """Weights large enough that every dimension depends strongly on the earlier ones."""
    policy = AutoregressivePolicy(2, 3, LOW, HIGH, bins=bins, hidden=(16,), **kwargs)  # type: ignore[arg-type]
    with torch.no_grad():
        generator = torch.Generator().manual_seed(1)
        for parameter in policy.parameters():
            parameter.add_(0.5 * torch.randn(parameter.shape, generator=generator))
    return policy


def categorical(probabilities: list[float], **kwargs: float) -> AutoregressivePolicy:
    """A discrete policy with known probabilities in every state."""
    policy = AutoregressivePolicy(1, 1, [], [], num_actions=len(probabilities), **kwargs)  # type: ignore[arg-type]
    last = policy.head[-1]
    with torch.no_grad():
        last.weight.zero_()
        last.bias.copy_(torch.tensor(probabilities).log())
    return policy


def frequencies(policy: AutoregressivePolicy, count: int) -> list[float]:
    action = policy.sample(torch.zeros(count, 1), torch.Generator().manual_seed(0))["action"]
    return (torch.bincount(action[:, 0], minlength=policy.bins) / count).tolist()


@pytest.mark.parametrize("bins", [2, 7, 21, 256])
def test_bins_survive_the_way_to_values_and_back(bins: int) -> None:
    index = torch.arange(bins)
    assert torch.equal(to_bins(from_bins(index, bins), bins), index)
    value = torch.linspace(-1, 1, 999)
    assert (from_bins(to_bins(value, bins), bins) - value).abs().max() <= 1 / bins + 1e-6
    assert to_bins(torch.tensor([-9.0, -1.0, 1.0, 9.0]), bins).tolist() == [0, 0, bins - 1, bins - 1]


def test_sampled_actions_decode_to_their_own_bins() -> None:
    policy = stirred(bins=21)
    sample = policy.sample(torch.randn(200, 2, generator=torch.Generator().manual_seed(0)), torch.Generator())
    assert torch.equal(policy.bins_of(sample["action"]), sample["action_bins"])


@pytest.mark.parametrize("top_p", [1.0, 0.7])
def test_probabilities_of_all_actions_sum_to_one(top_p: float) -> None:
    policy = stirred(top_p=top_p)
    every = torch.tensor(list(itertools.product(range(3), repeat=3)))
    observation = torch.tensor([[0.3, -1.0]]).expand(27, 2)
    scored = policy.log_prob(TensorDict({"observation": observation, "action_bins": every}, [27]))
    assert scored.log_prob.sum(-1).exp().sum().item() == pytest.approx(1.0, abs=1e-5)
    assert scored.exact == (top_p == 1.0)


def test_sampled_frequencies_are_the_scored_probabilities() -> None:
    policy = stirred(temperature=0.8)
    count = 20_000
    observation = torch.tensor([[0.3, -1.0]]).expand(count, 2)
    sample = policy.sample(observation, torch.Generator().manual_seed(2))
    code = (sample["action_bins"] * torch.tensor([9, 3, 1])).sum(-1)
    every = torch.tensor(list(itertools.product(range(3), repeat=3)))
    scored = policy.log_prob(TensorDict({"observation": observation[:27], "action_bins": every}, [27]))
    probability = scored.log_prob.detach().sum(-1).exp()
    error = torch.bincount(code, minlength=27) / count - probability
    assert (error.abs() < 4.5 * (probability * (1 - probability) / count).sqrt() + 1e-9).all()


def test_a_dimension_sees_the_earlier_ones_and_no_later_one() -> None:
    policy = stirred()
    observation, bins = torch.zeros(1, 2), torch.tensor([[0, 0, 0]])

    def units(changed: int) -> torch.Tensor:
        """Logits of every dimension after another bin at ``changed``."""
        other = bins.clone()
        other[0, changed] = 2
        return policy._logits(observation, other)[0]

    base = policy._logits(observation, bins)[0]
    for changed in range(3):
        same = [torch.allclose(base[i], units(changed)[i], atol=1e-6) for i in range(3)]
        assert same == [i <= changed for i in range(3)]


def test_nucleus_keeps_the_hand_computed_set() -> None:
    policy = categorical([0.5, 0.3, 0.15, 0.05], top_p=0.7)
    got = frequencies(policy, 20_000)
    assert got[2] == got[3] == 0.0  # 0.5 is below 0.7, 0.8 reaches it
    assert got[0] == pytest.approx(0.625, abs=4 * (0.625 * 0.375 / 20_000) ** 0.5)
    batch = TensorDict({"observation": torch.zeros(3, 1), "action": torch.tensor([[0], [1], [2]])}, [3])
    log_prob = policy.log_prob(batch).log_prob[:, 0].exp()
    torch.testing.assert_close(log_prob, torch.tensor([0.625, 0.375, 0.0]))


def test_temperature_sharpens_sampling_and_scoring_but_not_the_supervised_loss() -> None:
    policy = categorical([0.8, 0.2], temperature=0.5)  # 0.64 and 0.04, renormalised
    batch = TensorDict({"observation": torch.zeros(2, 1), "action": torch.tensor([[0], [1]])}, [2])
    torch.testing.assert_close(policy.log_prob(batch).log_prob.exp(), torch.tensor([[0.64], [0.04]]) / 0.68)
    torch.testing.assert_close((-policy.nll(batch)).exp(), torch.tensor([[0.8], [0.2]]))
    assert frequencies(policy, 20_000)[0] == pytest.approx(0.64 / 0.68, abs=4 * (0.06 / 20_000) ** 0.5)


def test_entropy_is_that_of_the_sampling_distribution() -> None:
    policy = categorical([0.5, 0.25, 0.25], top_p=0.5)
    batch = TensorDict({"observation": torch.zeros(2, 1), "action": torch.zeros(2, 1, dtype=torch.int64)}, [2])
    torch.testing.assert_close(policy.entropy(batch), torch.zeros(2, 1))
    policy = categorical([0.5, 0.25, 0.25])
    torch.testing.assert_close(policy.entropy(batch), torch.full((2, 1), 1.5 * torch.log(torch.tensor(2.0)).item()))


def test_an_action_outside_the_nucleus_has_finite_gradients() -> None:
    policy = categorical([0.5, 0.3, 0.2], top_p=0.6)
    batch = TensorDict({"observation": torch.zeros(2, 1), "action": torch.tensor([[0], [2]])}, [2])
    log_prob = policy.log_prob(batch).log_prob
    assert log_prob[1, 0] == float("-inf")
    torch.where(torch.isfinite(log_prob), log_prob, 0.0).sum().backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in policy.parameters() if parameter.grad is not None)


def test_settings_out_of_range_are_refused() -> None:
    with pytest.raises(ConfigError, match="at least 2"):
        AutoregressivePolicy(2, 3, LOW, HIGH, bins=1)
    with pytest.raises(ConfigError, match="finite"):
        AutoregressivePolicy(2, 1, [-float("inf")], [1.0])
    with pytest.raises(ConfigError, match="temperature"):
        AutoregressivePolicy(2, 3, LOW, HIGH, temperature=0.0)
