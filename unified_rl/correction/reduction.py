"""Reductions: what each unit's term is divided by. Every one is a constant of the row, so ``[B]`` says it all."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from unified_rl.errors import ConfigError

ReduceSum = Callable[[Tensor], Tensor]


def _inverse(count: Tensor) -> Tensor:
    return torch.where(count > 0, 1.0 / count.clamp(min=1e-30), torch.zeros_like(count))


def token_mean(units: Tensor, horizon: float | None, total: ReduceSum) -> Tensor:
    """1 over the units of the whole batch."""
    return _inverse(total(units.sum())).expand_as(units)


def sequence_mean_token_mean(units: Tensor, horizon: float | None, total: ReduceSum) -> Tensor:
    """Mean over non-empty rows of the mean over their units."""
    return _inverse(units) * _inverse(total((units > 0).sum().to(units.dtype)))


def sequence_mean_token_sum(units: Tensor, horizon: float | None, total: ReduceSum) -> Tensor:
    """Mean over non-empty rows of the sum over their units."""
    return _inverse(total((units > 0).sum().to(units.dtype))).expand_as(units)


def sequence_mean_token_sum_norm(units: Tensor, horizon: float | None, total: ReduceSum) -> Tensor:
    """The same, divided by the constant ``horizon`` (Dr. GRPO)."""
    return sequence_mean_token_sum(units, None, total) / _required(horizon)


def token_sum(units: Tensor, horizon: float | None, total: ReduceSum) -> Tensor:
    """The sum, divided by ``horizon`` where one is given."""
    return torch.full_like(units, 1.0 if horizon is None else 1.0 / horizon)


def _required(horizon: float | None) -> float:
    if not horizon:
        raise ConfigError("reduce=sequence-mean-token-sum-norm needs horizon: a constant, such as the longest answer")
    return horizon


REDUCTIONS: dict[str, Callable[[Tensor, float | None, ReduceSum], Tensor]] = {
    "token-mean": token_mean,
    "sequence-mean-token-mean": sequence_mean_token_mean,
    "sequence-mean-token-sum": sequence_mean_token_sum,
    "sequence-mean-token-sum-norm": sequence_mean_token_sum_norm,
    "token-sum": token_sum,
}
"""Each takes units ``[B]`` (float counts), the horizon and a cross-process sum, and returns the coefficient ``[B]``."""
