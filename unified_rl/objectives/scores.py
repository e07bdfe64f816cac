"""Losses that depend on the policy through one score a row.

``prepare`` differentiates such a loss by the scores ``[B]`` of the whole optimiser batch, and a micro-batch only
multiplies each row's slope by its score: rows that are compared may lie in different micro-batches.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from unified_rl.correction.internal.surrogate import KnownGradient
from unified_rl.correction.lookup import check_keys
from unified_rl.correction.view import share
from unified_rl.errors import ConfigError
from unified_rl.instantiate import check_type
from unified_rl.objectives.forward import Forward
from unified_rl.objectives.metrics import Mean, Metrics
from unified_rl.objectives.objective import Scored, Term
from unified_rl.objectives.terms import nothing, scattered
from unified_rl.returns.groups import lone

Within = Literal["group", "batch"]
Measure = Literal["sum", "mean"]


class Compared(NamedTuple):
    """What a loss of scores came to.

    Attributes:
        value: the loss, a scalar with a graph.
        number: of pairs, sets or rows, over which it is a mean.
        shown: a sum over these that is logged as a mean, scalar.
    """

    value: Tensor
    number: int
    shown: Tensor


class ScoreTerm(Term):
    """A loss of scores; a row's score is the sum of its units' log-ratios to another policy.

    A class of this kind sets ``counts`` and ``shows``, the names of its metrics, and writes :meth:`compare`.

    Args:
        name, rows, coefficient: see :class:`~unified_rl.objectives.objective.Term`.
        anchor: the policy that scores are measured against; ``none`` scores by the log-probs alone; a mapping of names
            to weights measures against their weighted log-probs.
        low, high: bounds of each unit's log-ratio before the sum (Humanline).
        score: ``sum`` of a row's units, or their ``mean``.
    """

    counts = "rows"
    shows = "score"
    whole_rows = True

    def __init__(
        self,
        name: str,
        rows: Any,
        coefficient: float | Mapping[str, Any],
        anchor: str | Mapping[str, Any],
        low: float | None,
        high: float | None,
        score: Measure,
    ) -> None:
        super().__init__(name, rows, coefficient)
        self.weights = _weights(anchor, f"{self.where}.anchor")
        if low is not None and high is not None and low > high:
            raise ConfigError(f"{self.where}.low must not lie above high={high}, got {low}")
        self.low, self.high, self.score = low, high, score
        self.anchors = frozenset(self.weights)
        self.reports = frozenset({f"loss/{name}", f"{name}/{self.counts}", f"{name}/{self.shows}"})

    def compare(self, score: Tensor, likelihood: Tensor, rows: TensorDict) -> Compared:
        """The loss of ``score [B]``; ``likelihood [B]`` are the rows' summed log-probs. Both have a graph."""
        raise NotImplementedError

    def prepare(self, batch: TensorDict, scored: Scored) -> TensorDictBase | None:
        """``slope [B, N]`` of the whole loss by every log-prob, and ``value [B]``, the rows' equal shares of it."""
        if self.rows.every:
            return self._prepared(batch, scored.log_prob)
        at = self.rows.numbers(batch)
        return scattered(self._prepared(batch[at], scored.log_prob[at]), at, len(batch)) if len(at) else None

    def _prepared(self, rows: TensorDict, log_prob: Tensor) -> TensorDictBase:
        mask, gap = rows["mask"], log_prob
        for name, weight in self.weights.items():
            gap = gap - (rows[f"{name}_log_prob"] if weight == 1.0 else weight * rows[f"{name}_log_prob"])
        x = torch.where(mask, gap, 0.0)
        bounded = x.clamp(self.low, self.high) if (self.low, self.high) != (None, None) else x
        size = mask.sum(-1).clamp(min=1) if self.score == "mean" else torch.ones_like(mask[:, 0], dtype=x.dtype)
        with torch.enable_grad():
            score = (bounded.sum(-1) / size).requires_grad_()
            likelihood = torch.where(mask, log_prob, 0.0).sum(-1).requires_grad_()
            found = self.compare(score, likelihood, rows)
            by_score, by_likelihood = _slopes(found.value, score, likelihood)
        slope = (by_score / size).unsqueeze(-1) * share(mask & (bounded == x), x.dtype)
        if by_likelihood is not None:
            slope = slope + by_likelihood.unsqueeze(-1) * share(mask, x.dtype)
        number = len(rows)
        items = {
            "slope": slope,
            "value": (found.value.detach() / number).expand(number),
            "number": torch.full_like(score.detach(), found.number / number),
            "shown": (found.shown.detach() / number).expand(number),
        }
        return TensorDict(items, batch_size=[number])

    def loss(self, forward: Forward, rows: TensorDict, stats: TensorDictBase | None) -> tuple[Tensor, Metrics]:
        """The micro-batch's share."""
        if stats is None:
            return nothing(forward.log_prob), {}
        value, number = stats["value"].sum(), stats["number"].sum()
        metrics = {
            f"loss/{self.name}": value,
            f"{self.name}/{self.counts}": number,
            f"{self.name}/{self.shows}": Mean(stats["shown"].sum(), number),
        }
        return KnownGradient.apply(forward.log_prob, value, stats["slope"]), metrics


