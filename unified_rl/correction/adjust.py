"""Corrections with one part changed, for what moves while a run goes on."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from unified_rl.correction.correction import Correction, Node
from unified_rl.correction.kernels.tables import KERNELS, PREPARES
from unified_rl.correction.levels import LEVELS
from unified_rl.correction.lookup import as_rule, bind


def with_kernel(correction: Correction, kernel: Node) -> Correction:
    """A copy with another kernel; everything else is shared.

    Raises:
        ConfigError: an unknown kernel or setting.
    """
    other = copy.copy(correction)
    other.kernel_name = as_rule(kernel, "kernel")["name"]
    other._kernel = bind(kernel, KERNELS, "kernel")[0]
    other._prepare = None if other.kernel_name not in PREPARES else bind(kernel, PREPARES, "kernel")[0]
    return other


def set_level(correction: Correction, **settings: Any) -> None:
    """Changes settings of the level in place.

    Raises:
        ConfigError: a setting that the level does not have.
    """
    kept = getattr(correction._level, "keywords", {})
    correction._level = bind({"name": correction.level_name, **kept, **settings}, LEVELS, "level")[0]


def penalty_coefficients(correction: Correction) -> list[float]:
    """The coefficients of the penalties, in their order."""
    return [penalty.coefficient for penalty in correction._penalties]


def set_penalty_coefficients(correction: Correction, values: Sequence[float]) -> None:
    """Changes them in place."""
    for penalty, value in zip(correction._penalties, values, strict=True):
        penalty.coefficient = value
