"""Terms that need nothing but the shared pass: policy gradient, value, entropy, likelihood."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from unified_rl.correction import Correction
from unified_rl.correction.diagnostics import DIAGNOSTICS
from unified_rl.correction.internal.surrogate import KnownGradient
from unified_rl.correction.lookup import as_rule, bind
from unified_rl.correction.reduction import REDUCTIONS
from unified_rl.correction.view import share
from unified_rl.errors import ConfigError
from unified_rl.interventions import Wrapper
from unified_rl.objectives.forward import Forward, Reader
from unified_rl.objectives.metrics import Mean, Metrics
from unified_rl.objectives.objective import Parts, Scored, Term
from unified_rl.objectives.rows import Rows
from unified_rl.objectives.settings import one_of
from unified_rl.objectives.value import value_loss
from unified_rl.policies.sampling import entropy_of
from unified_rl.protocols import HasEntropy, ShowsLogits, is_discrete
from unified_rl.ranges import NonNegative, UnitInterval, UpperBound
from unified_rl.returns.scan import backward_scan, shifted
from unified_rl.units import Source

OWN_ROWS = Rows("own")
EXPERT_ROWS = Rows(["demonstration", "expert"])


class PolicyGradientTerm(Term):
    """The corrected policy gradient, with the penalties of the correction and of its wrapper.

    Args:
        name, rows, coefficient: see :class:`Term`.
    """

    reports = frozenset({"loss/policy", "update/kl", "reject/fraction"})

    def __init__(self, name: str, *, rows: Any = None, coefficient: float | Mapping[str, Any] = 1.0) -> None:
        super().__init__(name, rows, coefficient)
        self.first: Metrics = {}
        self.split = False
        self.version = 0
        self.shown = False

    def attach(self, parts: Parts) -> None:
        """Takes the correction, the wrapper and the proximal policy."""
        self.correction: Correction = parts.correction
        self.wrapper: Wrapper = parts.wrapper
        self.interpolate = parts.anchors.interpolate
        self.needs_full_pass = self.correction.needs_full_pass or parts.anchors.provider == "interpolated"

    def start(self, progress: float, update: int) -> None:
        """Forgets the diagnostics of the update before."""
        super().start(progress, update)
        self.first, self.version = {}, update

    def check(self, record: TensorDictBase) -> None:
        """Finds rows of unknown behavior probability.

        Raises:
            ConfigError: the kernel has no weight for them.
        """
        experts = EXPERT_ROWS.of_record(record)
        self.shown = bool((experts if self.rows.every else experts & self.rows.of_record(record)).any())
        if self.shown and not self.correction.kernel.traits.scores_experts:
            raise ConfigError(
                f"correction {self.correction.name} divides by the probability that a row had when it was sampled, and "
                f"nobody knows that of demonstrations: set {self.where}.rows=own, or use correction=luffy"
            )

    def prepare(self, batch: TensorDict, scored: Scored) -> TensorDictBase | None:
        """The correction's statistics; at the first step of an update also its diagnostics."""
        self.split = not scored.free
        wanted = scored.free or not self.first or self.needs_full_pass
        log_prob = scored.log_prob if wanted else batch["behavior_log_prob"]
        self.interpolate(batch, log_prob, self.version)
        if self.rows.every:
            return self._prepared(batch, log_prob)
        at = self.rows.numbers(batch)
        return scattered(self._prepared(batch[at], log_prob[at]), at, len(batch)) if len(at) else None

    def _prepared(self, rows: TensorDict, log_prob: Tensor) -> TensorDictBase:
        stats = self.correction.prepare(log_prob, rows)
        if not self.first:
            self.first = self.correction.diagnostics(log_prob, self._own(rows), stats, version=self.version)
        return stats

    def _own(self, rows: TensorDictBase) -> TensorDictBase:
        """Nobody knows how probable a demonstration was to who wrote it: what compares with that leaves it out."""
        return OWN_ROWS.within(rows) if self.shown else rows

    def loss(self, forward: Forward, rows: TensorDict, stats: TensorDictBase) -> tuple[Tensor, Metrics]:
        """The correction's loss and the wrapper's penalty."""
        log_prob, extra = forward.log_prob, forward.penalty
        if not self.rows.every:
            at = self.rows.numbers(rows)
            if not len(at):
                return nothing(log_prob), {}
            rows, stats, log_prob = rows[at], stats[at], log_prob[at]
            extra = None if extra is None else extra[at]
        out = self.correction.loss(log_prob, rows, stats)
        self.wrapper.watch(log_prob, rows, stats, out.weight)
        loss, metrics = out.loss, {**out.metrics, "update/kl": behavior_kl(log_prob.detach(), self._own(rows))}
        if self.split and stats.get("keep", None) is not None:  # the correction's own number is of a micro-batch
            metrics["reject/fraction"] = Mean((stats["original"] - stats["kept"]).sum(), stats["original"].sum())
        if extra is not None:
            penalty = torch.where(rows["mask"], extra, 0.0) * stats["coefficient"].unsqueeze(-1)
            metrics["loss/wrapper"] = penalty.detach().sum()
            loss = loss + penalty.sum()
        return loss, self._renamed(metrics)

    def summary(self) -> Metrics:
        """The correction's diagnostics of the first optimiser step."""
        return self._renamed(self.first)

    @property
    def metric_names(self) -> frozenset[str]:
        """Those of the correction, its penalties and its wrapper too."""
        penalty = {"loss/penalty"} if self.correction.penalty_coefficients else set()
        loss = {"loss/wrapper"} & {*self.wrapper.reports}
        return frozenset(self._renamed(dict.fromkeys({*self.reports, *DIAGNOSTICS, *penalty, *loss})))

    def _renamed(self, metrics: Metrics) -> Metrics:
        """Two such terms in one loss report under names of their own."""
        return metrics if self.name == "policy" else {f"{self.name}/{key}": value for key, value in metrics.items()}


