"""What an environment shows and what it takes: one frozen description that policies, critics and rollouts share.

Parts follow Gymnasium's spaces (their names, dtypes, bounds and flat widths) and convert from and to them. Nothing here
depends on a policy: a part that no policy takes yet can still be described, and is refused by the policy, by name.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from unified_rl.errors import ConfigError

Array: TypeAlias = NDArray[Any]
Bound: TypeAlias = float | tuple[float, ...]
"""The same for every entry, or one number an entry in C order."""
GOAL_KEYS = frozenset({"observation", "achieved_goal", "desired_goal"})
"""Entries of a goal-conditioned observation, as in "Multi-Goal Reinforcement Learning" (arXiv:1802.09464)."""
SMALLEST_IMAGE = 8
"""Pixels of the shorter side, below which bytes in two dimensions are no image of one channel."""
MOST_CHOICES = 4096
"""An integer box with more values an entry is no list of choices."""


class Part:
    """One observation or action space.

    Attributes:
        shape: of one value; ``()`` where a value is a scalar or has parts of its own.
        dtype: NumPy name of its entries' type; ``object`` where it has parts of its own.
    """

    shape: tuple[int, ...]
    dtype: str

    @property
    def width(self) -> int:
        """Entries of the flat vector; a choice among n is one-hot, as in ``gymnasium.spaces.flatdim``."""
        raise NotImplementedError

    @property
    def choices(self) -> tuple[int, ...] | None:
        """How many choices each entry of a discrete value has; None where values are real or have parts."""
        return None

    def describe(self) -> str:
        """A phrase for error messages, for example ``a vector of 3 float32 in [-1, 1]``."""
        raise NotImplementedError

    def cast(self, values: Array) -> Array:
        """Values ``[K, *shape]`` of this space, in its dtype, from a policy's actions ``[K, a]``.

        Real actions are cast first and clipped to the bounds after it, so that a bound which the policy's float32
        rounds outward still lies inside. Choices, which policies number from 0, are shifted to where the space begins.

        Raises:
            ConfigError: values of this space cannot be made from flat actions.
        """
        raise ConfigError(f"an action cannot be {self.describe()}: flat vectors and choices can")

    def to_gymnasium(self) -> Any:
        """The ``gymnasium.spaces`` object."""
        raise NotImplementedError


@dataclass(frozen=True)
class Box(Part):
    """An array of numbers of any rank, float or integer, each within bounds of its own.

    Args:
        shape: of one value.
        dtype: NumPy name, for example ``float32``, ``float64``, ``int16``.
        low: lower bound, inclusive; ``-inf`` for none. One number, or one an entry.
        high: upper bound; ``inf`` for none.

    Raises:
        ConfigError: bounds of another length than the array has entries, or crossed ones.
    """

    shape: tuple[int, ...]
    dtype: str = "float32"
    low: Bound = -math.inf
    high: Bound = math.inf

    def __post_init__(self) -> None:
        for name in ("low", "high"):
            object.__setattr__(self, name, _collapse(getattr(self, name), self.width, name))
        if not bool((self.low_array <= self.high_array).all()):
            raise ConfigError(f"a box needs low <= high, got {self.low} and {self.high}")

    @property
    def width(self) -> int:
        """Number of entries."""
        return math.prod(self.shape)

    @cached_property
    def low_array(self) -> Array:
        """Lower bounds, ``[*shape]`` in the box's dtype."""
        return self._full(self.low)

    @cached_property
    def high_array(self) -> Array:
        """Upper bounds, ``[*shape]`` in the box's dtype."""
        return self._full(self.high)

    def _full(self, bound: Bound) -> Array:
        kind = np.dtype(self.dtype)
        if kind.kind in "iu" and not isinstance(bound, tuple) and math.isinf(bound):
            bound = int(np.iinfo(kind).max if bound > 0 else np.iinfo(kind).min)
        return np.broadcast_to(np.asarray(bound, dtype=kind).reshape(self.shape if _many(bound) else ()), self.shape)

    @property
    def integer(self) -> bool:
        """Whether entries are whole numbers."""
        return np.dtype(self.dtype).kind in "iub"

    @property
    def bounded(self) -> bool:
        """Whether every entry has two finite bounds."""
        return all(bool(np.isfinite(bound).all()) for bound in (self.low_array, self.high_array))

    @property
    def choices(self) -> tuple[int, ...] | None:
        """Of a small integer box: how many values each entry has."""
        if not self.integer:
            return None
        pairs = zip(self.low_array.ravel().tolist(), self.high_array.ravel().tolist(), strict=True)
        counts = tuple(int(high) - int(low) + 1 for low, high in pairs)
        return counts if max(counts, default=0) <= MOST_CHOICES else None

    def cast(self, values: Array) -> Array:
        """Real values in the box's dtype, inside its bounds; choices ``0 ...`` counted from the lower bound."""
        shaped = values.reshape(len(values), *self.shape)
        if self.choices is not None:
            chosen: Array = (shaped.astype(np.int64) + self.low_array).astype(self.dtype)
            return chosen
        inside: Array = np.clip(shaped.astype(self.dtype), self.low_array, self.high_array)
        return inside

    def describe(self) -> str:
        """Size, dtype and bounds."""
        size = f"a vector of {self.width}" if len(self.shape) == 1 else f"an array of {_times(self.shape)}"
        return f"{size} {self.dtype}{self._interval()}"

    def _interval(self) -> str:
        if _many(self.low) or _many(self.high):
            return " with bounds an entry"
        if self.low == -math.inf and self.high == math.inf:
            return ""
        left, right = "[("[self.low == -math.inf], "])"[self.high == math.inf]
        return f" in {left}{self.low:g}, {self.high:g}{right}"

    def to_gymnasium(self) -> Any:
        """``gymnasium.spaces.Box``."""
        from gymnasium import spaces

        return spaces.Box(self.low_array, self.high_array, self.shape, np.dtype(self.dtype).type)


