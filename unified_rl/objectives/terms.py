"""Terms that need nothing but the shared pass: policy gradient, value, entropy, likelihood."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from unified_rl.correction import Correction
from unified_rl.correction.reduction import REDUCTIONS
from unified_rl.correction.view import share
from unified_rl.errors import ConfigError
from unified_rl.instantiate import nearest
from unified_rl.interventions import Wrapper
from unified_rl.objectives.forward import Forward
from unified_rl.objectives.objective import Metrics, Scored, Term
from unified_rl.objectives.rows import Rows
from unified_rl.objectives.value import value_loss

OWN_ROWS = Rows("own")
EXPERT_ROWS = Rows(["demonstration", "expert"])


class PolicyGradientTerm(Term):
    """The corrected policy gradient, with the penalties of the correction and of its wrapper.

    Args:
        correction, wrapper: of the run.
        anchors: has ``provider`` and ``interpolate(batch, log_prob, version)``.
        rows, coefficient: see :class:`Term`.
    """

    def __init__(
        self,
        correction: Correction,
        wrapper: Wrapper,
        anchors: Any,
        *,
        rows: Any = None,
        coefficient: float | Mapping[str, Any] = 1.0,
    ) -> None:
        super().__init__(rows, coefficient)
        self.correction, self.wrapper, self.provider = correction, wrapper, anchors.provider
        self.interpolate = anchors.interpolate
        self.needs_full_pass = correction.needs_full_pass or anchors.provider == "interpolated"
        self.first: Metrics = {}
        self.version = 0

    def start(self, progress: float, update: int) -> None:
        """Forgets the diagnostics of the update before."""
        super().start(progress, update)
        self.first, self.version = {}, update

    def prepare(self, batch: TensorDict, scored: Scored) -> TensorDictBase:
        """The correction's statistics; at the first step of an update also its diagnostics."""
        wanted = scored.free or not self.first or self.needs_full_pass
        log_prob = scored.log_prob if wanted else batch["behavior_log_prob"]
        self.interpolate(batch, log_prob, self.version)
        if self.rows.every:
            return self._prepared(batch, log_prob)
        at = self.rows.of_record(batch).nonzero().squeeze(-1)
        return scattered(self._prepared(batch[at], log_prob[at]), at, len(batch))

    def _prepared(self, rows: TensorDict, log_prob: Tensor) -> TensorDictBase:
        stats = self.correction.prepare(log_prob, rows)
        if not self.first:
            own = OWN_ROWS.within(rows)  # nobody knows how probable a demonstration was to who wrote it
            self.first = self.correction.diagnostics(log_prob, own, stats, version=self.version)
            self._refuse_shown(rows)
        return stats

    def _refuse_shown(self, rows: TensorDictBase) -> None:
        shown = EXPERT_ROWS.within(rows)["mask"]
        if not self.correction.kernel.traits.scores_experts and bool(shown.any()):
            raise ConfigError(
                f"correction {self.correction.name} divides by the probability that a row had when it was sampled, and "
                "nobody knows that of demonstrations: set agent.objectives.policy.rows=own, or use correction=luffy"
            )

    def loss(self, forward: Forward, rows: TensorDict, stats: TensorDictBase) -> tuple[Tensor, Metrics]:
        """The correction's loss and the wrapper's penalty."""
        log_prob, extra = forward.log_prob, forward.penalty
        if not self.rows.every:
            at = self.rows.of_record(rows).nonzero().squeeze(-1)
            if not len(at):
                return log_prob.sum() * 0.0, {}
            rows, stats, log_prob = rows[at], stats[at], log_prob[at]
            extra = None if extra is None else extra[at]
        out = self.correction.loss(log_prob, rows, stats)
        self.wrapper.watch(log_prob, rows, stats, out.weight)
        loss, metrics = out.loss, {**out.metrics, "update/kl": behavior_kl(log_prob.detach(), rows)}
        if extra is not None:
            penalty = torch.where(rows["mask"], extra, 0.0) * stats["coefficient"].unsqueeze(-1)
            metrics["loss/wrapper"] = penalty.detach().sum()
            loss = loss + penalty.sum()
        return loss, metrics


class _Averaged(Term):
    """A mean over the entries of a bool column, whichever way the batch is split."""

    column = "mask"

    def prepare(self, batch: TensorDict, scored: Scored) -> TensorDictBase | None:
        """``count [B]``: entries of the whole batch; None where the batch is not split."""
        if scored.free:
            return None
        count = self._counted(batch).sum().clamp(min=1)
        return TensorDict({"count": count.expand(len(batch))}, batch_size=[len(batch)])

    def shared(self, mean: Tensor, rows: TensorDict, stats: Any) -> Tensor:
        """A micro-batch's mean times the share of the batch's entries that lie in it."""
        return mean if stats is None else mean * (self._counted(rows).sum() / stats["count"][0])

    def _counted(self, rows: TensorDictBase) -> Tensor:
        mask = rows[self.column]
        return mask if self.rows.every else mask & self.rows.of_record(rows).unsqueeze(-1)


