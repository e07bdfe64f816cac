"""Mismatch weights and rejection, applied together on the whole optimiser batch."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor

from unified_rl.correction.internal.distributed import Total, identity
from unified_rl.correction.levels import LEVELS, Layout
from unified_rl.correction.lookup import as_rule, bind
from unified_rl.correction.view import anchor_log_prob, difference, safe
from unified_rl.correction.weights.mismatch import MISMATCHES, normalized
from unified_rl.correction.weights.rejection import REJECTS
from unified_rl.errors import ConfigError

Node = str | Mapping[str, Any]

DEFAULTS: dict[str, Any] = {"level": "unit", "normalize": False}
"""Settings of every mismatch rule beside those of its function."""


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
        self._mismatch = [self._bound(node, "mismatch") for node in mismatch]
        self._reject = [self._bound(node, "reject") for node in reject]

    def _bound(self, node: Node, where: str) -> tuple[dict[str, Any], Any, dict[str, Any]]:
        table, extra = (MISMATCHES, list(DEFAULTS)) if where == "mismatch" else (REJECTS, [])
        function, others = bind(node, table, where, [*extra, "numerator"])
        numerator = others.setdefault("numerator", self._default)
        if numerator not in ("proximal", "current"):
            raise ConfigError(f"the numerator of a {where} rule is proximal or current, got {numerator!r}")
        if where == "mismatch":
            others = {**DEFAULTS, **others}
            others["bound_level"], _ = bind(others["level"], LEVELS, "level")
        return as_rule(node, where), function, others

    @property
    def _all(self) -> list[tuple[dict[str, Any], Any, dict[str, Any]]]:
        return [*self._mismatch, *self._reject]

    @property
    def current(self) -> bool:
        """Whether a rule looks at the current policy."""
        return any(others["numerator"] == "current" for _, _, others in self._all)

    @property
    def anchors(self) -> set[str]:
        """Anchors whose log-probs the rules need."""
        used = {others["numerator"] for _, _, others in self._all} - {"current"}
        return used | ({"behavior"} if self._all else set())

    def apply(
        self, log_prob: Tensor | None, batch: TensorDictBase, stats: dict[str, Tensor], total: Total = identity
    ) -> Tensor | None:
        """Writes ``weight [B, N]`` and ``keep [B, N]`` into ``stats`` where there are rules; returns ``keep``.

        Units whose log-ratio is not finite are not kept. Warns where nothing is left (on this process). ``total`` sums
        over the processes that share the batch.
        """
        if not self._all:
            return None
        drift = {n: self._drift(n, log_prob, batch) for n in {others["numerator"] for _, _, others in self._all}}
        masks = [layout.mask for _, layout in drift.values()]
        keep = valid = masks[0] if len(masks) == 1 else masks[0] & masks[1]
        for rule, function, others in self._reject:
            d, layout = drift[others["numerator"]]
            keep = keep & function(d, layout, stats["advantage"])
            _warn_if_nothing(rule, keep, valid)
        stats["keep"] = keep
        for rule, function, others in self._mismatch:
            d, layout = drift[others["numerator"]]
            weight = function(others["bound_level"](d, layout).exp())
            if rule["name"] == "mask":
                _warn_if_nothing(rule, (weight != 0) & valid, valid)
            if others["normalize"]:
                weight = normalized(weight, layout.mask, as_rule(others["level"], "level")["name"], total)
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
