"""Kernels whose weight depends on the whole optimiser batch: each has a ``prepare`` companion with the same settings.

``prepare(view, total, *, settings) -> {name: [B] or [B, N]}`` runs once over the batch; ``total`` sums over the
processes that share it. What it finds is carried in the statistics, so that micro-batches give the gradient of the
whole.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from unified_rl.correction.internal.distributed import Total, crossing
from unified_rl.correction.internal.hashing import unit_noise
from unified_rl.correction.kernels.unit import outside
from unified_rl.correction.view import BEYOND, View, anchor_log_prob, masked, narrow, only, share, sum_all


def _rows(x: Tensor, view: View) -> Tensor:
    """A scalar as a statistic of every row, ``[B]``."""
    return x.expand(view.mask.shape[0])


def _ess(w: Tensor, view: View, total: Total) -> Tensor:
    """Effective sample size of ``w [B, N]`` (0 where masked) as a fraction of the units; 1 where there are none."""
    n, square = total(view.layout.units), total(sum_all(w.square()))
    ess = total(sum_all(w)).square() / (n * square)
    return torch.where(square > 0, ess, 1.0).to(w.dtype)


def ess_cap_prepare(view: View, total: Total) -> dict[str, Tensor]:
    """ESS of the ratio over the batch, and 1 - ESS for the penalty."""
    ess = _ess(only(view.mask, view.ratio), view, total)
    return {"ess": _rows(ess, view), "one_minus_ess": _rows(1 - ess, view)}


def ess_cap(view: View) -> Tensor:
    """``min(ratio, ESS)``. P3O, 1905.01756."""
    return torch.minimum(view.ratio, view.row("ess"))


def ess_cap_mixed_prepare(view: View, total: Total) -> dict[str, Tensor]:
    """The smaller ESS of the ratios to behavior and proximal, and the mixture of the two that the penalty pulls to."""
    to_behavior, to_proximal = view.against("behavior").exp(), view.against("proximal").exp()
    b, p = (_ess(only(view.mask, ratio), view, total) for ratio in (to_behavior, to_proximal))
    ess = torch.minimum(b, p)
    weight = torch.stack([1 - b, 1 - p]).clamp(min=0.0)
    weight = torch.where(weight.sum() > 1e-6, weight / weight.sum().clamp(min=1e-30), 0.5)
    density = weight[0] / to_behavior + weight[1] / to_proximal  # of the mixture, over the current policy's
    mixture = view.raw_log_prob + density.log_()
    gap = torch.where(1 - ess > 1e-6, 1 - ess, 0.0)
    return {"ess": _rows(ess, view), "one_minus_ess": _rows(gap, view), "mixture_log_prob": mixture}


def ess_cap_mixed(view: View) -> Tensor:
    """``min(ratio to behavior, min ESS)``. P4O, in the code of Trust the Batch (P3O's successor)."""
    return torch.minimum(view.against("behavior").exp(), view.row("ess"))


def m2_mask_prepare(view: View, total: Total, *, budget: float = 0.04, weighted: bool = True) -> dict[str, Tensor]:
    """Keeps the largest set of harmful units whose mean squared log-ratio is within the budget.

    Units at or below the budget can never be dropped, so only those above it are sorted; equal ones go together.
    """
    d = view.unit_log_ratio
    square = d.square()
    harmful = view.mask & (narrow(view.advantage) * d > 0)
    bound = min(budget * (1 + 1e-6), 1e6)  # what rounding may add; no square is that large
    over = harmful & (square > bound)
    room = total(sum_all(only(harmful & ~over, square.neg().add_(bound))))
    cut = crossing(square[over], room, total, lambda x: x.double() - bound)
    return {"m2_keep": ~(over & (square >= cut))}


def m2_mask(view: View, *, budget: float = 0.04, weighted: bool = True) -> Tensor:
    """The ratio (1 where not ``weighted``) on units inside a second-moment budget, else 0. M2PO, 2510.01161."""
    kept = view.stats["m2_keep"]
    return only(kept, view.ratio) if weighted else share(kept, view.ratio.dtype)


def searched_ppo_prepare(
    view: View,
    total: Total,
    *,
    low: float = 0.6,
    low_max: float = 0.8,
    high: float = 1.2,
    high_max: float = 2.0,
    step: float = 0.05,
    target: float = 1.0,
    surrogate: bool = False,
    dual_clip: float | None = 3.0,
) -> dict[str, Tensor]:
    """Bounds found by raising ``low``, then ``high``, until positives weigh ``target`` times what negatives do.

    One binning pass a side gives every candidate's sum. By default only unclipped units count (their score weights);
    ``surrogate`` counts the clipped surrogate instead, as the authors' code does, under which raising ``low`` can only
    raise the negative side.
    """
    lows, highs = _grid(low, low_max, step, view), _grid(high, high_max, step, view)
    score = only(view.mask, view.ratio * narrow(view.advantage))
    above, below = view.up & (view.ratio > high), ~view.up & (view.ratio < max(low, low_max))
    positive = _clipped_sum(view, score, above & view.mask, highs, surrogate, 1.0, total)
    negative = _clipped_sum(view, score, below & view.mask, lows, surrogate, -1.0, total)
    enough = torch.cat([positive[:1] >= target * negative, positive[1:] >= target * negative[-1]])
    enough[-1] = True
    first, turn = enough.int().argmax(), len(lows) - 1  # low is raised first, and stays at its last when high is
    return {"low": _rows(lows[first.clamp(max=turn)], view), "high": _rows(highs[(first - turn).clamp(min=0)], view)}


def _grid(start: float, end: float, step: float, view: View) -> Tensor:
    """``start, start + step, ...``, ending exactly at ``end``."""
    count = max(0, math.ceil((end - start) / step - 1e-9))
    values = [start + n * step for n in range(count)] + [max(start, end)]
    return view.ratio.new_tensor(values)


def _clipped_sum(
    view: View, score: Tensor, touched: Tensor, edges: Tensor, surrogate: bool, sign: float, total: Total
) -> Tensor:
    """One side's weight at each candidate bound, ``[len(edges)]``; only units beyond the first bound are binned."""
    whole = total(sum_all((sign * score).clamp_(min=0.0))).to(score.dtype)
    row, column = touched.nonzero(as_tuple=True)
    size = len(edges) + 1
    index = torch.bucketize(view.ratio[row, column], edges, right=sign < 0)

    def beyond(x: Tensor) -> Tensor:
        binned = total(torch.bincount(index, weights=sign * x[row, column], minlength=size)).to(edges.dtype)
        return binned.flip(0).cumsum(0).flip(0)[1:] if sign > 0 else binned.cumsum(0)[:-1]

    inside = whole - beyond(score)
    return inside + edges * beyond(view.advantage) if surrogate else inside


def searched_ppo(
    view: View,
    *,
    low: float = 0.6,
    low_max: float = 0.8,
    high: float = 1.2,
    high_max: float = 2.0,
    step: float = 0.05,
    target: float = 1.0,
    surrogate: bool = False,
    dual_clip: float | None = 3.0,
) -> Tensor:
    """PPO clipping at ratio bounds that were searched for this batch. BAPO, 2510.18927."""
    ratio = view.ratio
    bad = ratio < view.row("low")
    bad = bad if dual_clip is None else bad | (ratio > dual_clip)
    return view.zeroed(ratio > view.row("high"), bad)


def covariance(view: View, total: Total) -> Tensor:
    """Each unit's ``(A - mean A)(log_prob - mean log_prob)`` over the batch, ``[B, N]``; 0 where masked."""
    n = total(view.layout.units).clamp(min=1)
    a, log_prob = narrow(view.advantage), view.log_prob
    mean_a = (total(sum_all(only(view.mask, a.expand_as(view.mask)))) / n).to(a.dtype)
    mean_log_prob = (total(sum_all(log_prob)) / n).to(a.dtype)
    return only(view.mask, (log_prob - mean_log_prob).mul_(a - mean_a))


def clip_cov_prepare(
    view: View,
    total: Total,
    *,
    fraction: float = 2e-4,
    cov_low: float = 1.0,
    cov_high: float = 5.0,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Draws the units to silence among those that PPO leaves and whose covariance lies between the bounds."""
    cov = covariance(view, total)
    number = max(1, int(fraction * int(total(view.layout.units))))
    silenced = torch.zeros_like(view.mask)
    row, column = (view.mask & (cov > cov_low) & (cov < cov_high)).nonzero(as_tuple=True)
    free = ~outside(view.at(row, column), clip_low, clip_high, None)
    row, column = row[free], column[free]
    noise = unit_noise(view.batch, view.layout, seed, (row, column))
    silenced[row, column] = noise <= crossing(noise, number - 1, total)
    return {"silenced": silenced}


def clip_cov(
    view: View,
    *,
    fraction: float = 2e-4,
    cov_low: float = 1.0,
    cov_high: float = 5.0,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    seed: int = 0,
) -> Tensor:
    """PPO with a few units of high covariance silenced. The Entropy Mechanism of RL for Reasoning LMs, 2505.22617."""
    return only(~(outside(view, clip_low, clip_high, None) | view.stats["silenced"]), view.ratio)


def spared_ppo_prepare(
    view: View, total: Total, *, fraction: float = 0.01, clip_low: float = 1.0, clip_high: float = 9.0
) -> dict[str, Tensor]:
    """Units of negative advantage among the least probable of the batch whose filtered proxy is more probable."""
    number = int(fraction * int(total(view.layout.units)))
    selected = torch.zeros_like(view.mask)
    if number < 1:
        return {"selected": selected}
    lp, proxy = view.raw_log_prob, anchor_log_prob(view.batch, "proxy")
    threshold = crossing(masked(view.mask, lp, BEYOND).flatten(), number - 1, total)
    row, column = (view.mask & (lp <= threshold) & (narrow(view.advantage) < 0)).nonzero(as_tuple=True)
    selected[row, column] = lp[row, column] < proxy[row, column]
    return {"selected": selected}


def spared_ppo(view: View, *, fraction: float = 0.01, clip_low: float = 1.0, clip_high: float = 9.0) -> Tensor:
    """PPO, unclipped on the units that the low-probability penalty acts on. Lp-Reg, 2510.03222."""
    return only(view.stats["selected"] | ~outside(view, clip_low, clip_high, None), view.ratio)
