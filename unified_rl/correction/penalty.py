"""Penalties: regularisers that stand beside the policy term and are never multiplied by its weights.

Each maps ``x = log_prob - anchor_log_prob [B, N]`` (differentiable, 0 where masked) to a penalty a unit, ``[B, N]``.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor


def k1(x: Tensor) -> Tensor:
    """``x``: with the anchor ``none``, the log-likelihood itself."""
    return x


def k2(x: Tensor) -> Tensor:
    """``x^2 / 2``."""
    return 0.5 * x.square()


def k3(x: Tensor) -> Tensor:
    """``exp(-x) + x - 1``: unbiased for KL(current || anchor) on fresh samples, never negative."""
    return (-x).exp() + x - 1


def k3_plus(x: Tensor) -> Tensor:
    """The value of k3 with the gradient of k2."""
    gradient = k2(x)
    return gradient + (k3(x) - gradient).detach()


def absolute(x: Tensor) -> Tensor:
    """``|x|``."""
    return x.abs()


PENALTIES: dict[str, Callable[[Tensor], Tensor]] = {"k1": k1, "k2": k2, "k3": k3, "k3_plus": k3_plus, "abs": absolute}
