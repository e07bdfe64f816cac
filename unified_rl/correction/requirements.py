"""What a correction needs to see together: single steps, whole rows, or groups of rows."""

from __future__ import annotations

from unified_rl.correction.correction import Correction
from unified_rl.correction.lookup import as_rule
from unified_rl.correction.weights.rules import Rule

STEPWISE = {"unit", "step", "step_sum"}
"""Levels that no other step of the row has a say in."""

BY_ROW = {"band": ("level", "geometric"), "divergence": ("over", "sequence_mean")}
"""The setting of a rejection rule that says whether it looks at whole rows, and its default."""


def needs_whole_rows(correction: Correction) -> bool:
    """Whether cutting rows into steps would change what the correction computes."""
    levels = [correction.level_name, *(rule.level_name for rule in correction.rules.mismatch)]
    thinned = correction.thin_name not in (None, "uniform")
    rejected = any(_rejects_rows(rule) for rule in correction.rules.reject)
    return thinned or rejected or correction.kernel.traits.groups is not None or not STEPWISE.issuperset(levels)


def looks_at_batch(correction: Correction) -> bool:
    """Whether a unit's weight depends on more of the optimiser batch than its own group."""
    selects = any(penalty.select is not None for penalty in correction.penalties)
    normalizes = any(rule.normalize for rule in correction.rules.mismatch)
    return selects or normalizes or (correction.kernel.prepares and correction.kernel.traits.groups is None)


def without_groups(correction: Correction) -> str | None:
    """The nearest preset for rows without groups, where the correction itself measures a row against the others."""
    return "reinforce" if correction.thin_name == "drop_negatives" else correction.kernel.without_groups


def advantage_needs_group(correction: Correction) -> bool:
    """Whether the group advantage that the correction wants is 0 for a row that is alone in its group."""
    settings = correction.advantage
    alone = settings.get("baseline", "mean") in ("none", "tracker", "given") and settings.get("scale") != "std"
    singleton = settings.get("singleton", "auto")
    kept = alone or singleton is None or (singleton == "auto" and settings.get("scale") == "whiten")
    return not kept and not settings.get("shift", 0.0)


def _rejects_rows(rule: Rule) -> bool:
    key, default = BY_ROW.get(rule.settings["name"], ("", "row"))
    return as_rule(rule.settings.get(key, default), key)["name"] not in STEPWISE
