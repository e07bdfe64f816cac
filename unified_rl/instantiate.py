"""From a node of a configuration to an object: what may be named, what its signature takes, and how it is built.

A default lives in a Python signature only, so a node is checked against the signature of its ``_target_``.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import inspect
import math
import sys
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from unified_rl.configurable import is_configurable, marked
from unified_rl.errors import ConfigError, UnifiedRLError
from unified_rl.peer_names import PEER_NAMES
from unified_rl.ranges import OutOfRangeError, bare, check_bounds, shown, words
from unified_rl.wrapping import Wrapping, wraps

PACKAGE = "unified_rl"
SCALARS = (bool, int, float, str)
PLAIN = (*SCALARS, list, tuple, dict, type(None))
REQUIRED = inspect.Parameter.empty


_ALLOWED: ContextVar[tuple[str, ...]] = ContextVar("allowed", default=())


@contextmanager
def allowing(allow: Sequence[str]) -> Iterator[None]:
    """Within it, rules may be named by dotted paths of these packages too.

    Composing and building enter it with what the command line allows; no configuration file can.
    """
    token = _ALLOWED.set(tuple(allow))
    try:
        yield
    finally:
        _ALLOWED.reset(token)


def allowed() -> tuple[str, ...]:
    """The prefixes of the innermost :func:`allowing`."""
    return _ALLOWED.get()


def is_ours(part: object) -> bool:
    """Whether the class of an object is one of this library's."""
    return type(part).__module__.startswith(f"{PACKAGE}.")


def nearest(name: object, known: Iterable[str], ranked: bool = False) -> str:
    """The end of an error message: the known name closest to ``name``, or all of them, with ``ranked`` by closeness."""
    names = sorted(known)
    close = difflib.get_close_matches(str(name), names, n=1, cutoff=0.5)
    if ranked:
        names.sort(key=lambda one: -difflib.SequenceMatcher(None, str(name), one).ratio())
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(names) or 'none'}"


def nearest_setting(name: str, known: Iterable[str]) -> str:
    """As :func:`nearest`, but a name of another library's is told what it is called here."""
    return f"here it is called {PEER_NAMES[name]}" if name in PEER_NAMES else nearest(name, known)


# ---------------------------------------------------------------------------------------------- signatures


@dataclasses.dataclass(frozen=True)
class Parameter:
    """One keyword of a target: its resolved annotation and its default (``REQUIRED``: none)."""

    hint: Any
    default: Any


def parameters(target: Callable[..., Any], allow: Sequence[str] = ()) -> tuple[dict[str, Parameter], bool]:
    """The keywords that ``target`` takes, and whether it takes any others too.

    ``**kwargs`` of a constructor are followed to the next constructor of an allowed package.

    Raises:
        ConfigError: an annotation cannot be resolved at run time.
    """
    if not isinstance(target, type):
        return _own_parameters(target, target)
    if target.__init__ is object.__init__:  # type: ignore[misc]
        plain = "__new__" not in {name for cls in target.__mro__[:-1] for name in vars(cls)}
        return ({}, False) if plain else _own_parameters(target, target)
    found: dict[str, Parameter] = {}
    is_open = False
    for cls in target.__mro__:
        if "__init__" in vars(cls) and (cls is not object) and (not found or _allowed(cls.__module__, allow)):
            own, is_open = _own_parameters(vars(cls)["__init__"], target)
            found = {**own, **found}
            if not is_open:
                break
    return found, is_open


def _own_parameters(function: Callable[..., Any], target: Callable[..., Any]) -> tuple[dict[str, Parameter], bool]:
    try:
        hints = typing.get_type_hints(function, include_extras=True)
    except NameError as error:
        raise ConfigError(f"the annotations of {_name(target)} do not resolve at run time: {error}") from error
    found = list(inspect.signature(function).parameters.values())
    if isinstance(target, type) and function is not target:
        found = found[1:]
    keyword = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    own = {p.name: Parameter(hints.get(p.name, Any), p.default) for p in found if p.kind in keyword}
    return own, any(p.kind is inspect.Parameter.VAR_KEYWORD for p in found)


def _name(target: Callable[..., Any]) -> str:
    return f"{target.__module__}.{getattr(target, '__qualname__', target)}"


