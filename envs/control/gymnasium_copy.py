"""One Gymnasium environment, whose code is somebody else's: found, made, and every answer of it checked."""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple, TypeAlias

import gymnasium
import numpy as np
from numpy.typing import NDArray

from unified_rl.errors import ConfigError, EnvError, NonFiniteError, UnifiedRLError
from unified_rl.instantiate import allowed, allowing, locate
from unified_rl.interop.words import OWN_NAMES, describe, one_line
from unified_rl.observations import NUMBERS, MisfitError, layout_of
from unified_rl.spaces import Space

Array: TypeAlias = NDArray[Any]
FOREIGN = ("GymV21Environment-v0", "GymV26Environment-v0")
"""Ids whose arguments name another module to import."""
NOTHING = object()
"""No answer yet."""


class Step(NamedTuple):
    """One step of one copy.

    Attributes:
        values: row of the observation ``[w]``, reward, terminated, truncated.
        told: numbers of its info, where the episode ended.
    """

    values: tuple[Array, float, bool, bool]
    told: dict[str, float]


class Recorder(gymnasium.Wrapper):  # type: ignore[type-arg]
    """Keeps what the environment itself answered, before wrappers stumble over it."""

    answer: Any = NOTHING

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        """As the environment."""
        self.answer = NOTHING
        self.answer = self.env.reset(seed=seed, options=options)
        return self.answer

    def step(self, action: Any) -> Any:
        """As the environment."""
        self.answer = NOTHING
        self.answer = self.env.step(action)
        return self.answer


