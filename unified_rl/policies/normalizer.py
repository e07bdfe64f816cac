"""Running normalisation of observations, held in buffers so that it travels with the weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from unified_rl.ranges import Count, Positive, ranged

MOMENTS = "moments"
"""Key of a sample's and a record's ``[...]`` int64 column: which moments its observation was standardised by."""
GROWTH = 1.01
"""Moments move when the observations seen have grown by this factor, so there are some 230 sets a factor of ten."""
CONSTANT = 1e-12
"""An entry of no more variance than float32 makes of a constant is not scaled: a data set says nothing of its size."""


def seen_by(network: nn.Module) -> str:
    """The column of rows that holds observations as this very object sees them; a copy of it has a column of its own.

    It lives for one update, and is never stored.
    """
    return f"seen_by_{id(network)}"


@ranged()
class RunningNormalizer(nn.Module):
    """Standardises observations by running moments: ``clamp((x - mean) / std, -limit, limit)``.

    Moments are weights of the policy that no gradient moves: a log-prob recorded under older moments is scored again
    under those same moments. So every set that was ever in use is kept under a number, :meth:`forward` takes the
    numbers that a record holds, and moments change in :meth:`update` only. Moments that pre-trained weights were fitted
    under stay as they are (:meth:`freeze`). An entry that never varied is centred and not scaled: else the first small
    move of a joint that stood still in all demonstrations would be ten standard deviations.

    Args:
        dim: width ``d`` of the observation.
        limit: outputs are clamped to plus or minus this, in standard deviations.
        epsilon: added to the variance.

    Attributes:
        count, mean, var: of all observations seen, float64 ``[]``, ``[d]``, ``[d]``.
        means, scales: every set of moments that was in use, float32 ``[C, d]``, of which the first ``used + 1`` count.
        used: number of the set in use, int64 ``[]``.
        frozen: bool ``[]``.
        mean_used, scale_used: the set in use, float32 ``[d]``; written in place, so that a captured CUDA graph sees it.

    Shapes: any ``[..., d]`` float to the same. Source: parallel moments as in Chan, Golub, LeVeque (1983).
    """

    count: Tensor
    mean: Tensor
    var: Tensor
    means: Tensor
    scales: Tensor
    used: Tensor
    counted: Tensor
    frozen: Tensor
    mean_used: Tensor
    scale_used: Tensor

    def __init__(self, dim: Count, limit: Positive = 10.0, epsilon: Positive = 1e-8) -> None:
        super().__init__()
        self.limit = limit
        self.epsilon = epsilon
        # float64: a running mean over 1e7 float32 observations would stop moving
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))
        self.register_buffer("mean", torch.zeros(dim, dtype=torch.float64))
        self.register_buffer("var", torch.ones(dim, dtype=torch.float64))
        self.register_buffer("means", torch.zeros(1, dim))
        self.register_buffer("scales", torch.ones(1, dim))
        self.register_buffer("used", torch.zeros((), dtype=torch.int64))
        self.register_buffer("counted", torch.zeros((), dtype=torch.float64))
        self.register_buffer("frozen", torch.zeros((), dtype=torch.bool))
        self.register_buffer("mean_used", torch.zeros(dim), persistent=False)
        self.register_buffer("scale_used", torch.ones(dim), persistent=False)

    @torch.no_grad()
    def update(self, observation: Tensor) -> None:
        """Adds ``observation [..., d]`` to the moments; nothing happens to frozen ones."""
        x = observation.reshape(-1, observation.shape[-1]).to(torch.float64)
        if x.shape[0] == 0 or bool(self.frozen):
            return
        total = self.count + x.shape[0]
        delta = x.mean(0) - self.mean
        # an empty count has weight 0, so the initial unit variance drops out
        squares = self.var * self.count + x.var(0, correction=0) * x.shape[0]
        squares = squares + delta.square() * self.count * x.shape[0] / total
        self.mean.add_(delta * x.shape[0] / total)
        self.var.copy_(squares / total)
        self.count.copy_(total)
        if bool(total >= GROWTH * self.counted):
            self._use()

    @torch.no_grad()
    def freeze(self) -> None:
        """From now on the moments stay as they are; nothing happens before the first :meth:`update`."""
        if bool(self.count > 0) and not bool(self.frozen):
            self._use()
            self.frozen.fill_(True)

    def _use(self) -> None:
        """Puts the moments of all that was seen into use, under the next number."""
        if bool(self.count == self.counted):
            return
        at = int(self.used) + 1
        if at == len(self.means):  # twice the room: shapes, which a compiled function depends on, change rarely
            self.means = torch.cat([self.means, torch.zeros_like(self.means)])
            self.scales = torch.cat([self.scales, torch.ones_like(self.scales)])
        self.means[at] = self.mean.to(self.means.dtype)
        constant = self.var <= CONSTANT * (1.0 + self.mean.square())
        scale = torch.where(constant, torch.ones_like(self.var), (self.var + self.epsilon).rsqrt())
        self.scales[at] = scale.to(self.scales.dtype)
        self.mean_used.copy_(self.means[at])
        self.scale_used.copy_(self.scales[at])
        self.used.fill_(at)
        self.counted.copy_(self.count)

    def forward(self, observation: Tensor, moments: Tensor | None = None) -> Tensor:
        """Normalised observation, same shape and dtype; clamped alone before the first update.

        Args:
            observation: ``[..., d]`` raw.
            moments: ``[...]`` int64 numbers of the moments to standardise by; None takes those in use.
        """
        if moments is None:
            mean, scale = self.mean_used, self.scale_used
        else:
            mean, scale = self.means[moments], self.scales[moments]
        mean, scale = mean.to(observation.dtype), scale.to(observation.dtype)
        return ((observation - mean) * scale).clamp(-self.limit, self.limit)

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *args: Any) -> None:
        """Takes in as many sets of moments as were saved; one, where none were kept."""
        mean, var = state.get(f"{prefix}mean"), state.get(f"{prefix}var")
        if mean is not None and var is not None:
            state.setdefault(f"{prefix}means", mean[None].to(self.means.dtype))
            state.setdefault(f"{prefix}scales", (var + self.epsilon).rsqrt()[None].to(self.scales.dtype))
            state.setdefault(f"{prefix}used", torch.zeros_like(self.used))
            state.setdefault(f"{prefix}counted", state[f"{prefix}count"])
            state.setdefault(f"{prefix}frozen", torch.zeros_like(self.frozen))
            kept = len(state[f"{prefix}means"])
            self.means, self.scales = (x.new_zeros(kept, x.shape[1]) for x in (self.means, self.scales))
        super()._load_from_state_dict(state, prefix, *args)
        if mean is not None:
            self.mean_used.copy_(self.means[self.used])
            self.scale_used.copy_(self.scales[self.used])
