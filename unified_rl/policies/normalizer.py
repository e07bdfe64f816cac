"""Running normalisation of observations, held in buffers so that it travels with the weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class RunningNormalizer(nn.Module):
    """Standardises observations by running moments: ``clamp((x - mean) / std, -limit, limit)``.

    Moments change in :meth:`update` only, never in :meth:`forward`: call it between collecting and optimising as a
    whole, since a log-prob that was recorded under older moments is one of an older policy.

    Args:
        dim: width ``d`` of the observation.
        limit: outputs are clamped to plus or minus this, in standard deviations.
        epsilon: added to the variance.

    Shapes: any ``[..., d]`` float to the same. Source: parallel moments as in Chan, Golub, LeVeque (1983).
    """

    count: Tensor
    mean: Tensor
    var: Tensor

    def __init__(self, dim: int, limit: float = 10.0, epsilon: float = 1e-8) -> None:
        super().__init__()
        self.limit = limit
        self.epsilon = epsilon
        # float64: a running mean over 1e7 float32 observations would stop moving
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))
        self.register_buffer("mean", torch.zeros(dim, dtype=torch.float64))
        self.register_buffer("var", torch.ones(dim, dtype=torch.float64))

    @torch.no_grad()
    def update(self, observation: Tensor) -> None:
        """Adds ``observation [..., d]`` to the moments."""
        x = observation.reshape(-1, observation.shape[-1]).to(torch.float64)
        if x.shape[0] == 0:
            return
        total = self.count + x.shape[0]
        delta = x.mean(0) - self.mean
        # an empty count has weight 0, so the initial unit variance drops out
        squares = self.var * self.count + x.var(0, correction=0) * x.shape[0]
        squares = squares + delta.square() * self.count * x.shape[0] / total
        self.mean.add_(delta * x.shape[0] / total)
        self.var.copy_(squares / total)
        self.count.copy_(total)

    def forward(self, observation: Tensor) -> Tensor:
        """Normalised observation, same shape and dtype; the identity before the first update."""
        scale = (self.var + self.epsilon).rsqrt().to(observation.dtype)
        return ((observation - self.mean.to(observation.dtype)) * scale).clamp(-self.limit, self.limit)