def coerce(value: Any, hint: Any, path: str = "") -> Any:
    """``value`` as ``hint`` asks for it: integral floats become ints, ints floats, lists tuples.

    Raises:
        TypeError: the value does not fit.
        OutOfRangeError: it is of the type, and outside the range (:mod:`unified_rl.ranges`); starts with ``path``.
    """
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any or hint is object or isinstance(hint, typing.TypeVar):
        return value
    if origin is typing.Annotated:
        return _within(
            coerce(value, args[0], path) if args[0] is not float else _coerce_scalar(value, float), args[1:], path
        )
    if origin in (typing.Union, types.UnionType):
        return _coerce_union(value, args, path)
    if origin is typing.Literal:
        return _require(value, any(value == arg and type(value) is type(arg) for arg in args))
    if hint in (None, type(None)):
        return _require(value, value is None)
    if hint in SCALARS:
        return _within(_coerce_scalar(value, hint), (), path)
    if is_node(value):
        return value
    return _coerce_container(value, origin or hint, args, path)


def _within(value: Any, metadata: tuple[Any, ...], path: str) -> Any:
    try:
        check_bounds(value, metadata)
    except OutOfRangeError as error:
        raise OutOfRangeError(f"{path}={shown(value)} must {error}") from None
    return value


def _require(value: Any, fits: bool) -> Any:
    if not fits:
        raise TypeError
    return value


def _coerce_union(value: Any, arms: tuple[Any, ...], path: str) -> Any:
    outside = None
    for arm in sorted(arms, key=lambda arm: bare(arm) is not type(value)):
        try:
            return coerce(value, arm, path)
        except OutOfRangeError as error:
            outside = outside or error
        except TypeError:
            continue
    raise outside or TypeError


def _coerce_scalar(value: Any, hint: type) -> Any:
    if hint is int and isinstance(value, float) and math.isfinite(value) and value == int(value):
        return int(value)
    if hint is float and type(value) is int:
        return float(value) if abs(value) < sys.float_info.max else math.inf
    return _require(value, type(value) is hint)


def _coerce_container(value: Any, kind: Any, args: tuple[Any, ...], path: str) -> Any:
    if not isinstance(kind, type):
        return _require(value, False)
    if isinstance(value, kind) and not isinstance(value, PLAIN):  # an object, given from Python
        return value
    if isinstance(value, dict):
        _require(value, issubclass(dict, kind))
        return {k: coerce(v, args[1], f"{path}.{k}") for k, v in value.items()} if len(args) == 2 else value
    if isinstance(value, list | tuple) and kind is tuple and args and args[-1] is not ...:
        _require(value, len(value) == len(args))
        return tuple(coerce(item, arg, f"{path}[{i}]") for i, (item, arg) in enumerate(zip(value, args, strict=True)))
    _require(value, isinstance(value, list | tuple) and (issubclass(list, kind) or kind is tuple))
    items = [coerce(item, args[0], f"{path}[{at}]") for at, item in enumerate(value)] if args else list(value)
    return tuple(items) if kind is tuple else items


def is_node(value: Any) -> bool:
    """Whether a configuration value describes an object to build."""
    return isinstance(value, Mapping) and "_target_" in value


def check_value(value: Any, path: str, allow: Sequence[str]) -> Any:
    """Checks every node inside ``value``; returns it with types coerced.

    Raises:
        ConfigError: an unknown key, a wrong type, or a target that is not allowed; ``path`` tells where.
    """
    if is_node(value):
        return _check_node(value, path, allow)
    if isinstance(value, Mapping):
        return {key: check_value(item, f"{path}.{key}", allow) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(check_value(item, f"{path}[{i}]", allow) for i, item in enumerate(value))
    return value


def _check_node(node: Mapping[str, Any], path: str, allow: Sequence[str]) -> dict[str, Any]:
    target = locate(node["_target_"], allow, path)
    known, is_open = parameters(target, allow)
    if wraps(path, target):
        known = {**parameters(Wrapping)[0], **known}
    checked: dict[str, Any] = {}
    for key, value in node.items():
        if key == "_target_" or (is_open and key not in known and not key.startswith("_")):
            checked[key] = value
        elif key not in known:
            raise ConfigError(f"{path} ({_name(target)}) has no key {key!r}; {nearest_setting(key, known)}")
        elif value is None and known[key].default is None:  # written out; other people's annotations leave it out
            checked[key] = None
        else:
            checked[key] = check_type(value, known[key].hint, f"{path}.{key}")
    check_settings = getattr(target, "check_settings", None)
    if check_settings is not None:  # rules inside the settings, which the signature says nothing about
        with allowing(allow):
            check_settings({key: value for key, value in checked.items() if key != "_target_"})
    return {key: check_value(value, f"{path}.{key}", allow) for key, value in checked.items()}


def check_type(value: Any, hint: Any, path: str) -> Any:
    """``value`` coerced to ``hint``, or a ConfigError that names ``path`` and what may stand there."""
    try:
        return coerce(value, hint, path)
    except OutOfRangeError as error:
        raise ConfigError(str(error)) from error
    except TypeError as error:
        inside = _unfit(value, hint)
        if inside is not None:
            check_type(value[inside[0]], inside[1], f"{path}.{inside[0]}")
        plain = value is not None and not isinstance(value, str | list | dict)
        quote = f"; quote it: {path}=\"'{shown(value)}'\"" if hint is str and plain else ""
        raise ConfigError(f"{path} is {shown(value)}; it must be {words(hint)}{quote}") from error


def _unfit(value: Any, hint: Any) -> tuple[Any, Any] | None:
    """The first key of a mapping, which ``hint`` allows, whose value does not fit, and what it should be."""
    if not isinstance(value, dict) or is_node(value):
        return None
    for arm in typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,):
        kind, args = typing.get_origin(arm), typing.get_args(arm)
        if isinstance(kind, type) and issubclass(dict, kind) and len(args) == 2:
            for key, item in value.items():
                try:
                    coerce(item, args[1])
                except OutOfRangeError:
                    continue
                except TypeError:
                    return key, args[1]
    return None


