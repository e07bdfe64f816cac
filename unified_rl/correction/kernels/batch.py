"""Kernels whose weight depends on the whole optimiser batch.

What ``prepare`` finds is carried in the statistics, so that micro-batches give the gradient of the whole.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from unified_rl.correction.internal.distributed import Total, crossing
from unified_rl.correction.internal.hashing import unit_noise
from unified_rl.correction.kernels.kernel import Kernel, Traits, by_name, clipped_formula, number
from unified_rl.correction.kernels.unit import outside
from unified_rl.correction.view import BEYOND, View, anchor_log_prob, masked, narrow, only, share, sum_all
from unified_rl.ranges import Bound, Extended, NonNegative, Positive, Radius, Seed, UnitInterval, UpperBound


def _rows(x: Tensor, view: View) -> Tensor:
    """A scalar as a statistic of every row, ``[B]``."""
    return x.expand(view.mask.shape[0])


def _ess(w: Tensor, view: View, total: Total) -> Tensor:
    """Effective sample size of ``w [B, N]`` (0 where masked) as a fraction of the units; 1 where there are none."""
    n, square = total(view.layout.units), total(sum_all(w.square()))
    ess = total(sum_all(w)).square() / (n * square)
    return torch.where(square > 0, ess, 1.0).to(w.dtype)


class EssCap(Kernel):
    """``min(ratio, ESS)``. P3O, 1905.01756."""

    name = "ess_cap"
    traits = Traits(truncates=True)

    def formula(self) -> str:
        """The cap."""
        return "min(r, ESS), ESS = (sum r)^2 / (n sum r^2) over the batch"

    def prepare(self, view: View, total: Total) -> dict[str, Tensor]:
        """ESS of the ratio over the batch, and 1 - ESS for the penalty."""
        ess = _ess(only(view.mask, view.ratio), view, total)
        return {"ess": _rows(ess, view), "one_minus_ess": _rows(1 - ess, view)}

    def weight(self, view: View) -> Tensor:
        """The capped ratio."""
        return torch.minimum(view.ratio, view.row("ess"))


class EssCapMixed(Kernel):
    """``min(ratio to behavior, min ESS)``. P4O, in the code of Trust the Batch (P3O's successor)."""

    name = "ess_cap_mixed"
    traits = Traits(anchors=("behavior", "proximal"))

    def formula(self) -> str:
        """The cap."""
        return "min(r, e), e the smaller ESS of pi / behavior and pi / proximal"

    def prepare(self, view: View, total: Total) -> dict[str, Tensor]:
        """The smaller ESS of both ratios, and the mixture of the two policies that the penalty pulls to."""
        to_behavior, to_proximal = view.against("behavior").exp(), view.against("proximal").exp()
        b, p = (_ess(only(view.mask, ratio), view, total) for ratio in (to_behavior, to_proximal))
        ess = torch.minimum(b, p)
        weight = torch.stack([1 - b, 1 - p]).clamp(min=0.0)
        weight = torch.where(weight.sum() > 1e-6, weight / weight.sum().clamp(min=1e-30), 0.5)
        density = weight[0] / to_behavior + weight[1] / to_proximal  # of the mixture, over the current policy's
        mixture = view.raw_log_prob + density.log_()
        gap = torch.where(1 - ess > 1e-6, 1 - ess, 0.0)
        return {"ess": _rows(ess, view), "one_minus_ess": _rows(gap, view), "mixture_log_prob": mixture}

    def weight(self, view: View) -> Tensor:
        """The capped ratio."""
        return torch.minimum(view.against("behavior").exp(), view.row("ess"))


class M2Mask(Kernel):
    """The ratio (1 where not ``weighted``) on units inside a second-moment budget, else 0. M2PO, 2510.01161."""

    name = "m2_mask"
    traits = Traits(truncates=True)
    budget: Bound = 0.04
    weighted: bool = True

    def formula(self) -> str:
        """The budget."""
        return (
            f"{'r' if self.weighted else '1'}, but 0 on the units of largest d^2 among those with A d > 0, until their "
            f"mean d^2 <= {number(self.budget)}"
        )

    def prepare(self, view: View, total: Total) -> dict[str, Tensor]:
        """Keeps the largest set of harmful units whose mean squared log-ratio is within the budget.

        Units at or below the budget can never be dropped, so only those above it are sorted; equal ones go together.
        """
        d = view.unit_log_ratio
        square = d.square()
        harmful = view.mask & (narrow(view.advantage) * d > 0)
        bound = min(self.budget * (1 + 1e-6), 1e6)  # what rounding may add; no square is that large
        over = harmful & (square > bound)
        room = total(sum_all(only(harmful & ~over, square.neg().add_(bound))))
        cut = crossing(square[over], room, total, lambda x: x.double() - bound)
        return {"m2_keep": ~(over & (square >= cut))}

    def weight(self, view: View) -> Tensor:
        """The ratio, or 1, on what was kept."""
        kept = view.stats["m2_keep"]
        return only(kept, view.ratio) if self.weighted else share(kept, view.ratio.dtype)


class SearchedPPO(Kernel):
    """PPO clipping at ratio bounds that were searched for this batch. BAPO, 2510.18927.

    ``low``, then ``high``, is raised until positives weigh ``target`` times what negatives do. By default only
    unclipped units count (their score weights); ``surrogate`` counts the clipped surrogate instead, as the authors'
    code does, under which raising ``low`` can only raise the negative side.
    """

    name = "searched_ppo"
    traits = Traits(truncates=True)
    ordered = (("low", "low_max"), ("high", "high_max"))
    low: Bound = 0.6
    low_max: Bound = 0.8
    high: UpperBound = 1.2
    high_max: UpperBound = 2.0
    step: Positive = 0.05
    target: NonNegative = 1.0
    surrogate: bool = False
    dual_clip: UpperBound | None = 3.0

    def formula(self) -> str:
        """The search."""
        return (
            "r, but 0 where A > 0 and r > hi, or A < 0 and r < lo"
            + ("" if self.dual_clip is None else f" or r > {number(self.dual_clip)}")
            + f"; lo from {number(self.low)} to {number(self.low_max)}, then hi from {number(self.high)} to "
            f"{number(self.high_max)}, in steps of {number(self.step)}, until positives weigh {number(self.target)} "
            "times the negatives"
        )

    def prepare(self, view: View, total: Total) -> dict[str, Tensor]:
        """The bounds: one binning pass a side gives every candidate's sum."""
        lows = _grid(self.low, self.low_max, self.step, view)
        highs = _grid(self.high, self.high_max, self.step, view)
        score = only(view.mask, view.ratio * narrow(view.advantage))
        above, below = view.up & (view.ratio > self.high), ~view.up & (view.ratio < max(self.low, self.low_max))
        positive = _clipped_sum(view, score, above & view.mask, highs, self.surrogate, 1.0, total)
        negative = _clipped_sum(view, score, below & view.mask, lows, self.surrogate, -1.0, total)
        enough = torch.cat([positive[:1] >= self.target * negative, positive[1:] >= self.target * negative[-1]])
        enough[-1] = True
        first, turn = enough.int().argmax(), len(lows) - 1  # low is raised first, and stays at its last when high is
        low, high = lows[first.clamp(max=turn)], highs[(first - turn).clamp(min=0)]
        return {"low": _rows(low, view), "high": _rows(high, view)}

    def weight(self, view: View) -> Tensor:
        """The ratio inside the bounds."""
        ratio = view.ratio
        bad = ratio < view.row("low")
        bad = bad if self.dual_clip is None else bad | (ratio > self.dual_clip)
        return view.zeroed(ratio > view.row("high"), bad)


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


def covariance(view: View, total: Total) -> Tensor:
    """Each unit's ``(A - mean A)(log_prob - mean log_prob)`` over the batch, ``[B, N]``; 0 where masked."""
    n = total(view.layout.units).clamp(min=1)
    a, log_prob = narrow(view.advantage), view.log_prob
    mean_a = (total(sum_all(only(view.mask, a.expand_as(view.mask)))) / n).to(a.dtype)
    mean_log_prob = (total(sum_all(log_prob)) / n).to(a.dtype)
    return only(view.mask, (log_prob - mean_log_prob).mul_(a - mean_a))


class ClipCov(Kernel):
    """PPO with a few units of high covariance silenced. The Entropy Mechanism of RL for Reasoning LMs, 2505.22617."""

    name = "clip_cov"
    traits = Traits(truncates=True)
    ordered = (("cov_low", "cov_high"),)
    fraction: UnitInterval = 2e-4
    cov_low: Extended = 1.0
    cov_high: Extended = 5.0
    clip_low: Radius = 0.2
    clip_high: Radius = 0.2
    seed: Seed = 0

    def formula(self) -> str:
        """The draw, on top of PPO's bounds."""
        return (
            clipped_formula(1 - self.clip_low, 1 + self.clip_high, None)
            + f"; and 0 on a random share {number(self.fraction)} of the units, drawn where "
            f"{number(self.cov_low)} < (A - mean A)(log pi - mean log pi) < {number(self.cov_high)}"
        )

    def prepare(self, view: View, total: Total) -> dict[str, Tensor]:
        """Draws the units to silence among those that PPO leaves and whose covariance lies between the bounds."""
        cov = covariance(view, total)
        count = max(1, int(self.fraction * int(total(view.layout.units))))
        silenced = torch.zeros_like(view.mask)
        row, column = (view.mask & (cov > self.cov_low) & (cov < self.cov_high)).nonzero(as_tuple=True)
        free = ~outside(view.at(row, column), self.clip_low, self.clip_high, None)
        row, column = row[free], column[free]
        noise = unit_noise(view.batch, view.layout, self.seed, (row, column))
        silenced[row, column] = noise <= crossing(noise, count - 1, total)
        return {"silenced": silenced}

    def weight(self, view: View) -> Tensor:
        """PPO's on what is not silenced."""
        return only(~(outside(view, self.clip_low, self.clip_high, None) | view.stats["silenced"]), view.ratio)


class SparedPPO(Kernel):
    """PPO, unclipped on the units that the low-probability penalty acts on. Lp-Reg, 2510.03222."""

    name = "spared_ppo"
    traits = Traits(truncates=True, anchors=("proxy",), probabilities="ppo")
    fraction: UnitInterval = 0.01
    clip_low: Radius = 1.0
    clip_high: Radius = 9.0

    def formula(self) -> str:
        """PPO's bounds, and which units are spared."""
        return (
            clipped_formula(1 - self.clip_low, 1 + self.clip_high, None)
            + f"; r on selected units (A < 0, log pi in the lowest {100 * self.fraction:g} %, below the proxy's)"
        )

    def prepare(self, view: View, total: Total) -> dict[str, Tensor]:
        """Units of negative advantage among the least probable of the batch whose filtered proxy is more probable."""
        count = int(self.fraction * int(total(view.layout.units)))
        selected = torch.zeros_like(view.mask)
        if count < 1:
            return {"selected": selected}
        lp, proxy = view.raw_log_prob, anchor_log_prob(view.batch, "proxy")
        threshold = crossing(masked(view.mask, lp, BEYOND).flatten(), count - 1, total)
        row, column = (view.mask & (lp <= threshold) & (narrow(view.advantage) < 0)).nonzero(as_tuple=True)
        selected[row, column] = lp[row, column] < proxy[row, column]
        return {"selected": selected}

    def weight(self, view: View) -> Tensor:
        """PPO's, and the ratio on the selected units."""
        return only(view.stats["selected"] | ~outside(view, self.clip_low, self.clip_high, None), view.ratio)


KERNELS = by_name(EssCap, EssCapMixed, M2Mask, SearchedPPO, ClipCov, SparedPPO)
