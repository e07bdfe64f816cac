"""The one off-policy correction.

Every method's gradient is ``sum of c * w * g * A * grad log pi`` minus the gradient of its regularisers: ``c`` the
reduction, ``w`` the mismatch weight and rejection, ``g`` the kernel, ``A`` the advantage, all detached. The loss is
``-(C * x).sum()`` with ``C = c * w * g * A``: its gradient is what matters, its value is not the textbook surrogate.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from unified_rl.configurable import configurable
from unified_rl.correction.diagnostics import diagnose
from unified_rl.correction.internal.distributed import Total, identity
from unified_rl.correction.internal.surrogate import KnownGradient, unit_advantage
from unified_rl.correction.kernels import KERNELS, Kernel
from unified_rl.correction.levels import LEVELS, Layout
from unified_rl.correction.lookup import as_rule, bind, check_keys, settings_of
from unified_rl.correction.penalties.penalty import Penalty
from unified_rl.correction.reduction import REDUCTIONS
from unified_rl.correction.transforms import PRES
from unified_rl.correction.view import (
    ANCHORS,
    View,
    anchor_log_prob,
    difference,
    narrow,
    only,
    passing,
    safe,
    share,
)
from unified_rl.correction.weights.rules import Rules
from unified_rl.correction.weights.thinning import THINS
from unified_rl.errors import ConfigError, RecordError
from unified_rl.instantiate import check_type, is_node, nearest, parameters
from unified_rl.ranges import Positive, ranged, shown
from unified_rl.units import EXPERTS

Node = str | Mapping[str, Any]


@dataclass
class CorrectionOutput:
    """What :meth:`Correction.loss` returns.

    Attributes:
        loss: scalar to minimise; those of all micro-batches add up to the whole batch's.
        weight: ``[B, N]`` detached, the total coefficient ``c * w * g * A`` of each unit's score.
        metrics: scalar tensors; ``loss/...`` add up over micro-batches, fractions are the micro-batch's own.
    """

    loss: Tensor
    weight: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)


@configurable
@ranged("correction")
class Correction:
    """A published (or new) off-policy correction, put together from parts.

    Args:
        level: grain of the kernel's log-ratio: a name of :data:`LEVELS`, or a mapping with ``name`` and settings.
        kernel: the weight as a function of ratio and advantage: a name of :data:`KERNELS`, the dotted path of a
            :class:`Kernel` in an allowed package, a mapping with ``name`` and settings, or a kernel itself.
        anchor: denominator of the kernel's ratio: behavior, proximal, reference or none.
        pre: optional unit-level transform of the log-ratio before the level.
        thin: optional random choice of units or rows to train on, weighted to stay unbiased.
        mismatch: outer weights proximal/behavior (current/behavior where the kernel itself holds no ratio).
        reject: rules that take units or rows out.
        rejected: whether units that ``reject`` or ``thin`` takes out of the policy term lose their penalties
            (``drop``) or keep them (``keep``); None leaves each as it is published: ``drop`` for ``reject``, as verl
            has it, and ``keep`` for ``thin``. TRL, slime and NeMo-RL mask the policy term alone (``keep``). What a
            row's terms are divided by does not depend on it.
        penalty: regularisers beside the policy term.
        reduce: what the sum over units is divided by.
        denominator: ``original`` counts every masked-in unit, ``kept`` those that ``reject`` left.
        horizon: the constant of ``sequence-mean-token-sum-norm`` (and optionally of ``token-sum``).
        attached: differentiate the level itself instead of the unit's log-prob (straight-through).
        advantage: settings for :func:`unified_rl.returns.record_advantage` that the method wants; None leaves it open.
        proximal: settings of the proximal policy's provider, for the trainer.
        anchors: further policies that penalties compare with; batches hold ``{name}_log_prob [B, N]`` of each.
        wrapper: settings of what acts outside the loss (optimiser step, data selection), for the trainer.
        name, summary, source, confidence, experimental: what it is and where it comes from.

    Raises:
        ConfigError: an unknown part or setting (names the nearest), or parts that contradict each other.
    """

    def __init__(
        self,
        *,
        level: Node = "unit",
        kernel: Node | Kernel = "constant",
        anchor: str = "behavior",
        pre: Node | None = None,
        thin: Node | None = None,
        mismatch: Sequence[Node] | None = None,
        reject: Sequence[Node] | None = None,
        rejected: Literal["drop", "keep"] | None = None,
        penalty: Sequence[Node] | None = None,
        reduce: str = "token-mean",
        denominator: str = "original",
        horizon: Positive | None = None,
        attached: bool = False,
        advantage: Mapping[str, Any] | None = None,
        proximal: Mapping[str, Any] | None = None,
        anchors: Sequence[str] | None = None,
        wrapper: Mapping[str, Any] | None = None,
        name: str = "",
        summary: str = "",
        source: str = "",
        confidence: str = "",
        experimental: bool = False,
    ) -> None:
        if anchor != "none" and anchor not in ANCHORS:
            raise ConfigError(f"correction.anchor {shown(anchor)} is unknown; {nearest(anchor, [*ANCHORS, 'none'])}")
        if reduce not in REDUCTIONS:
            raise ConfigError(f"correction.reduce {shown(reduce)} is unknown; {nearest(reduce, REDUCTIONS)}")
        if denominator not in ("original", "kept"):
            raise ConfigError(f"correction.denominator must be original or kept, got {shown(denominator)}")
        if rejected is not None and rejected not in ("drop", "keep"):
            raise ConfigError(f"correction.rejected must be drop or keep, got {rejected!r}")
        if reduce == "sequence-mean-token-sum-norm" and not horizon:
            raise ConfigError(
                "reduce=sequence-mean-token-sum-norm needs horizon: a constant, such as the longest answer"
            )
        self.anchors = tuple(anchors or ())
        self.anchor, self.reduce, self.denominator = anchor, reduce, denominator
        self.horizon, self.attached, self.rejected = horizon, attached, rejected
        self.name, self.summary, self.source = name, summary, source
        self.confidence, self.experimental = confidence, experimental
        self.advantage = dict(advantage or {})
        self.proximal, self.wrapper = dict(proximal or {}), dict(wrapper or {})
        self._level, self._level_name = _named(level, LEVELS, "level")
        self._kernel, self._kernel_name = _kernel_of(kernel)
        self._pre, self._pre_name = _optional(pre, PRES, "pre")
        self._thin, self._thin_name = _optional(thin, THINS, "thin")
        holds_ratio = self._kernel.traits.holds_ratio
        self._rules = Rules(mismatch or (), reject or (), anchor, weighted_kernel=holds_ratio)
        self._penalties = tuple(
            Penalty(node, f"correction.penalty.{i}", self.anchors) for i, node in enumerate(penalty or ())
        )
        self.total: Total = identity
        """Sums a tensor over processes; :func:`process_total` where a batch is spread over several."""

    @classmethod
    def from_config(cls, node: Mapping[str, Any]) -> Correction:
        """From a resolved configuration node, with or without ``_target_``."""
        values = {key: value for key, value in node.items() if key != "_target_"}
        check_keys(values, FIELDS, "a correction")
        known, _ = parameters(Correction)
        return cls(**{key: check_type(value, known[key].hint, f"correction.{key}") for key, value in values.items()})

    @classmethod
    def check_settings(cls, settings: Mapping[str, Any]) -> None:
        """Refuses settings that no correction can be made of, when a run is composed.

        Raises:
            ConfigError: an unknown rule or setting, or one of the wrong type; with its full name.
        """
        cls.from_config({key: value for key, value in settings.items() if not is_node(value)})

    @property
    def kernel(self) -> Kernel:
        """The weight, with its settings and :class:`~unified_rl.correction.kernels.Traits`."""
        return self._kernel

    @property
    def kernel_name(self) -> str:
        """What the configuration calls the kernel."""
        return self._kernel_name

    @property
    def level_name(self) -> str:
        """What the configuration calls the level."""
        return self._level_name

    @property
    def pre_name(self) -> str | None:
        """What the configuration calls the transform before the level; None without."""
        return self._pre_name

    @property
    def thin_name(self) -> str | None:
        """What the configuration calls the thinning; None without."""
        return self._thin_name

    @property
    def rules(self) -> Rules:
        """Mismatch weights and rejection."""
        return self._rules

    @property
    def penalties(self) -> tuple[Penalty, ...]:
        """The regularisers, in their order."""
        return self._penalties

    @property
    def penalty_coefficients(self) -> list[float]:
        """Those of the penalties, in their order."""
        return [penalty.coefficient for penalty in self._penalties]

    def set_penalty_coefficients(self, values: Sequence[float]) -> None:
        """Changes them in place."""
        for penalty, value in zip(self._penalties, values, strict=True):
            penalty.coefficient = value

    @property
    def level_settings(self) -> list[str]:
        """Names of the level's settings."""
        return list(settings_of(self._level))

    def set_level(self, **settings: Any) -> None:
        """Changes settings of the level in place.

        Raises:
            ConfigError: a setting that the level does not have, or of the wrong type.
        """
        name = f"correction.level {self._level_name!r}"
        known = settings_of(self._level)
        check_keys(settings, known, name)
        checked = {k: check_type(value, known[k].hint, f"correction.level.{k}") for k, value in settings.items()}
        self._level = partial(self._level, **checked)

    def with_kernel(self, kernel: Node | Kernel) -> Correction:
        """A copy with another kernel; everything else is shared.

        Raises:
            ConfigError: an unknown kernel or setting.
        """
        other = copy.copy(self)
        other._kernel, other._kernel_name = _kernel_of(kernel)
        return other

    def with_penalty(self, node: Node) -> Correction:
        """A copy with one penalty more, behind the others; everything else is shared.

        Raises:
            ConfigError: an unknown penalty or setting.
        """
        other = copy.copy(self)
        more = Penalty(node, f"correction.penalty.{len(self._penalties)}", self.anchors)
        other._penalties = (*self._penalties, more)
        return other

    @property
    def needs_full_pass(self) -> bool:
        """Whether ``prepare`` must see the current log-probs of the whole optimiser batch."""
        selected = any(p.select is not None for p in self._penalties)
        return self._kernel.prepares or self._rules.current or self.denominator == "kept" or selected

    def needs(self, anchor: str) -> bool:
        """Whether batches must hold the log-probs of this anchor."""
        used = {self.anchor, *self._rules.anchors, *self._kernel.anchors}
        if self._thin is not None:
            used.add("behavior")
        return anchor in used.union(*(p.anchors for p in self._penalties))

    def check_domain(self, *, discrete: bool) -> None:
        """Refuses what a policy's log-probs can not support.

        Args:
            discrete: True where log-probs are of probabilities (tokens, action bins), False for densities.

        Raises:
            ConfigError: the kernel needs probabilities; says why and names the nearest preset that works.
        """
        if self.wrapper.get("name") == "project_categorical" and not discrete:
            raise ConfigError(
                f"correction {self.name} projects a categorical distribution, and this policy's is a density; use "
                "correction=fixpo for a trust region on any policy"
            )
        nearest_preset = self._kernel.traits.probabilities
        if nearest_preset is not None and not discrete:
            raise ConfigError(
                f"correction {self.name or self.kernel_name} compares probabilities, and this policy's log-probs are "
                f"densities, which have no upper bound; use correction={nearest_preset}"
            )

    def check_sources(self, record: TensorDictBase) -> None:
        """Refuses rows that all are the policy's own where the kernel is about those that others wrote.

        Args:
            record: the rows that the policy term of the first update reads, batch size ``[B]``.

        Raises:
            ConfigError: there is no demonstration among them; says what works.
        """
        source = record.get("source", None)
        self.require_shown([] if source is None else source.unique().tolist())

    def require_shown(self, sources: Collection[int]) -> None:
        """Refuses a kernel that is about demonstrations where rows of ``sources`` are all that it will see.

        Raises:
            ConfigError: says what works.
        """
        without = self._kernel.traits.demonstrations
        if without is not None and set(EXPERTS).isdisjoint(sources):
            raise ConfigError(
                f"correction {self.name or self.kernel_name} learns from demonstrations, and the first update holds "
                "none, so nothing of the method would be left: add rows of rollout.sources (recipe=luffy does; answers "
                f"longer than env.max_turn_tokens are left out), or use correction={without}"
            )

    def require_support(self, *, wrappers: Collection[str] = (), providers: Collection[str] = ("snapshot",)) -> None:
        """Refuses a method of which the caller would only do half.

        Args:
            wrappers: names of ``wrapper`` that the trainer acts on.
            providers: names of ``proximal.provider`` that it offers.

        Raises:
            ConfigError: the method acts outside the loss in a way that the trainer does not have.
        """
        wrapper, provider = self.wrapper.get("name"), self.proximal.get("provider", "snapshot")
        if wrapper is not None and wrapper not in wrappers:
            raise ConfigError(
                f"correction {self.name} is more than a loss: it also needs {wrapper!r}, which this trainer lacks; "
                "set correction.wrapper=null to train with its loss alone"
            )
        if provider not in providers:
            raise ConfigError(
                f"correction {self.name} wants its proximal policy by {provider!r}, and this trainer has "
                f"{', '.join(providers)}; set correction.proximal=null for a snapshot"
            )

    def prepare(self, log_prob: Tensor | None, batch: TensorDictBase) -> TensorDict:
        """Looks at the whole optimiser batch once, without gradient.

        Args:
            log_prob: ``[B, N]`` of the current policy; None is allowed where ``needs_full_pass`` is False.
            batch: the record, batch size ``[B]``, with ``advantage`` of shape ``[B]``, ``[B, T]`` or ``[B, N]`` (read
                as one a unit where T = N).

        Returns:
            Statistics of batch size ``[B]`` that slice with the batch: ``coefficient [B]`` (c), ``advantage [B, N]``,
            ``original [B]`` and ``kept [B]`` (counts of units), and what the method's own parts add.

        Raises:
            RecordError: a log-prob the method needs is missing, or shapes disagree.
        """
        with torch.no_grad():
            return self._prepared(log_prob, batch)

    def _prepared(self, log_prob: Tensor | None, batch: TensorDictBase) -> TensorDict:
        mask = batch["mask"]
        _check_shape(log_prob, mask)
        if log_prob is None and self.needs_full_pass:
            raise RecordError(f"correction {self.name or self.kernel_name} needs the current log-probs in prepare")
        dtype = torch.float32 if log_prob is None or log_prob.dtype != torch.float64 else torch.float64
        count = share(mask, dtype).sum(-1)
        stats = {"advantage": unit_advantage(batch, mask, count, dtype, optional=self._kernel.traits.own_advantage)}
        keep = self._rules.apply(log_prob, batch, stats, self.total, spare=self.rejected == "keep")
        if self.denominator == "kept" and log_prob is not None:
            valid = safe(self._unit_log_ratio(log_prob, batch), mask)[1]
            keep = valid if keep is None else keep & valid
            stats["keep"] = keep
        if self._thin is not None:
            thinned = self._thin(batch, Layout(mask, batch), stats["advantage"], self.total)
            if isinstance(thinned, tuple):
                thinned, stats["advantage"] = thinned
            if self.rejected == "drop":
                stats["penalised"] = (mask if keep is None else keep) & (thinned != 0)
            stats["weight"] = thinned * stats["weight"] if "weight" in stats else thinned
        stats["original"] = count
        stats["kept"] = count if keep is None else share(keep, dtype).sum(-1)
        counted = stats["kept" if self.denominator == "kept" else "original"]
        stats["coefficient"] = REDUCTIONS[self.reduce](counted, self.horizon, self.total)
        if self._kernel.prepares or any(p.select is not None for p in self._penalties):
            assert log_prob is not None
            view, _, _ = self._view(log_prob.detach(), batch, stats)
            stats.update(self._kernel.prepare(view, self.total))
            for i, p in enumerate(self._penalties):
                if p.select is not None:
                    stats[f"select_{i}"] = p.select(view, self.total)
        return TensorDict._new_unsafe(stats, mask.shape[:1], mask.device)  # the checks cost as much as the arithmetic

    def loss(self, log_prob: Tensor, batch: TensorDictBase, stats: TensorDictBase) -> CorrectionOutput:
        """The loss of a (micro-)batch.

        Args:
            log_prob: ``[B, N]``, differentiable.
            batch: the record.
            stats: from :meth:`prepare`, sliced like the batch.

        Returns:
            The loss, the total coefficient of each unit, and metrics. Never NaN: units with non-finite log-probs are
            left out; with nothing left the loss is exactly 0 and still has a graph.
        """
        _check_shape(log_prob, batch["mask"])
        with torch.no_grad():
            view, ok, x = self._view(log_prob, batch, stats)
            weight = self._kernel.weight(view) * (narrow(view.advantage) * view.row("coefficient"))
            outer = stats.get("weight", None)
            weight = only(ok, weight if outer is None else weight.mul_(outer))
            score = view.raw_log_prob.nan_to_num(0.0, 0.0, 0.0) if x is None else x.detach()
            value = policy = -torch.dot(weight.flatten(), score.flatten().to(weight.dtype))
            slope = -weight if x is None else torch.zeros_like(weight)
            metrics = {"loss/policy": policy, "reject/fraction": _rejected(stats)}
            if self._penalties:
                spared = stats.get("penalised", None)
                part_of = ok if spared is None else view.mask & spared
                parts = [p(view, part_of, f"select_{i}") for i, p in enumerate(self._penalties)]
                metrics["loss/penalty"] = torch.stack([part for part, _ in parts]).sum()
                slope = sum((part for _, part in parts), slope)
                value = metrics["loss/penalty"] + (policy if x is None else 0)
        if x is None:
            return CorrectionOutput(KnownGradient.apply(log_prob, value, slope), weight, metrics)
        attached = -(weight * x).sum()
        if self._penalties:
            attached = attached + KnownGradient.apply(log_prob, value, slope)
        return CorrectionOutput(attached, weight, metrics)

    def __call__(self, log_prob: Tensor, batch: TensorDictBase) -> CorrectionOutput:
        """:meth:`prepare` and :meth:`loss` of one batch."""
        return self.loss(log_prob, batch, self.prepare(log_prob.detach(), batch))

    def diagnostics(
        self,
        log_prob: Tensor,
        batch: TensorDictBase,
        stats: TensorDictBase | None = None,
        *,
        version: int | None = None,
    ) -> dict[str, Tensor]:
        """How far off-policy the batch is and what the correction did about it; see :func:`diagnose` for the names.

        Args:
            log_prob: ``[B, N]`` of the current policy.
            batch: the record.
            stats: from :meth:`prepare`; computed here if not given.
            version: the learner's version, for the staleness.
        """
        with torch.no_grad():
            log_prob = log_prob.detach()
            stats = self.prepare(log_prob, batch) if stats is None else stats
            view, ok, _ = self._view(log_prob, batch, stats)
            kernel = self._kernel.weight(view)
            outer = stats.get("weight", None)
            truncating = self._kernel.traits.truncates
            return diagnose(view, ok, kernel, outer, version, truncating=truncating, total=self.total)

    def weight_curve(self, log_ratio: Tensor, advantage: float, **record: Tensor) -> Tensor:
        """The kernel's weight at each of ``log_ratio [n]``, as rows of one unit with the given advantage, ``[n]``."""
        zero = torch.zeros(len(log_ratio), 1, dtype=log_ratio.dtype)
        items = dict.fromkeys([*ANCHORS.values(), *(f"{name}_log_prob" for name in self.anchors)], zero)
        batch = TensorDict(
            {
                **items,
                "mask": torch.ones_like(zero, dtype=torch.bool),
                "step_index": torch.zeros_like(zero, dtype=torch.int64),
                "reward": torch.full_like(zero, float(advantage > 0)),
                "advantage": torch.full_like(zero, advantage),
                "group": torch.zeros(len(log_ratio), dtype=torch.int64),
                **record,
            },
            batch_size=[len(log_ratio)],
        )
        with torch.no_grad():
            log_prob = log_ratio.unsqueeze(-1)
            view, _, _ = self._view(log_prob, batch, self.prepare(log_prob, batch))
            return self._kernel.weight(view).squeeze(-1)

    def _unit_log_ratio(self, log_prob: Tensor, batch: TensorDictBase) -> Tensor:
        """Unit log-ratios to the anchor, ``[B, N]``, not yet made safe."""
        if self.anchor == "none":
            return log_prob if log_prob.dtype == torch.float64 else log_prob.float()
        return difference(log_prob, anchor_log_prob(batch, self.anchor))

    def _view(
        self, log_prob: Tensor, batch: TensorDictBase, stats: TensorDictBase | dict[str, Tensor]
    ) -> tuple[View, Tensor, Tensor | None]:
        """The view of a batch, which units take part in the loss, and the differentiable level where it is attached."""
        flat = log_prob.detach()
        d, valid = safe(self._unit_log_ratio(flat, batch), batch["mask"])
        layout = Layout(valid, batch)
        attached = self.attached and log_prob.requires_grad
        if attached:
            with torch.enable_grad():
                x = self._leveled(KnownGradient.apply(log_prob, d, passing(d, valid)), layout, stats)
            level = x.detach()
        else:
            level = self._leveled(d, layout, stats)
        view = View(level, d, flat, stats["advantage"], layout, batch, stats, self.anchor)
        keep = stats.get("keep", None)
        return view, valid if keep is None else valid & keep, x if attached else None

    def _leveled(self, d: Tensor, layout: Layout, stats: TensorDictBase | dict[str, Tensor]) -> Tensor:
        level: Tensor = self._level(d if self._pre is None else self._pre(d, stats["advantage"]), layout)
        return level