class _Averaged(Term):
    """A mean over the entries of a bool column, whichever way the batch is split."""

    column = "mask"

    def prepare(self, batch: TensorDict, scored: Scored) -> TensorDictBase | None:
        """``count [B]``: entries of the whole batch; None where the batch is not split."""
        if scored.free:
            return None
        count = self._total(batch).clamp(min=1)
        return TensorDict({"count": count.expand(len(batch), *count.shape)}, batch_size=[len(batch)])

    def shared(self, mean: Tensor, rows: TensorDict, stats: Any) -> Tensor:
        """A micro-batch's mean times the share of the batch's entries that lie in it."""
        return mean if stats is None else mean * (self._total(rows) / stats["count"][0])

    def _counted(self, rows: TensorDictBase) -> Tensor:
        mask = rows[self.column]
        if not self.rows.every:
            mask = mask & self.rows.of_record(rows).view(-1, *[1] * (mask.ndim - 1))
        out: Tensor = mask
        return out

    def _total(self, rows: TensorDictBase) -> Tensor:
        """Entries that count, ``[]``; of columns ``[B, N, H]`` for each of the ``H``, ``[H]``."""
        mask = self._counted(rows)
        return mask.sum((0, 1)) if mask.ndim == 3 else mask.sum()


class ValueTerm(_Averaged):
    """Regression of a critic on the targets that the advantage estimate wrote; of several heads the sum of theirs.

    Args:
        name, rows, coefficient: see :class:`Term`.
        clip: bound of the value's move, see :func:`~unified_rl.objectives.value_loss`.
    """

    column = "value_mask"
    scores = False
    reports = frozenset({"loss/value"})

    def __init__(
        self,
        name: str,
        *,
        clip: UpperBound | None = None,
        rows: Any = None,
        coefficient: NonNegative | Mapping[str, Any] = 0.5,
    ) -> None:
        super().__init__(name, rows, coefficient)
        self.clip = clip

    def attach(self, parts: Parts) -> None:
        """Takes the critic.

        Raises:
            ConfigError: there is none.
        """
        if parts.baseline is None:
            raise ConfigError(f"{self.where} trains a critic, and this agent has none: set agent.advantage=critic")
        self.baseline = parts.baseline

    def loss(self, forward: Forward, rows: TensorDict, stats: Any) -> tuple[Tensor, Metrics]:
        """Half the mean squared error."""
        value, target, mask, old = (
            self.baseline.values(rows)[0],
            rows["value_target"],
            self._counted(rows),
            rows["value"],
        )
        if value.ndim == 3:  # every head has a mask, and a mean, of its own
            heads = zip(value.unbind(-1), target.unbind(-1), mask.unbind(-1), old.unbind(-1), strict=True)
            error = torch.stack([value_loss(v, t, m, o, self.clip) for v, t, m, o in heads])
        else:
            error = value_loss(value, target, mask, old, self.clip)
        error = self.shared(error, rows, stats).sum()
        return error, {"loss/value": error.detach()}


