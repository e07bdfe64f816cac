"""Pairs of an older judgement, sorted by what is wanted now: turned round, pushed down, or left where they are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from tensordict import TensorDict
from torch import Tensor

from unified_rl.objectives.pairs import order_of
from unified_rl.objectives.preference import PairTerm
from unified_rl.objectives.scores import Compared, Measure, Within
from unified_rl.ranges import Name, NonNegative, Positive
from unified_rl.units import row_return


class TriageTerm(PairTerm):
    """A loss on pairs that another judgement made, a weighted mean over them.

    With ``h`` the scores of a pair, of which an older judgement chose ``w`` over ``l``: where the return says that only
    ``l`` is right, the link of ``h_l - h_w``; where neither is, ``-log sigmoid(-beta h)`` of both (NPO, 2404.05868);
    else what holds them at the anchor, ``h^2 / 2`` of both, times ``retain``. Of both is the mean. TRACE, "The
    Realignment Problem", 2511.02623.

    Args:
        name, rows, coefficient, anchor, low, high, score: see :class:`~unified_rl.objectives.scores.ScoreTerm`.
        within: see :class:`~unified_rl.objectives.scores.GroupScoreTerm`.
        old: column ``[B]`` of the rows with the older judgement.
        lowest: whether it preferred low values.
        pairs: of rows by it: a name of :data:`~unified_rl.objectives.pairs.PAIRS`, or a mapping.
        link: a name of :data:`~unified_rl.objectives.pairs.LINKS`, or a mapping with its settings.
        beta: of the scores of rows that are pushed down.
        threshold: of the return, above which a row is right.
        retain: weight of what holds pairs whose choice is right still.
        impact: pairs weigh the mean distance of their returns from the threshold to this power, divided by its mean.
    """

    shows = "inverted"

    def __init__(
        self,
        name: str,
        *,
        old: Name = "old",
        lowest: bool = False,
        pairs: str | Mapping[str, Any] = "best_worst",
        link: str | Mapping[str, Any] = "dpo",
        beta: Positive = 0.1,
        threshold: float = 0.5,
        retain: NonNegative = 1.0,
        impact: NonNegative = 1.0,
        anchor: str | Mapping[str, Any] = "reference",
        low: float | None = None,
        high: float | None = None,
        score: Measure = "sum",
        within: Within = "group",
        rows: Any = None,
        coefficient: float | Mapping[str, Any] = 1.0,
    ) -> None:
        shared = (rows, coefficient, anchor, low, high, score, within)
        super().__init__(name, *shared, pairs, link, old, "old")
        self.lowest, self.beta, self.threshold = lowest, beta, threshold
        self.retain, self.impact = retain, impact

    def compare(self, score: Tensor, likelihood: Tensor, rows: TensorDict) -> Compared:
        """The weighted mean over pairs; ``inverted`` is the share of those that are turned round."""
        order = order_of(rows, self.order)
        better, worse = self.pairs(-order if self.lowest else order, self.groups(rows))
        reward = row_return(rows) - self.threshold
        right = reward > 0
        invert, keep = right[worse] & ~right[better], right[better]
        h, other = score[better], score[worse]
        turned = self.link(other - h)
        pushed = -0.5 * (F.logsigmoid(-self.beta * h) + F.logsigmoid(-self.beta * other))
        held = 0.25 * self.retain * (h.square() + other.square())
        loss = invert * turned + keep * held + ~(invert | keep) * pushed
        weight = (0.5 * (reward[better].abs() + reward[worse].abs())) ** self.impact
        weight = weight / weight.mean().clamp(min=1e-12) if len(weight) else weight
        return Compared((weight * loss).sum() / max(1, len(better)), len(better), invert.float().sum())
