"""Divergences between whole distributions, read unit by unit in the pass that the other terms share.

The other policy's distributions are rebuilt from its last hidden states for a chunk of units at a time, in the forward
and again in the backward pass, so no second ``[B, N, V]`` tensor is ever held.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from unified_rl.correction.lookup import as_rule, bind
from unified_rl.correction.view import share
from unified_rl.errors import ConfigError
from unified_rl.instantiate import nearest
from unified_rl.objectives.forward import Forward, Reader
from unified_rl.objectives.kinds import KINDS, NORMAL_KINDS, TARGETS, Rest, Support, parts
from unified_rl.objectives.metrics import Metrics
from unified_rl.objectives.objective import Parts, Scored, Term
from unified_rl.objectives.terms import reduction, unknown_writers
from unified_rl.protocols import ShowsLogits, ShowsNormals, averages_dims
from unified_rl.ranges import NonNegative, UpperBound, Whole
from unified_rl.returns.groups import Groups
from unified_rl.units import Source, row_return


def by_pass_rate(rows: TensorDictBase, *, alpha: NonNegative = 1.0, beta: NonNegative = 1.0) -> Tensor:
    """``p^alpha (1 - p)^beta`` of the share ``p`` of a group's own rows that return more than 0.5, ``[B]``."""
    own = rows["source"] <= int(Source.OFFLINE)
    p = Groups.of(rows).weighted_mean((row_return(rows) > 0.5).float(), own.float())
    return p.pow(alpha) * (1 - p).pow(beta)


class DivergenceTerm(Term):
    """A divergence of each unit's distribution from another policy's.

    Categoricals are compared over the whole vocabulary; Normals, of policies that show no logits, in closed form.

    Args:
        name, rows, coefficient: see :class:`Term`.
        anchor: name of the other policy, see :class:`~unified_rl.agents.anchors.Anchors`.
        kind: a name of :data:`~unified_rl.objectives.kinds.KINDS`, or a mapping with its settings.
        target: what stands in the other policy's place, a name of :data:`~unified_rl.objectives.kinds.TARGETS` or a
            mapping; None is the other policy itself.
        view: of the rows, as the other policy sees them (``privileged``: with the solution in the prompt); by default
            as its provider says.
        top_k: keep the most probable tokens one by one, the sampled one among them; 0 keeps all.
        support: whose most probable tokens these are, the ``teacher``'s (the other policy's) or the ``student``'s.
        rest: what becomes of all others, see :func:`~unified_rl.objectives.kinds.parts`.
        importance_cap: units weigh their ratio to the behavior policy, without gradient, at most so much; None weighs
            all alike.
        pass_rate: ``{alpha: a, beta: b}`` weighs a row by ``p^a (1 - p)^b``, with the share ``p`` of its group's own
            rows that return more than 0.5; None weighs all alike. PACED.
        reduce: as a correction's.
    """

    couples_rows = False
    scores = False

    def __init__(
        self,
        name: str,
        *,
        anchor: str = "teacher",
        kind: str | Mapping[str, Any] = "reverse_kl",
        target: str | Mapping[str, Any] | None = None,
        top_k: Whole = 0,
        support: Support = "teacher",
        rest: Rest = "together",
        importance_cap: UpperBound | None = None,
        pass_rate: Mapping[str, Any] | None = None,
        view: str | None = None,
        reduce: str = "token-mean",
        rows: Any = None,
        coefficient: float | Mapping[str, Any] = 1.0,
    ) -> None:
        super().__init__(name, rows, coefficient)
        self.kind, _ = bind(kind, KINDS, f"{self.where}.kind")
        self.kind_name = as_rule(kind, self.where)["name"]
        self.target = None if target is None else bind(target, TARGETS, f"{self.where}.target")[0]
        self.anchor, self.top_k, self.view = anchor, top_k, view
        self.support, self.rest, self.importance_cap = support, rest, importance_cap
        if not top_k and (support, rest) != ("teacher", "together"):
            raise ConfigError(f"{self.where}.support and rest are of the parts that {self.where}.top_k keeps: set it")
        self.difficulty = None
        if pass_rate is not None:
            self.difficulty, _ = bind({"name": "p", **pass_rate}, {"p": by_pass_rate}, f"{self.where}.pass_rate")
        self.whole_groups = self.difficulty is not None
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
        if self.kind_name not in NORMAL_KINDS or self.top_k or self.view or self.target is not None:
            raise ConfigError(
                f"{self.where} is of the Normals of {type(parts.policy).__name__}: kind is one of "
                f"{', '.join(NORMAL_KINDS)} there, top_k 0, view and target null"
            )
        assert isinstance(parts.policy, ShowsNormals)
        self.normal, self.averaged = parts.policy, averages_dims(parts.policy)

    def check(self, record: TensorDictBase) -> None:
        """Refuses rows that lack what the other policy is to see, or what weighs them.

        Raises:
            ConfigError: names the setting, and what works.
        """
        self.check_columns(list(map(str, record.keys())))
        if self.importance_cap is not None and unknown_writers(self.rows.chosen(record)):
            raise ConfigError(
                f"{self.where}.importance_cap bounds the ratio to whoever wrote a row, and nobody knows the "
                f"probabilities of demonstrations: set {self.where}.rows=own, or importance_cap to null"
            )

    def refuse_lone(self) -> None:
        """Where every row is alone in its group.

        Raises:
            ConfigError: rows are weighed by their group's share of right answers.
        """
        if self.difficulty is not None:
            raise ConfigError(
                f"{self.where}.pass_rate is a share of a group's rows, and every row is alone in its own: sample "
                f"several rows a prompt (rollout.group_size), or set {self.where}.pass_rate=null"
            )

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
        log_s, log_t = parts(logits, other, token, self.top_k, self.support, self.rest)
        if self.target is not None:
            log_t = self.target(log_s, log_t)
        out: Tensor = self.kind(log_s, log_t)
        return out

    def _of_normals(self, rows: TensorDictBase) -> Tensor:
        """``[B, N]``, from one further pass of this policy's network and one of the other's."""
        with torch.no_grad():
            other = self.other.normals(rows)
        value = NORMAL_KINDS[self.kind_name](self.normal.normals(rows), other)
        return value.mean(-1) if self.averaged else value.sum(-1)

    def prepare(self, batch: TensorDict, scored: Scored) -> TensorDictBase:
        """``coefficient [B]``."""
        coefficient = self.reduce(self.rows.within(batch)["mask"])
        if self.difficulty is not None:
            coefficient = coefficient * self.difficulty(batch)
        return TensorDict({"coefficient": coefficient}, batch_size=[len(batch)])

    def loss(self, forward: Forward, rows: TensorDict, stats: TensorDictBase) -> tuple[Tensor, Metrics]:
        """The reduced divergence."""
        found = forward.read(self.name) if self.readers else self._of_normals(rows)
        scale = share(self.rows.within(rows)["mask"], torch.float32) * stats["coefficient"].unsqueeze(-1)
        if self.importance_cap is not None:
            ratio = (forward.log_prob.detach() - rows["behavior_log_prob"]).clamp(-20.0, 20.0).exp()
            scale = scale * torch.where(rows["mask"], ratio, 0.0).clamp(max=self.importance_cap)
        value = (found * scale).sum()
        return value, {f"loss/{self.name}": value.detach()}
