"""Flow policies: a learned velocity field on a straight path, with learned noise at every step."""

from __future__ import annotations

import math
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor

from unified_rl.configurable import configurable
from unified_rl.errors import ConfigError
from unified_rl.policies.base import HALF_LOG_TWO_PI, draw_normal, draw_uniform
from unified_rl.policies.chain import ChainPolicy
from unified_rl.ranges import Count, Positive, ranged
from unified_rl.spaces import Space


@configurable
@ranged("policy")
class FlowPolicy(ChainPolicy):
    """Flow matching with stochastic Euler steps.

    Path ``x_t = (1 - t) x_0 + t a`` from noise at t=0 to the action at t=1, velocity ``v(x, t, s)`` fitted to
    ``a - x_0``; step k goes from ``t = k / K`` by ``x_{k+1} ~ N(x_k + v / K, std(x_k, t, s)^2)``. A second head learns
    the noise within bounds, and the same bounds hold in sampling and in scoring. Deterministic use is the plain Euler
    integration of the velocity.

    Sources: "Flow Matching for Generative Modeling" (arXiv:2210.02747); learned noise as in "ReinFlow"
    (arXiv:2505.22094) and Flow-Noise of "pi_RL" (arXiv:2510.25889).

    Args:
        space: the environment's; or sizes and bounds, as of :class:`~unified_rl.policies.base.Policy`.
        sizes: the rest of those.
        steps: Euler steps.
        std_min: least standard deviation of a step's noise, where the action range is [-1, 1].
        std_max: its largest; equal to ``std_min`` the noise is constant.
        chain: further arguments of :class:`~unified_rl.policies.chain.ChainPolicy`.

    Raises:
        ConfigError: bounds of the noise that are not ``0 < std_min <= std_max``, and those of the base class.
    """

    outputs = 2

    def __init__(
        self,
        space: Space | int | None = None,
        *sizes: Any,
        steps: Count = 5,
        std_min: Positive = 0.05,
        std_max: Positive = 0.2,
        **chain: Any,
    ) -> None:
        if std_min > std_max:
            raise ConfigError(f"policy.std_min={std_min} must not lie above policy.std_max={std_max}")
        super().__init__(space, *sizes, steps=steps, **chain)
        self.log_std_low = math.log(std_min)
        self.log_std_range = math.log(std_max) - math.log(std_min)

    def velocity(self, observation: Tensor, state: Tensor, time: Tensor) -> Tensor:
        """``v(x, t, s)``: ``observation [M, d]`` raw, ``state [M, a]``, ``time [M]`` in [0, 1], to ``[M, a]``."""
        return self._velocity(self.normalize(observation), state, time)

    def entropy(self, batch: TensorDictBase) -> Tensor:
        """Entropy ``[B, N]`` of each stored step's noise given the state before it (nats; a mean over dimensions
        where log-probs are). The sum over a chain is not the entropy of the action.
        """
        log_std = self.transitions(*self._chain_of(batch))[1]
        per_dimension = log_std + (0.5 + HALF_LOG_TWO_PI)
        return self._reduce(per_dimension).reshape(batch["observation"].shape[0], -1)

    def _chain_of(self, batch: TensorDictBase) -> tuple[Tensor, Tensor]:
        observation, stored = self._flatten(batch)
        return observation, stored["chain"]

    def _velocity(self, observation: Tensor, state: Tensor, time: Tensor) -> Tensor:
        net = self.network
        output: Tensor = net(net.condition(observation), state, net.clock(time))
        return output[..., : self.action_dim]

    def _kernel(self, output: Tensor, state: Tensor, index: Tensor | int) -> tuple[Tensor, Tensor]:
        velocity, noise = output.chunk(2, dim=-1)
        mean = torch.add(state, velocity, alpha=1.0 / self.steps)
        return mean, self.log_std_low + self.log_std_range * torch.sigmoid(noise)

    def _noiseless(self, output: Tensor, state: Tensor, index: Tensor | int) -> Tensor:
        return torch.add(state, output[..., : self.action_dim], alpha=1.0 / self.steps)

    def _nll(self, observation: Tensor, action: Tensor, generator: torch.Generator) -> Tensor:
        """Flow-matching loss at one random time a sample, mean over dimensions, ``[M, 1]``.

        A regression loss, not a likelihood; it does not train the noise head.
        """
        end = self.from_env(action)
        start = draw_normal(end.shape, end, generator)
        time = draw_uniform(end.shape[:1], end, generator)
        state = torch.lerp(start, end, time.unsqueeze(-1))
        error = self._velocity(observation, state, time) - (end - start)
        return error.square().mean(-1, keepdim=True)