def with_defaults(value: Any, allow: Sequence[str]) -> Any:
    """``value`` with the plain defaults of every target inside it written out."""
    if is_node(value):
        known, _ = parameters(locate(value["_target_"], allow), allow)
        defaults = {name: p.default for name, p in known.items() if is_plain(p.default)}
        value = {"_target_": value["_target_"], **defaults, **value}
    if isinstance(value, Mapping):
        return {key: with_defaults(item, allow) for key, item in value.items()}
    return [with_defaults(item, allow) for item in value] if isinstance(value, list | tuple) else value


def is_plain(value: Any) -> bool:
    """Whether YAML can hold a default."""
    if isinstance(value, Mapping):
        return all(isinstance(key, str) and is_plain(item) for key, item in value.items())
    if isinstance(value, list | tuple):
        return all(map(is_plain, value))
    return value is None or type(value) in SCALARS


def plain(value: Any) -> Any:
    """``value`` with tuples as lists, as YAML holds them."""
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list | tuple) else value


# ---------------------------------------------------------------------------------------------- building


def build(node: Any, /, *, allow: Sequence[str] = (), setting: str = "", **given: Any) -> Any:
    """Builds the object that a node describes; nodes inside it first.

    Args:
        node: a mapping with ``_target_`` and keyword arguments.
        allow: prefixes beside ``unified_rl`` that ``_target_`` may name.
        setting: the node's full name in the configuration; what a node inside it refuses is said under its own.
        given: arguments of the outermost target that the caller knows; they win over defaults in the node.

    Raises:
        ConfigError: not a node, a target that is not allowed, an unknown key, a wrong type, a missing argument, or a
            value in the node (other than the default) for an argument that the caller gives.
    """
    if not is_node(node):
        raise ConfigError(f"cannot build {node!r}: it has no _target_")
    known, _ = parameters(locate(node["_target_"], allow), allow)
    for key in sorted(given.keys() & node.keys() & known.keys()):
        if node[key] != plain(known[key].default) and node[key] is not given[key] and node[key] != given[key]:
            raise ConfigError(f"{node['_target_']} has {key}={node[key]!r}, but the run itself sets {key}; remove it")
    with allowing(allow):
        return _construct(_check_node(node, setting or "node", allow), allow, given, setting)


def _construct(node: Mapping[str, Any], allow: Sequence[str], given: Mapping[str, Any], where: str) -> Any:
    target = locate(node["_target_"], allow)
    arguments = {
        key: _construct_inner(value, allow, f"{where}.{key}".lstrip("."))
        for key, value in node.items()
        if key != "_target_" and key not in given
    }
    known, is_open = parameters(target, allow)
    if not _allowed(getattr(target, "__module__", None) or "", ()):
        own = inspect.signature(target).parameters  # what it hands on may go elsewhere: say no defaults of others
        arguments = {k: v for k, v in arguments.items() if k in own or k not in known or v != plain(known[k].default)}
    missing = [n for n, p in known.items() if p.default is REQUIRED and n not in arguments and n not in given]
    if missing:
        place = f"set {where}.{missing[0]}=..." if where else f"set GROUP.{missing[0]}=... for its group"
        raise ConfigError(f"{_name(target)} needs {', '.join(missing)}: {place}")
    unknown = [] if is_open else [name for name in given if name not in known]
    if unknown:
        raise ConfigError(f"{_name(target)} does not take {', '.join(unknown)}, which a run gives it; add a parameter")
    return target(**arguments, **given)


