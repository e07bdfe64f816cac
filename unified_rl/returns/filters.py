"""Filters: which rows, or units, are learnt from, chosen after the statistics of their groups.

``(record, advantage [B, T] or [B, N]) -> [B]`` or ``[B, N]`` bool, what is kept. As maps do, a filter says by the
attribute ``reads`` which columns it wants from every unit's distribution. Rows that are left out are in no denominator;
neither are units.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from tensordict import TensorDictBase
from torch import Tensor

from unified_rl.ranges import Fraction, Name, NonNegative, UnitInterval, UpperBound
from unified_rl.returns import readings
from unified_rl.returns.groups import Groups
from unified_rl.units import Steps, of_units, row_return

Over = Literal["group", "batch"]


def largest_advantage(
    record: TensorDictBase, advantage: Tensor, *, keep: Fraction = 0.5, over: Over = "group"
) -> Tensor:
    """The share ``keep`` of the rows, rounded down, with the largest ``|A|``; earlier ones of equal size. CPPO.

    Args:
        keep: one minus the pruning rate; at least one row is kept of each.
        over: of every group, or of the whole update.
    """
    size = (advantage.abs() * _real(record, advantage)).amax(-1)
    group, count = _parts(record, over)
    rank = _ranks(-size, group)
    return rank < _quota(count, keep)


largest_advantage.compares = lambda *, over, **others: over == "group"  # type: ignore[attr-defined]


def widest_spread(record: TensorDictBase, advantage: Tensor, *, keep: Fraction = 0.5, over: Over = "group") -> Tensor:
    """The share ``keep`` of the rows, rounded down, whose advantages vary most: some lowest, the rest highest. D3S.

    The best number of lowest ones is found among all; of equally good ones the smallest.

    Args:
        keep: at least one row is kept of each.
        over: of every group, or of the whole update.
    """
    real = _real(record, advantage)
    value = (advantage * real).sum(-1).double() / real.sum(-1).clamp(min=1)
    group, count = _parts(record, over)
    rank, quota = _ranks(value, group), _quota(count, keep)
    width, number = int(count.max()), int(group.max()) + 1
    table = value.new_zeros(number, width).index_put((group, rank), value)
    sizes, wanted = (x.new_zeros(number).index_put((group,), x).unsqueeze(-1) for x in (count, quota))
    zero = table.new_zeros(number, 1)
    first, second = (torch.cat([zero, x.cumsum(-1)], -1) for x in (table, table.square()))  # sums of the k lowest
    low = torch.arange(width + 1, device=value.device).expand(number, -1)
    at, end = (sizes - wanted + low).clamp(max=width), sizes

    def chosen(sums: Tensor) -> Tensor:
        return sums.gather(-1, low.clamp(max=width)) + sums.gather(-1, end) - sums.gather(-1, at)

    spread = chosen(second) / wanted - (chosen(first) / wanted).square()
    spread = torch.where(low <= wanted, spread, -math.inf)
    best = spread.argmax(-1)[group]
    return (rank < best) | (rank >= count - quota + best)


widest_spread.compares = lambda *, over, **others: over == "group"  # type: ignore[attr-defined]


def seamless(record: TensorDictBase, advantage: Tensor, *, least: UnitInterval = 0.5) -> Tensor:
    """Rows of groups in which the rewarded answers are those that the policy finds likely. After SEAM, 2406.07971.

    A group's score is ``(1 + c) / 2``, with ``c`` the correlation of its returns with its rows' mean log-prob a unit
    when they were sampled, 0 where either is the same in all rows.

    Args:
        least: score of a group that is kept; 0 keeps all.
    """
    groups, mask = Groups.of(record), record["mask"]
    likely = torch.where(mask, record["behavior_log_prob"], 0.0).sum(-1) / mask.sum(-1).clamp(min=1)
    gap = [x - groups.mean(x) for x in (row_return(record), likely)]
    norm = (groups.sum(gap[0].square()) * groups.sum(gap[1].square())).sqrt()
    together = torch.where(norm > 0, groups.sum(gap[0] * gap[1]) / norm.clamp(min=1e-30), 0.0)
    return 0.5 + 0.5 * together >= least - 1e-6


seamless.compares = lambda **settings: True  # type: ignore[attr-defined]


def uncertain_units(record: TensorDictBase, advantage: Tensor, *, keep: Fraction = 0.5) -> Tensor:
    """The share ``keep`` of the update's units, rounded up, of largest ``|A|`` times entropy; equal ones too. D3S."""
    mask: Tensor = record["mask"]
    score: Tensor = of_units(record, advantage).abs() * record["entropy"]
    found = score[mask]
    if not len(found):
        return mask
    least = found.kthvalue(len(found) - math.ceil(keep * len(found)) + 1).values
    return mask & (score >= least)


