"""Maps of advantages: what reshapes them after the baseline, detached.

``(record, advantage [B, T]) -> [B, T]``, or ``[B, N]`` where units of a step are told apart from here on. A map says by
attributes what it wants beside the record: ``anchors`` (log-probs of other policies) and ``reads`` (columns from every
unit's distribution, see :mod:`~unified_rl.returns.readings`), and ``columns``, which of the record's own it needs.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from tensordict import TensorDictBase
from torch import Tensor

from unified_rl.errors import RecordError
from unified_rl.ranges import AtLeastOne, Name, NonNegative, Positive, UnitInterval
from unified_rl.returns import readings
from unified_rl.returns.groups import Groups
from unified_rl.returns.matching import matched
from unified_rl.returns.projection import residual
from unified_rl.returns.thoughts import thoughts
from unified_rl.returns.tree import tree
from unified_rl.units import Steps, of_units, row_return


def sign(record: TensorDictBase, advantage: Tensor, *, positive: float = 1.0, negative: float = 1.0) -> Tensor:
    """Positive advantages times one number, the others times another: PSR (1, 0), NSR (0, 1), W-REINFORCE (0.1, 1)."""
    return advantage * torch.where(advantage > 0, positive, negative)


def overconfident(record: TensorDictBase, advantage: Tensor, *, alpha: float = 1.0) -> Tensor:
    """Negative advantages times ``1 + alpha softplus(sum(lp - lp_reference))`` of their row. ACE (multiplier assumed).

    Raises:
        RecordError: the rows were not scored by the policy at the start of the update, and by the reference.
    """
    for name in overconfident.anchors:  # type: ignore[attr-defined]
        if f"{name}_log_prob" not in record.keys():
            raise RecordError(f"the map overconfident needs {name}_log_prob of the {name} policy")
    gap = Steps.of(record).sum(record["proximal_log_prob"] - record["reference_log_prob"]).sum(-1, keepdim=True)
    return advantage * torch.where(advantage < 0, 1 + alpha * torch.nn.functional.softplus(gap), 1.0)


overconfident.anchors = ("reference", "proximal")  # type: ignore[attr-defined]  # an agent scores them beforehand


def taught(record: TensorDictBase, advantage: Tensor, *, outcome: float = 0.0, scale: float = 1.0) -> Tensor:
    """``outcome A + scale (log teacher - log old)`` of every unit, ``[B, N]``. MOPD, 2601.02780.

    On rows of the present policy the second part is minus the reverse KL's derivative, estimated at the sampled unit.

    Args:
        outcome: factor of the advantage that rewards earned.
        scale: factor of the teacher's signal.

    Raises:
        RecordError: the rows were not scored by the teacher, and by the policy at the start of the update.
    """
    for name in taught.anchors:  # type: ignore[attr-defined]
        if f"{name}_log_prob" not in record.keys():
            raise RecordError(f"the map taught needs {name}_log_prob of the {name} policy")
    signal = (record["teacher_log_prob"] - record["proximal_log_prob"]).clamp(-20.0, 20.0)
    return outcome * of_units(record, advantage) + scale * torch.where(record["mask"], signal, 0.0)


taught.anchors = ("teacher", "proximal")  # type: ignore[attr-defined]


def long_success(
    record: TensorDictBase, advantage: Tensor, *, otherwise: NonNegative = 0.1, threshold: float = 0.5
) -> Tensor:
    """Groups whose longest right answer is not longer than their wrong ones are on average count less. ADORA.

    Args:
        otherwise: factor of such a group; wrong answers that were cut are left out of the mean.
        threshold: of the return, above which an answer is right.
    """
    won, length, groups = row_return(record) > threshold, _length(record, advantage), Groups.of(record)
    finished = ~(record["truncated"] & record["step_mask"]).any(-1)
    longest = groups.extreme(torch.where(won, length, -1.0), "amax")
    wrong = groups.weighted_mean(length, (~won & finished).to(length.dtype))
    return advantage * torch.where(longest > wrong, 1.0, otherwise).unsqueeze(-1).to(advantage.dtype)


long_success.compares = lambda **settings: True  # type: ignore[attr-defined]


def overlong_failure(
    record: TensorDictBase, advantage: Tensor, *, base: AtLeastOne = 1.00001, threshold: float = 0.5
) -> Tensor:
    """Wrong answers longer by D than their group's right ones on average: times ``2 - base^-D``. View-R1's STCR.

    Args:
        base: at least 1, of the power.
        threshold: of the return, above which an answer is right.
    """
    won, length, groups = row_return(record) > threshold, _length(record, advantage), Groups.of(record)
    right = won.to(length.dtype)
    excess = length - groups.weighted_mean(length, right)
    grown = ~won & (groups.sum(right) > 0) & (excess > 0)
    factor = torch.where(grown, 2.0 - base ** (-excess), 1.0)
    return advantage * factor.unsqueeze(-1).to(advantage.dtype)


overlong_failure.compares = lambda **settings: True  # type: ignore[attr-defined]


def retempered(
    record: TensorDictBase,
    advantage: Tensor,
    *,
    target: NonNegative = 0.5,
    hot: Positive = 1.2,
    cold: Positive = 0.8,
    cap: UnitInterval = 0.1,
    threshold: float = 0.05,
) -> Tensor:
    """``(1 - a) A + a w`` on the units of right answers, ``(1 - a) A`` elsewhere, ``[B, N]``. DCPO.

    ``w`` is a unit's probability under the distribution tempered by ``hot`` (where the mean entropy is at most the
    target) or ``cold``, over its own; ``a = x / (1 + x)`` with ``x = min(|target - entropy|, cap) / share of right
    answers``, and 0 where there is none. The mean of ``w`` is 1.

    Args:
        target: wanted mean entropy of a unit, in nats.
        hot, cold: further temperatures.
        cap: bound of the entropy's distance.
        threshold: of the return, above which an answer is right.
    """
    mask, won = record["mask"], row_return(record) > threshold
    nats = torch.where(mask, record["entropy"], 0.0).sum() / mask.sum().clamp(min=1)
    tempered = torch.where(nats <= target, record["hot_log_prob"], record["cold_log_prob"])
    weight = torch.where(mask, tempered - record["read_log_prob"], 0.0).exp()
    x = (target - nats).abs().clamp(max=cap) / won.float().mean()
    share = torch.where(won.any(), x / (1 + x), 0.0)
    out: Tensor = (1 - share) * of_units(record, advantage) + share * weight * won.unsqueeze(-1)
    return out


retempered.reads = lambda *, hot, cold, **others: {  # type: ignore[attr-defined]
    "entropy": readings.entropy,
    "read_log_prob": readings.log_prob,
    "hot_log_prob": readings.log_prob_at(hot),
    "cold_log_prob": readings.log_prob_at(cold),
}


def tilted(record: TensorDictBase, advantage: Tensor, *, share: float = 0.0, probability: UnitInterval = 0.0) -> Tensor:
    """``A + share |A|``: a positive share strengthens what is learnt and weakens what is unlearnt. EntroPIC.

    Args:
        share: from -1, where positive advantages vanish and negative ones double, to 1, the other way round.
        probability: only units likelier than this when they were sampled; 0 takes all, of policies of densities too.
    """
    if probability == 0.0:
        return advantage + share * advantage.abs()
    likely: Tensor = record["behavior_log_prob"] > math.log(probability)
    advantage = of_units(record, advantage)
    return advantage + share * advantage.abs() * likely


def forgiven_failure(
    record: TensorDictBase,
    advantage: Tensor,
    *,
    base: UnitInterval = 0.5,
    slope: NonNegative = 0.5,
    threshold: float = 0.5,
) -> Tensor:
    """Negative advantages times ``min(1, base + slope p)``, with the share ``p`` of right answers of their group.

    Where hardly anybody succeeds, a failure may be an answer that the verifier does not know. GUI-Libra, 2602.22190
    (the straight line is assumed).

    Args:
        base: factor where nobody succeeds.
        slope: of the factor.
        threshold: of the return, above which an answer is right.
    """
    won = (row_return(record) > threshold).to(advantage.dtype)
    factor = (base + slope * Groups.of(record).mean(won)).clamp(max=1.0).unsqueeze(-1)
    return advantage * torch.where(advantage < 0, factor, 1.0)


def by_difficulty(
    record: TensorDictBase,
    advantage: Tensor,
    *,
    group: NonNegative = 0.5,
    label: NonNegative = 0.0,
    label_column: Name = "label",
    threshold: float = 0.5,
) -> Tensor:
    """Advantages times ``(1 + group d_g) (1 + label d_l) / mean``: more where answers are wrong more often.

    ``d_g`` is the share of wrong answers of a row's group, ``d_l`` that of all rows with the same right answer; the
    mean of the factor over rows is divided out, so that the size of an update stays. VULPO, 2511.11896 (factors
    assumed).

    Args:
        group: weight of the difficulty of a prompt.
        label: weight of the difficulty of a right answer; 0 needs no column.
        label_column: entry ``[B]`` int64 of the record, equal for equal right answers (``rollout.columns``).
        threshold: of the return, above which an answer is right.
    """
    wrong = (row_return(record) <= threshold).to(advantage.dtype)
    factor = 1 + group * Groups.of(record).mean(wrong)
    if label:
        factor = factor * (1 + label * Groups(record[label_column]).mean(wrong))
    return advantage * (factor / factor.mean()).unsqueeze(-1)


by_difficulty.columns = lambda *, label, label_column, **others: [label_column] if label else []  # type: ignore[attr-defined]


def consistent(
    record: TensorDictBase,
    advantage: Tensor,
    *,
    sharpness: float = 5.0,
    middle: float = 0.5,
    answer_column: Name = "answer",
    threshold: float = 0.5,
) -> Tensor:
    """``w A + (1 - w) A_global``: where a group agrees, its prompt is compared with the others of the update. COPO.

    ``w = sigmoid(sharpness (H - middle))`` of the entropy ``H`` of the group's answers in nats over the logarithm of
    its size, so that 1 is no two alike. ``A_global`` is the share of right answers of the prompt, less the mean over
    prompts, over their standard deviation: the same for all rows of a group. 2508.04138 (both forms assumed).

    Args:
        sharpness, middle: of the logistic curve.
        answer_column: entry ``[B]`` int64 of the record, equal for equal answers (``rollout.columns``).
        threshold: of the return, above which an answer is right.
    """
    groups = Groups.of(record)
    won = (row_return(record) > threshold).to(advantage.dtype)
    agreed = Groups(_pairs(groups.index, record[answer_column])).count / groups.count  # share of a row's own answer
    entropy = groups.mean(-agreed.log()) / groups.count.clamp(min=2).log()
    rate, first = groups.mean(won), groups.first()
    whole = rate[first]
    spread = whole.std() if len(whole) > 1 else whole.new_ones(())
    overall = (rate - whole.mean()) / (spread + 1e-6) * (whole.amax() > whole.amin())  # alike: exactly 0
    local = torch.sigmoid(sharpness * (entropy - middle)).unsqueeze(-1)
    out: Tensor = local * advantage + (1 - local) * overall.unsqueeze(-1)
    return out


consistent.compares = lambda **settings: True  # type: ignore[attr-defined]
consistent.columns = lambda *, answer_column, **others: [answer_column]  # type: ignore[attr-defined]


def _pairs(one: Tensor, other: Tensor) -> Tensor:
    """A number ``[B]`` for every pair of two numbers."""
    out: Tensor = torch.unique(torch.stack([one, other], -1), dim=0, return_inverse=True)[1]
    return out


def _length(record: TensorDictBase, like: Tensor) -> Tensor:
    """Units of every row, ``[B]``, as floats."""
    out: Tensor = record["mask"].sum(-1).to(like.dtype)
    return out


MAPS: dict[str, Callable[..., Tensor]] = {
    "sign": sign,
    "overconfident": overconfident,
    "taught": taught,
    "long_success": long_success,
    "overlong_failure": overlong_failure,
    "retempered": retempered,
    "tilted": tilted,
    "forgiven_failure": forgiven_failure,
    "by_difficulty": by_difficulty,
    "consistent": consistent,
    "residual": residual,
    "matched": matched,
    "tree": tree,
    "thoughts": thoughts,
}
