"""Thinning: training on a random part of the units or rows, weighted so that the expectation stays the same.

A rule returns ``weight [B, N]``: 0 where a unit is left out, else 1 over the probability that it was kept; and, where
it changes them, the advantages ``[B, N]``. ``total`` sums over the processes that share the batch. The denominator
stays that of the full data, and levels are formed from all units, so nothing else changes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from tensordict import TensorDictBase
from torch import Tensor

from unified_rl.correction.internal.distributed import Total, identity
from unified_rl.correction.internal.hashing import row_noise, unit_noise
from unified_rl.correction.levels import Layout
from unified_rl.correction.view import narrow, share
from unified_rl.ranges import Fraction, NonNegative, Seed, Share
from unified_rl.returns.groups import Groups


def uniform(
    batch: TensorDictBase,
    layout: Layout,
    advantage: Tensor,
    total: Total = identity,
    *,
    keep: Fraction = 0.5,
    seed: Seed = 0,
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
    least: Share = 0.1,
    seed: Seed = 0,
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
    surplus: NonNegative = 1.0,
    recenter: bool = True,
    seed: Seed = 0,
) -> tuple[Tensor, Tensor]:
    """Of each group, drops random rows of A < 0 beyond ``surplus`` times its other rows. RED-Drop, 2509.24203.

    Returns:
        The weight, and the advantage less its mean over what is left of the group (as it was where not ``recenter``).
    """
    groups = Groups.of(batch)
    live = layout.mask.any(-1)
    each = advantage.masked_fill(~layout.mask, 0.0).sum(-1) / layout.count.squeeze(-1).to(advantage.dtype)
    negative = live & (each < 0)
    allowed = (surplus * groups.sum(share(live & ~negative, advantage.dtype))).ceil()
    rank = _rank(row_noise(batch, layout, seed).squeeze(-1).masked_fill(~negative, torch.inf), groups)
    kept = share(live & (~negative | (rank < allowed)), advantage.dtype)
    if recenter:
        shift = groups.weighted_mean(each, kept).unsqueeze(-1)
        advantage = (narrow(advantage) - shift).expand_as(advantage)
    return kept.unsqueeze(-1).expand_as(advantage), advantage


def _rank(x: Tensor, groups: Groups) -> Tensor:
    """How many rows of its group have a smaller ``x [B]``, ``[B]`` int64."""
    order = x.argsort()
    order = order[groups.index[order].argsort(stable=True)]
    at = torch.arange(len(x), device=x.device)
    first = torch.zeros_like(at).scatter_reduce(0, groups.index[order], at, "amin", include_self=False)
    return torch.empty_like(at).index_copy(0, order, at - first[groups.index[order]])


THINS: dict[str, Callable[..., Tensor | tuple[Tensor, Tensor]]] = {
    f.__name__: f for f in (uniform, prefix, drop_negatives)
}