uncertain_units.reads = lambda **settings: {"entropy": readings.entropy}  # type: ignore[attr-defined]


def first_units(record: TensorDictBase, advantage: Tensor, *, share: Fraction = 0.5) -> Tensor:
    """The first ``share`` of every row's units, rounded up: a horizon that a schedule moves further out."""
    mask: Tensor = record["mask"]
    place, count = mask.cumsum(-1), mask.sum(-1, keepdim=True)
    out: Tensor = mask & (place <= (count * share - 1e-6).ceil())
    return out


def entropy_above(record: TensorDictBase, advantage: Tensor, *, above: NonNegative = 1.0) -> Tensor:
    """The units whose distribution has at least so much entropy, in nats. ReasonMaxxer, 2605.06241."""
    out: Tensor = record["mask"] & (record["entropy"] >= above)
    return out


entropy_above.reads = lambda **settings: {"entropy": readings.entropy}  # type: ignore[attr-defined]


def distinct_pairs(
    record: TensorDictBase,
    advantage: Tensor,
    *,
    score: Name = "score",
    least: NonNegative = 0.1,
    threshold: float = 0.5,
) -> Tensor:
    """Rows without those that no row of the other outcome in their group is told apart from. DaGRPO, 2512.06337.

    A right and a wrong row are told apart where their scores differ by ``least``; a row of which every counterpart is
    closer would be pushed against its like. Rows without a counterpart stay.

    Args:
        score: entry ``[B]`` of the record, finer than the reward.
        least: difference; 0 keeps every row.
        threshold: of the return, above which an answer is right.
    """
    index, won, value = Groups.of(record).index, row_return(record) > threshold, record[score].float()
    other = (index[:, None] == index[None, :]) & (won[:, None] != won[None, :])
    apart = other & ((value[:, None] - value[None, :]).abs() >= least)
    kept: Tensor = apart.any(-1) | ~other.any(-1)
    return kept


distinct_pairs.compares = lambda **settings: True  # type: ignore[attr-defined]
distinct_pairs.columns = lambda *, score, **others: [score]  # type: ignore[attr-defined]


def likelihood_band(
    record: TensorDictBase, advantage: Tensor, *, low: NonNegative = 0.0, high: UpperBound = math.inf
) -> Tensor:
    """Units of steps whose mean negative log-prob, as sampled, is from ``low`` to ``high`` nats. After BFS-Prover-V2.

    What its sampler found trivial is left out, and what it hardly ever says.
    """
    steps = Steps.of(record)
    nats = -steps.mean(record["behavior_log_prob"])
    kept: Tensor = record["mask"] & steps.broadcast((nats >= low) & (nats <= high))
    return kept


def _real(record: TensorDictBase, advantage: Tensor) -> Tensor:
    """Which entries of advantages are a row's own, in their shape: what a map writes behind its end is nobody's."""
    mask: Tensor = record["mask"]
    return mask if advantage.shape == mask.shape else torch.ones_like(advantage, dtype=torch.bool)


def _parts(record: TensorDictBase, over: str) -> tuple[Tensor, Tensor]:
    """A number from 0 on of every row's part ``[B]`` int64, and the rows of that part ``[B]`` int64."""
    if over == "batch":
        rows = len(record)
        zero = torch.zeros(rows, dtype=torch.int64, device=record["mask"].device)
        return zero, zero + rows
    groups = Groups.of(record)
    return groups.index, groups.count.long()


def _quota(count: Tensor, keep: float) -> Tensor:
    """Rows that are kept of parts of ``count`` rows, as many, ``[B]`` int64."""
    return (count * keep + 1e-6).floor().long().clamp(min=1)


def _ranks(value: Tensor, group: Tensor) -> Tensor:
    """Each row's place ``[B]`` among those of its group by ``value [B]``, ascending; equal ones in their order."""
    order = value.argsort(stable=True)
    order = order[group[order].argsort(stable=True)]
    sorted_group = group[order]
    start = torch.searchsorted(sorted_group, sorted_group)
    place = torch.arange(len(order), device=value.device) - start
    return torch.empty_like(place).index_put((order,), place)


FILTERS: dict[str, Callable[..., Tensor]] = {
    "entropy_above": entropy_above,
    "largest_advantage": largest_advantage,
    "widest_spread": widest_spread,
    "seamless": seamless,
    "likelihood_band": likelihood_band,
    "uncertain_units": uncertain_units,
    "first_units": first_units,
    "distinct_pairs": distinct_pairs,
}