def _construct_inner(value: Any, allow: Sequence[str], where: str) -> Any:
    if is_node(value):
        try:
            return _construct(value, allow, {}, where)
        except UnifiedRLError as error:
            if where in str(error):
                raise
            raise type(error)(f"{where}: {error}") from error
    if isinstance(value, Mapping):
        return {key: _construct_inner(item, allow, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_construct_inner(item, allow, f"{where}.{at}") for at, item in enumerate(value))
    return value


def _allowed(module: str, allow: Sequence[str]) -> bool:
    prefixes = [prefix.rstrip(".") for prefix in (PACKAGE, *allow)]
    return any(module == prefix or module.startswith(f"{prefix}.") for prefix in prefixes)


def _offered(holder: Any, name: str, allow: Sequence[str]) -> list[str]:
    """The public classes and functions of a module or class that :func:`locate` would return."""
    own = vars(holder)
    public = [one for one in dir(holder) if not one.startswith("_")]
    found = []
    for one in public:
        value = own.get(one, _LAZY)  # a name that is imported when it is asked for is not asked for here
        module = getattr(value, "__module__", None)
        if value is _LAZY or (callable(value) and isinstance(module, str) and _allowed(module, allow)):
            found.append(one)
    return found


_LAZY = object()


def locate(
    path: str,
    allow: Sequence[str] = (),
    where: str = "",
    key: str = "_target_",
    rules: Mapping[str, Callable[..., Any]] | None = None,
) -> Callable[..., Any]:
    """Imports the class or function that a dotted path names.

    Of this package it must be marked as :func:`~unified_rl.configurable.configurable`. Elsewhere, both the path and the
    module that defines the object must lie within an allowed package, so that a path through an allowed module does not
    reach what that module imported. A class or function itself, which only Python code can put into a node, is returned
    as it is.

    Args:
        path: for example ``unified_rl.replay.Uniform``.
        allow: packages beside this one, as the command line names them.
        where: the node's full name, for errors.
        key: the setting in the node that holds the path, for errors.
        rules: a table of what may be named of this package instead of marked parts.

    Raises:
        ConfigError: not allowed, not found (names the nearest), or not a class or function.
    """
    at = ".".join(filter(None, (where, key)))
    parts = path.split(".") if isinstance(path, str) else []
    if callable(path):
        return path
    if len(parts) < 2 or any(not p.isidentifier() or p.startswith("_") for p in parts):
        raise ConfigError(f"{at} is {shown(path)}; it must be the dotted path of a public class or function")
    if not _allowed(path, allow):
        raise ConfigError(
            f"{at} {shown(path)} is outside the allowed packages; start with --allow {parts[0]} to build it"
        )
    holder, names = _import_longest(parts, at)
    for i, name in enumerate(names):
        if i and not isinstance(holder, type):
            raise ConfigError(f"{at} {path!r} reaches through {names[i - 1]!r}, which is not a class")
        if not hasattr(holder, name):
            known = _offered(holder, name, allow)
            raise ConfigError(f"{at} {path!r}: {holder.__name__} has no {name!r}; {nearest(name, known, ranked=True)}")
        holder = getattr(holder, name)
    module = getattr(holder, "__module__", None)
    if not callable(holder) or not isinstance(module, str) or not _allowed(module, allow):
        raise ConfigError(f"{at} {path!r} is not a class or function defined in an allowed package; see --allow")
    found: Callable[..., Any] = holder
    if rules is not None and _allowed(module, ()) and found not in rules.values():
        raise ConfigError(f"{at} {path!r} is none of what can stand there; {nearest(parts[-1], rules)}")
    if rules is None and _allowed(module, ()) and not is_configurable(found):
        raise ConfigError(f"{at} {path!r} is no part that a configuration may build{_nearest_part(parts[-1])}")
    return found


def _nearest_part(name: str) -> str:
    known = {part.__name__: _name(part) for part in marked()}
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"; did you mean {known[close[0]]!r}?" if close else ""


def _import_longest(parts: Sequence[str], at: str) -> tuple[Any, Sequence[str]]:
    for end in range(len(parts) - 1, 0, -1):
        name = ".".join(parts[:end])
        try:
            return importlib.import_module(name), parts[end:]
        except ModuleNotFoundError as error:
            if not error.name or not f"{name}.".startswith(f"{error.name}."):
                raise ConfigError(f"{at} {'.'.join(parts)!r} needs the package {error.name!r}; install it") from error
        except ImportError as error:
            raise ConfigError(f"{at} {'.'.join(parts)!r} cannot be imported: {error}") from error
    raise ConfigError(f"{at} {'.'.join(parts)!r}: there is no package {parts[0]!r} that Python can import")
