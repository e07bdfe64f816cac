"""Divergences of two distributions, what they are taken of where a vocabulary is large, and targets between the two."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from unified_rl.correction.levels import CLAMP
from unified_rl.interventions.distribution import FLOOR, categorical_kl, normal_kl, parts_log_prob, support_of
from unified_rl.ranges import NonNegative, OpenUnit, UnitInterval

Support = Literal["teacher", "student"]
Rest = Literal["together", "drop", "renormalise"]


def forward_kl(log_s: Tensor, log_t: Tensor) -> Tensor:
    """``KL(teacher || student)``."""
    return categorical_kl(log_t, log_s)


def reverse_kl(log_s: Tensor, log_t: Tensor) -> Tensor:
    """``KL(student || teacher)``."""
    return categorical_kl(log_s, log_t)


def reverse_kl_detached(log_s: Tensor, log_t: Tensor) -> Tensor:
    """``KL(student || teacher)`` with the gradient ``sum sg[s log(s / t)] grad log s``.

    Over whole distributions that is its gradient. Over parts that do not sum to 1 the plain form also pushes mass out
    of them, even where student and teacher are the same, and this one does not.
    """
    part = (log_s.exp() * (log_s - log_t)).detach()
    score = part * log_s
    return (score - score.detach() + part).sum(-1)


def jsd(log_s: Tensor, log_t: Tensor, *, beta: UnitInterval = 0.5) -> Tensor:
    """``beta KL(T || M) + (1 - beta) KL(S || M)``, ``M = (1 - beta) S + beta T``; 0 and 1 are the two KLs. GKD."""
    if beta in (0.0, 1.0):
        return forward_kl(log_s, log_t) if beta == 0.0 else reverse_kl(log_s, log_t)
    log_m = torch.logaddexp(log_s + math.log(1 - beta), log_t + math.log(beta))
    return beta * categorical_kl(log_t, log_m) + (1 - beta) * categorical_kl(log_s, log_m)


def tv(log_s: Tensor, log_t: Tensor) -> Tensor:
    """Total variation, half the sum of ``|s - t|``."""
    return 0.5 * (log_s.exp() - log_t.exp()).abs().sum(-1)


def hellinger(log_s: Tensor, log_t: Tensor) -> Tensor:
    """The squared Hellinger distance, ``1 - sum sqrt(s t)``."""
    return 1 - (0.5 * (log_s + log_t)).exp().sum(-1)


def alpha(log_s: Tensor, log_t: Tensor, *, alpha: OpenUnit = 0.5) -> Tensor:
    """``(1 - sum s^(1-a) t^a) / (a (1-a))``, from the reverse KL (alpha to 0) to the forward one (alpha to 1)."""
    return (1 - ((1 - alpha) * log_s + alpha * log_t).exp().sum(-1)) / (alpha * (1 - alpha))


def pearson_chi2(log_s: Tensor, log_t: Tensor) -> Tensor:
    """``sum (s - t)^2 / t``; a part of it is at most ``exp(20)``."""
    return (2 * log_s - log_t).clamp(max=CLAMP).exp().sum(-1) - 1


def neyman_chi2(log_s: Tensor, log_t: Tensor) -> Tensor:
    """``sum (s - t)^2 / s``; a part of it is at most ``exp(20)``."""
    return pearson_chi2(log_t, log_s)


KINDS: dict[str, Callable[..., Tensor]] = {
    f.__name__: f
    for f in (
        forward_kl, reverse_kl, jsd, reverse_kl_detached, tv, hellinger, alpha, pearson_chi2, neyman_chi2
    )
}  # fmt: skip
"""Pure functions of log-probs ``[n, m]`` of student and teacher, ``[n]``."""


NORMAL_KINDS: dict[str, Callable[..., Tensor]] = {
    "forward_kl": lambda student, teacher: normal_kl(*teacher, *student),
    "reverse_kl": lambda student, teacher: normal_kl(*student, *teacher),
}
"""The kinds with a closed form for Normals ``(mean, log_std)``, elementwise."""


def veto(log_s: Tensor, log_t: Tensor, *, beta: NonNegative = 0.5) -> Tensor:
    """The normalised ``t * s^beta``, without gradient: what the student thinks impossible is not asked of it. Veto."""
    return (log_t + beta * log_s.detach()).log_softmax(-1)


TARGETS: dict[str, Callable[..., Tensor]] = {"veto": veto}
"""What the student is compared with in the teacher's place: log-probs ``[n, m]`` from those of both."""


def parts(logits: Tensor, other: Tensor, token: Tensor, top_k: int, support: Support, rest: Rest) -> tuple[Tensor, ...]:
    """Log-probs of two distributions over the same parts, ``[n, m]`` each, not below :data:`FLOOR`.

    Args:
        logits: of the student, ``[n, V]``.
        other: of the teacher.
        token: that was sampled, ``[n]``; it is in the support.
        top_k: parts that are single tokens; 0 takes all.
        support: whose most probable tokens they are.
        rest: all other tokens: ``together`` as one part more; ``drop`` leaves them out, and probabilities do not sum to
            1; ``renormalise`` makes them.
    """
    if not top_k:
        return logits.log_softmax(-1).clamp(min=FLOOR), other.log_softmax(-1).clamp(min=FLOOR)
    chosen = support_of(other if support == "teacher" else logits, token, top_k)
    found = tuple(parts_log_prob(x, chosen) for x in (logits, other))
    if rest == "together" or top_k >= logits.shape[-1]:
        return found
    kept = tuple(x[:, : chosen.shape[-1]] for x in found)
    return kept if rest == "drop" else tuple(x.log_softmax(-1).clamp(min=FLOOR) for x in kept)
