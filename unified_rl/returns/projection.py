"""Advantages of wrong answers' tokens by how much of them right answers share, in the space of hidden states. ResRL."""

from __future__ import annotations

import torch
from tensordict import TensorDictBase
from torch import Tensor
from torch.nn.functional import layer_norm

from unified_rl.ranges import Count, NonNegative, TwoOrMore, UnitInterval
from unified_rl.returns.groups import Groups
from unified_rl.returns.readings import STATES
from unified_rl.units import of_units

ROUNDS = 4
"""Iterations that turn a random subspace into that of the largest singular values."""


def residual(
    record: TensorDictBase,
    advantage: Tensor,
    *,
    positive: NonNegative = 0.1,
    least: UnitInterval = 0.1,
    rank: Count = 64,
    low: UnitInterval = 0.2,
    high: UnitInterval = 0.8,
    fewest: TwoOrMore = 4,
    most: TwoOrMore = 4096,
) -> Tensor:
    """Positive advantages times a number; negative ones by what right answers do not share of a token, ``[B, N]``.

    In each group the hidden states of tokens of positive advantage, standardised entry by entry (a layer norm) and
    centred, span a subspace of at most ``rank`` dimensions. The weight of a negative token is
    ``least + (1 - least) x``, where ``x`` is its mean squared residual outside the subspace, from 0 at the quantile
    ``low`` of the group's negative tokens to 1 at ``high``; 1/2 where all are equal. Groups without tokens of both
    signs keep their negative advantages. 2605.00380.

    Args:
        positive: factor of positive advantages.
        least: smallest weight of a negative token.
        rank: dimensions of the subspace.
        low, high: quantiles.
        fewest: positive tokens that a group must have.
        most: positive tokens that are looked at, the first ones.
    """
    mask, states = record["mask"], record[STATES]
    out = of_units(record, advantage)
    weight = torch.ones_like(out)
    index = Groups.of(record).index
    up, down = mask & (out > 0), mask & (out < 0)
    for group in range(int(index.max()) + 1):
        rows = (index == group).unsqueeze(-1)
        shared, others = (up & rows).nonzero(as_tuple=True), (down & rows).nonzero(as_tuple=True)
        if len(shared[0]) < fewest or not len(others[0]):
            continue
        h = _standardised(states[tuple(at[:most] for at in shared)])
        center = h.mean(0)
        distance = _outside(_standardised(states[others]) - center, _span(h - center, rank))
        bounds = torch.quantile(distance, distance.new_tensor([low, high]))
        width = bounds[1] - bounds[0]
        x = torch.where(width > 1e-12, ((distance - bounds[0]) / width.clamp(min=1e-12)).clamp(0.0, 1.0), 0.5)
        weight[others] = (least + (1 - least) * x).to(weight.dtype)
    return torch.where(out > 0, positive * out, weight * out)


residual.states = True  # type: ignore[attr-defined]
residual.ordered = (("low", "high"),)  # type: ignore[attr-defined]


def _standardised(h: Tensor) -> Tensor:
    return layer_norm(h.float(), h.shape[-1:])


def _span(h: Tensor, rank: int) -> Tensor:
    """Orthonormal directions ``[d, k]`` of the largest singular values of ``h [M, d]``, which is centred."""
    k = min(rank, len(h) - 1, h.shape[1])
    start = torch.randn(h.shape[1], k, generator=torch.Generator().manual_seed(0)).to(h.device)
    basis = torch.linalg.qr(h.T @ (h @ start)).Q
    for _ in range(ROUNDS):
        basis = torch.linalg.qr(h.T @ (h @ basis)).Q
    _, sizes, turned = torch.linalg.svd(h @ basis, full_matrices=False)
    kept = sizes > 1e-4 * sizes.amax().clamp(min=1e-12)  # equal states span fewer dimensions than they are
    out: Tensor = basis @ turned[kept].T
    return out


def _outside(h: Tensor, basis: Tensor) -> Tensor:
    """Mean square over entries of what a subspace leaves of ``h [M, d]``, ``[M]``."""
    return (h - (h @ basis) @ basis.T).square().mean(-1)