@dataclass(frozen=True)
class Image(Part):
    """An image of unsigned bytes, 0 to 255, or the last few of them.

    Args:
        shape: ``(height, width, channels)``, channels first, or ``(height, width)`` of one channel; a history of n
            images has n in front.
        channels_first: whether channels come before height and width.
    """

    shape: tuple[int, ...]
    channels_first: bool = False
    dtype = "uint8"

    @property
    def width(self) -> int:
        """Number of entries."""
        return math.prod(self.shape)

    @property
    def planes(self) -> tuple[int, int, int]:
        """Channels (of all images of a history together), height and width."""
        if len(self.shape) == 2:
            return 1, self.shape[0], self.shape[1]
        *history, a, b, c = self.shape
        channels, height, width = (a, b, c) if self.channels_first else (c, a, b)
        return channels * math.prod(history), height, width

    def describe(self) -> str:
        """Size and layout."""
        if len(self.shape) == 2:
            return f"an image of {_times(self.shape)} uint8"
        return f"an image of {_times(self.shape)} uint8, channels {'first' if self.channels_first else 'last'}"

    def to_gymnasium(self) -> Any:
        """``gymnasium.spaces.Box`` of unsigned bytes."""
        from gymnasium import spaces

        return spaces.Box(0, 255, self.shape, np.uint8)


@dataclass(frozen=True)
class Discrete(Part):
    """One choice among ``n``, which the environment numbers from ``start`` and policies from 0.

    Raises:
        ConfigError: ``n`` below 1.
    """

    n: int
    start: int = 0
    shape = ()
    dtype = "int64"

    def __post_init__(self) -> None:
        if self.n < 1:
            raise ConfigError(f"a discrete space needs at least one choice, got n={self.n}")

    @property
    def width(self) -> int:
        """``n``."""
        return self.n

    @property
    def choices(self) -> tuple[int, ...]:
        """``(n,)``."""
        return (self.n,)

    def cast(self, values: Array) -> Array:
        """Choices ``[K]`` int64."""
        return values.reshape(len(values)).astype(np.int64) + self.start

    def describe(self) -> str:
        """Number of choices and how they are numbered."""
        return f"one of {self.n} choices ({self.start} to {self.start + self.n - 1})"

    def to_gymnasium(self) -> Any:
        """``gymnasium.spaces.Discrete``."""
        from gymnasium import spaces

        return spaces.Discrete(self.n, start=self.start)


