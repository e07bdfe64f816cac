"""What a correction's node holds for others, checked when a run is composed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from unified_rl.correction.lookup import check_keys
from unified_rl.interventions import wrapper_class
from unified_rl.objectives.rows import Rows
from unified_rl.returns.record import NAMED, PLAIN


def check_correction(node: Mapping[str, Any]) -> None:
    """Refuses settings of a correction's ``wrapper`` and ``advantage``, which others read, when a run is composed.

    Raises:
        ConfigError: an unknown setting or source of rows (names the nearest), or one of the wrong type.
    """
    wrapper_class(node.get("wrapper") or {})
    advantage = node.get("advantage") or {}
    check_keys(advantage, (*PLAIN, *NAMED, "rows"), "correction.advantage")
    Rows.of(advantage.get("rows"), "correction.advantage.rows")
