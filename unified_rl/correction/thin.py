"""Thinning: training on a random part of the units or rows, weighted so that the expectation stays the same.

A rule returns ``weight [B, N]``: 0 where a unit is left out, else 1 over the probability that it was kept. ``total``
sums over the processes that share the batch. The denominator stays that of the full data, and levels are formed from
all units, so nothing else changes.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from tensordict import TensorDictBase
from torch import Tensor

from unified_rl.correction.across import Total, crossing, identity
from unified_rl.correction.levels import Layout
from unified_rl.correction.random import row_noise, unit_noise
from unified_rl.correction.view import share


def uniform(
    batch: TensorDictBase,
    layout: Layout,
    advantage: Tensor,
    total: Total = identity,
    *,
    keep: float = 0.5,
    seed: int = 0,
) -> Tensor:
    """Each unit is kept with probability ``keep``. NAT's uniform random selection, 2603.06619."""
    kept = unit_noise(batch, layout, seed) < keep
    return share(kept, advantage.dtype) / keep


def prefix(
    batch: TensorDictBase,
    layout: Layout,
    advantage: Tensor,
    total: Total = identity,
    *,
    least: float = 0.1,
    seed: int = 0,
) -> Tensor:
    """A random prefix is kept: its share is uniform on ``[least, 1]``. NAT's random prefix cutting, 2603.06619."""
    count = layout.count.to(advantage.dtype)
    cut = (least + (1 - least) * row_noise(batch, layout, seed).to(advantage.dtype)) * count
    before = layout.position.to(advantage.dtype) - 1
    start = before / count  # the unit is kept where the cut lies beyond its start
    probability = ((1 - start) / (1 - least)).clamp(1e-6, 1.0)
    return share(before < cut, advantage.dtype) / probability


def drop_negatives(
    batch: TensorDictBase,
    layout: Layout,
    advantage: Tensor,
    total: Total = identity,
    *,
    surplus: float = 1.0,
    seed: int = 0,
) -> Tensor:
    """Drops random rows of A < 0 beyond ``surplus`` times the number of those with A > 0. RED-Drop, 2509.24203."""
    each = advantage.masked_fill(~layout.mask, 0.0).sum(-1)
    negative, allowed = each < 0, surplus * float(total((each > 0).sum()))
    noise = row_noise(batch, layout, seed).squeeze(-1)
    kept = ~negative | (noise < crossing(noise[negative], math.ceil(allowed), total))
    return kept.to(advantage.dtype).unsqueeze(-1).expand_as(advantage)


THINS: dict[str, Callable[..., Tensor]] = {f.__name__: f for f in (uniform, prefix, drop_negatives)}