@dataclass(frozen=True)
class MultiDiscrete(Part):
    """Several choices at once.

    Args:
        counts: how many there are for each entry, in C order.
        start: the environment's number of the first choice, of each entry; 0 by default.
        shape: of one value; a vector by default.
        dtype: NumPy name.

    Raises:
        ConfigError: no entries, an entry without choices, or lengths that differ.
    """

    counts: tuple[int, ...]
    start: tuple[int, ...] = ()
    shape: tuple[int, ...] = ()
    dtype: str = "int64"

    def __post_init__(self) -> None:
        object.__setattr__(self, "start", self.start or (0,) * len(self.counts))
        object.__setattr__(self, "shape", self.shape or (len(self.counts),))
        sizes = {len(self.counts), len(self.start), math.prod(self.shape)}
        if len(sizes) > 1 or min(self.counts, default=0) < 1:
            raise ConfigError(
                f"counts, start and shape of a multi-discrete space must have as many entries, with at least one "
                f"choice each, got {self.counts}, {self.start} and {self.shape}"
            )

    @property
    def width(self) -> int:
        """Choices of all entries together."""
        return sum(self.counts)

    @property
    def choices(self) -> tuple[int, ...]:
        """``counts``."""
        return self.counts

    def cast(self, values: Array) -> Array:
        """Choices ``[K, *shape]``."""
        moved: Array = values.reshape(len(values), -1).astype(np.int64) + np.asarray(self.start)
        return moved.reshape(len(values), *self.shape).astype(self.dtype)

    def describe(self) -> str:
        """The numbers of choices."""
        return f"{len(self.counts)} choices among {_listed(list(map(str, self.counts)))}"

    def to_gymnasium(self) -> Any:
        """``gymnasium.spaces.MultiDiscrete``."""
        from gymnasium import spaces

        counts, start = (np.asarray(x).reshape(self.shape) for x in (self.counts, self.start))
        return spaces.MultiDiscrete(counts, dtype=np.dtype(self.dtype).type, start=start)


@dataclass(frozen=True)
class MultiBinary(Part):
    """An array of zeros and ones."""

    shape: tuple[int, ...]
    dtype = "int8"

    @property
    def width(self) -> int:
        """Number of entries."""
        return math.prod(self.shape)

    @property
    def choices(self) -> tuple[int, ...]:
        """Two for every entry."""
        return (2,) * self.width

    def cast(self, values: Array) -> Array:
        """``[K, *shape]`` int8."""
        return values.reshape(len(values), *self.shape).astype(self.dtype)

    def describe(self) -> str:
        """Number of entries."""
        return f"{self.width} binary choices"

    def to_gymnasium(self) -> Any:
        """``gymnasium.spaces.MultiBinary``."""
        from gymnasium import spaces

        return spaces.MultiBinary(self.shape[0] if len(self.shape) == 1 else self.shape)


@dataclass(frozen=True)
class DictSpace(Part):
    """Named parts, in order. A goal dictionary is one whose keys are :data:`GOAL_KEYS`."""

    parts: tuple[tuple[str, Part], ...]
    shape = ()
    dtype = "object"

    @property
    def width(self) -> int:
        """Of all parts together."""
        return sum(part.width for _, part in self.parts)

    @property
    def is_goal(self) -> bool:
        """Whether it holds an observation, the goal that was reached and the goal that is wanted."""
        return {name for name, _ in self.parts} == GOAL_KEYS

    def describe(self) -> str:
        """Every part by name."""
        kind = "a goal dictionary" if self.is_goal else "a dictionary"
        return f"{kind} of {_listed([f'{name} ({part.describe()})' for name, part in self.parts])}"

    def to_gymnasium(self) -> Any:
        """``gymnasium.spaces.Dict`` in the same order."""
        from gymnasium import spaces

        return spaces.Dict(OrderedDict((name, part.to_gymnasium()) for name, part in self.parts))


