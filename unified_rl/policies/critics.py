"""State-value and action-value critics."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from unified_rl.errors import ConfigError
from unified_rl.policies.networks import activation_named, mlp, seeded
from unified_rl.policies.normalizer import RunningNormalizer


class ValueCritic(nn.Module):
    """A state-value estimate ``V(s)``.

    Args:
        observation_dim: width of the observation.
        hidden: widths of the hidden layers.
        activation: a name in :data:`unified_rl.policies.networks.ACTIVATIONS`.
        orthogonal: orthogonal initialisation (output gain 1).
        layer_norm: LayerNorm before every activation.
        normalize_observation: standardise observations by running moments (:meth:`update_normalizer`).
        seed: of the initial weights.
    """

    def __init__(
        self,
        observation_dim: int,
        hidden: Sequence[int] = (64, 64),
        *,
        activation: str = "tanh",
        orthogonal: bool = True,
        layer_norm: bool = False,
        normalize_observation: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.normalizer: nn.Module | None = RunningNormalizer(observation_dim) if normalize_observation else None
        with seeded(seed):
            self.network = mlp(
                observation_dim, hidden, 1, activation=activation, orthogonal=orthogonal, layer_norm=layer_norm
            )

    def update_normalizer(self, observation: Tensor) -> None:
        """Adds raw ``observation [..., d]`` to the running moments; does nothing where normalisation is off."""
        if isinstance(self.normalizer, RunningNormalizer):
            self.normalizer.update(observation)

    def forward(self, observation: Tensor) -> Tensor:
        """``observation [..., d]`` to values ``[...]``."""
        if self.normalizer is not None:
            observation = self.normalizer(observation)
        return self.network(observation).squeeze(-1)


class QEnsemble(nn.Module):
    """``num`` independent action-value estimates ``Q_i(s, a)``.

    Members are separate networks by default, which is the faster form on a CPU; ``stacked`` holds all of them in one
    batched matrix product a layer, which is the faster form on a GPU.

    Args:
        observation_dim: width of the observation.
        action_dim: width of the action.
        num: members.
        hidden: widths of the hidden layers.
        activation: a name in :data:`unified_rl.policies.networks.ACTIVATIONS`.
        layer_norm: LayerNorm before every activation, as in "Efficient Online Reinforcement Learning with Offline
            Data" (arXiv:2302.02948).
        stacked: one batched product a layer.
        action_low: with ``action_high``, actions are scaled to [-1, 1] first.
        action_high: upper bounds of the action.
        normalize_observation: standardise observations by running moments (:meth:`update_normalizer`).
        seed: of the initial weights.

    Raises:
        ConfigError: ``num`` below 1.
    """

    action_middle: Tensor
    action_scale: Tensor

    def __init__(
        self,
        observation_dim: int,
        action_dim: int,
        num: int = 2,
        hidden: Sequence[int] = (256, 256),
        *,
        activation: str = "relu",
        layer_norm: bool = False,
        stacked: bool = False,
        action_low: Sequence[float] | None = None,
        action_high: Sequence[float] | None = None,
        normalize_observation: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if num < 1:
            raise ConfigError(f"a Q-ensemble needs at least one member, got num={num}")
        self.num = num
        self.normalizer: nn.Module | None = RunningNormalizer(observation_dim) if normalize_observation else None
        self._register_bounds(action_low, action_high)
        width = observation_dim + action_dim
        with seeded(seed):
            members = [mlp(width, hidden, 1, activation=activation, layer_norm=layer_norm) for _ in range(num)]
        self.members: nn.ModuleList | None = None if stacked else nn.ModuleList(members)
        self.stack: nn.Sequential | None = _stack(members, activation) if stacked else None

    def _register_bounds(self, low: Sequence[float] | None, high: Sequence[float] | None) -> None:
        self.scales_action = False
        if low is None or high is None:
            return
        bottom, top = torch.tensor(list(map(float, low))), torch.tensor(list(map(float, high)))
        bounded = torch.isfinite(bottom) & torch.isfinite(top)
        middle = torch.where(bounded, 0.5 * (bottom + top), torch.zeros_like(top))
        scale = torch.where(bounded, 2.0 / (top - bottom), torch.ones_like(top))
        self.scales_action = bool((middle != 0).any() or (scale != 1).any())
        self.register_buffer("action_middle", middle, persistent=False)
        self.register_buffer("action_scale", scale, persistent=False)

    def update_normalizer(self, observation: Tensor) -> None:
        """Adds raw ``observation [..., d]`` to the running moments; does nothing where normalisation is off."""
        if isinstance(self.normalizer, RunningNormalizer):
            self.normalizer.update(observation)

    def forward(self, observation: Tensor, action: Tensor) -> Tensor:
        """``observation [..., d]`` and ``action [..., a]`` to values ``[num, ...]``."""
        if self.normalizer is not None:
            observation = self.normalizer(observation)
        if self.scales_action:
            action = (action - self.action_middle) * self.action_scale
        x = torch.cat((observation, action), dim=-1)
        if self.members is not None:
            return torch.stack([member(x) for member in self.members]).squeeze(-1)
        assert self.stack is not None
        flat = x.reshape(1, -1, x.shape[-1]).expand(self.num, -1, -1)
        return self.stack(flat).reshape(self.num, *x.shape[:-1])


class StackedLinear(nn.Module):
    """``num`` linear layers as one batched product: ``[num, M, i]`` to ``[num, M, o]``."""

    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.stack([layer.weight.detach().T for layer in layers]))
        self.bias = nn.Parameter(torch.stack([layer.bias.detach() for layer in layers]).unsqueeze(1))

    def forward(self, x: Tensor) -> Tensor:
        """Applies each member's layer to its own slice."""
        return torch.baddbmm(self.bias, x, self.weight)


class StackedLayerNorm(nn.Module):
    """``num`` LayerNorms with separate gains: ``[num, M, i]`` to the same."""

    def __init__(self, layers: Sequence[nn.LayerNorm]) -> None:
        super().__init__()
        self.epsilon = layers[0].eps
        self.weight = nn.Parameter(torch.stack([layer.weight.detach() for layer in layers]).unsqueeze(1))
        self.bias = nn.Parameter(torch.stack([layer.bias.detach() for layer in layers]).unsqueeze(1))

    def forward(self, x: Tensor) -> Tensor:
        """Normalises the last dimension, then applies each member's gain and bias."""
        normal = nn.functional.layer_norm(x, x.shape[-1:], eps=self.epsilon)
        return torch.addcmul(self.bias, normal, self.weight)


def _stack(members: Sequence[nn.Sequential], activation: str) -> nn.Sequential:
    """The same function as the list of members, with stacked parameters of the same values."""
    layers: list[nn.Module] = []
    for same in zip(*members, strict=True):
        if isinstance(same[0], nn.Linear):
            layers.append(StackedLinear(same))  # type: ignore[arg-type]
        elif isinstance(same[0], nn.LayerNorm):
            layers.append(StackedLayerNorm(same))  # type: ignore[arg-type]
        else:
            layers.append(activation_named(activation)())
    return nn.Sequential(*layers)
