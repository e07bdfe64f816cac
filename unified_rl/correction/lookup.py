"""From names and plain values to functions with their settings, with one clear error where they do not fit."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

from unified_rl.errors import ConfigError
from unified_rl.instantiate import nearest


def check_keys(given: Iterable[str], known: Iterable[str], where: str) -> None:
    """Raises ConfigError for the first key of ``given`` that is not in ``known``."""
    known = list(known)
    for key in given:
        if key not in known:
            raise ConfigError(f"{where} has no field {key!r}; {nearest(key, known)}")


def settings_of(function: Callable[..., Any]) -> list[str]:
    """The names of a rule's settings: its keyword-only parameters."""
    parameters = inspect.signature(function).parameters.values()
    return [p.name for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY]


def as_rule(node: str | Mapping[str, Any], where: str) -> dict[str, Any]:
    """A rule given as a bare name or as a mapping with ``name``, as a plain dict."""
    rule = {"name": node} if isinstance(node, str) else dict(node)
    if not isinstance(rule.get("name"), str):
        raise ConfigError(f"{where} needs a name, got {node!r}")
    return rule


def bind(
    node: str | Mapping[str, Any], table: Mapping[str, Callable[..., Any]], where: str, extra: Iterable[str] = ()
) -> tuple[Callable[..., Any], dict[str, Any]]:
    """Looks a rule up and fixes its settings.

    Args:
        node: a name, or a mapping with ``name`` and settings.
        table: the known rules; settings are their keyword-only parameters.
        where: what the error should call this place, for example ``kernel``.
        extra: further keys the caller understands; they are returned, not bound.

    Returns:
        The function with its settings bound, and the values of the ``extra`` keys that were given.

    Raises:
        ConfigError: an unknown rule, an unknown setting, or a missing required one.
    """
    rule = as_rule(node, where)
    name = rule.pop("name")
    if name not in table:
        raise ConfigError(f"unknown {where} {name!r}; {nearest(name, table)}")
    function, extra = table[name], list(extra)
    check_keys(rule, [*settings_of(function), *extra], f"{where} {name!r}")
    others = {key: rule.pop(key) for key in extra if key in rule}
    for parameter in inspect.signature(function).parameters.values():
        required = parameter.kind is parameter.KEYWORD_ONLY and parameter.default is parameter.empty
        if required and parameter.name not in rule:
            raise ConfigError(f"{where} {name!r} needs {parameter.name}")
    return partial(function, **rule), others