def _named(node: Node, table: Mapping[str, Any], field: str) -> tuple[Any, str]:
    """A rule with its settings, and what the configuration calls it."""
    return bind(node, table, f"correction.{field}")[0], as_rule(node, field)["name"]


def _optional(node: Node | None, table: Mapping[str, Any], field: str) -> tuple[Any, str | None]:
    return (None, None) if node is None else _named(node, table, field)


def _kernel_of(node: Node | Kernel) -> tuple[Kernel, str]:
    if isinstance(node, Kernel):
        return node, node.name or type(node).__name__
    made, name = _named(node, KERNELS, "kernel")
    return made(), name


FIELDS = tuple(name for name in Correction.__init__.__annotations__ if name != "return")
"""The fields of a correction's configuration."""


def _rejected(stats: TensorDictBase) -> Tensor:
    if stats.get("keep", None) is None:
        return torch.zeros((), device=stats["original"].device)
    lost: Tensor = 1.0 - stats["kept"].sum() / stats["original"].sum().clamp(min=1)
    return lost


def _check_shape(log_prob: Tensor | None, mask: Tensor) -> None:
    if log_prob is not None and log_prob.shape != mask.shape:
        raise RecordError(f"log_prob has shape {tuple(log_prob.shape)}, but the mask is {tuple(mask.shape)}")
