"""How a reward model learns from comparisons: losses of scores, and which rows were compared."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, NamedTuple

import torch
import torch.nn.functional as F
from annotated_types import Interval
from torch import Tensor

from unified_rl.correction.lookup import bind
from unified_rl.objectives.pairs import PAIRS, best_worst
from unified_rl.ranges import Fraction, NonNegative
from unified_rl.returns.groups import Groups

Probability = Annotated[float, Interval(ge=0.5, lt=1)]


class Fit(NamedTuple):
    """What a loss of scores came to.

    Attributes:
        value: the loss of each comparison ``[P]``, with a graph; its mean is minimised.
        better, worse: the rows that were compared, ``[Q]`` int64.
        at: which of the losses each of these belongs to, ``[Q]`` int64.
    """

    value: Tensor
    better: Tensor
    worse: Tensor
    at: Tensor


class RewardLoss:
    """``(score [B], order [B], group [B]) -> Fit``: ``order`` says which row of a group is better."""

    def __call__(self, score: Tensor, order: Tensor, group: Tensor) -> Fit:
        """The loss of every comparison."""
        raise NotImplementedError


class BradleyTerry(RewardLoss):
    """``-log sigmoid(s_better - s_worse - margin)``.

    Args:
        pairs: a name of :data:`~unified_rl.objectives.pairs.PAIRS`, or a mapping with its settings.
        margin: by which the better score should lead.
    """

    def __init__(self, *, pairs: str | Mapping[str, Any] = "best_worst", margin: NonNegative = 0.0) -> None:
        self.pairs, _ = bind(pairs, PAIRS, "agent.reward_model.loss.pairs")
        self.margin = margin

    def __call__(self, score: Tensor, order: Tensor, group: Tensor) -> Fit:
        """One loss a pair."""
        better, worse = self.pairs(order, group)
        return _of_pairs(score, better, worse, self.margin)


class PlackettLuce(RewardLoss):
    """``logsumexp over {k and what is worse} of s, minus s_k``, summed over a group's rows: a whole ranking at once.

    Rows that are equally good stand in no order, so none is among the others' alternatives. Of two rows it is
    :class:`BradleyTerry`. "Principled Reinforcement Learning with Human Feedback from Pairwise or K-wise Comparisons",
    2301.11270.
    """

    def __call__(self, score: Tensor, order: Tensor, group: Tensor) -> Fit:
        """One loss a group whose rows differ."""
        below = (order[:, None] > order) & (group[:, None] == group)
        better, worse = below.nonzero(as_tuple=True)
        rows = torch.arange(len(score), device=score.device)
        among = below | (rows[:, None] == rows)
        each = torch.where(among, score, -math.inf).logsumexp(-1) - score
        groups = Groups(group)
        which, at = torch.unique(groups.index[better], return_inverse=True)
        value = torch.zeros(groups.number, device=score.device).index_add(0, groups.index, each)
        return Fit(value[which], better, worse, at)


class WestOfN(RewardLoss):
    """Pairs that are judged in a part of the groups, and in the others pairs of the model's own best and worst rows.

    The latter are kept where the model itself is at least so sure of them. West-of-N, 2401.12086.

    Args:
        labelled: share of the groups, in their order, whose best and worst rows are judged; one of them at least, or
            else a model whose scores are still 0 would never be sure of any.
        confidence: least probability of a pair, under the present scores, in the other groups.
    """

    def __init__(self, *, labelled: Fraction = 0.5, confidence: Probability = 0.6) -> None:
        self.labelled, self.confidence = labelled, confidence

    def __call__(self, score: Tensor, order: Tensor, group: Tensor) -> Fit:
        """One loss a pair."""
        groups = Groups(group)
        judged = groups.index < max(1, round(self.labelled * groups.number))
        gap = math.log(self.confidence / (1.0 - self.confidence))
        parts = []
        for rows, by, least in ((judged, order, 0.0), (~judged, score.detach(), gap)):
            at = rows.nonzero().squeeze(-1)
            if len(at):
                parts.append([at[pair] for pair in best_worst(by[at], group[at], least_gap=least)])
        better, worse = (torch.cat(part) for part in zip(*parts, strict=True))
        return _of_pairs(score, better, worse)


def _of_pairs(score: Tensor, better: Tensor, worse: Tensor, margin: float = 0.0) -> Fit:
    value = -F.logsigmoid(score[better] - score[worse] - margin)
    return Fit(value, better, worse, torch.arange(len(better), device=score.device))


REWARD_LOSSES: dict[str, type[RewardLoss]] = {
    "bradley_terry": BradleyTerry,
    "plackett_luce": PlackettLuce,
    "west_of_n": WestOfN,
}
