"""Value critics and Q-ensembles."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from unified_rl.errors import ConfigError
from unified_rl.policies.critics import QEnsemble, ValueCritic
from unified_rl.policies.networks import mlp, time_features


def inputs(*shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(*shape, 3, generator=generator), torch.randn(*shape, 2, generator=generator)


def test_a_value_critic_is_its_matrices_written_out() -> None:
    critic = ValueCritic(3, (5,), layer_norm=True)
    observation = inputs(7)[0]
    first, _, _, last = critic.network
    hidden = observation.numpy() @ first.weight.detach().numpy().T + first.bias.detach().numpy()
    hidden = (hidden - hidden.mean(-1, keepdims=True)) / np.sqrt(hidden.var(-1, keepdims=True) + 1e-5)
    expected = np.tanh(hidden) @ last.weight.detach().numpy().T[:, 0] + last.bias.detach().numpy()
    np.testing.assert_allclose(critic(observation).detach().numpy(), expected, atol=1e-5)


@pytest.mark.parametrize("shape", [(7,), (7, 4)])
@pytest.mark.parametrize("layer_norm", [False, True])
def test_stacked_and_separate_members_agree_in_value_and_gradient(shape: tuple[int, ...], layer_norm: bool) -> None:
    separate = QEnsemble(3, 2, num=3, hidden=(8, 6), layer_norm=layer_norm)
    stacked = QEnsemble(3, 2, num=3, hidden=(8, 6), layer_norm=layer_norm, stacked=True)
    observation, action = inputs(*shape)
    action.requires_grad_(True)
    values = separate(observation, action), stacked(observation, action)
    assert values[0].shape == (3, *shape)
    torch.testing.assert_close(*values)
    gradients = [torch.autograd.grad(value.square().sum(), action)[0] for value in values]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("stacked", [False, True])
def test_members_differ_and_share_nothing(stacked: bool) -> None:
    critic = QEnsemble(3, 2, num=3, hidden=(8,), stacked=stacked)
    value = critic(*inputs(7))
    assert not torch.allclose(value[0], value[1])
    value[1].sum().backward()
    with torch.no_grad():
        for parameter in critic.parameters():
            if parameter.grad is not None:
                parameter.add_(parameter.grad)
    changed = critic(*inputs(7))
    assert torch.equal(changed[0], value[0]) and torch.equal(changed[2], value[2])
    assert not torch.allclose(changed[1], value[1])


def test_actions_are_scaled_by_their_bounds() -> None:
    plain = QEnsemble(3, 2)
    scaled = QEnsemble(3, 2, action_low=[0.0, -4.0], action_high=[1.0, 4.0])
    observation, action = inputs(6)
    by_hand = torch.stack((2 * action[:, 0] - 1, action[:, 1] / 4), -1)
    torch.testing.assert_close(scaled(observation, action), plain(observation, by_hand))


def test_critics_normalise_observations_by_the_moments_they_were_shown() -> None:
    observation, action = inputs(50)
    by_hand = (observation - observation.mean(0)) / observation.std(0, correction=0)
    value, value_plain = ValueCritic(3, normalize_observation=True), ValueCritic(3)
    q, q_plain = QEnsemble(3, 2, normalize_observation=True), QEnsemble(3, 2)
    for critic in (value, q):
        critic.update_normalizer(observation)
    torch.testing.assert_close(value(observation), value_plain(by_hand), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(q(observation, action), q_plain(by_hand, action), atol=1e-5, rtol=1e-5)


def test_an_ensemble_needs_a_member_and_networks_known_parts() -> None:
    with pytest.raises(ConfigError, match="num=0 must be at least 1"):
        QEnsemble(3, 2, num=0)
    with pytest.raises(ConfigError, match=r"softsign.*relu"):
        mlp(3, (4,), activation="softsign")
    with pytest.raises(ConfigError, match="widths"):
        mlp(3, (0,))


def test_orthogonal_layers_have_their_gain() -> None:
    network = mlp(8, (8,), 8, orthogonal=True, output_gain=0.01)
    first, last = network[0], network[2]
    assert isinstance(first, nn.Linear) and isinstance(last, nn.Linear)
    torch.testing.assert_close(first.weight @ first.weight.T, 2.0 * torch.eye(8), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(last.weight @ last.weight.T, 1e-4 * torch.eye(8), atol=1e-8, rtol=1e-4)


def test_time_features_at_a_half() -> None:
    # angles pi/2 and pi
    torch.testing.assert_close(
        time_features(torch.tensor(0.5), 4), torch.tensor([1.0, 0.0, 0.0, -1.0]), atol=1e-6, rtol=0
    )


@pytest.mark.parametrize(
    "register",
    [
        nn.Module.register_forward_hook,
        nn.Module.register_forward_pre_hook,
        nn.Module.register_full_backward_hook,
        nn.Module.register_full_backward_pre_hook,
    ],
)
def test_hooks_of_layers_are_heard(register: Callable[..., Any]) -> None:
    network, heard = mlp(3, (4,), 1), []
    x = torch.ones(2, 3, requires_grad=True)
    for layer in network:
        register(layer, lambda layer, *_: heard.append(layer))
    network(x).sum().backward()
    assert set(heard) == set(network)
