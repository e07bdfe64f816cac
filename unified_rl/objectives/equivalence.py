"""Equal scores for answers that are equally right."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tensordict import TensorDict
from torch import Tensor

from unified_rl.objectives.scores import Compared, GroupScoreTerm, Measure, Within
from unified_rl.ranges import Positive
from unified_rl.returns.groups import Groups
from unified_rl.units import row_return


class EquivalenceTerm(GroupScoreTerm):
    """``(beta (h - h'))^2`` of two right rows of a group, a mean over pairs; ``h`` is a row's score. GEPO, 2505.12723.

    Args:
        name, rows, coefficient, anchor, low, high, score: see :class:`~unified_rl.objectives.scores.ScoreTerm`.
        within: see :class:`~unified_rl.objectives.scores.GroupScoreTerm`.
        beta: of the scores.
        threshold: of the return, above which a row is right.
    """

    counts, shows = "pairs", "gap"

    def __init__(
        self,
        name: str,
        *,
        beta: Positive = 0.1,
        threshold: float = 0.5,
        anchor: str | Mapping[str, Any] = "reference",
        low: float | None = None,
        high: float | None = None,
        score: Measure = "sum",
        within: Within = "group",
        rows: Any = None,
        coefficient: float | Mapping[str, Any] = 1.0,
    ) -> None:
        super().__init__(name, rows, coefficient, anchor, low, high, score, within)
        self.beta, self.threshold = beta, threshold

    def compare(self, score: Tensor, likelihood: Tensor, rows: TensorDict) -> Compared:
        """The mean over pairs: of ``n`` right rows they sum to ``n`` times the squared distances from their mean."""
        right = row_return(rows) > self.threshold
        if not bool(right.any()):
            return Compared(score.new_zeros(()), 0, score.new_zeros(()))
        groups, own = Groups(self.groups(rows)[right]), self.beta * score[right]
        pairs = round(float((groups.count - 1).sum()) / 2)
        squares = (groups.count * (own - groups.mean(own)).square()).sum()
        return Compared(squares / max(1, pairs), pairs, squares)
