"""Settings that are one of a few words."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from unified_rl.errors import ConfigError
from unified_rl.instantiate import nearest
from unified_rl.ranges import shown


def one_of(value: Any, table: Iterable[str], where: str) -> str:
    """``value``, which must be one of the names.

    Raises:
        ConfigError: it is none; names the nearest.
    """
    names = list(table)
    if value not in names:
        raise ConfigError(f"{where} {shown(value)} is unknown; {nearest(value, names)}")
    chosen: str = value
    return chosen
