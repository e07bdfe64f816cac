"""What a correction needs to see together: single steps, whole rows, or groups of rows."""

from __future__ import annotations

from typing import Any

from unified_rl.correction.correction import Correction
from unified_rl.correction.kernels.tables import PREPARES
from unified_rl.correction.lookup import as_rule

STEPWISE = {"unit", "step", "step_sum"}
"""Levels that no other step of the row has a say in."""

GROUP_KERNELS = {"residual": "dro", "likelihood_pair": "topr"}
"""Kernels that compare the outcomes of a group's rows, and the nearest preset that does without."""

BY_ROW = {"band": ("level", "geometric"), "divergence": ("over", "sequence_mean")}
"""The setting of a rejection rule that says whether it looks at whole rows, and its default."""


def needs_whole_rows(correction: Correction) -> bool:
    """Whether cutting rows into steps would change what the correction computes."""
    rules = correction._rules
    levels = [correction.level_name, *(as_rule(others["level"], "level")["name"] for _, _, others in rules._mismatch)]
    thinned = correction._thin is not None and _name(correction._thin) != "uniform"
    rejected = any(_rejects_rows(rule) for rule, _, _ in rules._reject)
    return thinned or rejected or correction.kernel_name in GROUP_KERNELS or not STEPWISE.issuperset(levels)


def looks_at_batch(correction: Correction) -> bool:
    """Whether a unit's weight depends on more of the optimiser batch than its own group."""
    selects = any(penalty.select is not None for penalty in correction._penalties)
    normalizes = any(others["normalize"] for _, _, others in correction._rules._mismatch)
    return selects or normalizes or correction.kernel_name in PREPARES.keys() - GROUP_KERNELS.keys()


def without_groups(correction: Correction) -> str | None:
    """The nearest preset for rows without groups, where the correction itself measures a row against the others."""
    if correction._thin is not None and _name(correction._thin) == "drop_negatives":
        return "reinforce"
    centred = getattr(correction._kernel, "keywords", {}).get("centred", True)
    return GROUP_KERNELS.get(correction.kernel_name) if centred else None


def advantage_needs_group(correction: Correction) -> bool:
    """Whether the group advantage that the correction wants is 0 for a row that is alone in its group."""
    settings = correction.advantage
    alone = settings.get("baseline", "mean") in ("none", "tracker", "given") and settings.get("scale") != "std"
    kept = alone or settings.get("singleton", 0.0) is None
    return not kept and not settings.get("shift", 0.0)


def _rejects_rows(rule: dict[str, Any]) -> bool:
    key, default = BY_ROW.get(rule["name"], ("", "row"))
    return as_rule(rule.get(key, default), key)["name"] not in STEPWISE


def _name(function: Any) -> str:
    return getattr(function, "func", function).__name__
