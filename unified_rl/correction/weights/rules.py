"""Mismatch weights and rejection, applied together on the whole optimiser batch."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from tensordict import TensorDictBase
from torch import Tensor

from unified_rl.correction.internal.distributed import Total, identity
from unified_rl.correction.levels import LEVELS, Layout, Level
from unified_rl.correction.lookup import as_rule, bind, settings_of
from unified_rl.correction.view import anchor_log_prob, difference, safe
from unified_rl.correction.weights.mismatch import MISMATCHES, normalized
from unified_rl.correction.weights.rejection import REJECTS
from unified_rl.errors import ConfigError

Node = str | Mapping[str, Any]

DEFAULTS: dict[str, Any] = {"level": "unit", "normalize": False}
"""Settings of every mismatch rule beside those of its function."""

NUMERATOR = {"numerator": Literal["proximal", "current"]}
EXTRA: dict[str, Mapping[str, Any]] = {"mismatch": {"level": Node, "normalize": bool, **NUMERATOR}, "reject": NUMERATOR}
"""Types of the settings that every rule of a kind has."""


@dataclass(frozen=True)
class Rule:
    """A mismatch weight or a rejection with its settings fixed.

    Attributes:
        settings: as they were given, with ``name``.
        function: of the ratio (mismatch), or of log-ratios, layout and advantage (rejection).
        numerator: ``proximal`` or ``current``, over the behavior policy.
        level, level_name: at which a mismatch ratio is formed.
        normalize: divide mismatch weights by their mean.
    """

    settings: Mapping[str, Any]
    function: Any
    numerator: str
    level: Level
    level_name: str
    normalize: bool


def default_numerator(anchor: str) -> str:
    """Whose ratio to the behavior policy the rules look at where they do not say."""
    return "proximal" if anchor == "proximal" else "current"


class Rules:
    """The outer weight ``w`` and the rejection of a correction.

    Both look at the ratio ``numerator / behavior``; the numerator is ``proximal`` where the kernel's anchor is, else
    ``current``; each rule may name its own.

    Raises:
        ConfigError: an unknown rule or setting, or an outer weight on top of a kernel that already holds the ratio to
            the behavior policy.
    """

    def __init__(self, mismatch: Sequence[Node], reject: Sequence[Node], anchor: str, *, weighted_kernel: bool) -> None:
        if isinstance(mismatch, (str, Mapping)) or isinstance(reject, (str, Mapping)):
            raise ConfigError("mismatch and reject are lists of rules")
        if mismatch and anchor == "behavior" and weighted_kernel:
            raise ConfigError(
                "anchor=behavior already puts the ratio to the behavior policy into the kernel; a mismatch weight on "
                "top would count it twice: set anchor=proximal, or mismatch=[]"
            )
        self._default = default_numerator(anchor)
        self.mismatch = tuple(self._bound(node, "mismatch", i) for i, node in enumerate(mismatch))
        self.reject = tuple(self._bound(node, "reject", i) for i, node in enumerate(reject))

    def _bound(self, node: Node, kind: str, index: int) -> Rule:
        table, where = {"mismatch": MISMATCHES, "reject": REJECTS}[kind], f"correction.{kind}.{index}"
        function, others = bind(node, table, where, EXTRA[kind])
        others = {"numerator": self._default, **DEFAULTS, **others}
        level = bind(others["level"], LEVELS, f"{where}.level")[0]
        if kind == "reject" and "level" in settings_of(function):  # found once, and not at every update
            own = as_rule(node, where).get("level", settings_of(function)["level"].default)
            function = partial(function, level=bind(own, LEVELS, f"{where}.level")[0])
        name = as_rule(others["level"], where)["name"]
        return Rule(as_rule(node, where), function, others["numerator"], level, name, others["normalize"])

    @property
    def _all(self) -> tuple[Rule, ...]:
        return (*self.mismatch, *self.reject)

    @property
    def current(self) -> bool:
        """Whether a rule looks at the current policy."""
        return any(rule.numerator == "current" for rule in self._all)

    @property
    def anchors(self) -> set[str]:
        """Anchors whose log-probs the rules need."""
        used = {rule.numerator for rule in self._all} - {"current"}
        return used | ({"behavior"} if self._all else set())

    def apply(
        self,
        log_prob: Tensor | None,
        batch: TensorDictBase,
        stats: dict[str, Tensor],
        total: Total = identity,
        *,
        spare: bool = False,
    ) -> Tensor | None:
        """Writes ``weight [B, N]`` and ``keep [B, N]`` into ``stats`` where there are rules; returns ``keep``.

        Units whose log-ratio is not finite are not kept. Warns where nothing is left (on this process). ``total`` sums
        over the processes that share the batch. ``spare`` also writes ``penalised [B, N]``: the units of finite
        log-ratio, whose penalties stay whatever is rejected.
        """
        if not self._all:
            return None
        drift = {n: self._drift(n, log_prob, batch) for n in {rule.numerator for rule in self._all}}
        masks = [layout.mask for _, layout in drift.values()]
        keep = valid = masks[0] if len(masks) == 1 else masks[0] & masks[1]
        for rule in self.reject:
            d, layout = drift[rule.numerator]
            keep = keep & rule.function(d, layout, stats["advantage"])
            _warn_if_nothing(rule.settings, keep, valid)
        stats["keep"] = keep
        if spare:
            stats["penalised"] = valid
        for rule in self.mismatch:
            d, layout = drift[rule.numerator]
            weight = rule.function(rule.level(d, layout).exp())
            if rule.settings["name"] == "mask":
                _warn_if_nothing(rule.settings, (weight != 0) & valid, valid)
            if rule.normalize:
                weight = normalized(weight, layout.mask, rule.level_name, total)
            stats["weight"] = stats["weight"] * weight if "weight" in stats else weight
        return keep

    def _drift(self, numerator: str, log_prob: Tensor | None, batch: TensorDictBase) -> tuple[Tensor, Layout]:
        top = log_prob if numerator == "current" else anchor_log_prob(batch, numerator)
        assert top is not None
        d = difference(top, anchor_log_prob(batch, "behavior"))
        d, valid = safe(d, batch["mask"])
        return d, Layout(valid, batch)


def _warn_if_nothing(rule: Mapping[str, Any], kept: Tensor, valid: Tensor) -> None:
    """Warns where a rule, with those before it, leaves nothing of the units of finite log-ratio."""
    if kept.is_cuda and torch.cuda.is_current_stream_capturing():
        return
    if not bool(kept.any()) and bool(valid.any()):
        settings = ", ".join(f"{key}={value}" for key, value in rule.items() if key != "name")
        warnings.warn(
            f"{rule['name']} ({settings}) leaves 0 of {int(valid.sum())} units: 100 % rejected, so this update has no "
            "policy gradient; widen the bounds or use fresher data",
            stacklevel=2,
        )