class Copy:
    """One environment, stepped by itself.

    Args:
        id: what errors call it.
        lane: its number.
        env: the environment.

    Attributes:
        space: what it shows and takes.

    Raises:
        ConfigError: a space that has no rows, such as texts.
        EnvError: by :meth:`reset` and :meth:`step`, where the environment raises or returns what it cannot mean.
    """

    def __init__(self, id: str, lane: int, env: Any) -> None:
        self.id, self.lane, self.env = id, lane, env
        self.recorder = _insert_recorder(env)
        try:
            self.space = Space.from_gymnasium(env.observation_space, env.action_space)
        except (ConfigError, AttributeError) as error:
            raise ConfigError(f"{id} cannot be used: {error}") from error
        self.layout = layout_of(self.space.observation)

    @property
    def time_limit(self) -> int | None:
        """Steps of an episode at most, where the registration or a ``TimeLimit`` says so."""
        if self.env.spec is not None and self.env.spec.max_episode_steps:
            return int(self.env.spec.max_episode_steps)
        env = self.env
        while isinstance(env, gymnasium.Wrapper):
            if isinstance(env, gymnasium.wrappers.TimeLimit):
                return int(env._max_episode_steps)
            env = env.env
        return None

    @property
    def frames_per_second(self) -> float:
        """As the environment's metadata say; 30 where they say nothing."""
        return float(self.env.metadata.get("render_fps") or 30.0)

    def picture(self) -> NDArray[np.uint8]:
        """What it draws, ``[H, W, 3]``; it must be made with ``render_mode: rgb_array``.

        Raises:
            ConfigError: it was made to draw nothing.
        """
        if self.env.render_mode != "rgb_array":
            raise ConfigError(
                f"{self.id} was made without render_mode=rgb_array, so it draws nothing: add it to env.make_kwargs"
            )
        drawn: NDArray[np.uint8] = self.env.render()
        return drawn

    def reset(self, seed: int) -> Array:
        """Starts an episode; the row of its observation, ``[w]``."""
        where = "reset"
        try:
            answer = self.env.reset(seed=seed)
        except (Exception, SystemExit) as error:
            self._blame(where, error, self._check_reset)
        return self._check_reset(answer, where)

    def step(self, action: Any, number: int) -> Step:
        """Steps with an action of its space; ``number`` counts the episode's steps from 1."""
        where = f"step {number}"
        try:
            answer = self.env.step(action)
        except (Exception, SystemExit) as error:
            self._blame(where, error, self._check_step)
        values, info = self._check_step(answer, where)
        return Step(values, _told(info) if values[2] or values[3] else {})

    def replay(self, seed: int, actions: Any) -> Array:
        """Plays an episode again; the row of its last observation, ``[w]``."""
        row = self.reset(seed)
        for number, action in enumerate(actions, 1):
            row = self.step(action, number).values[0]
        return row

    def close(self) -> None:
        """Closes the environment."""
        self.env.close()

    def _blame(self, where: str, error: BaseException, check: Any) -> None:
        """Raises the reason of a failure: a wrong answer that a wrapper stumbled over, else what was raised."""
        if isinstance(error, UnifiedRLError):
            raise error
        if self.recorder is not None and self.recorder.answer is not NOTHING:
            space = self.recorder.env.observation_space
            check(self.recorder.answer, where, getattr(space, "shape", None) if _is_array(space) else None, True)
        raise EnvError(f"{self._name()} raised in {where}: {one_line(error)}") from error

    def _name(self) -> str:
        return f"{self.id} (simulation {self.lane})"

    def _wrong(self, what: str, value: Any, where: str, expected: str) -> EnvError:
        return EnvError(f"{self._name()} returned {what}{describe(value)} from {where}; {expected}")

    def _check_reset(self, answer: Any, where: str, shape: Any = None, inner: bool = False) -> Array:
        if not isinstance(answer, tuple | list) or len(answer) != 2:
            raise self._wrong("", answer, where, "a tuple of an observation and a dict of infos is expected")
        observation = self._inner(answer[0], where, shape) if inner else self._row(answer[0], where)
        if not isinstance(answer[1], dict):
            raise self._wrong("info=", answer[1], where, "a dict is expected")
        return observation

    def _check_step(
        self, answer: Any, where: str, shape: Any = None, inner: bool = False
    ) -> tuple[tuple[Array, float, bool, bool], dict[str, Any]]:
        if not isinstance(answer, tuple | list) or len(answer) != 5:
            count = f"{len(answer)} values, " if isinstance(answer, tuple | list) else ""
            raise self._wrong(
                count, answer, where, "five are expected: observation, reward, terminated, truncated, info"
            )
        observation = self._inner(answer[0], where, shape) if inner else self._row(answer[0], where)
        reward = self._number("reward", answer[1], where, "a number")
        flags = [self._flag(name, value, where) for name, value in zip(FLAGS, answer[2:4], strict=True)]
        if not isinstance(answer[4], dict):
            raise self._wrong("info=", answer[4], where, "a dict is expected")
        return (observation, reward, flags[0], flags[1]), answer[4]

    def _row(self, value: Any, where: str) -> Array:
        """An observation as a row."""
        if (
            type(value) is np.ndarray
            and value.dtype == np.float32
            and value.ndim == 1
            and value.shape == self.layout.plain
        ):
            return value
        try:
            row = self.layout.pack(value)
        except MisfitError as error:
            hint = " (the observation alone, without infos?)" if isinstance(value, tuple) and not error.where else ""
            what = f"observation[{error.where}]=" if error.where else "observation="
            raise self._wrong(what, error.value, where, f"{error.expected} is expected{hint}") from None
        if self.layout.images and not self.layout.finite(row):
            raise NonFiniteError(f"{self._name()} returned an observation with a NaN or infinity from {where}")
        return row

    def _inner(self, value: Any, where: str, shape: tuple[int, ...] | None) -> Array:
        """Refuses what the environment's own wrappers stumble over: no array of that shape, or nothing at all."""
        if shape is None:
            if value is None:
                raise self._wrong("observation=", value, where, "an observation of its space is expected")
            return np.empty(0, np.float32)
        try:
            found = np.asarray(value)
        except (ValueError, TypeError, RuntimeError):  # ragged, or an object that is no array
            found = np.asarray(None)
        if found.dtype.kind not in NUMBERS or found.shape != shape:
            size = "x".join(map(str, shape)) or "()"
            raise self._wrong("observation=", value, where, f"an array of shape {size} of real numbers is expected")
        return found

    def _number(self, what: str, value: Any, where: str, expected: str) -> float:
        if type(value) is float or type(value) is np.float64:
            return float(value)
        try:
            found = np.asarray(value)
        except (ValueError, TypeError, RuntimeError):
            found = np.asarray(None)
        if found.dtype.kind not in NUMBERS or found.size != 1:
            hint = ": does its step() end without a reward?" if value is None else ""
            raise self._wrong(f"{what}=", value, where, f"{expected} is expected{hint}")
        return float(found.reshape(()))

    def _flag(self, what: str, value: Any, where: str) -> bool:
        if value is True or value is False:
            return value
        expected = "True or False"
        number = self._number(what, value, where, expected)
        if number not in (0.0, 1.0):
            raise self._wrong(f"{what}=", value, where, f"{expected} is expected")
        return bool(number)


FLAGS = ("terminated", "truncated")


def _told(info: dict[Any, Any]) -> dict[str, float]:
    """The numbers of an info, ``is_success`` as ``success`` too."""
    numbers = {key: value for key, value in info.items() if isinstance(key, str) and _is_number(value)}
    told = {key: float(np.asarray(value).reshape(())) for key, value in numbers.items()}
    if "is_success" in told:
        told.setdefault("success", told["is_success"])
    return {key: value for key, value in told.items() if key not in OWN_NAMES}


def _is_number(value: Any) -> bool:
    if isinstance(value, bool | int | float | np.generic):
        return not isinstance(value, np.generic) or value.dtype.kind in NUMBERS
    shape, kind = getattr(value, "shape", None), getattr(getattr(value, "dtype", None), "kind", "none")
    return shape in ((), (1,)) and kind in NUMBERS


