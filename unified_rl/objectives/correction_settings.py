"""What a correction's node holds for others, checked when a run is composed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from unified_rl.correction.lookup import check_keys
from unified_rl.instantiate import check_type
from unified_rl.interventions import wrapper_class
from unified_rl.objectives.rows import Rows
from unified_rl.ranges import Name, Share
from unified_rl.returns.record import setting_types

PROXIMAL: dict[str, Any] = {"provider": Literal["snapshot", "average", "interpolated", "versions"], "decay": Share}
"""Types of the settings of the proximal policy's provider."""

CREDIT: dict[str, Any] = {"name": Name, "whiten": bool}
"""Types of the settings of a wrapper that is a credit."""


def check_correction(node: Mapping[str, Any]) -> None:
    """Refuses what others read, ``wrapper``, ``advantage`` and ``proximal``, when a run is composed.

    Raises:
        ConfigError: an unknown setting or source of rows (names the nearest), or one of the wrong type.
    """
    wrapper = node.get("wrapper") or {}
    if wrapper_class(wrapper) is None:
        for key, value in wrapper.items():  # of a credit, which the agent acts on
            check_type(value, CREDIT.get(key, Any), f"correction.wrapper.{key}")
    advantage = node.get("advantage") or {}
    _check_types(advantage, {**setting_types(), "rows": Any}, "correction.advantage")
    Rows.of(advantage.get("rows"), "correction.advantage.rows")
    _check_types(node.get("proximal") or {}, PROXIMAL, "correction.proximal")


def _check_types(node: Mapping[str, Any], types: Mapping[str, Any], where: str) -> None:
    check_keys(node, types, where)
    for key, value in node.items():
        check_type(value, types[key], f"{where}.{key}")
