"""Supervised losses that read whole distributions beside the likelihood."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from unified_rl.correction.levels import CLAMP
from unified_rl.errors import ConfigError
from unified_rl.interventions.distribution import FLOOR, categorical_kl
from unified_rl.objectives.forward import Forward, Reader
from unified_rl.objectives.metrics import Metrics
from unified_rl.objectives.objective import Parts, Scored, Term
from unified_rl.objectives.terms import reduction
from unified_rl.policies.sampling import entropy_of, token_log_prob
from unified_rl.protocols import ShowsLogits
from unified_rl.ranges import Count, NonNegative, UnitInterval
from unified_rl.returns.scan import shifted


class DistributionTerm(Term):
    """A term of single units that reads logits, by default of demonstrations.

    Args:
        name, rows, coefficient: see :class:`~unified_rl.objectives.objective.Term`.
        reduce: as a correction's.
    """

    couples_rows = False

    def __init__(self, name: str, rows: Any, coefficient: float | Mapping[str, Any], reduce: str) -> None:
        super().__init__(name, rows, coefficient)
        self.reduce = reduction(reduce, self.where)
        self.reports = frozenset({f"loss/{name}"})

    def attach(self, parts: Parts) -> None:
        """Looks for logits.

        Raises:
            ConfigError: the policy shows none.
        """
        if not isinstance(parts.policy, ShowsLogits):
            raise ConfigError(
                f"{self.where} reads the logits of every unit, and {type(parts.policy).__name__} has none: use "
                f"policy=causal_lm or autoregressive, or {self.where}={{name: nll}}"
            )

    def prepare(self, batch: TensorDict, scored: Scored) -> TensorDictBase:
        """``coefficient [B]``."""
        return TensorDict({"coefficient": self.reduce(self.rows.within(batch)["mask"])}, batch_size=[len(batch)])

    def loss(self, forward: Forward, rows: TensorDict, stats: TensorDictBase) -> tuple[Tensor, Metrics]:
        """The reduced sum of :meth:`units`."""
        mask = self.rows.within(rows)["mask"]
        found = torch.where(mask, self.units(forward, mask), 0.0)
        value = (found * stats["coefficient"].unsqueeze(-1)).sum()
        return value, {f"loss/{self.name}": value.detach()}

    def units(self, forward: Forward, mask: Tensor) -> Tensor:
        """The loss of each unit, ``[B, N]``."""
        raise NotImplementedError


class SelectiveNllTerm(DistributionTerm):
    """Likelihood without the units of highest entropy or divergence, which are regularised instead. EKSFT, 2605.29303.

    Kept units give ``-log p``; the others ``-entropy_coef H / log V + kl_coef KL(policy || anchor)``. Every unit counts
    in the denominator.

    Args:
        name, rows, coefficient, reduce: see :class:`DistributionTerm`.
        portion: of a row's units that are left out by each measure, rounded down.
        by: ``union``, ``intersection``, or one measure alone: ``entropy`` or ``kl``.
        entropy_coef, kl_coef: of the units that are left out.
        anchor: the policy that the divergence is from.
    """

    def __init__(
        self,
        name: str,
        *,
        portion: UnitInterval = 0.2,
        by: Literal["union", "intersection", "entropy", "kl"] = "union",
        entropy_coef: NonNegative = 0.05,
        kl_coef: NonNegative = 0.05,
        anchor: str = "reference",
        reduce: str = "token-mean",
        rows: Any = "demonstration",
        coefficient: float | Mapping[str, Any] = 1.0,
    ) -> None:
        super().__init__(name, rows, coefficient, reduce)
        self.portion, self.by, self.anchor = portion, by, anchor
        self.entropy_coef, self.kl_coef = entropy_coef, kl_coef
        self.distributions = frozenset({anchor})

    def attach(self, parts: Parts) -> None:
        """Takes the other policy.

        Raises:
            ConfigError: it, or this policy, shows no logits.
        """
        super().attach(parts)
        self.other = parts.anchors[self.anchor]
        if not isinstance(self.other.policy, ShowsLogits):
            raise ConfigError(f"{self.where} reads logits, and agent.anchors.{self.anchor} shows none")
        self.readers = (
            Reader(f"{self.name}/entropy", lambda logits, token: entropy_of(logits) / math.log(logits.shape[-1])),
            Reader(f"{self.name}/kl", self._kl, lambda rows: (self.other.states(rows),)),
        )

    def _kl(self, logits: Tensor, token: Tensor, states: Tensor) -> Tensor:
        with torch.no_grad():
            other = self.other.logits(states).log_softmax(-1).clamp(min=FLOOR)
        return categorical_kl(logits.log_softmax(-1).clamp(min=FLOOR), other)

    def units(self, forward: Forward, mask: Tensor) -> Tensor:
        """Likelihood of the units that are kept, the regularisers of the others."""
        entropy, kl = (forward.read(f"{self.name}/{key}") for key in ("entropy", "kl"))
        high = [highest(x.detach(), mask, self.portion) for x in (entropy, kl)]
        left_out = {"union": high[0] | high[1], "intersection": high[0] & high[1], "entropy": high[0], "kl": high[1]}
        instead = self.kl_coef * kl - self.entropy_coef * entropy
        return torch.where(left_out[self.by], instead, -forward.log_prob)


class SoftQTerm(DistributionTerm):
    """Likelihood, and a temporal difference of logits read as action values: inverse soft Q-learning. 2409.01369.

    ``-log p + td_coef (Q - gamma V')^2`` with the logit ``Q`` of the unit and ``V' = log sum exp`` of the next one's
    logits, 0 behind the last; both with gradient.

    Args:
        name, rows, coefficient, reduce: see :class:`DistributionTerm`.
        td_coef: of the temporal difference.
        gamma: its discount.
    """

    def __init__(
        self,
        name: str,
        *,
        td_coef: NonNegative = 0.1,
        gamma: UnitInterval = 1.0,
        reduce: str = "token-mean",
        rows: Any = "demonstration",
        coefficient: float | Mapping[str, Any] = 1.0,
    ) -> None:
        super().__init__(name, rows, coefficient, reduce)
        self.td_coef, self.gamma = td_coef, gamma
        if td_coef:
            self.readers = (
                Reader(f"{name}/q", lambda logits, token: logits.gather(-1, token.unsqueeze(-1)).squeeze(-1)),
                Reader(f"{name}/v", lambda logits, token: logits.logsumexp(-1)),
            )

    def units(self, forward: Forward, mask: Tensor) -> Tensor:
        """Likelihood and squared temporal difference."""
        if not self.td_coef:
            return -forward.log_prob
        q, v = (forward.read(f"{self.name}/{key}") for key in ("q", "v"))
        following = shifted(torch.where(mask, v, 0.0))
        return (q - self.gamma * following).square() * self.td_coef - forward.log_prob


class RankAwareTerm(DistributionTerm):
    """A policy gradient of one step whose rewards are of the label, of its likeliest rivals and of all other tokens.

    ``-sum_a sg[p_a r_a] log p_a`` over the whole vocabulary, with ``p^-beta / p`` for the label, ``near`` for the
    ``top_k`` most probable other tokens and ``far`` for the rest; 0 in all three is the likelihood. As ``sum_a p_a grad
    log p_a = 0``, only the label and the rivals are looked at. 2512.22955 (from its abstract; the scaling is ours).

    Args:
        name, rows, coefficient, reduce: see :class:`DistributionTerm`.
        beta: below 0 labels count more the more probable they are (precision), above 0 the less (diversity).
        top_k: rivals.
        near, far: rewards of rivals, and of all others.
    """

    scores = False

    def __init__(
        self,
        name: str,
        *,
        beta: float = 0.0,
        top_k: Count = 16,
        near: float = 0.0,
        far: float = 0.0,
        reduce: str = "token-mean",
        rows: Any = "demonstration",
        coefficient: float | Mapping[str, Any] = 1.0,
    ) -> None:
        super().__init__(name, rows, coefficient, reduce)
        self.beta, self.top_k, self.near, self.far = beta, top_k, near, far
        self.readers = (Reader(name, self._read),)

    def _read(self, logits: Tensor, token: Tensor) -> Tensor:
        label = token_log_prob(logits, token)
        fixed = label.detach()
        weight = (-self.beta * fixed).clamp(-CLAMP, CLAMP).exp() - self.far * fixed.exp()
        loss = -weight * label
        if self.near == self.far:
            return loss
        top, index = logits.topk(min(self.top_k + 1, logits.shape[-1]), -1)
        rival = index != token.unsqueeze(-1)
        rival &= rival.cumsum(-1) <= self.top_k
        found = torch.where(rival, top - logits.logsumexp(-1, keepdim=True), 0.0)
        mass = torch.where(rival, found.detach().exp(), 0.0)
        return loss - (self.near - self.far) * (mass * found).sum(-1)

    def units(self, forward: Forward, mask: Tensor) -> Tensor:
        """As the pass read it."""
        return forward.read(self.name)


def highest(x: Tensor, mask: Tensor, portion: float, least: int = 0) -> Tensor:
    """The ``floor(portion * n)`` largest, but at least ``least``, of each row's ``n`` entries of ``mask [B, N]``."""
    count = (mask.sum(-1, keepdim=True) * portion + 1e-6).floor().clamp(min=least)
    order = x.masked_fill(~mask, -torch.inf).argsort(dim=-1, descending=True, stable=True)
    return (order.argsort(dim=-1) < count) & mask
