"""Levels: at which grain the log-ratio of two policies is formed.

Every level maps unit log-ratios ``d [B, N]`` (0 where masked) to one log-ratio a unit, ``[B, N]``, differentiable in
``d``. Values at masked units are meaningless and are dropped later. Formulas: DeepSeekMath (2402.03300, unit), GSPO
(2507.18071, geometric), CTPO (2605.07331, prefix), MinPRO (2601.22718, min_prefix), HölderPO (2605.12058).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from tensordict import TensorDictBase
from torch import Tensor

from unified_rl.units import Steps

Level = Callable[[Tensor, "Layout"], Tensor]
"""From unit log-ratios ``[B, N]`` and the layout to one log-ratio a unit, ``[B, N]``."""

CLAMP = 20.0
"""Log-ratios are clamped to plus or minus this before ``exp``, for a unit and again for a sum of units."""


@dataclass
class Layout:
    """Which units of a batch count, and how they form steps.

    Attributes:
        mask: ``[B, N]`` bool, units that are the policy's own and have finite log-probs.
        batch: the record, for ``step_index`` and ``reward``.
    """

    mask: Tensor
    batch: TensorDictBase

    @cached_property
    def count(self) -> Tensor:
        """Masked-in units of each row, at least 1, ``[B, 1]`` float."""
        return self.mask.sum(-1, keepdim=True).clamp(min=1).to(torch.float32)

    @cached_property
    def units(self) -> Tensor:
        """How many units are masked in, scalar int64."""
        return self.mask.count_nonzero()

    @cached_property
    def position(self) -> Tensor:
        """1-based index of each unit among its row's masked-in ones, ``[B, N]`` float; the others do not advance it."""
        return self.mask.cumsum(-1).clamp(min=1).to(torch.float32)

    @cached_property
    def steps(self) -> Steps:
        """The steps of the record under this mask."""
        steps = Steps.of(self.batch)
        return Steps(steps.step_index, self.mask, steps.num_steps, steps.units_per_step)


def unit(d: Tensor, layout: Layout) -> Tensor:
    """Each unit's own log-ratio."""
    return d


def step(d: Tensor, layout: Layout) -> Tensor:
    """Mean over the units of the step (the geometric mean of their ratios)."""
    return layout.steps.broadcast(layout.steps.mean(d))


def step_sum(d: Tensor, layout: Layout) -> Tensor:
    """Sum over the units of the step: the exact ratio of the executed action."""
    return layout.steps.broadcast(layout.steps.sum(d)).clamp(-CLAMP, CLAMP)


def sequence(d: Tensor, layout: Layout) -> Tensor:
    """Sum over the row: the exact trajectory ratio."""
    return d.sum(-1, keepdim=True).clamp(-CLAMP, CLAMP).expand_as(d)


def geometric(d: Tensor, layout: Layout) -> Tensor:
    """Mean over the row (length-normalised; not an importance weight any more)."""
    return (d.sum(-1, keepdim=True) / layout.count.to(d.dtype)).expand_as(d)


def prefix(d: Tensor, layout: Layout) -> Tensor:
    """Sum of the units up to and including this one: the exact per-decision ratio."""
    return d.cumsum(-1).clamp(-CLAMP, CLAMP)


def prefix_geometric(d: Tensor, layout: Layout) -> Tensor:
    """Mean of the units up to and including this one."""
    return d.cumsum(-1) / layout.position.to(d.dtype)


def min_prefix(d: Tensor, layout: Layout, *, capped: bool = False) -> Tensor:
    """Own log-ratio plus the smallest one before it (0 for the first; ``capped`` never lets it exceed 0)."""
    seen = d.masked_fill(~layout.mask, math.inf).cummin(-1).values
    before = torch.cat([torch.full_like(seen[..., :1], math.inf), seen[..., :-1]], -1)
    before = before.masked_fill(torch.isinf(before), 0.0)
    return d + (before.clamp(max=0.0) if capped else before)


def hoelder(d: Tensor, layout: Layout, *, p: float = 1.0) -> Tensor:
    """Log of the power mean of the unit ratios of a row; ``p = 0`` is the geometric mean, ``p = 1`` the arithmetic."""
    if p == 0.0:
        return geometric(d, layout)
    away = (layout.mask.view(torch.uint8).to(d.dtype) - 1) * 1e30  # as good as -inf, but finite in an empty row
    mean = ((p * d + away).logsumexp(-1, keepdim=True) - layout.count.to(d.dtype).log()) / p
    return mean.clamp(-CLAMP, CLAMP).expand_as(d)


LEVELS: dict[str, Callable[..., Tensor]] = {
    f.__name__: f for f in (unit, step, step_sum, sequence, geometric, prefix, prefix_geometric, min_prefix, hoelder)
}
