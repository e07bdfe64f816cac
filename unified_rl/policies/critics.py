"""State-value and action-value critics."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from tensordict import TensorDictBase
from torch import Tensor, nn

from unified_rl.errors import ConfigError
from unified_rl.observations import layout_of
from unified_rl.policies.base import action_bounds
from unified_rl.policies.encoder import USUAL_FEATURES, ObservationEncoder
from unified_rl.policies.networks import activation_named, mlp, seeded
from unified_rl.policies.normalizer import RunningNormalizer, seen_by
from unified_rl.ranges import Count, Seed, ranged
from unified_rl.spaces import Box, Part, Space, as_space

SETTING = "agent.critic_hidden"
"""The full name of ``hidden`` in a run's configuration."""


class Critic(nn.Module):
    """What critics share: observations standardised by running moments, and images encoded, by weights of their own.

    Args:
        part: the observation space, or the width of a vector.
        normalize: keep moments, else observations are used as they are.
        image_features: of each image.
        seed: of the encoder's weights.

    Attributes:
        width: of the observation as the network sees it.
    """

    def __init__(self, part: Part | int, normalize: bool, image_features: int, seed: int) -> None:
        super().__init__()
        self.layout = layout_of(Box((part,)) if isinstance(part, int) else part)
        moments = normalize and self.layout.vector > 0
        self.normalizer: nn.Module | None = RunningNormalizer(self.layout.vector) if moments else None
        self.encoder: nn.Module | None = None
        self.width = self.layout.width
        if self.layout.images:
            self.encoder = ObservationEncoder(self.layout, image_features, seed)
            self.width = self.encoder.width

    def update_normalizer(self, observation: Tensor) -> None:
        """Adds raw ``observation [..., d]`` to the running moments; does nothing where normalisation is off."""
        if isinstance(self.normalizer, RunningNormalizer):
            self.normalizer.update(self.layout.unpack(observation)[0])

    def normalize(self, observation: Tensor) -> Tensor:
        """The observation ``[..., d]`` as the network sees it."""
        if self.encoder is None:
            return observation if self.normalizer is None else self.normalizer(observation)
        numbers, images = self.layout.unpack(observation)
        numbers = numbers if self.normalizer is None else self.normalizer(numbers)
        return self.encoder(numbers, images)  # type: ignore[no-any-return]


@ranged()
class ValueCritic(Critic):
    """A state-value estimate ``V(s)``.

    Args:
        space: the environment's, or the width of its observation.
        hidden: widths of the hidden layers.
        activation: a name in :data:`unified_rl.policies.networks.ACTIVATIONS`.
        orthogonal: orthogonal initialisation (output gain 1).
        layer_norm: LayerNorm before every activation.
        normalize_observation: standardise observations by running moments (:meth:`update_normalizer`).
        image_features: width that the encoder gives each image of an observation.
        seed: of the initial weights.
    """

    def __init__(
        self,
        space: Space | int,
        hidden: Sequence[Count] = (64, 64),
        *,
        activation: str = "tanh",
        orthogonal: bool = True,
        layer_norm: bool = False,
        normalize_observation: bool = False,
        image_features: Count = USUAL_FEATURES,
        seed: Seed = 0,
    ) -> None:
        part = space.observation if isinstance(space, Space) else space
        super().__init__(part, normalize_observation, image_features, seed)
        with seeded(seed):
            self.network = mlp(
                self.width,
                hidden,
                1,
                activation=activation,
                orthogonal=orthogonal,
                layer_norm=layer_norm,
                setting=SETTING,
            )

    @property
    def output(self) -> nn.Linear:
        """The last layer."""
        last = self.network[-1]
        assert isinstance(last, nn.Linear)
        return last

    def forward(self, observation: Tensor) -> Tensor:
        """``observation [..., d]`` to values ``[...]``."""
        return self.of_seen(self.normalize(observation))

    def of_seen(self, seen: Tensor) -> Tensor:
        """Values ``[...]`` of observations ``[..., d]`` as :meth:`normalize` makes them."""
        value: Tensor = self.network(seen)
        return value.squeeze(-1)

    def keep_seen(self, rows: TensorDictBase) -> None:
        """Writes what the network sees of ``rows`` into them, as no step of an update changes it; images aside."""
        if self.normalizer is not None and self.encoder is None:
            rows[seen_by(self)] = self.normalize(rows["observation"])


