"""Losses of sequence scores: pairs and sets of a group's rows.

Such a loss depends on the policy through one score a row, so ``prepare`` differentiates it by the scores ``[B]`` of the
whole optimiser batch, and a micro-batch only multiplies each row's slope by its score: rows of a pair may lie in
different micro-batches.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from annotated_types import Interval
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from unified_rl.correction.internal.surrogate import KnownGradient
from unified_rl.correction.lookup import bind
from unified_rl.correction.view import share
from unified_rl.errors import ConfigError
from unified_rl.objectives.forward import Forward
from unified_rl.objectives.metrics import Mean, Metrics
from unified_rl.objectives.objective import Scored, Term
from unified_rl.objectives.terms import nothing, scattered
from unified_rl.ranges import NonNegative, Positive
from unified_rl.returns.groups import Groups
from unified_rl.units import row_return

Pairs = tuple[Tensor, Tensor]
"""Indices ``[P]`` of the better and the worse rows."""


def best_worst(reward: Tensor, group: Tensor, *, least_gap: NonNegative = 0.0) -> Pairs:
    """In every group whose rewards differ by more than ``least_gap``: the first best row and the first worst."""
    groups = Groups(group)
    high, low = groups.extreme(reward, "amax"), groups.extreme(reward, "amin")
    better, worse = (_first(groups, reward == extreme) for extreme in (high, low))
    chosen = (high - low)[better] > least_gap
    return better[chosen], worse[chosen]


def _first(groups: Groups, holds: Tensor) -> Tensor:
    """The first row of every group where ``holds [B]``, which it does somewhere in each, ``[groups]``."""
    rows = holds.nonzero().squeeze(-1)
    first = torch.full((groups.number,), len(holds), device=holds.device)
    return first.scatter_reduce(0, groups.index[rows], rows, "amin")


def every_pair(reward: Tensor, group: Tensor) -> Pairs:
    """Every two rows of one group of which one has the higher reward (GAL)."""
    better = (reward[:, None] > reward) & (group[:, None] == group)
    winner, loser = better.nonzero(as_tuple=True)
    return winner, loser


PAIRS: dict[str, Callable[..., Pairs]] = {"best_worst": best_worst, "every_pair": every_pair}


def dpo(margin: Tensor, *, beta: Positive = 0.1, smoothing: Annotated[float, Interval(ge=0, le=0.5)] = 0.0) -> Tensor:
    """``-log sigmoid(beta margin)``. Direct Preference Optimization, 2305.18290."""
    d = beta * margin
    return -(1 - smoothing) * F.logsigmoid(d) - smoothing * F.logsigmoid(-d)


def ipo(margin: Tensor, *, beta: Positive = 0.1) -> Tensor:
    """``(margin - 1 / (2 beta))^2``. IPO, 2310.12036."""
    return (margin - 1 / (2 * beta)).square()


LINKS: dict[str, Callable[..., Tensor]] = {"dpo": dpo, "ipo": ipo}
"""Losses ``[P]`` of margins ``[P]``: the better row's score over the reference minus the worse one's."""


class PreferenceTerm(Term):
    """A contrastive loss on rows of a group.

    Args:
        name, rows, coefficient: see :class:`Term`.
        link: a name of :data:`LINKS`, or a mapping with its settings.
        pairs: a name of :data:`PAIRS`, or a mapping.
        anchor: the policy that scores are measured against; ``none`` scores by the log-probs alone.
        low, high: bounds of each unit's log-ratio before the sum (Humanline).
    """

    whole_groups = True

    def __init__(
        self,
        name: str,
        *,
        link: str | Mapping[str, Any] = "dpo",
        pairs: str | Mapping[str, Any] = "best_worst",
        anchor: str = "reference",
        low: float | None = None,
        high: float | None = None,
        rows: Any = None,
        coefficient: float | Mapping[str, Any] = 1.0,
    ) -> None:
        super().__init__(name, rows, coefficient)
        self.link, _ = bind(link, LINKS, f"{self.where}.link")
        self.pairs, _ = bind(pairs, PAIRS, f"{self.where}.pairs")
        if low is not None and high is not None and low > high:
            raise ConfigError(f"{self.where}.low must not lie above high={high}, got {low}")
        self.low, self.high, self.anchor = low, high, anchor
        self.anchors = frozenset({anchor} - {"none"})
        self.reports = frozenset({f"loss/{name}", f"{name}/pairs", f"{name}/margin"})

    def check(self, record: TensorDictBase) -> None:
        """Looks for groups.

        Raises:
            ConfigError: every row is alone in its group, so there are no pairs.
        """
        rows = record if self.rows.every else self.rows.chosen(record)
        if len(rows) and len(rows["group"].unique()) == len(rows):
            raise ConfigError(
                f"{self.where} compares rows of one group, and every row is alone in its own: sample several rows a "
                "prompt or reset state (rollout.group_size)"
            )

    def prepare(self, batch: TensorDict, scored: Scored) -> TensorDictBase | None:
        """``slope [B, N]`` of the whole loss by every log-prob, and ``value [B]``, the rows' equal shares of it."""
        if self.rows.every:
            return self._prepared(batch, scored.log_prob)
        at = self.rows.numbers(batch)
        return scattered(self._prepared(batch[at], scored.log_prob[at]), at, len(batch)) if len(at) else None

    def _prepared(self, rows: TensorDict, log_prob: Tensor) -> TensorDictBase:
        gap = log_prob if self.anchor == "none" else log_prob - rows[f"{self.anchor}_log_prob"]
        x = torch.where(rows["mask"], gap, 0.0)
        bounded = x.clamp(self.low, self.high) if (self.low, self.high) != (None, None) else x
        with torch.enable_grad():
            score = bounded.sum(-1).requires_grad_()
            better, worse = self.pairs(row_return(rows), rows["group"])
            margin = score[better] - score[worse]
            value = self.link(margin).sum() / max(1, len(better))
            (slope,) = torch.autograd.grad(value, score) if len(better) else (torch.zeros_like(score),)
        slope = slope.unsqueeze(-1) * share(rows["mask"] & (bounded == x), x.dtype)
        number = len(rows)
        items = {
            "slope": slope,
            "value": (value.detach() / number).expand(number),
            "pairs": torch.full_like(score.detach(), len(better) / number),
            "margin": (margin.detach().sum() / number).expand(number),
        }
        return TensorDict(items, batch_size=[number])

    def loss(self, forward: Forward, rows: TensorDict, stats: TensorDictBase | None) -> tuple[Tensor, Metrics]:
        """The micro-batch's share."""
        if stats is None:
            return nothing(forward.log_prob), {}
        value, pairs = stats["value"].sum(), stats["pairs"].sum()
        metrics = {
            f"loss/{self.name}": value,
            f"{self.name}/pairs": pairs,
            f"{self.name}/margin": Mean(stats["margin"].sum(), pairs),
        }
        return KnownGradient.apply(forward.log_prob, value, stats["slope"]), metrics
