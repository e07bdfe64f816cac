"""Gaussian policies, with and without tanh squashing."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor, nn
from torch.nn import functional as F

from unified_rl.configurable import configurable
from unified_rl.errors import ConfigError
from unified_rl.policies.base import HALF_LOG_TWO_PI, NormalLogProb, Policy, draw_normal, normal_log_prob
from unified_rl.policies.networks import Activation, linear, mlp, run_layers, seeded, trunk_width
from unified_rl.ranges import Count, LogScale, NonNegative, Seed, ranged
from unified_rl.spaces import Space

SQUASH_LIMIT = 0.999
"""Demonstrated actions are clipped to this share of the range before atanh, which is infinite at the bounds."""


@configurable
@ranged("policy")
class GaussianPolicy(Policy):
    """A diagonal Gaussian over a raw action, which the environment sees clipped or tanh-squashed, and scaled.

    ``raw_action ~ N(mean(s), std)`` in coordinates where the action bounds are -1 and 1. Stored log-probs are of the
    *raw* action: the Jacobian of the squashing is the same for both policies, so it cancels in every ratio, and a
    clipped action keeps an exact density. One unit an action, or one per dimension.

    With ``squash`` and ``state_dependent_std`` it is the actor of "Soft Actor-Critic" (arXiv:1801.01290); without
    both, that of "Proximal Policy Optimization" (arXiv:1707.06347).

    With ``gsde`` it explores as "Smooth Exploration for Robotic Reinforcement Learning" (arXiv:2005.05719) does: the
    noise is ``W' phi(s)``, where ``phi [F]`` is what the last hidden layer makes of the state and ``W [F, a]`` has
    entries ``W_ij ~ N(0, sigma_ij^2)``, which a rollout draws for each simulation and holds for several steps. The
    density of an action given its state is ``N(mean_i(s), sum_j phi_j(s)^2 sigma_ij^2)``, bounded as every standard
    deviation here is; log-probs and entropies are of that, and :meth:`sample`, which holds nothing, draws from it.

    Args:
        space: the environment's; or sizes and bounds, as of :class:`~unified_rl.policies.base.Policy`.
        sizes: the rest of those.
        squash: tanh-squash the raw action; else the environment's bounds clip it.
        state_dependent_std: the network gives the standard deviation; else it is a free parameter per dimension.
        per_dimension: one unit per action dimension instead of one per action.
        hidden: widths of the hidden layers.
        activation: a name in :data:`unified_rl.policies.networks.ACTIVATIONS`.
        orthogonal: orthogonal initialisation.
        output_gain: gain of the mean layer with ``orthogonal``.
        initial_log_std: of a free standard deviation.
        log_std_low: floor of the log standard deviation, in sampling and scoring alike.
        log_std_high: its ceiling.
        gsde: generalised state-dependent exploration; ``initial_log_std`` is then that of an action where the features
            are of size 1 (a sigma is smaller by the root of ``F``).
        gsde_every: steps for which a noise matrix is held, at most for an episode; None for as long as that lasts.
        gsde_learn_features: let the gradient of the standard deviation reach the hidden layers, too.
        seed: of the initial weights.
        shared: further arguments of :class:`~unified_rl.policies.base.Policy`.

    Raises:
        ConfigError: discrete actions, squashing without finite bounds, or settings that do not go together.
    """

    rescoring_keys = ("raw_action",)

    def __init__(
        self,
        space: Space | int | None = None,
        *sizes: Any,
        squash: bool = False,
        state_dependent_std: bool = False,
        per_dimension: bool = False,
        hidden: Sequence[Count] = (64, 64),
        activation: Activation = "tanh",
        orthogonal: bool = True,
        output_gain: NonNegative = 0.01,
        initial_log_std: LogScale = 0.0,
        log_std_low: LogScale = -5.0,
        log_std_high: LogScale = 2.0,
        gsde: bool = False,
        gsde_every: Count | None = None,
        gsde_learn_features: bool = False,
        seed: Seed = 0,
        **shared: Any,
    ) -> None:
        super().__init__(space, *sizes, seed=seed, **shared)
        if squash and not self.bounded:
            raise ConfigError("squash needs finite action bounds; set squash to false")
        if log_std_low >= log_std_high:
            raise ConfigError(f"policy.log_std_low={log_std_low} must lie below policy.log_std_high={log_std_high}")
        if not (state_dependent_std or log_std_low <= initial_log_std <= log_std_high):
            raise ConfigError(
                f"policy.initial_log_std={initial_log_std} must lie between policy.log_std_low={log_std_low} and "
                f"policy.log_std_high={log_std_high}"
            )
        if gsde and state_dependent_std:
            raise ConfigError(
                "policy.gsde has a standard deviation of its own for each feature of the state; set "
                "policy.state_dependent_std=false"
            )
        if not gsde and (gsde_every is not None or gsde_learn_features):
            given = "gsde_learn_features" if gsde_every is None else "gsde_every"
            raise ConfigError(f"policy.{given} is of state-dependent exploration; set policy.gsde=true")
        self.squash = squash
        self.gsde, self.gsde_learn_features = gsde, gsde_learn_features
        self.hold_steps: float = 0 if not gsde else math.inf if gsde_every is None else gsde_every
        self.state_dependent_std = state_dependent_std
        self.per_dimension = per_dimension
        self.num_units = self.action_dim if per_dimension else 1
        self.log_std_low, self.log_std_high = log_std_low, log_std_high
        with seeded(seed):
            self.trunk = mlp(self.observation_dim, hidden, activation=activation, orthogonal=orthogonal)
            width = trunk_width(self.observation_dim, hidden)
            outputs = 2 * self.action_dim if state_dependent_std else self.action_dim
            self.head = linear(width, outputs, gain=output_gain if orthogonal else None)
        if gsde:
            each = float(initial_log_std) - 0.5 * math.log(width)
            self.log_std = nn.Parameter(torch.full((width, self.action_dim), each))
        elif not state_dependent_std:
            self.log_std = nn.Parameter(torch.full((self.action_dim,), float(initial_log_std)))

    def mean_and_log_std(self, observation: Tensor) -> tuple[Tensor, Tensor]:
        """Mean ``[M, a]`` and bounded log standard deviation (``[M, a]`` or ``[a]``) of the raw action.

        ``observation [M, d]`` is already normalised.
        """
        return self._of_features(run_layers(self.trunk, observation))

    def _of_features(self, features: Tensor) -> tuple[Tensor, Tensor]:
        out = run_layers((self.head,), features)
        if self.gsde:
            return out, self._marginal_log_std(features)
        if self.state_dependent_std:
            mean, log_std = out.chunk(2, dim=-1)
        else:
            mean, log_std = out, self.log_std
        return mean, log_std.clamp(self.log_std_low, self.log_std_high)

    def _variance(self, features: Tensor) -> Tensor:
        """Of the action ``[M, a]`` under noise matrices on ``features [M, F]``."""
        return features.square() @ (2.0 * self.log_std).exp()

    def _marginal_log_std(self, features: Tensor) -> Tensor:
        """``[M, a]``, bounded; features that are all 0 would have none."""
        variance = self._variance(features if self.gsde_learn_features else features.detach())
        low, high = math.exp(2.0 * self.log_std_low), math.exp(2.0 * self.log_std_high)
        return 0.5 * variance.clamp(low, high).log()

    def draw_noise(self, count: int, generator: torch.Generator) -> Tensor:
        """``[count, F, a]`` standard normal, a matrix a simulation: what is held is ``W / sigma``.

        So a matrix outlives updates, and the noise under it always has the density of the present ``sigma``.
        """
        return draw_normal((count, *self.log_std.shape), self.log_std, generator)

    @torch.no_grad()
    def sample_held(self, observation: Tensor, noise: Tensor) -> TensorDict:
        """As :meth:`sample` for ``observation [K, d]``, with the noise ``[K, F, a]`` that each simulation holds."""
        features = self.trunk(self.normalize(self._raw(observation)))
        mean, log_std = self._of_features(features)
        deviation = torch.einsum("kf,fa,kfa->ka", features, self.log_std.exp(), noise)
        # in units of its own deviation, so that a bound on the standard deviation holds for what is drawn, too
        unit = deviation * self._variance(features).clamp(min=torch.finfo(mean.dtype).tiny).rsqrt()
        return self._sampled(self._drawn(mean, log_std, unit), observation.shape[:-1])

    def normals(self, batch: TensorDictBase) -> tuple[Tensor, Tensor]:
        """Mean and log standard deviation ``[B, N, D]`` of every unit: D is the action's width, or 1 per dimension."""
        mean, log_std = self.mean_and_log_std(self._flatten(batch)[0])
        shape = (batch["observation"].shape[0], -1, 1 if self.per_dimension else self.action_dim)
        return mean.reshape(shape), log_std.expand_as(mean).reshape(shape)

    def rsample(
        self, observation: Tensor, generator: torch.Generator | None = None, noise: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Reparameterised sample with the log-prob of the *action*, for pathwise gradients.

        Args:
            observation: ``[M, d]`` raw.
            generator: random stream; :attr:`generator` if None.
            noise: ``[M, a]`` standard normal to use instead of drawing (for captured graphs).

        Returns:
            ``action [M, a]`` in the environment's coordinates, and ``log_prob [M]`` of the action scaled to [-1, 1],
            the tanh Jacobian included (the coordinates in which a target entropy of minus the action width is meant).
        """
        mean, log_std = self.mean_and_log_std(self.normalize(observation))
        if noise is None:
            noise = draw_normal(mean.shape, mean, self.generator if generator is None else generator)
        raw = torch.addcmul(mean, log_std.exp(), noise)
        # the part of the density without gradient: the noise is its own standardised sample
        constant = noise.square().sum(-1).mul_(-0.5).sub_(self.action_dim * HALF_LOG_TWO_PI)
        if not self.squash:
            return self.to_env(raw), constant - log_std.sum(-1)
        # log(1 - tanh(x)^2) = 2 (log 2 - x - softplus(-2 x)), finite for every x
        jacobian = (raw + F.softplus(-2.0 * raw)).mul(2.0) - log_std
        action = torch.addcmul(self.action_middle, self.action_half, torch.tanh(raw))
        return action, constant - 2.0 * math.log(2.0) * self.action_dim + jacobian.sum(-1)

    def entropy(self, batch: TensorDictBase | Tensor) -> Tensor:
        """Closed-form entropy of the raw action, ``[B, N]`` nats.

        ``batch`` is a record with ``observation [B, (T,) d]``, or that observation itself.
        """
        observation = batch if isinstance(batch, Tensor) else batch["observation"]
        mean, log_std = self.mean_and_log_std(self._observed(batch))
        per_dimension = (log_std + (0.5 + HALF_LOG_TWO_PI)).expand_as(mean)
        return self._units(per_dimension).reshape(observation.shape[0], -1)

    def _units(self, per_dimension: Tensor) -> Tensor:
        return per_dimension if self.per_dimension else per_dimension.sum(-1, keepdim=True)

    def _action(self, raw: Tensor) -> Tensor:
        return self.to_env(torch.tanh(raw) if self.squash else raw)

    def _sample(self, observation: Tensor, generator: torch.Generator, deterministic: bool) -> dict[str, Tensor]:
        mean, log_std = self.mean_and_log_std(observation)
        if deterministic:
            log_prob = mean.new_full((mean.shape[0], self.num_units), torch.nan)
            return {"action": self._action(mean), "raw_action": mean, "behavior_log_prob": log_prob}
        return self._drawn(mean, log_std, draw_normal(mean.shape, mean, generator))

    def _drawn(self, mean: Tensor, log_std: Tensor, unit: Tensor) -> dict[str, Tensor]:
        """The sample that standard normal numbers ``unit [M, a]`` stand for."""
        raw = torch.addcmul(mean, log_std.exp(), unit)
        log_prob = self._units(normal_log_prob(raw, mean, log_std))
        return {"action": self._action(raw), "raw_action": raw, "behavior_log_prob": log_prob}

    def _deterministic_action(self, observation: Tensor) -> Tensor:
        return self._action(self.mean_and_log_std(observation)[0])

    def _log_prob(self, observation: Tensor, stored: Mapping[str, Tensor]) -> Tensor:
        mean, log_std = self.mean_and_log_std(observation)
        raw = stored["raw_action"]
        if self.per_dimension or raw.requires_grad or torch.compiler.is_compiling():
            return self._units(normal_log_prob(raw, mean, log_std))
        return NormalLogProb.apply(raw, mean, log_std)

    def _nll(self, observation: Tensor, action: Tensor, generator: torch.Generator) -> Tensor:
        """Minus the log-density of the raw action that leads to ``action``, ``[M, 1]``."""
        raw = self.from_env(action)
        if self.squash:
            raw = torch.atanh(raw.clamp(-SQUASH_LIMIT, SQUASH_LIMIT))
        mean, log_std = self.mean_and_log_std(observation)
        return -normal_log_prob(raw, mean, log_std).sum(-1, keepdim=True)