@ranged()
class QEnsemble(Critic):
    """``num`` independent action-value estimates ``Q_i(s, a)``.

    Members are separate networks by default, which is the faster form on a CPU; ``stacked`` holds all of them in one
    batched matrix product a layer, which is the faster form on a GPU.

    Args:
        space: the environment's, whose action bounds are scaled to [-1, 1] first; or the width of the observation.
        action_dim: with that, the width of the action.
        num: members.
        hidden: widths of the hidden layers.
        activation: a name in :data:`unified_rl.policies.networks.ACTIVATIONS`.
        layer_norm: LayerNorm before every activation, as in "Efficient Online Reinforcement Learning with Offline
            Data" (arXiv:2302.02948).
        stacked: one batched product a layer.
        action_low: without a space: with ``action_high``, actions are scaled to [-1, 1] first.
        action_high: upper bounds of the action.
        normalize_observation: standardise observations by running moments (:meth:`update_normalizer`).
        image_features: width that the encoder gives each image of an observation.
        seed: of the initial weights.

    Raises:
        ConfigError: ``num`` below 1, or discrete actions.
    """

    action_middle: Tensor
    action_scale: Tensor

    def __init__(
        self,
        space: Space | int,
        action_dim: int | None = None,
        num: Count = 2,
        hidden: Sequence[Count] = (256, 256),
        *,
        activation: str = "relu",
        layer_norm: bool = False,
        stacked: bool = False,
        action_low: Sequence[float] | None = None,
        action_high: Sequence[float] | None = None,
        normalize_observation: bool = False,
        image_features: Count = USUAL_FEATURES,
        seed: Seed = 0,
    ) -> None:
        if not isinstance(space, Space) and action_low is None and action_high is None and action_dim is not None:
            action_low, action_high = [-math.inf] * action_dim, [math.inf] * action_dim
        space = as_space("QEnsemble", space, action_dim=action_dim, action_low=action_low, action_high=action_high)
        super().__init__(space.observation, normalize_observation, image_features, seed)
        if space.action.choices is not None:
            raise ConfigError(f"a Q-ensemble takes vectors of floats as actions, not {space.action.describe()}")
        self.num = num
        self._register_bounds(space)
        width = self.width + space.action_dim
        with seeded(seed):
            members = [
                mlp(width, hidden, 1, activation=activation, layer_norm=layer_norm, setting=SETTING) for _ in range(num)
            ]
        for layer in (layer for member in members for layer in member if isinstance(layer, nn.ReLU)):
            layer.inplace = True  # no layer before it needs its own result again
        self.members: nn.ModuleList | None = None if stacked else nn.ModuleList(members)
        self.stack: nn.Sequential | None = _stack(members, activation) if stacked else None

    def _register_bounds(self, space: Space) -> None:
        bounds = action_bounds(space)
        middle, scale = bounds["middle"], 1.0 / bounds["half"]
        self.scales_action = bool((middle != 0).any() or (scale != 1).any())
        self.register_buffer("action_middle", middle, persistent=False)
        self.register_buffer("action_scale", scale, persistent=False)

    def forward(self, observation: Tensor, action: Tensor) -> Tensor:
        """``observation [..., d]`` and ``action [..., a]`` to values ``[num, ...]``."""
        if self.scales_action:
            action = (action - self.action_middle) * self.action_scale
        x = torch.cat((self.normalize(observation), action), dim=-1)
        if self.members is not None:
            return torch.stack([member(x) for member in self.members]).squeeze(-1)
        assert self.stack is not None
        flat = x.reshape(1, -1, x.shape[-1]).expand(self.num, -1, -1)
        values: Tensor = self.stack(flat)
        return values.reshape(self.num, *x.shape[:-1])


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
            layers.append(StackedLinear(same))
        elif isinstance(same[0], nn.LayerNorm):
            layers.append(StackedLayerNorm(same))
        else:
            layers.append(activation_named(activation)())
    return nn.Sequential(*layers)