class GroupScoreTerm(ScoreTerm):
    """A loss of scores that compares rows: those of one group, or all of an optimiser batch.

    Args:
        name, rows, coefficient, anchor, low, high, score: see :class:`ScoreTerm`.
        within: ``group``, or ``batch`` where rows share no prompt and no reset state (control): their returns must then
            be comparable, as where every episode starts from the same distribution.
    """

    def __init__(
        self,
        name: str,
        rows: Any,
        coefficient: float | Mapping[str, Any],
        anchor: str | Mapping[str, Any],
        low: float | None,
        high: float | None,
        score: Measure,
        within: Within,
    ) -> None:
        super().__init__(name, rows, coefficient, anchor, low, high, score)
        self.within = within
        self.whole_groups = within == "group"

    def check_groups(self, record: TensorDictBase) -> None:
        """Looks for groups.

        Raises:
            ConfigError: every row is alone in its group, so there is nothing to compare.
        """
        if lone(record["group"][self.rows.ungated.of_record(record)]):
            self.refuse_lone()

    def refuse_lone(self) -> None:
        """Where every row is alone in its group.

        Raises:
            ConfigError: they are compared within it.
        """
        if self.within == "group":
            raise ConfigError(
                f"{self.where} compares rows of one group, and every row is alone in its own: sample several rows a "
                f"prompt (rollout.group_size) or start (rollout.starts), or set {self.where}.within=batch"
            )

    def groups(self, rows: TensorDict) -> Tensor:
        """Who is compared with whom, ``[B]`` int64."""
        group: Tensor = rows["group"]
        return group if self.within == "group" else torch.zeros_like(group)


def _weights(anchor: str | Mapping[str, Any], where: str) -> dict[str, float]:
    """Names and weights of the policies that scores are measured against.

    Raises:
        ConfigError: neither a name nor a mapping of names to numbers.
    """
    if isinstance(anchor, str):
        return {} if anchor == "none" else {anchor: 1.0}
    check_keys([key for key in anchor if not isinstance(key, str) or key == "none"], (), where)
    found = {name: check_type(weight, float, f"{where}.{name}") for name, weight in anchor.items()}
    return {name: weight for name, weight in found.items() if weight != 0.0}


def _slopes(value: Tensor, score: Tensor, likelihood: Tensor) -> tuple[Tensor, Tensor | None]:
    """Derivatives ``[B]`` of a loss by scores and by log-probs; None where it does not read the latter."""
    if not value.requires_grad:
        return torch.zeros_like(score), None
    by_score, by_likelihood = torch.autograd.grad(value, (score, likelihood), allow_unused=True)
    return torch.zeros_like(score) if by_score is None else by_score, by_likelihood