@dataclass(frozen=True)
class TupleSpace(Part):
    """Parts without names."""

    parts: tuple[Part, ...]
    shape = ()
    dtype = "object"

    @property
    def width(self) -> int:
        """Of all parts together."""
        return sum(part.width for part in self.parts)

    def describe(self) -> str:
        """Every part."""
        return f"a tuple of {_listed([f'({part.describe()})' for part in self.parts])}"

    def to_gymnasium(self) -> Any:
        """``gymnasium.spaces.Tuple``."""
        from gymnasium import spaces

        return spaces.Tuple([part.to_gymnasium() for part in self.parts])


@dataclass(frozen=True)
class Space:
    """Observation and action of an environment, as it has them (not as a policy scales them).

    Args:
        observation: what the policy sees.
        action: what the environment takes.
    """

    observation: Part
    action: Part

    @classmethod
    def flat(
        cls,
        observation_dim: int,
        action_dim: int | None = None,
        action_low: Sequence[float] | None = None,
        action_high: Sequence[float] | None = None,
        num_actions: int | None = None,
    ) -> Space:
        """Float32 vectors without bounds as observations; a bounded float32 vector or one choice as actions.

        Args:
            observation_dim: width of the observation.
            action_dim: width of the action; not needed with ``num_actions``.
            action_low: one lower bound an entry of the action.
            action_high: one upper bound.
            num_actions: instead of the three: the number of choices.

        Raises:
            ConfigError: sizes that are missing or do not fit together.
        """
        observation = Box((observation_dim,))
        if num_actions is not None:
            return cls(observation, Discrete(num_actions))
        if action_dim is None or action_low is None or action_high is None:
            raise ConfigError("a space needs action_dim, action_low and action_high, or num_actions")
        low, high = tuple(map(float, action_low)), tuple(map(float, action_high))
        if len(low) != action_dim or len(high) != action_dim:
            raise ConfigError(f"action_low and action_high need {action_dim} entries, got {len(low)}, {len(high)}")
        return cls(observation, Box((action_dim,), low=low, high=high))

    @classmethod
    def of(cls, inputs: Mapping[str, Any]) -> Space:
        """The space in an environment's ``policy_inputs()``: its ``space``, or made from the arguments of :meth:`flat`.

        Raises:
            ConfigError: neither is there.
        """
        if isinstance(inputs.get("space"), Space):
            space: Space = inputs["space"]
            return space
        if "observation_dim" not in inputs:
            raise ConfigError(f"policy_inputs() holds {_listed(sorted(inputs))}, but no space and no observation_dim")
        return cls.flat(**inputs)

    @classmethod
    def from_gymnasium(cls, observation: Any, action: Any) -> Space:
        """Of a Gymnasium environment's ``observation_space`` and ``action_space``.

        Raises:
            ConfigError: a kind of space that has no description here (text, graphs, sequences); says which.
        """
        return cls(part_from_gymnasium(observation), part_from_gymnasium(action))

    def to_gymnasium(self) -> tuple[Any, Any]:
        """``observation_space`` and ``action_space``; :meth:`from_gymnasium` of them is equal to this one."""
        return self.observation.to_gymnasium(), self.action.to_gymnasium()

    def as_policies_see_it(self) -> Space:
        """The float32 vectors that an adapter shows, and the actions that it takes: choices counted from 0.

        Raises:
            ConfigError: observations with images, or actions that are neither a vector nor choices.
        """
        if has_images(self.observation):
            raise ConfigError(
                f"vectors alone can be seen here, and these are {self.observation.describe()}: set env.flatten=true, "
                "or use a policy of the library"
            )
        observation, choices = Box((self.observation_dim,)), self.action.choices
        if choices is None:
            return Space.flat(**self.sizes())
        return Space(observation, Discrete(choices[0]) if len(choices) == 1 else MultiDiscrete(choices))

    def plain(self) -> dict[str, Any]:
        """As lists, names and numbers that JSON holds; :meth:`from_plain` of it is equal to this one."""
        return {"observation": _plain(self.observation), "action": _plain(self.action)}

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> Space:
        """The inverse of :meth:`plain`.

        Raises:
            ConfigError: it describes no space.
        """
        try:
            found = cls(_part(plain["observation"]), _part(plain["action"]))
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise ConfigError(f"this describes no space: {str(plain)[:80]} ({error!r})") from error
        return found

    @property
    def observation_dim(self) -> int:
        """Width ``d`` of the flat observation."""
        return self.observation.width

    @property
    def action_dim(self) -> int:
        """Entries ``a`` of an action as policies write it: numbers, or one choice each."""
        choices = self.action.choices
        return self.action.width if choices is None else len(choices)

    @property
    def num_actions(self) -> int | None:
        """Choices of a single discrete action, else None."""
        return self.action.n if isinstance(self.action, Discrete) else None

    def sizes(self) -> dict[str, Any]:
        """The arguments of :meth:`flat`, for policies of older code; bounds of choices are the first and the last.

        Raises:
            ConfigError: actions that are neither a vector nor choices.
        """
        action, choices = self.action, self.action.choices
        if choices is not None:
            low, high = [0.0] * len(choices), [count - 1.0 for count in choices]
        elif isinstance(action, Box):
            low, high = (bound.ravel().astype(float).tolist() for bound in (action.low_array, action.high_array))
        else:
            raise ConfigError(f"actions that are {action.describe()} have no bounds")
        sizes: dict[str, Any] = {"observation_dim": self.observation_dim, "action_dim": self.action_dim}
        sizes |= {"action_low": low, "action_high": high}
        return sizes if self.num_actions is None else {**sizes, "num_actions": self.num_actions}

    def describe(self) -> str:
        """Both parts, for error messages."""
        return f"observation {self.observation.describe()}, action {self.action.describe()}"


