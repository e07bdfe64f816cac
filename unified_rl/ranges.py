"""Ranges of settings: said once, with the type, where a setting is defined; read wherever a setting is checked.

An annotation such as ``lr: NonNegative`` is the whole declaration: :func:`unified_rl.instantiate.check_type` refuses
what lies outside when a run is composed, and :func:`ranged` when a class is called from Python. NaN is in no range,
infinity only where :data:`MayBeInfinite` stands, and whole numbers fit into 64 bits.
"""

from __future__ import annotations

import functools
import inspect
import math
import reprlib
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Annotated, Any, TypeVar

from annotated_types import Ge, GroupedMetadata, Gt, Interval, Le, Lt, MinLen, Predicate

from unified_rl.errors import ConfigError


def not_nan(value: float) -> bool:
    """Whether a number is one, perhaps an infinite one."""
    return not math.isnan(value)


MayBeInfinite = Predicate(not_nan)
"""Beside a float: infinity is a value that the setting understands."""

Count = Annotated[int, Ge(1)]
Whole = Annotated[int, Ge(0)]
Seed = Annotated[int, Ge(0)]
Positive = Annotated[float, Gt(0)]
NonNegative = Annotated[float, Ge(0)]
UnitInterval = Annotated[float, Interval(ge=0, le=1)]
Fraction = Annotated[float, Interval(gt=0, le=1)]
"""A part of a whole that is not nothing."""
Share = Annotated[float, Interval(ge=0, lt=1)]
"""A part that leaves something: the old value's in a moving average, held-out prompts."""
Extended = Annotated[float, MayBeInfinite]
"""Any number, infinite ones too: a bound that may be off."""
Bound = Annotated[float, Ge(0), MayBeInfinite]
"""Of a ratio, which is never negative; infinity is no bound."""
UpperBound = Annotated[float, Gt(0), MayBeInfinite]
"""As :data:`Bound`, where 0 would leave nothing."""
Radius = Annotated[float, Gt(0), MayBeInfinite]
"""Of a trust region around 1; infinity is none, 0 would let nothing move."""
Float32 = Annotated[float, Interval(ge=-3.4e38, le=3.4e38)]
"""A number of either sign that a tensor of rewards holds."""
OpenUnit = Annotated[float, Interval(gt=0, lt=1)]
AtLeastOne = Annotated[float, Ge(1)]
TwoOrMore = Annotated[int, Ge(2)]
LogScale = Annotated[float, Interval(ge=-20, le=20)]
"""The logarithm of a scale that float32 holds, with its square."""
Exponent = Annotated[float, Interval(ge=-80, le=80)]
"""Of e, whose power float32 holds."""
PositiveExponent = Annotated[float, Interval(gt=0, le=80)]
HeldOut = Annotated[float, Interval(ge=0, le=0.99)]
"""A share of prompts kept for evaluation: training ones are found by drawing, so some must be left."""
Seconds = Annotated[float, Interval(gt=0, le=86_400)]
"""That somebody waits."""
Devices = Annotated[float, Interval(ge=0, le=4096)]
"""Cores or GPUs that one process is given, a part of one or several whole ones."""
Name = Annotated[str, MinLen(1)]
Texts = Annotated[list[Name], MinLen(1)] | Name
"""One text or several."""
Some = Annotated[list[Any], MinLen(1)]
"""A list that holds something."""

LARGEST = 2**63
"""Whole numbers are below it and not below its negative: what a tensor's integer holds."""

C = TypeVar("C", bound=type)
F = TypeVar("F", bound=Callable[..., Any])
Hint = Any


class OutOfRangeError(TypeError):
    """A value of the right type outside its range; ``str`` of it says where it must lie."""


def shown(value: object) -> str:
    """A value in an error message: numbers as they are, long texts cut."""
    return repr(value) if isinstance(value, int | float) and abs(value) < 1e300 else _REPR.repr(value)


_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = 80
_REPR.maxlong = 40
_REPR.maxlist = _REPR.maxtuple = _REPR.maxdict = 8


# ---------------------------------------------------------------------------------------------- what a range says


def limits(metadata: Iterable[Any]) -> dict[str, Any]:
    """The bounds (``gt``, ``ge``, ``lt``, ``le``, ``min_length``) among the metadata of an annotation."""
    found: dict[str, Any] = {}
    for entry in metadata:
        if isinstance(entry, GroupedMetadata):
            found |= limits(entry)
        for kind, name in ((Gt, "gt"), (Ge, "ge"), (Lt, "lt"), (Le, "le"), (MinLen, "min_length")):
            if isinstance(entry, kind):
                found[name] = getattr(entry, name)
    return found


def inside(value: Any, bounds: Mapping[str, Any]) -> bool:
    """Whether a number or a sequence lies within :func:`limits`."""
    if "min_length" in bounds and len(value) < bounds["min_length"]:
        return False
    return not (
        ("gt" in bounds and not value > bounds["gt"])
        or ("ge" in bounds and not value >= bounds["ge"])
        or ("lt" in bounds and not value < bounds["lt"])
        or ("le" in bounds and not value <= bounds["le"])
    )


def interval(bounds: Mapping[str, Any]) -> str:
    """The bounds as words behind a noun, ``above 0`` or ``in [0, 1)``; empty where there are none."""
    low, high = bounds.get("ge", bounds.get("gt")), bounds.get("le", bounds.get("lt"))
    if low is not None and high is not None:
        return f"in {'[' if 'ge' in bounds else '('}{low:g}, {high:g}{']' if 'le' in bounds else ')'}"
    if low is not None:
        return f"of at least {low:g}" if "ge" in bounds else f"above {low:g}"
    if high is not None:
        return f"of at most {high:g}" if "le" in bounds else f"below {high:g}"
    return ""


