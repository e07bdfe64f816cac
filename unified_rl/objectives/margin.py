"""A margin between a row's units and those of a demonstration of the same prompt, place by place."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from unified_rl.correction.view import share
from unified_rl.objectives.forward import Forward
from unified_rl.objectives.metrics import Metrics
from unified_rl.objectives.objective import Scored, Term
from unified_rl.objectives.terms import EXPERT_ROWS, OWN_ROWS, reduction
from unified_rl.ranges import UnitInterval
from unified_rl.returns.groups import Groups
from unified_rl.units import of_units, row_return


class MarginTerm(Term):
    """``|A| leaky(-z (log_prob - expert))`` on own rows, z = 1 where the row is right, else -1. CalibRL, 2602.20197.

    ``expert`` is the present log-prob, without gradient, of the unit at the same place of the group's demonstration
    (its first row that others wrote); units beyond its end, and groups without one, have no part in it.

    Args:
        name, coefficient: see :class:`Term`.
        rows: read by it; of these, own rows have the margin and others give it.
        slope: of ``leaky`` below 0, where the margin is met already.
        threshold: of the return, above which a row is right.
        reduce: over units, as a correction's.
    """

    whole_groups = True

    def __init__(
        self,
        name: str,
        *,
        slope: UnitInterval = 0.5,
        threshold: float = 0.5,
        reduce: str = "sequence-mean-token-mean",
        rows: Any = None,
        coefficient: float | Mapping[str, Any] = 0.1,
    ) -> None:
        super().__init__(name, rows, coefficient)
        self.slope, self.threshold, self.reduce = slope, threshold, reduction(reduce, self.where)
        self.reports = frozenset({f"loss/{name}"})

    def prepare(self, batch: TensorDict, scored: Scored) -> TensorDictBase:
        """``expert [B, N]``, ``compared [B, N]`` bool and ``coefficient [B]``."""
        expert, compared = expert_log_prob(self.rows.within(batch), scored.log_prob)
        items = {"expert": expert, "compared": compared, "coefficient": self.reduce(compared)}
        return TensorDict(items, batch_size=[len(batch)])

    def loss(self, forward: Forward, rows: TensorDict, stats: TensorDictBase) -> tuple[Tensor, Metrics]:
        """The margin of the micro-batch."""
        right = torch.where(row_return(rows) > self.threshold, 1.0, -1.0).unsqueeze(-1)
        log_prob, mask = forward.log_prob, stats["compared"]
        gap = -right * torch.where(mask, log_prob - stats["expert"], 0.0)
        size = of_units(rows, rows["advantage"]).abs()
        scale = share(mask, log_prob.dtype) * stats["coefficient"].unsqueeze(-1)
        value = (torch.where(mask, size, 0.0) * torch.nn.functional.leaky_relu(gap, self.slope) * scale).sum()
        return value, {f"loss/{self.name}": value.detach()}


def expert_log_prob(batch: TensorDictBase, log_prob: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probs of the group's demonstration at the place of every unit of own rows.

    Args:
        batch: whole groups.
        log_prob: of its units, ``[B, N]``.

    Returns:
        The log-probs ``[B, N]``, 0 where there are none, and where there are, bool.
    """
    mask, rows = batch["mask"], len(batch)
    place = (mask.cumsum(-1) - 1).clamp(min=0)
    number = torch.arange(rows, device=mask.device)
    shown = EXPERT_ROWS.of_record(batch) & mask.any(-1)
    first = Groups.of(batch).extreme(torch.where(shown, number, rows), "amin").long()  # a row of each group, or none
    packed = torch.zeros_like(log_prob).scatter_add(1, place, torch.where(mask, log_prob, 0.0))
    chosen = first.clamp(max=rows - 1)
    length = torch.where(first < rows, mask.sum(-1)[chosen], 0)
    compared = mask & OWN_ROWS.of_record(batch).unsqueeze(-1) & (place < length.unsqueeze(-1))
    return torch.where(compared, packed[chosen].gather(1, place), 0.0), compared
