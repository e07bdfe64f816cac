"""Diffusion policies: a DDPM chain with a floor on the noise of every step."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from unified_rl.configurable import configurable
from unified_rl.policies.base import draw_normal
from unified_rl.policies.chain import ChainPolicy
from unified_rl.ranges import Count, Positive, UpperBound, ranged
from unified_rl.spaces import Space


def cosine_alpha_bar(steps: int, offset: float = 0.008, beta_max: float = 0.999) -> Tensor:
    """Cumulative signal shares ``[K + 1]`` float64 of the cosine schedule; entry 0 is 1.

    ``f(k) = cos^2(((k / K + offset) / (1 + offset)) pi / 2)``, ``beta_k = min(1 - f(k) / f(k - 1), beta_max)``,
    ``alpha_bar_k`` the product of ``1 - beta``. "Improved Denoising Diffusion Probabilistic Models" (arXiv:2102.09672).
    """
    phase = (torch.arange(steps + 1, dtype=torch.float64) / steps + offset) / (1 + offset) * math.pi / 2
    share = phase.cos().square()
    beta = (1 - share[1:] / share[:-1]).clamp(max=beta_max)
    return torch.cat((torch.ones(1, dtype=torch.float64), (1 - beta).cumprod(0)))


def posterior_constants(alpha_bar: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Constants of ``q(x_{k-1} | x_k, a) = N(c1 a + c2 x_k, variance)`` for k = 1..K, each ``[K]``.

    "Denoising Diffusion Probabilistic Models" (arXiv:2006.11239), equations 6 and 7.
    """
    now, before = alpha_bar[1:], alpha_bar[:-1]
    alpha = now / before
    beta = 1 - alpha
    c1 = beta * before.sqrt() / (1 - now)
    c2 = alpha.sqrt() * (1 - before) / (1 - now)
    return c1, c2, beta * (1 - before) / (1 - now)


@configurable
@ranged("policy")
class DiffusionPolicy(ChainPolicy):
    """A DDPM policy with noise prediction and a cosine schedule.

    Chain step j takes diffusion step ``k = K - j``: ``x_{j+1} ~ N(c1_k a_hat + c2_k x_j, std_k^2)`` with
    ``a_hat = (x - sqrt(1 - alpha_bar) eps) / sqrt(alpha_bar)``, optionally clipped, and ``std_k`` the posterior's or
    ``std_min``, whichever is larger. Floor and clipping hold in sampling and in scoring alike. Deterministic use is
    DDIM with eta = 0 ("Denoising Diffusion Implicit Models", arXiv:2010.02502).

    Sources: "Diffusion Policy" (arXiv:2303.04137), "Diffusion Policy Policy Optimization" (arXiv:2409.00588).

    Args:
        space: the environment's; or sizes and bounds, as of :class:`~unified_rl.policies.base.Policy`.
        sizes: the rest of those.
        steps: diffusion steps.
        std_min: floor of every step's standard deviation, where the action range is [-1, 1].
        clip_prediction: bound on the predicted action, 1 being the action's; None for no clipping.
        chain: further arguments of :class:`~unified_rl.policies.chain.ChainPolicy`.

    Raises:
        ConfigError: ``std_min`` not above 0, and those of the base class.
    """

    signal: Tensor
    noise: Tensor
    next_signal: Tensor
    next_noise: Tensor
    c1: Tensor
    c2: Tensor
    log_stds: Tensor

    def __init__(
        self,
        space: Space | int | None = None,
        *sizes: Any,
        steps: Count = 20,
        std_min: Positive = 0.05,
        clip_prediction: UpperBound | None = 1.0,
        **chain: Any,
    ) -> None:
        super().__init__(space, *sizes, steps=steps, **chain)
        self.clip_prediction = clip_prediction
        self._register_schedule(cosine_alpha_bar(steps), std_min)

    def _register_schedule(self, alpha_bar: Tensor, std_min: float) -> None:
        """Constants by chain step, which runs against diffusion time."""
        c1, c2, variance = posterior_constants(alpha_bar)
        constants = {
            "signal": alpha_bar[1:].sqrt(),
            "noise": (1 - alpha_bar[1:]).sqrt(),
            "next_signal": alpha_bar[:-1].sqrt(),
            "next_noise": (1 - alpha_bar[:-1]).sqrt(),
            "c1": c1,
            "c2": c2,
            "log_stds": variance.sqrt().clamp(min=std_min).log(),
        }
        for name, value in constants.items():
            self.register_buffer(name, value.flip(0).unsqueeze(-1).to(torch.float32), persistent=False)

    def _predicted_action(self, output: Tensor, state: Tensor, index: Tensor | int) -> Tensor:
        action = (state - self.noise[index] * output) / self.signal[index]
        limit = self.clip_prediction
        return action if limit is None else action.clamp(-limit, limit)

    def _kernel(self, output: Tensor, state: Tensor, index: Tensor | int) -> tuple[Tensor, Tensor]:
        action = self._predicted_action(output, state, index)
        return self.c1[index] * action + self.c2[index] * state, self.log_stds[index]

    def _noiseless(self, output: Tensor, state: Tensor, index: Tensor | int) -> Tensor:
        action = self._predicted_action(output, state, index)
        # the noise that fits the clipped prediction, so that the pair still explains the state
        noise = (state - self.signal[index] * action) / self.noise[index]
        return self.next_signal[index] * action + self.next_noise[index] * noise

    def _nll(self, observation: Tensor, action: Tensor, generator: torch.Generator) -> Tensor:
        """Noise-prediction loss at one random step a sample, mean over dimensions, ``[M, 1]``; not a likelihood."""
        end = self.from_env(action)
        noise = draw_normal(end.shape, end, generator)
        index = torch.randint(self.steps, end.shape[:1], generator=generator, device=generator.device).to(end.device)
        state = self.signal[index] * end + self.noise[index] * noise
        net = self.network
        output: Tensor = net(net.condition(observation), state, net.clock(self.times)[index])
        return (output - noise).square().mean(-1, keepdim=True)