class EntropyTerm(_Averaged):
    """The policy's entropy in nats a unit, as a bonus: its coefficient counts negatively in the loss.

    It is of the sampling distribution (temperature and truncation included). A policy without ``entropy`` shows its
    logits instead, chunk by chunk, in the pass that the other terms share.
    """

    reports = frozenset({"policy/entropy"})
    couples_rows = False
    scores = False

    def __init__(self, name: str, *, rows: Any = None, coefficient: float | Mapping[str, Any] = 0.0) -> None:
        super().__init__(name, rows, coefficient)

    def attach(self, parts: Parts) -> None:
        """Finds out how the policy tells its entropy.

        Raises:
            ConfigError: it does not.
        """
        policy = parts.policy
        if isinstance(policy, HasEntropy):
            entropy = policy.entropy
            self.entropy: Callable[[Forward, TensorDict], Tensor] = lambda forward, rows: entropy(rows)
        elif isinstance(policy, ShowsLogits):
            self.readers = (Reader(self.name, lambda logits, token: entropy_of(logits)),)
            self.entropy = lambda forward, rows: forward.read(self.name)
        else:
            raise ConfigError(
                f"{_setting(self, 'agent.entropy_coef')} needs a policy with an entropy; {type(policy).__name__} has "
                "none: set agent.entropy_coef=0, or use policy=gaussian, flow, autoregressive or causal_lm"
            )

    def start(self, progress: float, update: int) -> None:
        """Sets the coefficient, negated."""
        super().start(progress, update)
        self.coefficient = -self.coefficient

    def loss(self, forward: Forward, rows: TensorDict, stats: Any) -> tuple[Tensor, Metrics]:
        """The mean over units."""
        mask = self._counted(rows)
        entropy = torch.where(mask, self.entropy(forward, rows), 0.0).sum() / mask.sum().clamp(min=1)
        entropy = self.shared(entropy, rows, stats)
        return entropy, {"policy/entropy": entropy.detach()}


def none(log_prob: Tensor, rows: TensorDictBase) -> Tensor:
    """1."""
    return torch.ones_like(log_prob)


def probability(log_prob: Tensor, rows: TensorDictBase) -> Tensor:
    """``p`` (DFT)."""
    return log_prob.exp()


def uncertain(log_prob: Tensor, rows: TensorDictBase) -> Tensor:
    """``p (1 - p)`` (CHORD)."""
    return log_prob.exp() * (1 - log_prob.exp())


def suffix_ratio(
    log_prob: Tensor, rows: TensorDictBase, *, gamma: UnitInterval = 0.99, cap: UpperBound = 5.0
) -> Tensor:
    """The discounted ratio of what follows to whoever wrote it: ``min(exp(sum_{u>t} gamma^(u-t) d_u), cap)``. PEAR.

    ``d`` is the log-ratio of the policy to the rows' behavior policy.
    """
    d = torch.where(rows["mask"], log_prob - rows["behavior_log_prob"], 0.0).clamp(-20.0, 20.0)
    after = gamma * shifted(backward_scan(d, torch.full_like(d, gamma)))
    return after.clamp(-20.0, 20.0).exp().clamp(max=cap)


NLL_WEIGHTS: dict[str, Callable[..., Tensor]] = {f.__name__: f for f in (none, probability, uncertain, suffix_ratio)}
"""Detached weights ``[B, N]`` of units' negative log-likelihoods by their log-probs and the rows."""


