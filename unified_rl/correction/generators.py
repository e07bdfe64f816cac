"""Generators of f-divergences, ``D_f(pi || p) = E_p[f(t)]`` with ``t = pi / p``, in terms of ``l = log t``.

Each gives ``f`` and ``f'``: the gradient of the divergence is ``E_pi[f'(t) grad log pi]``. Aligning Language Models
with Preferences through f-divergence Minimization, 2302.08215.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from unified_rl.correction.levels import CLAMP
from unified_rl.ranges import OpenUnit, ranged


class Generator(Protocol):
    """A convex function of the ratio of two probabilities that is 0 where both are the same."""

    def value(self, log_ratio: Tensor) -> Tensor:
        """``f(t)`` of any shape."""
        ...

    def slope(self, log_ratio: Tensor) -> Tensor:
        """``f'(t)`` of any shape."""
        ...


class ReverseKl:
    """``KL(pi || p)``: ``t log t``."""

    def value(self, log_ratio: Tensor) -> Tensor:
        """As said."""
        return log_ratio.clamp(max=CLAMP).exp() * log_ratio

    def slope(self, log_ratio: Tensor) -> Tensor:
        """``log t + 1``."""
        return log_ratio + 1


class ForwardKl:
    """``KL(p || pi)``: ``-log t``."""

    def value(self, log_ratio: Tensor) -> Tensor:
        """As said."""
        return -log_ratio

    def slope(self, log_ratio: Tensor) -> Tensor:
        """``-1 / t``."""
        return -(-_safe(log_ratio)).exp()


class JensenShannon:
    """The Jensen-Shannon divergence: ``(t log t - (t + 1) log((t + 1) / 2)) / 2``."""

    def value(self, log_ratio: Tensor) -> Tensor:
        """As said."""
        x = _safe(log_ratio)
        return 0.5 * (x.exp() * x - (x.exp() + 1) * (F.softplus(x) - math.log(2)))

    def slope(self, log_ratio: Tensor) -> Tensor:
        """``log(2 t / (t + 1)) / 2``."""
        return 0.5 * (math.log(2) - F.softplus(-log_ratio))


class PearsonChi2:
    """``chi2(pi || p)``: ``(t - 1)^2``."""

    def value(self, log_ratio: Tensor) -> Tensor:
        """As said."""
        return _safe(log_ratio).expm1().square()

    def slope(self, log_ratio: Tensor) -> Tensor:
        """``2 (t - 1)``."""
        return 2 * _safe(log_ratio).expm1()


class NeymanChi2:
    """``chi2(p || pi)``: ``(t - 1)^2 / t``."""

    def value(self, log_ratio: Tensor) -> Tensor:
        """As said."""
        x = _safe(log_ratio)
        return x.exp() - 2 + (-x).exp()

    def slope(self, log_ratio: Tensor) -> Tensor:
        """``1 - 1 / t^2``."""
        return -(-2 * _safe(log_ratio)).expm1()


class TotalVariation:
    """``|t - 1| / 2``."""

    def value(self, log_ratio: Tensor) -> Tensor:
        """As said."""
        return 0.5 * _safe(log_ratio).expm1().abs()

    def slope(self, log_ratio: Tensor) -> Tensor:
        """``sign(t - 1) / 2``."""
        return 0.5 * log_ratio.sign()


class Hellinger:
    """The squared Hellinger distance: ``(sqrt(t) - 1)^2 / 2``."""

    def value(self, log_ratio: Tensor) -> Tensor:
        """As said."""
        return 0.5 * (0.5 * _safe(log_ratio)).expm1().square()

    def slope(self, log_ratio: Tensor) -> Tensor:
        """``(1 - 1 / sqrt(t)) / 2``."""
        return -0.5 * (-0.5 * _safe(log_ratio)).expm1()


@ranged()
class Alpha:
    """The alpha divergence, from ``KL(pi || p)`` (alpha to 0) to ``KL(p || pi)`` (alpha to 1).

    ``(t^(1-a) - (1-a) t - a) / (a (a-1))``.

    Args:
        alpha: strictly between 0 and 1.
    """

    def __init__(self, *, alpha: OpenUnit = 0.5) -> None:
        self.alpha = alpha

    def value(self, log_ratio: Tensor) -> Tensor:
        """As said."""
        a, x = self.alpha, _safe(log_ratio)
        return (((1 - a) * x).expm1() - (1 - a) * x.expm1()) / (a * (a - 1))

    def slope(self, log_ratio: Tensor) -> Tensor:
        """``(t^-a - 1) / -a``."""
        return (-self.alpha * _safe(log_ratio)).expm1() / -self.alpha


GENERATORS: dict[str, Callable[..., Generator]] = {
    "reverse_kl": ReverseKl,
    "forward_kl": ForwardKl,
    "js": JensenShannon,
    "pearson_chi2": PearsonChi2,
    "neyman_chi2": NeymanChi2,
    "tv": TotalVariation,
    "hellinger": Hellinger,
    "alpha": Alpha,
}


def _safe(log_ratio: Tensor) -> Tensor:
    return torch.clamp(log_ratio, -CLAMP, CLAMP)