class PolicyInputs(dict[str, Any]):
    """What an environment gives to a policy's constructor: ``space``.

    The entries of :meth:`Space.sizes` can be read from it as well, as they were before there was a space.
    """

    def __init__(self, space: Space) -> None:
        super().__init__(space=space)

    def __missing__(self, key: str) -> Any:
        return self["space"].sizes()[key]

    def get(self, key: str, default: Any = None) -> Any:
        """As ``self[key]``, or ``default``."""
        return self[key] if key in self or key in self["space"].sizes() else default


def has_images(part: Part) -> bool:
    """Whether an observation is an image, or holds one."""
    if isinstance(part, DictSpace):
        return any(has_images(one) for _, one in part.parts)
    return any(map(has_images, part.parts)) if isinstance(part, TupleSpace) else isinstance(part, Image)


def as_space(owner: str, space: Space | int | None, **flat: Any) -> Space:
    """The space that a constructor was given, as a :class:`Space` or as the arguments of :meth:`Space.flat`.

    Args:
        owner: the constructor's name, for error messages.
        space: a space, or the width of the observation.
        flat: arguments of :meth:`Space.flat`; None where not given.

    Raises:
        ConfigError: both forms, neither, or an incomplete one.
    """
    given = {name: value for name, value in flat.items() if value is not None}
    if isinstance(space, Space):
        if given:
            raise ConfigError(f"{owner} was given a space, and {_listed(sorted(given))} as well; leave those out")
        return space
    if space is not None:
        if isinstance(space, bool) or not isinstance(space, int) or "observation_dim" in given:
            raise ConfigError(f"{owner} takes a Space or observation_dim first, once; got {space!r} and {given}")
        given["observation_dim"] = space
    if "observation_dim" not in given:
        raise ConfigError(f"{owner} needs a space: env.space, or observation_dim, action_dim, action_low, action_high")
    return Space.flat(**given)


