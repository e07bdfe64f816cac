"""Divergences from another policy as rows tell them: through the ratio of the sampled units alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from unified_rl.correction.generators import GENERATORS
from unified_rl.correction.internal.surrogate import KnownGradient
from unified_rl.correction.lookup import bind
from unified_rl.correction.view import anchor_log_prob, share
from unified_rl.errors import ConfigError
from unified_rl.objectives.forward import Forward
from unified_rl.objectives.metrics import Metrics
from unified_rl.objectives.objective import Scored, Term
from unified_rl.objectives.terms import EXPERT_ROWS, reduction
from unified_rl.ranges import UpperBound
from unified_rl.returns.groups import Groups
from unified_rl.units import row_return

BOUND = 20.0
"""Log-ratios are clamped to plus or minus this, and have no gradient beyond."""


class SampledDivergenceTerm(Term):
    """An f-divergence ``D_f(policy || anchor)`` of each unit, estimated at the unit that was sampled.

    With ``t = policy / anchor`` and ``g(t) = f(t) - f'(1) (t - 1)``, which has no slope at 1: rows that the anchor drew
    give ``g(t)`` and its derivative; rows that the policy drew give ``g(t) / t`` and the gradient
    ``(f'(t) - f'(1)) grad log policy``, that of the divergence itself. Both need log-probs alone, of any policy in
    either domain. DPH-RL, 2509.07430, rehearses with the first on frozen rows of the initial policy.

    Args:
        name, rows, coefficient: see :class:`~unified_rl.objectives.objective.Term`.
        generator: ``f``, a name of :data:`~unified_rl.correction.generators.GENERATORS` or a mapping.
        anchor: the other policy; ``behavior`` is whoever sampled the rows.
        drawn: who drew the rows, the ``anchor`` or the ``policy``.
        tilt: rows weigh ``exp(R / tilt)`` of their return over its group's mean; None weighs all alike. RAPO.
        reduce: as a correction's.

    Raises:
        ConfigError: rows of the policy's own against whoever sampled them.
    """

    couples_rows = False

    def __init__(
        self,
        name: str,
        *,
        generator: str | Mapping[str, Any] = "forward_kl",
        anchor: str = "behavior",
        drawn: Literal["anchor", "policy"] = "anchor",
        tilt: UpperBound | None = None,
        reduce: str = "token-mean",
        rows: Any = None,
        coefficient: float | Mapping[str, Any] = 1.0,
    ) -> None:
        super().__init__(name, rows, coefficient)
        self.generator = bind(generator, GENERATORS, f"{self.where}.generator")[0]()
        if anchor == "none" or (anchor, drawn) == ("behavior", "policy"):
            raise ConfigError(
                f"{self.where}.anchor={anchor} is no other policy than the one that drew the rows: use "
                "anchor=reference, or drawn=anchor"
            )
        self.anchor, self.drawn, self.tilt = anchor, drawn, tilt
        self.whole_groups = tilt is not None
        self.anchors = frozenset({anchor} - {"behavior"})
        self.reduce = reduction(reduce, self.where)
        self.reports = frozenset({f"loss/{name}"})

    def refuse_lone(self) -> None:
        """Where every row is alone in its group.

        Raises:
            ConfigError: rows are weighed within their groups.
        """
        if self.tilt is not None:
            raise ConfigError(
                f"{self.where}.tilt weighs a row beside the others of its group, and every row is alone in its own: "
                f"sample several rows a prompt (rollout.group_size), or set {self.where}.tilt=null"
            )

    def check(self, record: TensorDictBase) -> None:
        """Looks for rows whose sampler nobody knows.

        Raises:
            ConfigError: demonstrations are compared with their sampler.
        """
        shown = EXPERT_ROWS.of_record(record) & self.rows.of_record(record)
        if self.anchor == "behavior" and bool(shown.any()):
            raise ConfigError(
                f"{self.where} divides by the probability that a row had when it was sampled, and nobody knows that of "
                f"demonstrations: set {self.where}.rows=offline or own"
            )

    def prepare(self, batch: TensorDict, scored: Scored) -> TensorDictBase:
        """``coefficient [B]``."""
        coefficient = self.reduce(self.rows.within(batch)["mask"])
        if self.tilt is not None:
            groups, x = Groups.of(batch), row_return(batch) / self.tilt
            coefficient = coefficient * (x - groups.logsumexp(x)).exp() * groups.count
        return TensorDict({"coefficient": coefficient}, batch_size=[len(batch)])

    def loss(self, forward: Forward, rows: TensorDict, stats: TensorDictBase) -> tuple[Tensor, Metrics]:
        """The micro-batch's share."""
        mask = self.rows.within(rows)["mask"]
        with torch.no_grad():
            gap = torch.where(mask, forward.log_prob - anchor_log_prob(rows, self.anchor), 0.0)
            x = gap.nan_to_num(0.0).clamp(-BOUND, BOUND)
            one = self.generator.slope(torch.zeros_like(x[:1, :1]))
            value, slope = self.generator.value(x) - one * x.expm1(), self.generator.slope(x) - one
            value, slope = (value, slope * x.exp()) if self.drawn == "anchor" else (value * (-x).exp(), slope)
            scale = share(mask, x.dtype) * stats["coefficient"].unsqueeze(-1)
            total = (value * scale).sum()
            slope = slope * scale * share(gap.abs() < BOUND, x.dtype)
        return KnownGradient.apply(forward.log_prob, total, slope), {f"loss/{self.name}": total}
