"""Preferences: pairs and sets of rows of which some are better, and rows that are good or bad by themselves."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Literal

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from unified_rl.correction.generators import GENERATORS
from unified_rl.correction.lookup import bind
from unified_rl.errors import ConfigError
from unified_rl.objectives.objective import Parts
from unified_rl.objectives.pairs import LINKS, PAIRS, check_order, first_row, order_of
from unified_rl.objectives.scores import Compared, GroupScoreTerm, Measure, ScoreTerm, Within
from unified_rl.protocols import Samples
from unified_rl.ranges import Name, NonNegative, Positive, Whole
from unified_rl.returns.groups import Groups
from unified_rl.units import Source, row_return

__all__ = ["LINKS", "PAIRS", "KtoTerm", "PairTerm", "PreferenceTerm", "SetPreferenceTerm"]


class PairTerm(GroupScoreTerm):
    """A loss of the margins of pairs of rows, which some order makes.

    Args:
        name, rows, coefficient, anchor, low, high, score: see :class:`~unified_rl.objectives.scores.ScoreTerm`.
        within: see :class:`~unified_rl.objectives.scores.GroupScoreTerm`.
        pairs: a name of :data:`PAIRS`, or a mapping.
        link: a name of :data:`LINKS`, or a mapping with its settings.
        order: ``reward``, or a column ``[B]`` of the rows.
        setting: what the configuration calls ``order``.
    """

    counts = "pairs"

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
        pairs: str | Mapping[str, Any],
        link: str | Mapping[str, Any],
        order: str,
        setting: str,
    ) -> None:
        super().__init__(name, rows, coefficient, anchor, low, high, score, within)
        self.pairs, _ = bind(pairs, PAIRS, f"{self.where}.pairs")
        self.link, _ = bind(link, LINKS, f"{self.where}.link")
        self.order, self._setting = order, f"{self.where}.{setting}"
        self.columns = frozenset({order} - {"reward"})

    def check_columns(self, columns: Collection[str]) -> None:
        """Looks for the column that orders rows.

        Raises:
            ConfigError: no row will hold it.
        """
        check_order(self.order, columns, self._setting)


class PreferenceTerm(PairTerm):
    """A contrastive loss on pairs of rows, a mean over pairs.

    Args:
        name, rows, coefficient, anchor, low, high, score: see :class:`~unified_rl.objectives.scores.ScoreTerm`.
        within: see :class:`~unified_rl.objectives.scores.GroupScoreTerm`.
        link: a name of :data:`LINKS`, or a mapping with its settings.
        pairs: a name of :data:`PAIRS`, or a mapping.
        order: what says which row is better: ``reward``, or a column ``[B]`` of the rows, such as one of
            ``rollout.columns``, or ``source``.
        generator: scores are ``f'`` of a row's ratio, a name of
            :data:`~unified_rl.correction.generators.GENERATORS` or a mapping: the divergence from the anchor that the
            rewards are traded against. f-DPO, 2309.16240; ``reverse_kl`` is DPO.
        nll: weight of the better row's negative log-likelihood, summed over its units. RPO, 2405.16436.
    """

    shows = "margin"

    def __init__(
        self,
        name: str,
        *,
        link: str | Mapping[str, Any] = "dpo",
        pairs: str | Mapping[str, Any] = "best_worst",
        order: Name = "reward",
        generator: str | Mapping[str, Any] = "reverse_kl",
        nll: NonNegative = 0.0,
        anchor: str | Mapping[str, Any] = "reference",
        low: float | None = None,
        high: float | None = None,
        score: Measure = "sum",
        within: Within = "group",
        rows: Any = None,
        coefficient: float | Mapping[str, Any] = 1.0,
    ) -> None:
        shared = (rows, coefficient, anchor, low, high, score, within)
        super().__init__(name, *shared, pairs, link, order, "order")
        self.generator = bind(generator, GENERATORS, f"{self.where}.generator")[0]()
        self.nll = nll

    def compare(self, score: Tensor, likelihood: Tensor, rows: TensorDict) -> Compared:
        """The link's mean over pairs."""
        better, worse = self.pairs(order_of(rows, self.order), self.groups(rows))
        slope = self.generator.slope(score)
        margin = slope[better] - slope[worse]
        value = self.link(margin).sum()
        if self.nll:
            value = value - self.nll * likelihood[better].sum()
        return Compared(value / max(1, len(better)), len(better), margin.sum())


