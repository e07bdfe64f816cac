"""Selections: which units a penalty is for, chosen on the whole batch and carried in its statistics.

``select(view, total, *, settings) -> [B, N]`` bool; ``total`` sums over the processes that share the batch.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from unified_rl.correction.internal.distributed import Total, crossing
from unified_rl.correction.internal.hashing import unit_noise
from unified_rl.correction.kernels.batch import covariance
from unified_rl.correction.view import BEYOND, View, masked
from unified_rl.ranges import Fraction, Seed


def negative(view: View, total: Total) -> Tensor:
    """Units of negative advantage, ``[B, N]`` bool."""
    return view.mask & (view.advantage < 0)


def positive(view: View, total: Total) -> Tensor:
    """Units of positive advantage, ``[B, N]`` bool."""
    return view.mask & (view.advantage > 0)


def selected(view: View, total: Total) -> Tensor:
    """The units that the kernel's own companion chose."""
    return view.stats["selected"]


def top_covariance(view: View, total: Total, *, fraction: Fraction = 2e-4, seed: Seed = 0) -> Tensor:
    """The units of highest covariance of advantage and log-prob; at least one. ``seed`` decides between equal ones."""
    cov = covariance(view, total)
    number = max(1, int(fraction * int(total(view.layout.units))))
    last = -crossing(masked(view.mask, -cov, BEYOND).flatten(), number - 1, total)
    chosen = torch.zeros_like(view.mask)
    row, column = (view.mask & (cov >= last)).nonzero(as_tuple=True)
    above = cov[row, column] > last
    left = number - int(total(above.sum()))
    if int(total((~above).sum())) > left:  # equal ones: a draw decides
        noise = unit_noise(view.batch, view.layout, seed, (row, column)).masked_fill(above, torch.inf)
        above |= noise <= crossing(noise[~above], left - 1, total)
        row, column = row[above], column[above]
    chosen[row, column] = True
    return chosen


SELECTIONS: dict[str, Callable[..., Tensor]] = {f.__name__: f for f in (negative, positive, selected, top_covariance)}
