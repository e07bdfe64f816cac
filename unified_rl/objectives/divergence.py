"""Divergences between whole distributions, read unit by unit in the pass that the other terms share.

The other policy's distributions are rebuilt from its last hidden states for a chunk of units at a time, in the forward
and again in the backward pass, so no second ``[B, N, V]`` tensor is ever held.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from unified_rl.correction.lookup import as_rule, bind
from unified_rl.correction.view import share
from unified_rl.errors import ConfigError
from unified_rl.instantiate import nearest
from unified_rl.interventions.distribution import FLOOR, categorical_kl, normal_kl, parts_log_prob, support_of
from unified_rl.objectives.forward import Forward, Reader
from unified_rl.objectives.metrics import Metrics
from unified_rl.objectives.objective import Parts, Scored, Term
from unified_rl.objectives.terms import reduction
from unified_rl.protocols import ShowsLogits, ShowsNormals, averages_dims
from unified_rl.ranges import UnitInterval, Whole


def forward_kl(log_s: Tensor, log_t: Tensor) -> Tensor:
    """``KL(teacher || student)``."""
    return categorical_kl(log_t, log_s)


def reverse_kl(log_s: Tensor, log_t: Tensor) -> Tensor:
    """``KL(student || teacher)``."""
    return categorical_kl(log_s, log_t)


def jsd(log_s: Tensor, log_t: Tensor, *, beta: UnitInterval = 0.5) -> Tensor:
    """``beta KL(T || M) + (1 - beta) KL(S || M)``, ``M = (1 - beta) S + beta T``; 0 and 1 are the two KLs. GKD."""
    if beta in (0.0, 1.0):
        return forward_kl(log_s, log_t) if beta == 0.0 else reverse_kl(log_s, log_t)
    log_m = torch.logaddexp(log_s + math.log(1 - beta), log_t + math.log(beta))
    return beta * categorical_kl(log_t, log_m) + (1 - beta) * categorical_kl(log_s, log_m)


KINDS: dict[str, Callable[..., Tensor]] = {"forward_kl": forward_kl, "reverse_kl": reverse_kl, "jsd": jsd}
"""Pure functions of log-probs ``[n, m]`` of student and teacher, ``[n]``."""


NORMAL_KINDS: dict[str, Callable[..., Tensor]] = {
    "forward_kl": lambda student, teacher: normal_kl(*teacher, *student),
    "reverse_kl": lambda student, teacher: normal_kl(*student, *teacher),
}
"""The kinds with a closed form for Normals ``(mean, log_std)``, elementwise."""


class DivergenceTerm(Term):
    """A divergence of each unit's distribution from another policy's.

    Categoricals are compared over the whole vocabulary; Normals, of policies that show no logits, in closed form.

    Args:
        name, rows, coefficient: see :class:`Term`.
        anchor: name of the other policy, see :class:`~unified_rl.agents.anchors.Anchors`.
        kind: a name of :data:`KINDS`, or a mapping with its settings.
        view: of the rows, as the other policy sees them (``privileged``: with the solution in the prompt); by default
            as its provider says.
        top_k: keep the other policy's most probable tokens one by one and the rest together; 0 keeps all.
        reduce: as a correction's.
    """

    def __init__(
        self,
        name: str,
        *,
        anchor: str = "teacher",
        kind: str | Mapping[str, Any] = "reverse_kl",
        top_k: Whole = 0,
        view: str | None = None,
        reduce: str = "token-mean",
        rows: Any = None,
        coefficient: float | Mapping[str, Any] = 1.0,
    ) -> None:
        super().__init__(name, rows, coefficient)
        self.kind, _ = bind(kind, KINDS, f"{self.where}.kind")
        self.kind_name = as_rule(kind, self.where)["name"]
        self.anchor, self.top_k, self.view = anchor, top_k, view
        self.distributions = frozenset({anchor})
        self.reduce = reduction(reduce, self.where)
        self.reports = frozenset({f"loss/{name}"})

    def attach(self, parts: Parts) -> None:
        """Takes the other policy.

        Raises:
            ConfigError: this policy, or the other, shows neither logits nor normals.
        """
        self.other = parts.anchors[self.anchor]
        for who, policy in (("", parts.policy), (f" (agent.anchors.{self.anchor})", self.other.policy)):
            if not isinstance(policy, ShowsLogits | ShowsNormals):
                raise ConfigError(
                    f"{self.where} compares whole distributions, and {type(policy).__name__}{who} shows neither logits "
                    "nor normals: use policy=causal_lm, autoregressive, gaussian or flow, or a penalty of the "
                    "correction, which is estimated from samples"
                )
        if isinstance(parts.policy, ShowsLogits):
            self.readers = (Reader(self.name, self._read, self._states),)
            return
        if self.kind_name not in NORMAL_KINDS or self.top_k or self.view:
            raise ConfigError(
                f"{self.where} is of the Normals of {type(parts.policy).__name__}: kind is one of "
                f"{', '.join(NORMAL_KINDS)} there, top_k 0 and view null"
            )
        assert isinstance(parts.policy, ShowsNormals)
        self.normal, self.averaged = parts.policy, averages_dims(parts.policy)

    def check(self, record: TensorDictBase) -> None:
        """Refuses rows that lack what the other policy is to see.

        Raises:
            ConfigError: names the view's setting, and what works.
        """
        self.check_columns(list(map(str, record.keys())))

    def check_columns(self, columns: Collection[str]) -> None:
        """As :meth:`check`, by the names of the columns."""
        view = self.view or self.other.view
        if view is None or f"{view}_tokens" in columns:
            return
        where = f"{self.where}.view" if self.view else f"agent.anchors.{self.anchor}.view"
        known = [key.removesuffix("_tokens") for key in columns if key.endswith("_tokens")]
        if view == "privileged":
            instead = "set rollout.privileged to the style of the solution that goes into its prompt, or view to null"
        else:
            instead = nearest(view, [*known, "privileged"])
        raise ConfigError(f"{where}={view} reads {view}_tokens, which the rows lack; {instead}")

    def _states(self, rows: TensorDictBase) -> tuple[Tensor, ...]:
        return (self.other.states(rows, self.view),)

    def _read(self, logits: Tensor, token: Tensor, states: Tensor) -> Tensor:
        with torch.no_grad():
            other = self.other.logits(states)
        if self.top_k:
            support = support_of(other, token, self.top_k)
            parts = parts_log_prob(logits, support), parts_log_prob(other, support)
        else:
            parts = logits.log_softmax(-1).clamp(min=FLOOR), other.log_softmax(-1).clamp(min=FLOOR)
        out: Tensor = self.kind(*parts)
        return out

    def _of_normals(self, rows: TensorDictBase) -> Tensor:
        """``[B, N]``, from one further pass of this policy's network and one of the other's."""
        with torch.no_grad():
            other = self.other.normals(rows)
        value = NORMAL_KINDS[self.kind_name](self.normal.normals(rows), other)
        return value.mean(-1) if self.averaged else value.sum(-1)

    def prepare(self, batch: TensorDict, scored: Scored) -> TensorDictBase:
        """``coefficient [B]``."""
        return TensorDict({"coefficient": self.reduce(self.rows.within(batch)["mask"])}, batch_size=[len(batch)])

    def loss(self, forward: Forward, rows: TensorDict, stats: TensorDictBase) -> tuple[Tensor, Metrics]:
        """The reduced divergence."""
        found = forward.read(self.name) if self.readers else self._of_normals(rows)
        scale = share(self.rows.within(rows)["mask"], torch.float32) * stats["coefficient"].unsqueeze(-1)
        value = (found * scale).sum()
        return value, {f"loss/{self.name}": value.detach()}
