"""A preset with every default written out, and what it needs from a batch."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from unified_rl.correction.correction import Correction
from unified_rl.correction.kernels import KERNELS
from unified_rl.correction.levels import LEVELS
from unified_rl.correction.lookup import as_rule, find, settings_of
from unified_rl.correction.penalties import penalty
from unified_rl.correction.penalties.selection import SELECTIONS
from unified_rl.correction.transforms import PRES
from unified_rl.correction.view import ANCHORS
from unified_rl.correction.weights import rules
from unified_rl.correction.weights.mismatch import MISMATCHES
from unified_rl.correction.weights.rejection import REJECTS
from unified_rl.correction.weights.thinning import THINS
from unified_rl.errors import ConfigError
from unified_rl.instantiate import REQUIRED
from unified_rl.interventions import WRAPPERS
from unified_rl.returns.groups import group_advantage

Table = Mapping[str, Callable[..., Any]]
ONE_RULE: dict[str, Table] = {"level": LEVELS, "kernel": KERNELS, "pre": PRES, "thin": THINS}


def expanded(config: Mapping[str, Any]) -> dict[str, Any]:
    """Every field of a correction with the defaults of its parts.

    Args:
        config: fields as in a preset's file.

    Returns:
        The same fields and all others of :class:`Correction`, in its order, descriptive ones first. Parts are mappings
        with ``name`` and every setting.

    Raises:
        ConfigError: an unknown field, part or setting.
    """
    Correction.from_config(config)
    fields = _defaults(Correction)
    full = {key: config.get(key, default) for key, default in fields.items()}
    for key, table in ONE_RULE.items():
        if full[key] is not None:
            full[key] = _filled(full[key], table)
    numerator = {"numerator": rules.default_numerator(full["anchor"])}
    full["mismatch"] = [_filled(r, MISMATCHES, {**rules.DEFAULTS, **numerator}) for r in full["mismatch"] or ()]
    full["reject"] = [_filled(r, REJECTS, numerator) for r in full["reject"] or ()]
    full["penalty"] = [_penalty(p) for p in full["penalty"] or ()]
    if full["advantage"]:
        full["advantage"] = {**_defaults(group_advantage), **full["advantage"]}
    full["proximal"] = full["proximal"] or {"provider": "snapshot"}
    if full["wrapper"] and full["wrapper"].get("name") in WRAPPERS:
        full["wrapper"] = _filled(full["wrapper"], WRAPPERS)
    about = ("name", "summary", "source", "confidence", "experimental")
    return {key: full[key] for key in (*about, *(k for k in full if k not in about))}


def needs(correction: Correction) -> dict[str, Any]:
    """What a batch and a policy must offer.

    Returns:
        ``log_probs`` (record keys), ``discrete`` (only for probabilities), ``binary_rewards``, ``full_pass`` (the
        current log-probs of the whole optimiser batch before the first micro-batch), ``wrapper`` (what acts outside
        the loss).
    """
    return {
        "log_probs": [key for anchor, key in ANCHORS.items() if correction.needs(anchor)],
        "discrete": _discrete_only(correction),
        "binary_rewards": correction.kernel.traits.binary_rewards,
        "full_pass": correction.needs_full_pass,
        "wrapper": correction.wrapper.get("name"),
    }


def _discrete_only(correction: Correction) -> bool:
    try:
        correction.check_domain(discrete=False)
    except ConfigError:
        return True
    return False


def _defaults(function: Callable[..., Any]) -> dict[str, Any]:
    """Parameters with a default; a group advantage's tensors are no settings."""
    parameters, tensors = inspect.signature(function).parameters.values(), ("weight", "given", "units")
    return {p.name: p.default for p in parameters if p.default is not p.empty and p.name not in tensors}


def _filled(node: str | Mapping[str, Any], table: Table, extra: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """A rule with ``name`` first and every setting."""
    rule = as_rule(node, "rule")
    known = settings_of(find(rule["name"], table, "rule"))
    return {
        "name": rule["name"],
        **{key: parameter.default for key, parameter in known.items() if parameter.default is not REQUIRED},
        **(extra or {}),
        **{k: v for k, v in rule.items() if k != "name"},
    }


def _penalty(node: str | Mapping[str, Any]) -> dict[str, Any]:
    full = _filled(node, penalty.PENALTIES, penalty.DEFAULTS)
    select = full["select"]
    return full if select is None else {**full, "select": _filled(select, SELECTIONS)}
