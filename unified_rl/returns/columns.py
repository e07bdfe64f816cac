"""Columns: numbers of rows that are computed once an update, before advantages, and that something else reads by name.

``(record) -> [B]`` float. Rewards made of others (``correction.advantage.reward`` names one), weights of rows
(``correction.penalty`` and terms do). As maps do, a column says by attributes what it wants beside the record:
``anchors``, ``reads`` and ``columns``, see :mod:`~unified_rl.returns.maps`. Returns are those that advantages are made
of: of ``agent.reward_model`` where there is one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from tensordict import TensorDictBase
from torch import Tensor

from unified_rl.errors import ConfigError, RecordError
from unified_rl.ranges import Exponent, Name, NonNegative, Positive, PositiveExponent, TwoOrMore, UnitInterval, Whole
from unified_rl.returns.groups import Groups
from unified_rl.units import Source, numbered, row_return


def rubric(
    record: TensorDictBase, *, of: Name | list[Name] = "scores", weights: list[float] | None = None, clamp: bool = True
) -> Tensor:
    """``sum_j w_j c_j / sum_j max(w_j, 0)``: the weighted share of the criteria that are met. Rubrics as Rewards.

    All met is 1. A criterion of negative weight is a pitfall; with ``clamp`` it brings a row down to 0 and no further.
    Several objectives, of which the weights move, are mixed in the same way. 2507.17746.

    Args:
        of: entry ``[B, K]`` of the record, or a list of K entries ``[B]``.
        weights: K numbers; all 1 if not given.
        clamp: keep the result within 0 and 1.

    Raises:
        ConfigError: no criterion, another number of weights than of criteria, or none above 0.
    """
    told = _rubric_misfit({of: record[of].shape[-1]} if isinstance(of, str) else {}, of=of, weights=weights)
    if told is not None:
        raise ConfigError(f"the column rubric {told}")
    criteria = record[of].float() if isinstance(of, str) else torch.stack([record[name].float() for name in of], -1)
    given = criteria.new_ones(criteria.shape[-1]) if weights is None else criteria.new_tensor(weights)
    best = given.clamp(min=0).sum()
    if not bool(best > 0):
        raise ConfigError("the column rubric needs a weight above 0: without one nothing can be earned")
    share = (criteria * given).sum(-1) / best
    return share.clamp(0.0, 1.0) if clamp else share


def _rubric_misfit(
    widths: Mapping[str, int], *, of: str | list[str], weights: list[float] | None, **others: object
) -> str | None:
    """What is wrong with criteria and weights; None where nothing is, or the number of criteria is unknown."""
    if not of:
        return "has of=[], no criterion at all: name entries of the rows"
    number = widths.get(of) if isinstance(of, str) else len(of)
    if weights is None or number is None or len(weights) == number:
        return None
    return f"has {len(weights)} weights for {number} criteria"


rubric.misfit = _rubric_misfit  # type: ignore[attr-defined]
rubric.columns = lambda *, of, **others: [of] if isinstance(of, str) else list(of)  # type: ignore[attr-defined]


def criterion(record: TensorDictBase, *, of: Name = "scores", at: Whole = 0, complement: bool = False) -> Tensor:
    """One of several scores of a row, or one less it; its mean is reported as that of every column.

    Args:
        of: entry ``[B, K]`` of the record.
        at: which of them, from 0.
        complement: of a score that says what should not be.

    Raises:
        ConfigError: the entry holds fewer.
    """
    scores: Tensor = record[of].float()
    told = _criterion_misfit({of: scores.shape[1] if scores.ndim == 2 else 0}, of=of, at=at)
    if told is not None:
        raise ConfigError(f"the column criterion {told}")
    return 1 - scores[:, at] if complement else scores[:, at]


def _criterion_misfit(widths: Mapping[str, int], *, of: str, at: int, **others: object) -> str | None:
    """What is wrong with ``at``; None where nothing is, or the number of scores is unknown."""
    number = widths.get(of)
    return None if number is None or at < number else f"has at={at}, and {of} holds {number} scores a row"


criterion.misfit = _criterion_misfit  # type: ignore[attr-defined]
criterion.columns = lambda *, of, **others: [of]  # type: ignore[attr-defined]


def bent(
    record: TensorDictBase, *, turn: float = 0.8, rise: NonNegative = 0.01, fall: PositiveExponent = 1.0
) -> Tensor:
    """The return, flattened above ``turn`` and steeper the further it lies below. TempSamp-R1, 2509.18056.

    ``turn + rise log(1 + R - turn)`` from ``turn`` on, ``turn - (exp(fall (turn - R)) - 1) / (exp(fall) - 1)`` below;
    continuous, and rising on [0, 1]. The constants are from memory.

    Args:
        turn: where both parts meet.
        rise, fall: their slopes.
    """
    total = row_return(record)
    above = turn + rise * (total - turn).clamp(min=0).log1p()
    below = turn - (fall * (turn - total).clamp(min=0)).expm1() / math.expm1(fall)
    return torch.where(total >= turn, above, below)


def success(record: TensorDictBase, *, threshold: float = 1.0) -> Tensor:
    """1 where the return is at least ``threshold``, else 0: a success rate where the reward is none.

    For ``correction.advantage={baseline: tracker, reward: NAME}``, which counts rewards from 0 to 1, and to compare
    rows by success where the environment's reward is shaped.

    Args:
        threshold: of the return, from which on a row has succeeded.
    """
    return (row_return(record) >= threshold).float()


def spoken(
    record: TensorDictBase, *, levels: TwoOrMore = 10, worst: Positive = 5.0, share: UnitInterval = 1.0
) -> Tensor:
    """A teacher's mark for a whole row, one of ``levels``, over the best one. OVD, 2601.21968.

    There the teacher says a digit; here it is read off its mean log-prob of the row's units: 0 at ``-worst`` nats and
    below, the best mark at 0.

    Args:
        levels: marks, from 0 to ``levels - 1``.
        worst: nats a unit.
        share: of the mark in the reward; the rest is the return.
    """
    mask = record["mask"]
    mean = torch.where(mask, record["teacher_log_prob"], 0.0).sum(-1) / mask.sum(-1).clamp(min=1)
    mark = (levels * (1 + mean / worst)).floor().clamp(0, levels - 1) / (levels - 1)
    out: Tensor = share * mark + (1 - share) * row_return(record)
    return out


spoken.anchors = ("teacher",)  # type: ignore[attr-defined]


def calibrated(record: TensorDictBase, *, tilt: Exponent = 5.0) -> Tensor:
    """How a row's return ranks among those of another policy's answers to its prompt, tilted. InfAlign, 2412.19792.

    ``C`` is the share of the group's rows of source ``expert`` with a lower return, equal ones counting half; the
    column is ``(exp(tilt C) - 1) / (exp(tilt) - 1)``: near the best of many for ``tilt`` above 0, near the worst below,
    ``C`` itself at 0.

    Raises:
        RecordError: a group without rows of an expert.
    """
    total, index = row_return(record).double(), Groups.of(record).index
    other = record["source"] == int(Source.EXPERT)
    same = (index[:, None] == index[None, :]) & other[None, :]
    count = same.sum(-1)
    if not bool((count > 0).all()):
        raise RecordError(
            "the column calibrated ranks a row among answers of another model to its prompt, and a group has none: add "
            "rollout.sources.reference={_target_: unified_rl.rollout.sources.Model, folder: FOLDER, per_group: 8}"
        )
    lower = (total[:, None] > total[None, :]).double() + 0.5 * (total[:, None] == total[None, :]).double()
    rank = (lower * same).sum(-1) / count
    out: Tensor = rank if tilt == 0 else (tilt * rank).expm1() / math.expm1(tilt)
    return out.float()


def loosened(record: TensorDictBase, *, steepness: Positive = math.e, threshold: float = 0.5) -> Tensor:
    """``1 - exp(-steepness p)`` for right answers, with the share ``p`` of right ones of their group; 1 for all others.

    The weight of a row's KL: a right answer to a hard prompt may move further. View-R1's DADS, 2506.21655. Groups that
    are all right, or all wrong, keep 1.

    Args:
        steepness: of the curve.
        threshold: of the return, above which an answer is right.
    """
    won = row_return(record) > threshold
    rate = Groups.of(record).mean(won.float())
    return torch.where(won & (rate < 1), -(-steepness * rate).expm1(), 1.0)


def class_costs(
    record: TensorDictBase,
    *,
    alarm: list[int | Name],
    hit: float = 1.0,
    miss: float = -1.0,
    false_alarm: float = -0.5,
    label_column: Name = "label",
    answer_column: Name = "answer",
    threshold: float = 0.5,
) -> Tensor:
    """A reward by classes: what an answer is worth depends on whether the right one, or the given one, is an alarm.

    Right answers earn ``hit`` where an alarm was right, else 1; wrong ones ``miss`` where an alarm was right,
    ``false_alarm`` where they raise one and none was, else 0. After 2511.22169, on asymmetric costs of forecasts.

    Args:
        alarm: the answers that raise it, texts or whole numbers.
        hit, miss, false_alarm: rewards.
        label_column, answer_column: entries ``[B]`` of the record, of the right answer and of the given one.
        threshold: of the return, above which an answer is right.
    """
    wanted = torch.tensor([numbered(str(one)) for one in alarm], device=record["mask"].device)
    due, raised = (torch.isin(record[name], wanted) for name in (label_column, answer_column))
    right = torch.where(due, hit, 1.0)
    wrong = torch.where(due, miss, torch.where(raised, false_alarm, 0.0))
    return torch.where(row_return(record) > threshold, right, wrong)


class_costs.columns = lambda *, label_column, answer_column, **others: [label_column, answer_column]  # type: ignore[attr-defined]


def distinct(record: TensorDictBase, *, bonus: NonNegative = 0.1, threshold: float = 0.5) -> Tensor:
    """The return, and for right answers ``bonus`` times how little they resemble the right ones of their group. DSDR.

    ``d = 1 - mean similarity``, the cosine of counts of tokens and of neighbouring tokens; 0 for the only right answer.
    2602.19895.

    Args:
        bonus: below the gap of rewards it never lifts a wrong answer above a right one.
        threshold: of the return, above which an answer is right.
    """
    total = row_return(record)
    return total + bonus * _distinctness(record, total > threshold)


def distinct_share(record: TensorDictBase, *, temperature: Positive = 0.2, threshold: float = 0.5) -> Tensor:
    """Softmax of ``d / temperature`` over the right answers of a group, times their number; 0 for wrong ones. DSDR.

    ``d`` is that of :func:`distinct`: the weight of a row's entropy bonus. Equal right answers have 1 each.

    Args:
        temperature: of the softmax.
        threshold: of the return, above which an answer is right.
    """
    won, groups = row_return(record) > threshold, Groups.of(record)
    x = _distinctness(record, won) / temperature
    weight = torch.where(won, (x - groups.extreme(torch.where(won, x, 0.0), "amax")).exp(), 0.0)
    return weight / groups.sum(weight).clamp(min=1e-12) * groups.sum(won.float())


def likeness(record: TensorDictBase) -> Tensor:
    """How much a row resembles the answer that somebody else gave to its prompt, from 0 to 1; of several the closest.

    The cosine of :func:`distinct`; 1 for those answers, 0 in groups without one. A fine-grained score that needs no
    judge, for :func:`~unified_rl.returns.filters.distinct_pairs`.
    """
    index, profile = Groups.of(record).index, _profile(record["tokens"], record["mask"])
    shown = record["source"] > int(Source.OFFLINE)
    same = (index[:, None] == index[None, :]) & shown[None, :]
    return torch.where(same, profile @ profile.T, 0.0).amax(-1).clamp(0.0, 1.0)


likeness.columns = lambda **settings: ["tokens"]  # type: ignore[attr-defined]
distinct.columns = distinct_share.columns = lambda **settings: ["tokens"]  # type: ignore[attr-defined]
PROFILE = 512
"""Width of the hashed counts that two answers are compared by."""


def _distinctness(record: TensorDictBase, won: Tensor) -> Tensor:
    """One minus the mean similarity of each chosen row to the other chosen rows of its group, ``[B]``; else 0."""
    index, profile = Groups.of(record).index, _profile(record["tokens"], record["mask"])
    pair = (index[:, None] == index[None, :]) & won[:, None] & won[None, :]
    pair = pair & ~torch.eye(len(won), dtype=torch.bool, device=won.device)
    count = pair.sum(-1)
    alike = ((profile @ profile.T) * pair).sum(-1) / count.clamp(min=1)
    return torch.where(count > 0, (1 - alike).clamp(min=0.0), 0.0)


def _profile(tokens: Tensor, mask: Tensor) -> Tensor:
    """Counts of the sampled tokens and of pairs of neighbours, hashed: ``[B, PROFILE]`` float32 of length 1."""
    pairs = tokens[:, :-1] * 1_000_003 + tokens[:, 1:] * 40_503 + 1
    at = torch.cat([tokens * 2_654_435_761 % 2_147_483_647, pairs % 2_147_483_647], 1) % PROFILE
    real = torch.cat([mask, mask[:, :-1] & mask[:, 1:]], 1).float()
    counts = torch.zeros(len(tokens), PROFILE, device=tokens.device).scatter_add_(1, at, real)
    return torch.nn.functional.normalize(counts, dim=-1)


COLUMNS: dict[str, Callable[..., Tensor]] = {
    "rubric": rubric,
    "criterion": criterion,
    "bent": bent,
    "success": success,
    "spoken": spoken,
    "calibrated": calibrated,
    "loosened": loosened,
    "class_costs": class_costs,
    "distinct": distinct,
    "distinct_share": distinct_share,
    "likeness": likeness,
}
