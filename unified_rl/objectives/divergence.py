"""Divergences between whole distributions, read unit by unit in the pass that the other terms share.

The other policy's distributions are rebuilt from its last hidden states for a chunk of units at a time, in the forward
and again in the backward pass, so no second ``[B, N, V]`` tensor is ever held.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from unified_rl.correction.lookup import bind
from unified_rl.correction.reduction import REDUCTIONS
from unified_rl.correction.view import share
from unified_rl.interventions.distribution import FLOOR, categorical_kl, parts_log_prob, support_of
from unified_rl.objectives.forward import Forward, Reader
from unified_rl.objectives.objective import Metrics, Scored, Term


def forward_kl(log_s: Tensor, log_t: Tensor) -> Tensor:
    """``KL(teacher || student)``."""
    return categorical_kl(log_t, log_s)


def reverse_kl(log_s: Tensor, log_t: Tensor) -> Tensor:
    """``KL(student || teacher)``."""
    return categorical_kl(log_s, log_t)


def jsd(log_s: Tensor, log_t: Tensor, *, beta: float = 0.5) -> Tensor:
    """``beta KL(T || M) + (1 - beta) KL(S || M)``, ``M = (1 - beta) S + beta T``; 0 and 1 are the two KLs. GKD."""
    if beta in (0.0, 1.0):
        return forward_kl(log_s, log_t) if beta == 0.0 else reverse_kl(log_s, log_t)
    log_m = torch.logaddexp(log_s + math.log(1 - beta), log_t + math.log(beta))
    return beta * categorical_kl(log_t, log_m) + (1 - beta) * categorical_kl(log_s, log_m)


KINDS: dict[str, Callable[..., Tensor]] = {"forward_kl": forward_kl, "reverse_kl": reverse_kl, "jsd": jsd}
"""Pure functions of log-probs ``[n, m]`` of student and teacher, ``[n]``."""


class DivergenceTerm(Term):
    """A divergence of each unit's distribution from another policy's.

    Args:
        other: the other policy, with ``unit_states(batch) [B, N, d]`` and ``logits_of(states [n, d]) [n, V]``.
        name: of the term, to tell its reading from others'.
        kind: a name of :data:`KINDS`, or a mapping with its settings.
        view: of the rows, as the other policy sees them (``privileged``: with the solution in the prompt).
        top_k: keep the other policy's most probable tokens one by one and the rest together; 0 keeps all.
        reduce: as a correction's.
    """

    def __init__(
        self,
        other: Any,
        name: str,
        *,
        kind: str | Mapping[str, Any] = "reverse_kl",
        top_k: int = 0,
        view: str | None = None,
        reduce: str = "token-mean",
        rows: Any = None,
        coefficient: float | Mapping[str, Any] = 1.0,
    ) -> None:
        super().__init__(rows, coefficient)
        self.other, self.name, self.top_k, self.view = other, name, top_k, view
        self.kind, _ = bind(kind, KINDS, "divergence")
        self.reduce = REDUCTIONS[reduce]
        self.readers = (Reader(name, self._read, self._states),)

    def _states(self, rows: TensorDictBase) -> tuple[Tensor, ...]:
        if self.view is None:
            return (self.other.unit_states(rows),)
        seen = TensorDict(
            {"tokens": rows[f"{self.view}_tokens"], "mask": rows[f"{self.view}_mask"]}, batch_size=rows.batch_size
        )
        states = self.other.unit_states(seen)
        mask = rows["mask"]  # the same units in the same order, at other columns
        return (
            states.new_zeros(*mask.shape, states.shape[-1]).masked_scatter(mask.unsqueeze(-1), states[seen["mask"]]),
        )

    def _read(self, logits: Tensor, token: Tensor, states: Tensor) -> Tensor:
        with torch.no_grad():
            other = self.other.logits_of(states)
        if self.top_k:
            support = support_of(other, token, self.top_k)
            return self.kind(parts_log_prob(logits, support), parts_log_prob(other, support))
        return self.kind(logits.log_softmax(-1).clamp(min=FLOOR), other.log_softmax(-1).clamp(min=FLOOR))

    def prepare(self, batch: TensorDict, scored: Scored) -> TensorDictBase:
        """``coefficient [B]``."""
        units = self.rows.within(batch)["mask"].float().sum(-1)
        return TensorDict({"coefficient": self.reduce(units, None, lambda x: x)}, batch_size=[len(batch)])

    def loss(self, forward: Forward, rows: TensorDict, stats: TensorDictBase) -> tuple[Tensor, Metrics]:
        """The reduced divergence."""
        scale = share(self.rows.within(rows)["mask"], torch.float32) * stats["coefficient"].unsqueeze(-1)
        value = (forward.read(self.name) * scale).sum()
        return value, {f"loss/{self.name}": value.detach()}
