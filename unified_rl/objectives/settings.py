"""Settings that are one of a few words."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from unified_rl.errors import ConfigError
from unified_rl.instantiate import nearest


def one_of(value: Any, table: Iterable[str], where: str) -> str:
    """``value``, which must be one of the names.

    Raises:
        ConfigError: it is none; names the nearest.
    """
    names = list(table)
    if value not in names:
        raise ConfigError(f"{where} {value!r} is unknown; {nearest(value, names)}")
    chosen: str = value
    return chosen


def tried(function: Callable[..., Any], where: str, *inputs: Any) -> None:
    """Calls a function once, so that settings which it refuses are refused before the first step.

    Raises:
        ConfigError: of the function, under the setting's full name.
    """
    try:
        function(*inputs)
    except ConfigError as error:
        raise ConfigError(f"{where}.{error}") from error
