"""Credit in a forest of answers: what a part is worth to all that go on from it."""

from __future__ import annotations

import torch
from tensordict import TensorDictBase
from torch import Tensor

from unified_rl.errors import RecordError
from unified_rl.returns.groups import Groups
from unified_rl.units import of_units

PRIME = 6364136223846793005
"""An odd multiplier of 64 bits, for numbers of sequences that wrap around."""


def tree(
    record: TensorDictBase, advantage: Tensor, *, local: float = 1.0, overall: float = 1.0, shared: bool = True
) -> Tensor:
    """``(local (V - V_before) + overall V) / sqrt(leaves)`` for every unit, ``[B, N]``. TreeRL, 2506.11902.

    ``V`` is the mean advantage of the leaves that have a unit in common, ``V_before`` that of the part before, 0 at the
    root. Units are in common where a fork began with them (column ``begun``); all others are of one leaf.

    Args:
        local: weight of what a part adds.
        overall: weight of what it is worth.
        shared: divide by the root of the number of leaves, in each of which the unit is learnt again.

    Raises:
        RecordError: nobody says what rows began with.
    """
    if "begun" not in record.keys():
        raise RecordError(
            "the map tree needs to know how many tokens rows began with: set rollout.columns.begun=begun, and "
            "rollout.context to unified_rl.rollout.forks.Forks"
        )
    mask: Tensor = record["mask"]
    value = of_units(record, advantage)
    node = _nodes(record)
    real, size = node >= 0, int(node.max()) + 1
    index = node[real]
    leaves = value.new_zeros(size).index_add(0, index, torch.ones_like(value[real]))
    worth = value.new_zeros(size).index_add(0, index, value[real]) / leaves.clamp(min=1)
    zero = torch.zeros_like(value)
    count, worth = (zero.masked_scatter(real, x[index]) for x in (leaves, worth))
    begins = real & (count != torch.cat([torch.zeros_like(count[:, :1]), count[:, :-1]], -1))
    column = torch.arange(mask.shape[1], device=mask.device).expand_as(mask)
    first = torch.where(begins, column, torch.zeros_like(column)).cummax(-1).values
    earlier = torch.cat([zero[:, :1], worth], -1).gather(-1, first)  # the column before that in which a part begins
    out = local * (worth - earlier) + overall * worth
    if shared:
        out = out / count.clamp(min=1).sqrt()
    return torch.where(real, out, zero)


tree.columns = lambda **settings: ["begun"]  # type: ignore[attr-defined]


def _nodes(record: TensorDictBase) -> Tensor:
    """A number from 0 on of the node of every unit, ``[B, N]`` int64; -1 of what is no unit."""
    tokens, mask = record["tokens"], record["mask"]
    group = Groups.of(record).index
    width = tokens.shape[1]
    power = torch.full((width,), PRIME, dtype=torch.int64, device=tokens.device).cumprod(0)
    said = ((tokens + 1) * power).cumsum(-1)  # the same for the same tokens up to here
    column = torch.arange(width, device=tokens.device)
    number = (said + (group.unsqueeze(-1) * width + column) * PRIME)[mask]
    _, index = number.unique(return_inverse=True)
    place = mask.cumsum(-1) - 1
    common = (record["begun"].unsqueeze(-1) > place)[mask]  # of a fork, what it began with
    size = int(index.max()) + 1 if len(index) else 0
    forked = torch.zeros(size, dtype=torch.int64, device=tokens.device).index_add(0, index, common.long()) > 0
    alone = size + torch.arange(len(index), device=tokens.device)
    out = torch.full_like(tokens, -1)
    return out.masked_scatter(mask, torch.where(forked[index], index, alone))