def _is_array(space: Any) -> bool:
    return isinstance(space, gymnasium.spaces.Box)


def _insert_recorder(env: Any) -> Recorder | None:
    """Puts a recorder around the innermost environment, where the wrapper over it is Gymnasium's own."""
    holder = None
    while isinstance(env, gymnasium.Wrapper):
        holder, env = env, env.env
    if holder is None or not type(holder).__module__.startswith("gymnasium."):
        return None
    holder.env = Recorder(env)
    return holder.env


@dataclass(frozen=True)
class Source:
    """Where copies of an environment come from.

    Attributes:
        id: a registered id, or ``package:Id-v0``; None with ``make``.
        make: a function or class that makes one, or its name, ``module:function``.
        flatten: wrap them so that they observe one vector.
        max_episode_steps: the time limit; the environment's own if None.
        make_kwargs: further arguments of ``gymnasium.make``, or of ``make``.
        allow: packages that may be imported.
    """

    id: str | None
    make: Any = None
    flatten: bool = False
    max_episode_steps: int | None = None
    make_kwargs: dict[str, Any] = field(default_factory=dict)
    allow: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """What errors call its copies."""
        if self.id is not None:
            return self.id
        return self.make if isinstance(self.make, str) else str(getattr(self.make, "__name__", self.make))

    def copy(self, lane: int) -> Copy:
        """Makes one.

        Raises:
            ConfigError: an unknown id, a package that is not allowed, or an environment that cannot be made.
        """
        opened = self._opener()
        try:
            env = self._wrapped(opened())
        except UnifiedRLError:
            raise
        except (Exception, SystemExit) as error:
            raise ConfigError(f"{self.name} could not be made: {one_line(error)}") from error
        return Copy(self.name, lane, env)

    def _opener(self) -> Callable[[], Any]:
        """Makes an environment without wrappers of ours."""
        kwargs, steps = self.make_kwargs, self.max_episode_steps
        if self.id is not None:
            with allowing(self.allow):
                name = _registered(self.id)
            return lambda: gymnasium.make(name, **kwargs | ({} if steps is None else {"max_episode_steps": steps}))
        found = factory(self.make, self.allow)
        return lambda: self._limited(found(**kwargs))

    def _limited(self, env: Any) -> Any:
        if not isinstance(env, gymnasium.Env):
            raise ConfigError(
                f"env.make={self.name} returned {describe(env)}; one gymnasium.Env is expected (what holds several, or "
                "is of TorchRL, goes by env._target_)"
            )
        steps = self.max_episode_steps
        return env if steps is None else gymnasium.wrappers.TimeLimit(env, steps)

    def _wrapped(self, env: Any) -> Any:
        return gymnasium.wrappers.FlattenObservation(env) if self.flatten else env

    def plain(self) -> dict[str, Any]:
        """For a process of its own, where names alone arrive."""
        return asdict(self)


def factory(make: Any, allow: tuple[str, ...]) -> Callable[..., Any]:
    """The function or class that ``env.make`` names.

    Raises:
        ConfigError: not allowed, or not found.
    """
    return locate(make.replace(":", "."), allow, "env", "make") if isinstance(make, str) else make  # type: ignore[no-any-return]


def _registered(id: str) -> str:
    """The id as the registry has it, after the import of its package where that is allowed.

    Raises:
        ConfigError: neither registered nor allowed to be imported.
    """
    package, _, name = id.rpartition(":")
    if package:
        _import_allowed(package, id)
    if name in FOREIGN:
        raise ConfigError(f"{name} imports whatever its arguments name; wrap the environment in an id of your own")
    if name in gymnasium.registry:
        return name
    near = difflib.get_close_matches(name, list(gymnasium.registry), 1, 0.3)
    hint = f", did you mean {near[0]!r}?" if near else ""
    if package:
        raise ConfigError(f"{package} registers no environment {name!r} with Gymnasium{hint}")
    raise ConfigError(
        f"Gymnasium has no environment {id!r}{hint} (one of your own is named with the package that registers it: "
        f"env.id=PACKAGE:{id} and --allow PACKAGE)"
    )


def _import_allowed(package: str, id: str) -> None:
    """Imports a package that the command line allows; one that a script has imported already needs no leave."""
    if package in sys.modules:
        return
    known = [prefix.rstrip(".") for prefix in allowed()]
    if not any(package == prefix or package.startswith(f"{prefix}.") for prefix in known):
        raise ConfigError(
            f"env.id={id} would import the package {package!r}, which runs its code; start with --allow "
            f"{package.split('.')[0]} to allow it (in a script: import it first)"
        )
    try:
        importlib.import_module(package)
    except Exception as error:
        raise ConfigError(f"env.id={id}: the package {package!r} cannot be imported: {one_line(error)}") from error
