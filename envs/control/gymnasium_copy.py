"""One Gymnasium environment, whose code is somebody else's: found, made, and every answer of it checked."""

from __future__ import annotations

import difflib
import importlib
import sys
from typing import Any, NamedTuple, TypeAlias

import gymnasium
import numpy as np
from numpy.typing import NDArray

from unified_rl.errors import ConfigError, EnvError, UnifiedRLError
from unified_rl.instantiate import allowed
from unified_rl.interop.guard import OWN_NAMES, describe, one_line

Array: TypeAlias = NDArray[Any]
NUMBERS = "biuf"
"""Kinds of NumPy dtypes that are real numbers."""
FOREIGN = ("GymV21Environment-v0", "GymV26Environment-v0")
"""Ids whose arguments name another module to import."""
NOTHING = object()
"""No answer yet."""


class Step(NamedTuple):
    """One step of one copy.

    Attributes:
        values: observation ``[d]``, reward, terminated, truncated.
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
    """One environment made by ``gymnasium.make``.

    Args:
        id: of the environment, for errors.
        lane: its number.
        env: the environment.

    Raises:
        EnvError: by :meth:`reset` and :meth:`step`, where the environment raises or returns what it cannot mean.
    """

    def __init__(self, id: str, lane: int, env: Any) -> None:
        self.id, self.lane, self.env = id, lane, env
        self.recorder = _insert_recorder(env)
        self.shape = tuple(getattr(env.observation_space, "shape", None) or ())

    @property
    def time_limit(self) -> int | None:
        """Steps of an episode at most, where the registration says so."""
        return self.env.spec.max_episode_steps if self.env.spec else None

    def reset(self, seed: int) -> Array:
        """Starts an episode; its observation ``[d]`` float32."""
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

    def close(self) -> None:
        """Closes the environment."""
        self.env.close()

    def _blame(self, where: str, error: BaseException, check: Any) -> None:
        """Raises the reason of a failure: a wrong answer that a wrapper stumbled over, else what was raised."""
        if isinstance(error, UnifiedRLError):
            raise error
        if self.recorder is not None and self.recorder.answer is not NOTHING:
            space = self.recorder.env.observation_space
            check(self.recorder.answer, where, getattr(space, "shape", None) if _is_array(space) else None, False)
        raise EnvError(f"{self._name()} raised in {where}: {one_line(error)}") from error

    def _name(self) -> str:
        return f"{self.id} (simulation {self.lane})"

    def _wrong(self, what: str, value: Any, where: str, expected: str) -> EnvError:
        return EnvError(f"{self._name()} returned {what}{describe(value)} from {where}; {expected}")

    def _check_reset(self, answer: Any, where: str, shape: Any = (), final: bool = True) -> Array:
        if not isinstance(answer, tuple | list) or len(answer) != 2:
            raise self._wrong("", answer, where, "a tuple of an observation and a dict of infos is expected")
        observation = self._array(answer[0], where, self.shape if final else shape)
        if not isinstance(answer[1], dict):
            raise self._wrong("info=", answer[1], where, "a dict is expected")
        return observation

    def _check_step(
        self, answer: Any, where: str, shape: Any = (), final: bool = True
    ) -> tuple[tuple[Array, float, bool, bool], dict[str, Any]]:
        if not isinstance(answer, tuple | list) or len(answer) != 5:
            count = f"{len(answer)} values, " if isinstance(answer, tuple | list) else ""
            raise self._wrong(
                count, answer, where, "five are expected: observation, reward, terminated, truncated, info"
            )
        observation = self._array(answer[0], where, self.shape if final else shape)
        reward = self._number("reward", answer[1], where, "a number")
        flags = [self._flag(name, value, where) for name, value in zip(FLAGS, answer[2:4], strict=True)]
        if not isinstance(answer[4], dict):
            raise self._wrong("info=", answer[4], where, "a dict is expected")
        return (observation, reward, flags[0], flags[1]), answer[4]

    def _array(self, value: Any, where: str, shape: tuple[int, ...] | None) -> Array:
        """An observation as float32; where ``shape`` is None, its own wrappers will make an array of it."""
        if type(value) is np.ndarray and value.dtype == np.float32 and value.shape == shape:
            return value
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
            hint = " (the observation alone, without infos?)" if isinstance(value, tuple) else ""
            raise self._wrong(
                "observation=", value, where, f"an array of shape {size} of real numbers is expected{hint}"
            )
        return found.astype(np.float32, copy=False)

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


def make_copies(id: str, num_envs: int, flatten: bool, make_kwargs: dict[str, Any]) -> list[Copy]:
    """Environments by their id.

    Args:
        id: registered, or ``package:Id-v0``.
        num_envs: how many.
        flatten: wrap them so that they observe one vector.
        make_kwargs: of ``gymnasium.make``.

    Raises:
        ConfigError: an unknown id, a package that is not allowed, or an environment that cannot be made.
    """
    name = _registered(id)
    copies = []
    for lane in range(num_envs):
        try:
            env = gymnasium.make(name, **make_kwargs)
            env = gymnasium.wrappers.FlattenObservation(env) if flatten else env
        except (Exception, SystemExit) as error:
            raise ConfigError(f"{id} could not be made: {one_line(error)}") from error
        copies.append(Copy(id, lane, env))
    return copies


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
