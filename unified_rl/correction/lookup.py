"""From names and plain values to rules with their settings, with one clear error where they do not fit.

A rule is a function whose settings are its keyword-only parameters, or a class whose are its constructor's. It is found
by its name in a table, or by the dotted path of a package that the command line allows.
"""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

from unified_rl.errors import ConfigError
from unified_rl.instantiate import REQUIRED, Parameter, allowed, check_type, locate, nearest
from unified_rl.ranges import shown

Table = Mapping[str, Callable[..., Any]]


def check_keys(given: Iterable[str], known: Iterable[str], where: str) -> None:
    """Raises ConfigError for the first key of ``given`` that is not in ``known``."""
    known = list(known)
    for key in given:
        if key not in known:
            raise ConfigError(f"{where} has no field {key!r}; {nearest(key, known)}")


def settings_of(rule: Callable[..., Any]) -> dict[str, Parameter]:
    """A rule's settings by name: the types and defaults of its keyword-only parameters.

    Raises:
        ConfigError: an annotation that does not resolve at run time.
    """
    plain = rule.func if isinstance(rule, partial) else rule
    try:
        found = inspect.signature(rule).parameters.values()
        known = plain.__init__ if isinstance(plain, type) else plain  # type: ignore[misc]
        hints = typing.get_type_hints(known, include_extras=True)
    except NameError as error:
        raise ConfigError(f"the annotations of {_path(rule)} do not resolve at run time: {error}") from error
    except (TypeError, ValueError):  # written in C: nothing is known, and nothing can be set
        return {}
    return {p.name: Parameter(hints.get(p.name, Any), p.default) for p in found if p.kind is p.KEYWORD_ONLY}


def as_rule(node: str | Mapping[str, Any], where: str) -> dict[str, Any]:
    """A rule given as a bare name or as a mapping with ``name``, as a plain dict."""
    rule = {"name": node} if isinstance(node, str) else dict(node) if isinstance(node, Mapping) else {}
    if not isinstance(rule.get("name"), str):
        raise ConfigError(f"{where} needs a name, got {node!r}")
    return rule


def find(name: str, table: Table, where: str) -> Callable[..., Any]:
    """A rule by its name in a table, or by the dotted path of an allowed package.

    Args:
        name: of the rule.
        table: the known rules; what is found elsewhere must be such as these (a subclass of the class that they share,
            or a function of as many positional parameters).
        where: the full name of the setting that holds ``name``.

    Raises:
        ConfigError: unknown (names the nearest, or what it is called now), not allowed, or of another kind.
    """
    if name in table:
        return table[name]
    if "." not in name:
        now = [key for key, rule in table.items() if getattr(rule, "formerly", "") == name]
        raise ConfigError(f"{where} {shown(name)} is unknown; {nearest(now[0], now) if now else nearest(name, table)}")
    found = locate(name, allowed(), where, key="", rules=table)
    base = _shared_base(table)
    if base is not None and not (isinstance(found, type) and issubclass(found, base)):
        raise ConfigError(f"{where} {shown(name)} is no {base.__name__}; derive it from {_path(base)}")
    wanted, got = _arguments(table.values()), _positional(found)
    if base is None and wanted is not None and got is not None and len(got) != len(wanted):
        called = (
            f"called with {len(wanted)}: ({', '.join(wanted)}, *, settings)"
            if wanted
            else ("made from its settings alone: write a class with keyword-only settings")
        )
        raise ConfigError(f"{where} {shown(name)} takes {len(got)} positional arguments, and is {called}")
    return found


def bind(
    node: str | Mapping[str, Any], table: Table, where: str, extra: Iterable[str] | Mapping[str, Any] = ()
) -> tuple[partial[Any], dict[str, Any]]:
    """Looks a rule up and fixes its settings.

    Args:
        node: a name, or a mapping with ``name`` and settings.
        table: the known rules, see :func:`find`; settings are their keyword-only parameters.
        where: the full name of the setting, for example ``correction.kernel``.
        extra: further keys that the caller understands, perhaps with their types; they are returned, not bound.

    Returns:
        The rule with its settings bound, and the values of the ``extra`` keys that were given.

    Raises:
        ConfigError: an unknown rule, an unknown setting, one of the wrong type, or a missing required one.
    """
    rule = as_rule(node, where)
    name = rule.pop("name")
    function = find(name, table, where if isinstance(node, str) else f"{where}.name")
    known = settings_of(function)
    others = dict(extra) if isinstance(extra, Mapping) else dict.fromkeys(extra, Any)
    check_keys(rule, [*known, *others], f"{where} {name!r}")
    hints = {**others, **{key: parameter.hint for key, parameter in known.items()}}
    rule = {key: check_type(value, hints[key], f"{where}.{key}") for key, value in rule.items()}
    given = {key: rule.pop(key) for key in others if key in rule}
    check_order(function, rule, where)
    for key, parameter in known.items():
        if parameter.default is REQUIRED and key not in rule:
            raise ConfigError(f"{where} {name!r} needs {key}")
    return partial(function, **rule), given


def check_order(rule: Callable[..., Any], given: Mapping[str, Any], where: str) -> None:
    """Refuses bounds of which the lower one lies above the other; ``rule.ordered`` holds the names of such pairs.

    Raises:
        ConfigError: names both settings.
    """
    known = settings_of(rule)
    for low, high in getattr(rule, "ordered", ()):
        below, above = (given.get(key, known[key].default) for key in (low, high))
        if below > above:
            raise ConfigError(f"{where}.{low}={below} must not lie above {where}.{high}={above}")


def _path(rule: Callable[..., Any]) -> str:
    return f"{rule.__module__}.{getattr(rule, '__qualname__', rule)}"


def _shared_base(table: Table) -> type | None:
    """The closest class that all rules of a table derive from; None where they are functions, or there is but one."""
    rules = list(table.values())
    types = [rule for rule in rules if isinstance(rule, type)]
    if len(types) < len(rules) or len(types) < 2:
        return None
    shared = [c for c in types[0].__mro__ if all(issubclass(t, c) for t in types) and c is not object]
    return shared[0] if shared else None


def _arguments(rules: Iterable[Callable[..., Any]]) -> list[str] | None:
    """The names of the positional parameters that all rules have, or None where they differ in number."""
    found = [_positional(rule) for rule in rules]
    first = next(iter(found), None)
    return first if all(names is not None and len(names) == len(first or ()) for names in found) else None


def _positional(rule: Callable[..., Any]) -> list[str] | None:
    """The names of a rule's positional parameters; None where it takes any number, or nobody knows."""
    try:
        found = inspect.signature(rule).parameters.values()
    except (TypeError, ValueError):
        return None
    if any(p.kind is p.VAR_POSITIONAL for p in found):
        return None
    return [p.name for p in found if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