class ValueTerm(_Averaged):
    """Regression of a critic on the targets that the advantage estimate wrote."""

    column = "value_mask"

    def __init__(
        self,
        values: Callable[[TensorDictBase], Tensor],
        *,
        clip: float | None = None,
        rows: Any = None,
        coefficient: float | Mapping[str, Any] = 0.5,
    ) -> None:
        super().__init__(rows, coefficient)
        self.values, self.clip = values, clip

    def loss(self, forward: Forward, rows: TensorDict, stats: Any) -> tuple[Tensor, Metrics]:
        """Half the mean squared error."""
        error = value_loss(self.values(rows), rows["value_target"], self._counted(rows), rows["value"], self.clip)
        return self.shared(error, rows, stats), {"loss/value": error.detach()}


class EntropyTerm(_Averaged):
    """The policy's entropy, as a bonus: its coefficient counts negatively in the loss."""

    def __init__(self, policy: Any, *, rows: Any = None, coefficient: float | Mapping[str, Any] = 0.0) -> None:
        super().__init__(rows, coefficient)
        self.policy = policy

    def start(self, progress: float, update: int) -> None:
        """Sets the coefficient, negated."""
        super().start(progress, update)
        self.coefficient = -self.coefficient

    def loss(self, forward: Forward, rows: TensorDict, stats: Any) -> tuple[Tensor, Metrics]:
        """The mean over units."""
        mask = self._counted(rows)
        entropy = torch.where(mask, self.policy.entropy(rows), 0.0).sum() / mask.sum().clamp(min=1)
        return self.shared(entropy, rows, stats), {"policy/entropy": entropy.detach()}


NLL_WEIGHTS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": torch.ones_like,
    "probability": torch.Tensor.exp,
    "uncertain": lambda log_prob: log_prob.exp() * (1 - log_prob.exp()),
}
"""Detached weights of a token's negative log-likelihood by its log-prob: 1, p (DFT), p(1-p) (CHORD)."""


class NllTerm(Term):
    """Negative log-likelihood of rows, by default of demonstrations.

    Args:
        weight: a name of :data:`NLL_WEIGHTS`.
        reduce: as a correction's.
    """

    def __init__(
        self,
        *,
        weight: str = "none",
        reduce: str = "token-mean",
        rows: Any = "demonstration",
        coefficient: float | Mapping[str, Any] = 1.0,
    ) -> None:
        super().__init__(rows, coefficient)
        if weight not in NLL_WEIGHTS:
            raise ConfigError(f"nll has no weight {weight!r}; {nearest(weight, NLL_WEIGHTS)}")
        self.weight, self.reduce = NLL_WEIGHTS[weight], REDUCTIONS[reduce]

    def prepare(self, batch: TensorDict, scored: Scored) -> TensorDictBase:
        """``coefficient [B]``."""
        units = self.rows.within(batch)["mask"].float().sum(-1)
        return TensorDict({"coefficient": self.reduce(units, None, lambda x: x)}, batch_size=[len(batch)])

    def loss(self, forward: Forward, rows: TensorDict, stats: TensorDictBase) -> tuple[Tensor, Metrics]:
        """The weighted likelihood of the micro-batch."""
        nll = forward.nll
        mask = self.rows.within(rows)["mask"]
        scale = share(mask, nll.dtype) * stats["coefficient"].unsqueeze(-1)
        value = (nll * self.weight(-nll.detach()) * scale).sum()
        return value, {"loss/nll": (nll.detach() * scale).sum()}


def scattered(stats: TensorDictBase, at: Tensor, rows: int) -> TensorDictBase:
    """Statistics of the rows ``at`` of a batch of so many, 0 for the others."""
    items = {key: x.new_zeros(rows, *x.shape[1:]).index_copy(0, at, x.contiguous()) for key, x in stats.items()}
    return TensorDict(items, batch_size=[rows])


def behavior_kl(log_prob: Tensor, batch: TensorDictBase) -> Tensor:
    """Estimate k3 of the KL to the policy that acted, per unit: ``exp(-x) + x - 1`` of the log-ratio ``x``."""
    x = torch.where(batch["mask"], log_prob - batch["behavior_log_prob"], 0.0).clamp(-20.0, 20.0)
    return ((-x).exp() + x - 1.0).sum() / batch["mask"].sum().clamp(min=1)
