"""What a prompt is worth, from how often it is solved: ``(success rate [n], *, settings) -> weight [n]``."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from unified_rl.ranges import NonNegative, Positive, UnitInterval


def deviation(rate: Tensor, *, eps: NonNegative = 0.05) -> Tensor:
    """``sqrt(p (1 - p)) + eps``: the spread of the reward, and something for every prompt. SPO, 2509.13232."""
    return (rate * (1 - rate)).clamp(min=0).sqrt() + eps


def variance(rate: Tensor, *, eps: NonNegative = 0.0) -> Tensor:
    """``p (1 - p) + eps``: the variance of the reward. VADE, 2511.18902."""
    return (rate * (1 - rate)).clamp(min=0) + eps


def nearest(rate: Tensor, *, target: UnitInterval = 0.5) -> Tensor:
    """``1 - |p - target|``, largest where the rate is the wanted one. PCL, 2510.01135."""
    return 1 - (rate - target).abs()


def gaussian(rate: Tensor, *, target: UnitInterval = 0.5, sigma: Positive = 0.2) -> Tensor:
    """``exp(-(p - target)^2 / (2 sigma^2))``; equal for every prompt where ``sigma`` is large. FG-ExPO."""
    return (-(rate - target).square() / (2 * sigma**2)).exp()


DIFFICULTIES: dict[str, Callable[..., Tensor]] = {
    "deviation": deviation,
    "variance": variance,
    "nearest": nearest,
    "gaussian": gaussian,
}


def draw_weighted(weight: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """``count`` places of ``weight [n]``, one after the other in proportion to what is left; ``[count]``, ascending.

    Exponential races: the smallest of ``E_i / w_i`` are such a sample without replacement. Weights of 0 come last.
    """
    waits = torch.empty(len(weight), dtype=torch.float64).exponential_(generator=generator) / weight.double()
    return waits.argsort(stable=True)[:count].sort().values


def draw_top(weight: Tensor, count: int) -> Tensor:
    """The ``count`` places of the largest weights, ``[count]`` ascending; among equals the first."""
    return weight.argsort(descending=True, stable=True)[:count].sort().values
