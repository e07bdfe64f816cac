"""Named parts of a loss with their settings: checked by name and by type, under the setting's full name."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

from unified_rl.correction.lookup import as_rule, bind
from unified_rl.errors import ConfigError
from unified_rl.instantiate import check_type, nearest, parameters


def named(
    node: Any, table: Mapping[str, Callable[..., Any]], where: str, extra: Iterable[str] = ()
) -> tuple[partial[Any], dict[str, Any]]:
    """As :func:`~unified_rl.correction.lookup.bind`, with the types of the settings checked.

    Args:
        node: a name (or the dotted path of a callable of the user's own), or a mapping with ``name`` and settings.
        table: what is known by name.
        where: the full name of the setting, for example ``agent.objectives.distill.kind``.
        extra: further keys that the caller understands.

    Raises:
        ConfigError: names the setting, and the nearest name that is known.
    """
    if not isinstance(node, str | Mapping):
        raise ConfigError(f"{where} is {node!r}; it must be a name ({', '.join(table)}), or a mapping with one")
    name = as_rule(node, where)["name"]
    if name not in table and "." not in name:
        raise ConfigError(f"{where} {name!r} is unknown; {nearest(name, table)}")
    made, others = bind(node, table, where, extra)
    function, given = getattr(made, "func", made), getattr(made, "keywords", {})
    known, _ = parameters(function)
    checked = {key: check_type(value, known[key].hint, f"{where}.{key}") for key, value in given.items()}
    return partial(function, **checked), others


def one_of(value: Any, table: Iterable[str], where: str) -> str:
    """``value``, which must be one of the names.

    Raises:
        ConfigError: it is none; names the nearest.
    """
    names = list(table)
    if value not in names:
        raise ConfigError(f"{where} {value!r} is unknown; {nearest(value, names)}")
    return value
