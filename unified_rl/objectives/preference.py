"""Losses of sequence scores: pairs and sets of a group's rows.

Such a loss depends on the policy through one score a row, so ``prepare`` differentiates it by the scores ``[B]`` of the
whole optimiser batch, and a micro-batch only multiplies each row's slope by its score: rows of a pair may lie in
different micro-batches.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from unified_rl.correction.internal.surrogate import KnownGradient
from unified_rl.correction.lookup import bind
from unified_rl.correction.view import share
from unified_rl.objectives.forward import Forward
from unified_rl.objectives.objective import Metrics, Scored, Term
from unified_rl.units import row_return

Pairs = tuple[Tensor, Tensor]
"""Indices ``[P]`` of the better and the worse rows."""


def best_worst(reward: Tensor, group: Tensor, *, least_gap: float = 0.0) -> Pairs:
    """In every group whose rewards differ: the first best row and the first worst."""
    better, worse = [], []
    for g in torch.unique(group).tolist():
        rows = (group == g).nonzero().squeeze(-1)
        high, low = rows[reward[rows].argmax()], rows[reward[rows].argmin()]
        if float(reward[high] - reward[low]) > least_gap:
            better.append(high)
            worse.append(low)
    empty = torch.zeros(0, dtype=torch.int64, device=group.device)
    return (torch.stack(better), torch.stack(worse)) if better else (empty, empty)


def every_pair(reward: Tensor, group: Tensor) -> Pairs:
    """Every two rows of one group of which one has the higher reward (GAL)."""
    better = (reward[:, None] > reward) & (group[:, None] == group)
    w, l = better.nonzero(as_tuple=True)
    return w, l


PAIRS: dict[str, Callable[..., Pairs]] = {"best_worst": best_worst, "every_pair": every_pair}


def dpo(margin: Tensor, *, beta: float = 0.1, smoothing: float = 0.0) -> Tensor:
    """``-log sigmoid(beta margin)``. Direct Preference Optimization, 2305.18290."""
    d = beta * margin
    return -(1 - smoothing) * F.logsigmoid(d) - smoothing * F.logsigmoid(-d)


def ipo(margin: Tensor, *, beta: float = 0.1) -> Tensor:
    """``(margin - 1 / (2 beta))^2``. IPO, 2310.12036."""
    return (margin - 1 / (2 * beta)).square()


LINKS: dict[str, Callable[..., Tensor]] = {"dpo": dpo, "ipo": ipo}
"""Losses ``[P]`` of margins ``[P]``: the better row's score over the reference minus the worse one's."""


class PreferenceTerm(Term):
    """A contrastive loss on rows of a group.

    Args:
        link: a name of :data:`LINKS`, or a mapping with its settings.
        pairs: a name of :data:`PAIRS`, or a mapping.
        low, high: bounds of each unit's log-ratio before the sum (Humanline).
    """

    anchors = frozenset({"reference"})
    whole_groups = True
    needs_full_pass = True

    def __init__(
        self,
        *,
        link: str | Mapping[str, Any] = "dpo",
        pairs: str | Mapping[str, Any] = "best_worst",
        low: float | None = None,
        high: float | None = None,
        rows: Any = None,
        coefficient: float | Mapping[str, Any] = 1.0,
    ) -> None:
        super().__init__(rows, coefficient)
        self.link, _ = bind(link, LINKS, "link")
        self.pairs, _ = bind(pairs, PAIRS, "pairs")
        self.low, self.high = low, high

    def prepare(self, batch: TensorDict, scored: Scored) -> TensorDictBase:
        """``slope [B, N]`` of the whole loss by every log-prob, and ``value [B]``, the rows' equal shares of it."""
        rows = self.rows.within(batch)
        x = torch.where(rows["mask"], scored.log_prob - rows["reference_log_prob"], 0.0)
        bounded = x.clamp(self.low, self.high) if (self.low, self.high) != (None, None) else x
        with torch.enable_grad():
            score = bounded.sum(-1).requires_grad_()
            better, worse = self.pairs(row_return(rows), rows["group"])
            margin = score[better] - score[worse]
            value = self.link(margin).sum() / max(1, len(better))
            (slope,) = torch.autograd.grad(value, score) if len(better) else (torch.zeros_like(score),)
        slope = slope.unsqueeze(-1) * share(rows["mask"] & (bounded == x), x.dtype)
        items = {
            "slope": slope,
            "value": (value.detach() / len(batch)).expand(len(batch)),
            "pairs": torch.full_like(score.detach(), len(better)),
            "margin": margin.detach().mean().nan_to_num().expand(len(batch)),
        }
        return TensorDict(items, batch_size=[len(batch)])

    def loss(self, forward: Forward, rows: TensorDict, stats: TensorDictBase) -> tuple[Tensor, Metrics]:
        """The micro-batch's share."""
        value = stats["value"].sum()
        metrics = {
            "loss/preference": value,
            "preference/pairs": stats["pairs"][0],
            "preference/margin": stats["margin"][0],
        }
        return KnownGradient.apply(forward.log_prob, value, stats["slope"]), metrics
