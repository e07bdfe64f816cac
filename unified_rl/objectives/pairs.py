"""Which rows of a group are a pair, and losses of the margin between its two."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Annotated

import torch
import torch.nn.functional as F
from annotated_types import Interval
from tensordict import TensorDictBase
from torch import Tensor

from unified_rl.errors import ConfigError
from unified_rl.instantiate import nearest
from unified_rl.ranges import NonNegative, Positive
from unified_rl.returns.groups import Groups
from unified_rl.units import row_return

Pairs = tuple[Tensor, Tensor]
"""Indices ``[P]`` of the better and the worse rows."""


def best_worst(reward: Tensor, group: Tensor, *, least_gap: NonNegative = 0.0) -> Pairs:
    """In every group whose rewards differ by more than ``least_gap``: the first best row and the first worst."""
    groups = Groups(group)
    high, low = groups.extreme(reward, "amax"), groups.extreme(reward, "amin")
    better, worse = (first_row(groups, reward == extreme) for extreme in (high, low))
    chosen = (high - low)[better] > least_gap
    return better[chosen], worse[chosen]


def every_pair(reward: Tensor, group: Tensor) -> Pairs:
    """Every two rows of one group of which one has the higher reward (GAL)."""
    better = (reward[:, None] > reward) & (group[:, None] == group)
    winner, loser = better.nonzero(as_tuple=True)
    return winner, loser


def best_deviant(reward: Tensor, group: Tensor, *, deviations: float = -2.0) -> Pairs:
    """In every group whose rewards differ: the first best row, and the row nearest ``mean + deviations * std``.

    The deviation is that of the population; of several nearest rows the first counts. The sweet spot of on-policy
    preference data, 2502.16825, rejects at ``mean - 2 std``: the least of many rewards is an outlier.
    """
    groups = Groups(group)
    mean, std = groups.mean(reward), groups.std(reward, 0)
    distance = (reward - mean - deviations * std).abs()
    better = first_row(groups, reward == groups.extreme(reward, "amax"))
    worse = first_row(groups, distance == groups.extreme(distance, "amin"))
    chosen = reward[better] > reward[worse]
    return better[chosen], worse[chosen]


def order_of(rows: TensorDictBase, order: str) -> Tensor:
    """What says which row is better, ``[B]``: the return for ``reward``, else the column of that name."""
    return row_return(rows) if order == "reward" else rows[order].double()


def check_order(order: str, columns: Collection[str], where: str) -> None:
    """Refuses an order that no row will hold.

    Raises:
        ConfigError: names the setting and the nearest column.
    """
    if order != "reward" and order not in columns:
        raise ConfigError(
            f"{where} names {order!r}, which is no column of the rows; {nearest(order, ['reward', *columns])}: define "
            f"rollout.columns.{order}"
        )


PAIRS: dict[str, Callable[..., Pairs]] = {
    "best_worst": best_worst,
    "every_pair": every_pair,
    "best_deviant": best_deviant,
}


def first_row(groups: Groups, holds: Tensor) -> Tensor:
    """The first row of every group where ``holds [B]``, which it does somewhere in each, ``[groups]``."""
    rows = holds.nonzero().squeeze(-1)
    first = torch.full((groups.number,), len(holds), device=holds.device)
    return first.scatter_reduce(0, groups.index[rows], rows, "amin")


def dpo(margin: Tensor, *, beta: Positive = 0.1, smoothing: Annotated[float, Interval(ge=0, le=0.5)] = 0.0) -> Tensor:
    """``-log sigmoid(beta margin)``. Direct Preference Optimization, 2305.18290."""
    d = beta * margin
    return -(1 - smoothing) * F.logsigmoid(d) - smoothing * F.logsigmoid(-d)


def ipo(margin: Tensor, *, beta: Positive = 0.1) -> Tensor:
    """``(margin - 1 / (2 beta))^2``. IPO, 2310.12036."""
    return (margin - 1 / (2 * beta)).square()


LINKS: dict[str, Callable[..., Tensor]] = {"dpo": dpo, "ipo": ipo}
"""Losses ``[P]`` of margins ``[P]``: the better row's score minus the worse one's."""
