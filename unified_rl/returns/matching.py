"""Advantages of units from what a right answer has in their places. PCPG."""

from __future__ import annotations

import torch
from tensordict import TensorDictBase
from torch import Tensor
from torch.nn.functional import conv1d, pad

from unified_rl.ranges import Count, UnitInterval
from unified_rl.returns.groups import Groups
from unified_rl.units import of_units


def matched(record: TensorDictBase, advantage: Tensor, *, window: Count = 5, share: UnitInterval = 1.0) -> Tensor:
    """``(1 - share) A + share (r - b)``, ``[B, N]``: units earn 1 where the shown solution has them in the same place.

    ``r`` is the mean of those rewards over ``window`` places around a unit (0 beyond the answer), so that each unit
    answers for its surroundings; ``b`` is the group's mean of ``r`` at the place. A window of 1 smooths nothing.
    Pseudo-Convolutional Policy Gradient, 2003.03983.

    Args:
        window: places, one more behind a unit than before it where it is even.
        share: of these advantages.
    """
    mask, tokens, shown = record["mask"], record["tokens"], record["privileged_tokens"]
    out = of_units(record, advantage)
    start = mask.to(torch.uint8).argmax(-1, keepdim=True)
    length = record["privileged_mask"].to(torch.uint8).argmax(-1, keepdim=True) - start
    place = (mask.cumsum(-1) - 1).clamp(min=0)
    here = shown.gather(1, (start + place).clamp(max=shown.shape[1] - 1))
    right = (mask & (place < length) & (tokens == here)).to(out.dtype)
    packed = torch.zeros_like(out).scatter_add(1, place, right)
    behind = pad(packed, ((window - 1) // 2, window // 2)).unsqueeze(1)
    smooth = conv1d(behind, packed.new_full((1, 1, window), 1 / window)).squeeze(1)
    filled = torch.arange(mask.shape[1], device=mask.device) < mask.sum(-1, keepdim=True)
    index = Groups.of(record).index
    total, count = (_by_group(x, index) for x in (torch.where(filled, smooth, 0.0), filled.to(out.dtype)))
    centred = (smooth - total / count.clamp(min=1)).gather(1, place)
    return (1 - share) * out + share * torch.where(mask, centred, 0.0)


matched.compares = lambda **settings: True  # type: ignore[attr-defined]
matched.columns = lambda **settings: ["privileged_tokens", "privileged_mask"]  # type: ignore[attr-defined]


def _by_group(x: Tensor, index: Tensor) -> Tensor:
    """Each row's group sums of ``x [B, L]``."""
    return torch.zeros_like(x).index_add(0, index, x)[index]