class SetPreferenceTerm(GroupScoreTerm):
    """Minus the log of the share of the better rows in the softmax of scores, a mean over groups whose rewards differ.

    Multi-Preference Optimization, 2412.04628, of many scored answers; AMPO, 2502.18293, of the best against a few.

    Args:
        name, rows, coefficient, anchor, low, high, score: see :class:`~unified_rl.objectives.scores.ScoreTerm`.
        within: see :class:`~unified_rl.objectives.scores.GroupScoreTerm`.
        chosen: the better rows: all ``above_mean`` of the group, or its first ``best``.
        negatives: the others: so many of the lowest rewards; 0 takes all.
        beta: of the scores.
        deviation: rows weigh ``exp(deviation |r - mean|)`` in the softmax, with the mean of their group.
    """

    counts, shows = "sets", "share"

    def __init__(
        self,
        name: str,
        *,
        chosen: Literal["above_mean", "best"] = "above_mean",
        negatives: Whole = 0,
        beta: Positive = 0.1,
        deviation: NonNegative = 1.0,
        anchor: str | Mapping[str, Any] = "reference",
        low: float | None = None,
        high: float | None = None,
        score: Measure = "sum",
        within: Within = "group",
        rows: Any = None,
        coefficient: float | Mapping[str, Any] = 1.0,
    ) -> None:
        super().__init__(name, rows, coefficient, anchor, low, high, score, within)
        self.chosen, self.negatives, self.beta, self.deviation = chosen, negatives, beta, deviation

    def compare(self, score: Tensor, likelihood: Tensor, rows: TensorDict) -> Compared:
        """The mean over groups; ``share`` is the probability of the better rows in the softmax."""
        reward = row_return(rows)
        groups = Groups(self.groups(rows))
        better = reward > groups.mean(reward)
        best = groups.extreme(reward, "amax")
        differ = best > groups.extreme(reward, "amin")
        if self.chosen == "best":
            better = torch.zeros_like(better).index_fill(0, first_row(groups, reward == best), True)
        logit = self.beta * score + self.deviation * (reward - groups.mean(reward)).abs()
        part = differ & (better | _lowest(groups, reward.masked_fill(better, torch.inf), self.negatives))
        at, good = part.nonzero().squeeze(-1), (part & better).nonzero().squeeze(-1)
        if not len(at):
            return Compared(score.new_zeros(()), 0, score.new_zeros(()))
        every, some = Groups(groups.index[at]), Groups(groups.index[good])
        first = [first_row(g, torch.ones_like(g.index, dtype=torch.bool)) for g in (every, some)]
        log_share = some.logsumexp(logit[good])[first[1]] - every.logsumexp(logit[at])[first[0]]
        return Compared(-log_share.mean(), every.number, log_share.exp().sum())


def _lowest(groups: Groups, reward: Tensor, count: int) -> Tensor:
    """The ``count`` rows of lowest finite reward of every group, all where ``count`` is 0, ``[B]`` bool."""
    finite = reward < torch.inf
    if not count:
        return finite
    order = reward.sort(stable=True).indices
    order = order[groups.index[order].sort(stable=True).indices]  # group by group, rewards ascending in each
    index = groups.index[order]
    place = torch.arange(len(order), device=order.device)
    start = torch.full((groups.number,), len(order), device=order.device).scatter_reduce(0, index, place, "amin")
    rank = torch.empty_like(place).index_copy(0, order, place - start[index])
    return finite & (rank < count)