def part_from_gymnasium(space: Any) -> Part:
    """The description of one Gymnasium space, nested ones included.

    Raises:
        ConfigError: text, graphs, sequences and other kinds without a fixed width.
    """
    from gymnasium import spaces

    makers: tuple[tuple[type[Any], Callable[[Any], Part]], ...] = (
        (spaces.Box, _box),
        (spaces.Discrete, lambda x: Discrete(int(x.n), int(x.start))),
        (spaces.MultiDiscrete, _multi_discrete),
        (spaces.MultiBinary, lambda x: MultiBinary(tuple(x.shape))),
        (spaces.Dict, lambda x: DictSpace(tuple((str(k), part_from_gymnasium(v)) for k, v in x.spaces.items()))),
        (spaces.Tuple, lambda x: TupleSpace(tuple(map(part_from_gymnasium, x.spaces)))),
    )
    for kind, make in makers:
        if isinstance(space, kind):
            return make(space)
    raise ConfigError(
        f"a {type(space).__name__} space has no fixed width; Box, Discrete, MultiDiscrete, MultiBinary, Dict and Tuple "
        "are known: encode it in the environment"
    )


def _box(space: Any) -> Part:
    shape, low, high = tuple(map(int, space.shape)), space.low, space.high
    if space.dtype == np.uint8 and _is_picture(shape) and bool((low == 0).all() and (high == 255).all()):
        last = shape[-3:]
        return Image(shape, channels_first=len(last) == 3 and last[0] == min(last) and last[0] < last[2])
    return Box(shape, str(space.dtype), tuple(low.ravel().tolist()), tuple(high.ravel().tolist()))


def _is_picture(shape: tuple[int, ...]) -> bool:
    """Height and width, with channels and a history in front or without; a few bytes in two dimensions are numbers."""
    return len(shape) in (3, 4) or (len(shape) == 2 and min(shape) >= SMALLEST_IMAGE)


def _multi_discrete(space: Any) -> Part:
    counts, start = (tuple(map(int, x.ravel())) for x in (space.nvec, space.start))
    return MultiDiscrete(counts, start, tuple(map(int, space.shape)), str(space.dtype))


KINDS: dict[str, Callable[..., Part]] = {
    kind.__name__: kind for kind in (Box, Image, Discrete, MultiDiscrete, MultiBinary, DictSpace, TupleSpace)
}
"""Every part by its name in plain data."""


def _plain(value: Any) -> Any:
    if isinstance(value, Part) and is_dataclass(value):
        own = {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
        return {"kind": type(value).__name__, **own}
    if isinstance(value, tuple):
        return [_plain(entry) for entry in value]
    return str(value) if isinstance(value, float) and math.isinf(value) else value  # JSON has no infinity


def _part(plain: Mapping[str, Any]) -> Part:
    own = {key: _value(key, value) for key, value in plain.items() if key != "kind"}
    return KINDS[plain["kind"]](**own)


def _value(key: str, value: Any) -> Any:
    if isinstance(value, Mapping):
        return _part(value)
    if isinstance(value, list):
        return tuple(_value(key, entry) for entry in value)
    return float(value) if key in ("low", "high") and isinstance(value, str) else value


def _many(bound: Bound) -> bool:
    return isinstance(bound, tuple)


def _collapse(bound: Bound, width: int, name: str) -> Bound:
    """One number where all are the same, so that equal boxes are equal."""
    if not isinstance(bound, tuple):
        return bound
    if len(bound) != width:
        raise ConfigError(f"{name} of a box needs {width} entries, got {len(bound)}")
    if not bound:
        return -math.inf if name == "low" else math.inf
    return bound[0] if len(set(bound)) == 1 else bound


def _times(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) or "one"


def _listed(words: list[str]) -> str:
    return ", ".join(words[:-1]) + (" and " if len(words) > 1 else "") + "".join(words[-1:])