def _must(bounds: Mapping[str, Any]) -> str:
    """What a value outside the bounds must do."""
    if "min_length" in bounds:
        return "not be empty"
    where = interval(bounds)
    return f"lie {where}" if where.startswith("in ") else f"be {where.removeprefix('of ')}"


def words(hint: Hint) -> str:
    """A type and its range as a user reads it: ``a number in [0, 1]``, ``one of 'a', 'b'``, ``a list of texts``."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return " ".join(filter(None, (words(args[0]), interval(limits(args[1:])))))
    if origin in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(words(arm) for arm in args))
    if origin is typing.Literal:
        return f"one of {', '.join(map(repr, args))}"
    if hint in _NOUNS:
        return _NOUNS[hint]
    kind = origin or hint
    if kind in (list, tuple, Sequence) and args and (kind is not tuple or args[-1] is ...):
        return f"a list, each item {words(args[0])}"
    if kind is tuple and args:
        return f"a list of {len(args)}: {', '.join(map(words, args))}"
    if kind in (list, tuple, Sequence):
        return "a list"
    if isinstance(kind, type) and issubclass(kind, Mapping):
        return "a mapping"
    return f"a {getattr(kind, '__name__', 'value')}"


_NOUNS: dict[Any, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a text",
    None: "null",
    type(None): "null",
    Any: "anything",
    object: "anything",
}


# ---------------------------------------------------------------------------------------------- checking


def check_bounds(value: Any, metadata: Iterable[Any]) -> None:
    """Raises OutOfRangeError where a value of the right type is not what its annotation's metadata say."""
    metadata = tuple(metadata)
    bounds = limits(metadata)
    if isinstance(value, float) and not math.isfinite(value) and (math.isnan(value) or MayBeInfinite not in metadata):
        nothing_else = not bounds or inside(value, bounds)
        raise OutOfRangeError("be finite" if nothing_else else _must(bounds))
    if type(value) is int and not -LARGEST <= value < LARGEST:
        raise OutOfRangeError(_must(bounds) + " and fit into 64 bits" if bounds else "fit into 64 bits")
    if bounds and isinstance(value, int | float | str | Sequence) and not inside(value, bounds):
        raise OutOfRangeError(_must(bounds))


def check_ranges(values: Mapping[str, Any], hints: Mapping[str, Hint], where: str = "") -> None:
    """Refuses arguments outside the ranges of their annotations, whatever their types.

    Raises:
        ConfigError: the first one, as ``where.name``.
    """
    for name, value in values.items():
        if name in hints:
            _walk(value, hints[name], ".".join(filter(None, (where, name))))


def _walk(value: Any, hint: Hint, path: str) -> None:
    """Numbers, and numbers in lists; objects, nodes and values of another type are for others to judge."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if origin in (typing.Union, types.UnionType):
        for arm in args:
            if isinstance(value, list | tuple) or (number and bare(arm) in (int, float)):
                _walk(value, arm, path)
    elif origin is Annotated and number:
        try:
            check_bounds(value, args[1:])
        except OutOfRangeError as error:
            raise ConfigError(f"{path}={shown(value)} must {error}") from error
    elif isinstance(value, list | tuple) and args and (origin is not tuple or args[-1] is ...):
        for at, item in enumerate(value):
            _walk(item, args[0], f"{path}[{at}]")


def bare(hint: Hint) -> Any:
    """A hint without its range."""
    return typing.get_args(hint)[0] if typing.get_origin(hint) is Annotated else hint


def ordered(low: str, high: str) -> Callable[[F], F]:
    """A decorator that says of which settings of a rule the first must not lie above the second."""

    def decorate(rule: F) -> F:
        rule.ordered = (*getattr(rule, "ordered", ()), (low, high))  # type: ignore[attr-defined]
        return rule

    return decorate


def ranged(where: str = "") -> Callable[[C], C]:
    """A class decorator: the constructor refuses arguments outside the ranges of their annotations.

    For classes that Python code makes without a configuration, so that a range holds there too and is said once. It
    costs some microseconds a construction, and nothing afterwards.

    Args:
        where: the group of the class, for the full names in errors.
    """

    def decorate(cls: C) -> C:
        enforce(cls, where)
        return cls

    return decorate


def enforce(cls: type, where: str = "") -> None:
    """What :func:`ranged` does, for a base class that does it to its subclasses (``__init_subclass__``)."""
    inner = vars(cls).get("__init__")
    if inner is None or hasattr(inner, "ranged"):
        return
    signature = inspect.signature(inner)

    @functools.cache
    def hints() -> dict[str, Hint]:
        found = typing.get_type_hints(inner, include_extras=True)
        return {name: hint for name, hint in found.items() if "typing.Annotated" in repr(hint)}

    @functools.wraps(inner)
    def checked(self: Any, *args: Any, **kwargs: Any) -> None:
        try:
            given = signature.bind_partial(self, *args, **kwargs).arguments
        except TypeError:
            given = {}  # the call below says what is wrong with it
        check_ranges(given, hints(), where)
        inner(self, *args, **kwargs)

    checked.ranged = True  # type: ignore[attr-defined]
    cls.__init__ = checked  # type: ignore[misc]
