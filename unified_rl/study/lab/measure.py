"""From moments to the numbers of the table."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from unified_rl.study.lab.exact import Moments

BATCHES = (16, 64, 256, 1024, 4096)
"""Batch sizes, in rows, for which the error is reported."""


@dataclass(frozen=True)
class Measured:
    """How good an estimator of the gradient is.

    Attributes:
        bias2: squared distance of its mean from the true gradient.
        variance: of one row's estimate; that of N rows is this over N.
        mean_norm, true_norm: norms of its mean and of the true gradient.
        cosine: between the two.
        cosine_error: standard error of the cosine; 0 where it is exact.
    """

    bias2: float
    variance: float
    mean_norm: float
    true_norm: float
    cosine: float
    cosine_error: float

    def error(self, rows: float) -> float:
        """Smallest expected squared error over learning rates, relative to the squared gradient: 0 best, 1 useless."""
        if self.cosine <= 0:
            return 1.0
        square = self.mean_norm**2
        return 1.0 - self.cosine**2 * square / (square + self.variance / rows)

    @property
    def free_bias2(self) -> float:
        """Squared bias that no learning rate removes, relative to the squared gradient: ``1 - cosine^2``."""
        return 1.0 - self.cosine**2 if self.cosine > 0 else 1.0

    @property
    def free_variance(self) -> float:
        """A row's variance at the learning rate that is best for many rows, relative to the squared gradient."""
        return self.cosine**2 * self.variance / self.mean_norm**2 if self.mean_norm > 0 else math.nan


def measure(moments: Moments, truth: Tensor) -> Measured:
    """The numbers of an estimator whose moments are known or sampled.

    Args:
        moments: its mean and variance.
        truth: ``[F, A]`` the true gradient.
    """
    true_square, inner = float(truth.square().sum()), float((moments.mean * truth).sum())
    square = max(moments.square, 0.0)
    norm = math.sqrt(square * true_square)
    cosine = min(max(inner / norm, -1.0), 1.0) if norm > 0 else 0.0
    spread = 0.0
    if moments.projections is not None and norm > 0:
        spread = float(moments.projections.std()) / math.sqrt(moments.batches) / norm
    bias2 = max(square - 2 * inner + true_square, 0.0)
    return Measured(bias2, max(moments.variance, 0.0), math.sqrt(square), math.sqrt(true_square), cosine, spread)