class NllTerm(Term):
    """Negative log-likelihood of rows, by default of demonstrations.

    A policy whose supervised loss has other entries than units (flow matching, say) has them averaged a step.

    Args:
        name, rows, coefficient: see :class:`Term`.
        weight: a name of :data:`NLL_WEIGHTS`, or a mapping with its settings.
        reduce: as a correction's, over units (or steps).
    """

    couples_rows = False

    def __init__(
        self,
        name: str,
        *,
        weight: str | Mapping[str, Any] = "none",
        reduce: str = "token-mean",
        rows: Any = "demonstration",
        coefficient: float | Mapping[str, Any] = 1.0,
    ) -> None:
        super().__init__(name, rows, coefficient)
        self.weight_name = as_rule(weight, f"{self.where}.weight")["name"]
        self.weight, _ = bind(weight, NLL_WEIGHTS, f"{self.where}.weight")
        self.reduce = reduction(reduce, self.where)
        self.reports = frozenset({f"loss/{name}"})

    def attach(self, parts: Parts) -> None:
        """Checks the weight.

        Raises:
            ConfigError: the weight is of a probability, and the policy has densities.
        """
        policy = parts.policy
        if self.weight_name != "none" and not is_discrete(policy):
            raise ConfigError(
                f"{self.where}.weight={self.weight_name} is a function of probabilities, and the log-probs of "
                f"{type(policy).__name__} are densities: set {self.where}.weight=none"
            )

    def check(self, record: TensorDictBase) -> None:
        """Looks for rows whose writer's probabilities nobody knows.

        Raises:
            ConfigError: the weight divides by these.
        """
        if self.weight_name == "suffix_ratio" and unknown_writers(self.rows.chosen(record)):
            raise ConfigError(
                f"{self.where}.weight=suffix_ratio divides by the probabilities that rows had for who wrote them, and "
                f"nobody knows those of demonstrations: set {self.where}.rows=offline and join recorded rows "
                f"(recipe=pear), give log_probs in an expert's file, or use {self.where}.weight=none"
            )

    def prepare(self, batch: TensorDict, scored: Scored) -> TensorDictBase:
        """``coefficient [B]`` of units, and ``step_coefficient [B]`` where the record has steps."""
        chosen = self.rows.within(batch)
        items = {"coefficient": self.reduce(chosen["mask"])}
        if "step_mask" in batch.keys():
            items["step_coefficient"] = self.reduce(self._steps(chosen))
        return TensorDict(items, batch_size=[len(batch)])

    def loss(self, forward: Forward, rows: TensorDict, stats: TensorDictBase) -> tuple[Tensor, Metrics]:
        """The weighted likelihood of the micro-batch."""
        nll, chosen = forward.nll, self.rows.within(rows)
        mask, coefficient = chosen["mask"], stats["coefficient"]
        if nll.shape != mask.shape:
            mask, coefficient = self._steps(chosen), stats["step_coefficient"]
            nll = nll.unflatten(1, (mask.shape[1], -1)).mean(-1)
        scale = share(mask, nll.dtype) * coefficient.unsqueeze(-1)
        value = (nll * self.weight(-nll.detach(), rows) * scale).sum()
        return value, {f"loss/{self.name}": (nll.detach() * scale).sum()}

    def _steps(self, chosen: TensorDictBase) -> Tensor:
        out: Tensor = chosen["step_mask"] & chosen["mask"].any(-1, keepdim=True)
        return out


def reduction(name: str, where: str) -> Callable[[Tensor], Tensor]:
    """``mask [B, N] -> coefficient [B]``: what a sum over masked-in entries is multiplied by, as a correction's reduce.

    Raises:
        ConfigError: an unknown name, or a reduction by a constant.
    """
    names = [key for key in REDUCTIONS if key != "sequence-mean-token-sum-norm"]  # it is divided by a constant
    reduce = REDUCTIONS[one_of(name, names, f"{where}.reduce")]
    return lambda mask: reduce(mask.float().sum(-1), None, lambda x: x)


def unknown_writers(rows: TensorDictBase) -> bool:
    """Whether somebody else wrote one of the rows, and nobody knows how probable its units were to them."""
    if "source" not in rows.keys():
        return False
    shown = rows["source"] > int(Source.OFFLINE)
    return bool((shown & (torch.where(rows["mask"], rows["behavior_log_prob"], 0.0) == 0).all(-1)).any())


def scattered(stats: TensorDictBase, at: Tensor, rows: int) -> TensorDictBase:
    """Statistics of the rows ``at`` of a batch of so many, 0 for the others."""
    items = {key: x.new_zeros(rows, *x.shape[1:]).index_copy(0, at, x.contiguous()) for key, x in stats.items()}
    return TensorDict(items, batch_size=[rows])


def nothing(log_prob: Tensor) -> Tensor:
    """0 with a graph, whatever the log-probs are."""
    return KnownGradient.apply(log_prob, log_prob.new_zeros(()), torch.zeros_like(log_prob))


def behavior_kl(log_prob: Tensor, batch: TensorDictBase) -> Mean:
    """Estimate k3 of the KL to the policy that acted, per unit: ``exp(-x) + x - 1`` of the log-ratio ``x``."""
    x = torch.where(batch["mask"], log_prob - batch["behavior_log_prob"], 0.0).clamp(-20.0, 20.0)
    return Mean(((-x).exp() + x - 1.0).sum(), batch["mask"].sum())


def _setting(term: Term, flat: str) -> str:
    """How a user would have asked for a term: by the agent's own setting, or by name."""
    return flat if term.where == f"agent.objectives.{flat.split('.')[1].removesuffix('_coef')}" else term.where