class KtoTerm(ScoreTerm):
    """Rows that are good or bad by themselves.

    ``1 - sigmoid(beta (h - z0))`` of a good row and ``1 - sigmoid(beta (z0 - h))`` of a bad one, ``h`` its score and
    ``z0 = max(0, mean of h)``, without gradient: of rows that the policy sampled this mean is the divergence from the
    anchor, which the paper estimates from mismatched prompts and answers instead. Needs neither pairs nor groups, so it
    also takes episodes. KTO, 2402.01306.

    Args:
        name, rows, coefficient, anchor, low, high, score: see :class:`~unified_rl.objectives.scores.ScoreTerm`.
        beta: of the scores.
        threshold: a row is good whose return lies above it, else bad; None is the mean return of the optimiser batch,
            and rows at the mean are then neither.
        desirable, undesirable: weights of good and of bad rows.
        error_rate: further weights by how far the policy's best guesses lie from a row's actions: ``1 - exp(-k e)`` of
            good rows, which it does not yet follow, and ``exp(-k e)`` of bad ones, which it still does, with ``e`` a
            row's part of the batch's error; None is none. Control. Action Preference Optimization, 2506.07127.

    Rows of interventions are good whatever their return.
    """

    def __init__(
        self,
        name: str,
        *,
        beta: Positive = 0.1,
        threshold: float | None = None,
        desirable: NonNegative = 1.0,
        undesirable: NonNegative = 1.0,
        error_rate: Positive | None = None,
        anchor: str | Mapping[str, Any] = "reference",
        low: float | None = None,
        high: float | None = None,
        score: Measure = "sum",
        rows: Any = None,
        coefficient: float | Mapping[str, Any] = 1.0,
    ) -> None:
        super().__init__(name, rows, coefficient, anchor, low, high, score)
        self.beta, self.threshold = beta, threshold
        self.desirable, self.undesirable = desirable, undesirable
        self.error_rate = error_rate

    def attach(self, parts: Parts) -> None:
        """Takes the policy, whose actions are compared.

        Raises:
            ConfigError: it says answers, of which there is no nearest.
        """
        if self.error_rate is not None and not isinstance(parts.policy, Samples):
            raise ConfigError(
                f"{self.where}.error_rate weighs rows by the distance of actions, and this policy says answers: set it "
                "to null"
            )
        self.policy = parts.policy

    def compare(self, score: Tensor, likelihood: Tensor, rows: TensorDict) -> Compared:
        """The weighted mean over rows."""
        reward = row_return(rows)
        threshold = reward.mean() if self.threshold is None else torch.full_like(reward[0], self.threshold)
        source = rows.get("source", None)
        helped = torch.zeros_like(reward, dtype=torch.bool) if source is None else source == int(Source.INTERVENTION)
        good = (reward > threshold) | helped
        gap = self.beta * (score - score.detach().mean().clamp(min=0.0))
        weight = torch.where(good, self.desirable, self.undesirable)
        if self.threshold is None:
            weight = torch.where(torch.isclose(reward, threshold) & ~helped, 0.0, weight)
        if self.error_rate is not None:
            assert isinstance(self.policy, Samples)  # see attach
            kept = torch.exp(-self.error_rate * error_shares(action_errors(self.policy, rows)))
            weight = weight * torch.where(good, 1.0 - kept, kept)
        value = (weight * torch.sigmoid(torch.where(good, -gap, gap))).mean()
        return Compared(value, len(score), score.sum())


@torch.no_grad()
def action_errors(policy: Samples, rows: TensorDictBase) -> Tensor:
    """The mean distance of the actions of control rows from the policy's best guesses, ``[B]``.

    Choices are 0 or 1 apart.
    """
    action, valid = rows["action"], rows["step_mask"]
    best = policy.sample(rows["observation"], deterministic=True)["action"]
    apart = (action - best).abs() if action.is_floating_point() else (action != best).float()
    error: Tensor = torch.where(valid, apart.mean(-1), 0.0).sum(-1) / valid.sum(-1).clamp(min=1)
    return error


def error_shares(error: Tensor, least: float = 1e-4) -> Tensor:
    """Each row's part of the batch's error, ``[B]``; errors are ``least`` larger than they are."""
    return (error + least) / (error.sum() + least)
