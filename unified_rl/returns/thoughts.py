"""Advantages of thoughts: runs of units that are marked alike. TP-GRPO."""

from __future__ import annotations

import math

import torch
from tensordict import TensorDictBase
from torch import Tensor

from unified_rl.ranges import NonNegative, UnitInterval
from unified_rl.returns.groups import Groups
from unified_rl.units import MARKS, of_units, row_return


def thoughts(
    record: TensorDictBase,
    advantage: Tensor,
    *,
    share: UnitInterval = 0.5,
    mercy: NonNegative = 1.0,
    threshold: float = 0.5,
) -> Tensor:
    """``(1 - share) A + share A_thought``, ``[B, N]``: adjacent units of equal marks are one thought, with a reward.

    A right thought earns 1, a wrong one ``-p^mercy`` with the share ``p`` of right answers of the group (who hardly
    ever succeeds may try), one without a mark 0. ``A_thought`` is that reward less the mean of all thoughts of the
    group, each once, over their standard deviation; 0 where all are alike. 2507.23317 (the rewards are assumed).

    Args:
        share: of the thoughts' advantages.
        mercy: 0 punishes wrong thoughts alike whatever the group can do.
        threshold: of the return, above which an answer is right.
    """
    mask, groups = record["mask"], Groups.of(record)
    out = of_units(record, advantage)
    place = (mask.cumsum(-1) - 1).clamp(min=0)
    marks = torch.where(mask, record[MARKS].to(out.dtype), 0.0)
    packed = torch.zeros_like(out).scatter_add(1, place, marks)
    filled = torch.arange(mask.shape[1], device=mask.device) < mask.sum(-1, keepdim=True)
    begins = filled.clone()
    begins[:, 1:] &= packed[:, 1:] != packed[:, :-1]
    rate = groups.mean((row_return(record) > threshold).to(out.dtype)).unsqueeze(-1)
    reward = torch.where(packed < 0, -rate.pow(mercy), packed.clamp(max=1.0))
    once = begins.to(out.dtype)
    count = groups.sum(once.sum(-1)).unsqueeze(-1)
    mean = groups.sum((once * reward).sum(-1)).unsqueeze(-1) / count.clamp(min=1)
    spread = (groups.sum((once * (reward - mean).square()).sum(-1)).unsqueeze(-1) / (count - 1).clamp(min=1)).sqrt()
    best = groups.extreme(torch.where(begins, reward, -math.inf).amax(-1), "amax")
    least = groups.extreme(torch.where(begins, reward, math.inf).amin(-1), "amin")
    differ = (best > least).unsqueeze(-1)  # else exactly 0, not what rounding left of it
    scored = torch.where(differ, (reward - mean) / (spread + 1e-6), 0.0).gather(1, place)
    return (1 - share) * out + share * torch.where(mask, scored, 0.0)


thoughts.columns = lambda **settings: [MARKS]  # type: ignore[attr-defined]
