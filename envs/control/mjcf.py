"""A robot of one's own: an MJCF file, and functions on batches that say what is seen, what is paid and what ends."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import mujoco
import numpy as np
from numpy.typing import NDArray

from unified_rl.configurable import configurable
from unified_rl.envs.control.base import ControlEnvBase
from unified_rl.envs.control.mujoco_env import BatchedMujocoEnv
from unified_rl.envs.control.simulation import Array, Frame
from unified_rl.envs.control.tasks import Outcome, Scene, Task, never, quiet_deprecations
from unified_rl.errors import ConfigError, EnvError, UnifiedRLError
from unified_rl.instantiate import allowed, locate, nearest
from unified_rl.interop.words import OWN_NAMES, describe, one_line
from unified_rl.observations import NUMBERS
from unified_rl.ranges import Count, Name, NonNegative, Seed

READ = ("qpos", "qvel", "act", "xpos", "xquat", "site_xpos", "sensordata", "actuator_force")
"""Arrays of ``MjData`` that functions see; whatever else a task needs, a sensor of the model measures."""
SHAPES: dict[str, tuple[int, ...]] = {"xpos": (-1, 3), "xquat": (-1, 4), "site_xpos": (-1, 3)}
"""Of those with more than one dimension a simulation."""


class State:
    """K simulations at the end of a control step: arrays float64, read only, valid until the next step.

    Positions, velocities and everything derived from them are of the same moment (in Gymnasium's MuJoCo tasks what is
    derived is one physics step older); forces and accelerations are of the last physics step.

    Attributes:
        qpos, qvel, act, sensordata, actuator_force: ``[K, n]``, as in ``MjData``.
        xpos, xquat: of bodies, ``[K, bodies, 3]`` and ``[K, bodies, 4]``.
        site_xpos: ``[K, sites, 3]``.
        dt: seconds of a control step.
        model: the compiled ``MjModel``.
    """

    qpos: Array
    qvel: Array
    act: Array
    sensordata: Array
    actuator_force: Array
    xpos: Array
    xquat: Array
    site_xpos: Array

    def __init__(self, frame: Mapping[str, Array], model: mujoco.MjModel, dt: float) -> None:
        self.model, self.dt = model, dt
        for name, value in frame.items():
            shown = value.reshape(len(value), *SHAPES.get(name, (-1,))) if value.size else value
            shown = shown.view()
            shown.flags.writeable = False
            setattr(self, name, shown)

    def __len__(self) -> int:
        """K."""
        return len(self.qpos)

    def body(self, name: str) -> Array:
        """Where a body is, ``[K, 3]`` metres in the world.

        Raises:
            ConfigError: the model has no such body.
        """
        return self.xpos[:, self._id("body", name)]

    def site(self, name: str) -> Array:
        """Where a site is, ``[K, 3]`` metres in the world.

        Raises:
            ConfigError: the model has no such site.
        """
        return self.site_xpos[:, self._id("site", name)]

    def sensor(self, name: str) -> Array:
        """What a sensor measures, ``[K, n]``.

        Raises:
            ConfigError: the model has no such sensor.
        """
        number = self._id("sensor", name)
        start = int(self.model.sensor_adr[number])
        return self.sensordata[:, start : start + int(self.model.sensor_dim[number])]

    def joint(self, name: str) -> Array:
        """Position of a joint, ``[K, n]``: radians or metres; 7 numbers of a free joint.

        Raises:
            ConfigError: the model has no such joint.
        """
        return self.qpos[:, self._of_joint(name, self.model.jnt_qposadr, self.model.nq)]

    def joint_velocity(self, name: str) -> Array:
        """Velocity of a joint, ``[K, n]``; 6 numbers of a free joint.

        Raises:
            ConfigError: the model has no such joint.
        """
        return self.qvel[:, self._of_joint(name, self.model.jnt_dofadr, self.model.nv)]

    def _of_joint(self, name: str, starts: NDArray[np.int32], end: int) -> slice:
        number = self._id("joint", name)
        after = starts[number + 1] if number + 1 < len(starts) else end
        return slice(int(starts[number]), int(after))

    def _id(self, kind: str, name: str) -> int:
        number = mujoco.mj_name2id(self.model, getattr(mujoco.mjtObj, f"mjOBJ_{kind.upper()}"), name)
        if number < 0:
            count = getattr(self.model, {"body": "nbody", "site": "nsite", "sensor": "nsensor", "joint": "njnt"}[kind])
            known = [getattr(self.model, kind)(at).name for at in range(count)]
            raise ConfigError(f"the model has no {kind} {name!r}; {nearest(name, filter(None, known))}")
        return int(number)


class Function(NamedTuple):
    """A function of the user's, and which arguments it takes.

    Attributes:
        setting: for example ``env.reward``.
        path: its dotted path.
        call: the function.
        takes: names of its arguments.
    """

    setting: str
    path: str
    call: Callable[..., Any]
    takes: tuple[str, ...]

    @property
    def label(self) -> str:
        """What errors call it."""
        return f"{self.setting} ({self.path})"

    def __call__(self, offered: Mapping[str, Any]) -> Any:
        """Its answer.

        Raises:
            EnvError: it raised.
        """
        try:
            return self.call(**{name: offered[name] for name in self.takes})
        except UnifiedRLError:
            raise
        except Exception as error:
            raise EnvError(f"{self.label} raised {one_line(error)}") from error

    def numbers(self, offered: Mapping[str, Any], shape: tuple[int, ...]) -> Array:
        """Its answer as float64 of a shape, in which -1 is any number.

        Raises:
            EnvError: it raised, or returned something else.
        """
        return self.checked(self(offered), shape)

    def checked(self, value: Any, shape: tuple[int, ...], of: str = "") -> Array:
        """A value as float64 of a shape.

        Raises:
            EnvError: it is none.
        """
        try:
            found = np.asarray(value)
        except (ValueError, TypeError, RuntimeError):
            found = np.asarray(None)
        fits = len(found.shape) == len(shape) and all(a in (-1, b) for a, b in zip(shape, found.shape, strict=True))
        if found.dtype.kind not in NUMBERS or not fits:
            size = ", ".join("d" if one == -1 else str(one) for one in shape)
            raise EnvError(
                f"{self.label} returned {of}{describe(value)}; numbers of shape [{size}] are expected, one row a "
                "simulation"
            )
        return found.astype(np.float64)


ARGUMENTS: dict[str, tuple[str, ...]] = {
    "observation": ("state",),
    "reward": ("state", "action", "before"),
    "termination": ("state", "action", "before"),
    "metrics": ("state", "action", "before"),
    "initial": ("model", "rng", "count"),
}
"""What each function may take, by name."""


def function_named(setting: str, path: str | Callable[..., Any], allow: Sequence[str] = ()) -> Function:
    """The function that a setting of ``env`` names, ``module:function`` or dotted.

    Raises:
        ConfigError: not allowed, not found, or with arguments that nobody gives it.
    """
    dotted = path.replace(":", ".") if isinstance(path, str) else path
    found = locate(dotted, allow, "env", setting)  # type: ignore[arg-type]
    offered, name = ARGUMENTS[setting], path if isinstance(path, str) else getattr(path, "__name__", repr(path))
    taken = inspect.signature(found).parameters.values()
    open_ended = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    needed = [one.name for one in taken if one.default is one.empty and one.kind not in open_ended]
    unknown = [one for one in needed if one not in offered]
    if unknown:
        raise ConfigError(
            f"env.{setting}={name} takes {', '.join(unknown)}, which nobody gives it; it may take {', '.join(offered)}"
        )
    return Function(f"env.{setting}", name, found, tuple(one.name for one in taken if one.name in offered))


@dataclass(frozen=True)
class MjcfTask(Task):
    """A task whose model is a file and whose rules are functions.

    Attributes:
        path: of the MJCF file.
        functions: by the name of their setting, see :data:`ARGUMENTS`.
    """

    synchronous: ClassVar[bool] = True

    path: str = ""
    functions: Mapping[str, Function] = field(default_factory=dict)

    @cached_property
    def model(self) -> mujoco.MjModel:
        """The compiled model."""
        if not Path(self.path).is_file():
            raise ConfigError(f"env.path={self.path}: there is no such file")
        try:
            with quiet_deprecations():
                return mujoco.MjModel.from_xml_path(str(self.path))
        except (ValueError, mujoco.FatalError) as error:
            raise ConfigError(f"env.path={self.path} is no model that MuJoCo reads: {one_line(error)}") from error

    def load_model(self) -> mujoco.MjModel:
        """The compiled model."""
        return self.model

    def views(self, data: mujoco.MjData) -> Frame:
        """Everything that functions see."""
        return {name: getattr(data, name).reshape(-1) for name in READ}

    def initial(self, model: mujoco.MjModel, rng: np.random.Generator, count: int) -> tuple[Array, Array]:
        """As ``initial`` says, else the model's own start with uniform noise on positions and velocities."""
        function = self.functions.get("initial")
        if function is None:
            return super().initial(model, rng, count)
        answer = function({"model": model, "rng": rng, "count": count})
        if not isinstance(answer, tuple | list) or len(answer) != 2:
            raise EnvError(f"{function.label} returned {describe(answer)}; positions and velocities are expected")
        parts = zip(answer, ("positions ", "velocities "), (model.nq, model.nv), strict=True)
        qpos, qvel = (function.checked(value, (count, size), of) for value, of, size in parts)
        return qpos, qvel

    def memory(self, scene: Scene, frame: Frame) -> Array:
        """The whole frame, where a function compares with what was before; else nothing."""
        if not any("before" in function.takes for function in self.functions.values()):
            return super().memory(scene, frame)
        return np.concatenate(list(frame.values()), axis=1)

    def observe(self, frame: Frame) -> Array:
        """What ``observation`` makes of the state; else positions, velocities and sensors."""
        function = self.functions.get("observation")
        if function is None:
            return np.concatenate([frame[name] for name in ("qpos", "qvel", "sensordata")], axis=1)
        return function.numbers({"state": self.state(frame)}, (len(frame["qpos"]), -1))

    def outcome(self, scene: Scene, frame: Frame, memory: Array, action: Array) -> Outcome:
        """Reward, end and metrics, as the functions say."""
        offered: dict[str, Any] = {"state": self.state(frame), "action": action}
        if memory.size:
            offered["before"] = self.state(self._remembered(frame, memory))
        count, functions = len(memory), self.functions
        reward = functions["reward"].numbers(offered, (count,))
        ends, told = functions.get("termination"), functions.get("metrics")
        terminated = never(count) if ends is None else self._flags(ends, offered, count)
        infos = {} if told is None else self._metrics(told, offered, count)
        return Outcome(reward, terminated, self.memory(scene, frame), infos)

    def state(self, frame: Mapping[str, Array]) -> State:
        """A frame as functions see it."""
        return State(frame, self.model, float(self.model.opt.timestep) * self.frame_skip)

    @staticmethod
    def _remembered(frame: Frame, memory: Array) -> Frame:
        ends = np.cumsum([part.shape[1] for part in frame.values()])[:-1]
        return dict(zip(frame, np.split(memory, ends, axis=1), strict=True))

    @staticmethod
    def _flags(function: Function, offered: Mapping[str, Any], count: int) -> NDArray[np.bool_]:
        found = function.numbers(offered, (count,))
        if not np.isin(found, (0.0, 1.0)).all():
            raise EnvError(f"{function.label} returned {describe(found)}; True or False a simulation is expected")
        return found.astype(np.bool_)

    @staticmethod
    def _metrics(function: Function, offered: Mapping[str, Any], count: int) -> dict[str, Any]:
        found = function(offered)
        if not isinstance(found, Mapping) or not all(isinstance(name, str) for name in found):
            raise EnvError(f"{function.label} returned {describe(found)}; a dictionary of numbers by name is expected")
        taken = sorted(OWN_NAMES & found.keys())
        if taken:
            raise EnvError(f"{function.label} tells {', '.join(taken)}, which a run measures; choose other names")
        return {name: function.checked(value, (count,), f"{name}=") for name, value in found.items()}


@configurable
def make_mjcf(
    path: Name,
    reward: Name,
    observation: Name | None = None,
    termination: Name | None = None,
    metrics: Name | None = None,
    initial: Name | None = None,
    num_envs: Count = 1,
    seed: Seed = 0,
    frame_skip: Count = 5,
    max_steps: Count = 1000,
    reset_noise_scale: NonNegative = 0.01,
    threads: Count = 1,
) -> ControlEnvBase:
    """K simulations of an MJCF file, stepped natively.

    Functions are named ``module:function`` and come from packages that ``--allow`` names. They see all simulations at
    once and take, by name, what they need of ``state`` (:class:`State`), ``action [K, nu]`` float64, and ``before``,
    the state before the step. Actions lie in the control ranges of the model's actuators, without bounds where those
    have none.

    Args:
        path: of the MJCF file.
        reward: function to rewards ``[K]``.
        observation: of ``state``, to observations ``[K, d]``; None shows ``qpos``, ``qvel`` and ``sensordata``.
        termination: function to ``[K]`` bool: which episodes have ended; None ends them by ``max_steps`` alone.
        metrics: function to a dictionary of ``[K]`` numbers, of which those of an episode's last step are told as
            ``rollout/NAME`` and ``eval/NAME``; ``success`` is what success is called.
        initial: function of ``model``, ``rng`` and ``count`` to start states ``qpos [count, nq]`` and
            ``qvel [count, nv]``; None adds noise to the model's own.
        num_envs: K.
        seed: of the generator that start states are drawn from.
        frame_skip: physics steps in one control step.
        max_steps: control steps before an episode is truncated.
        reset_noise_scale: size of the uniform noise on start positions and velocities; of no effect with ``initial``.
        threads: worker threads for the physics.

    Raises:
        ConfigError: no such file or no model, a model without actuators, or a function that is not allowed, not found
            or takes what nobody gives it.
        EnvError: a function raised, or returned something of another shape.
    """
    given = {"observation": observation, "reward": reward, "termination": termination}
    given |= {"metrics": metrics, "initial": initial}
    functions = _functions(given)
    sizes: dict[str, Any] = {"frame_skip": frame_skip, "max_steps": max_steps, "reset_noise_scale": reset_noise_scale}
    task = MjcfTask(**sizes, path=path, functions=functions)
    if task.model.nu == 0:
        raise ConfigError(f"env.path={path} has no actuators, so nothing can act in it; add an <actuator> section")
    env = BatchedMujocoEnv(task, num_envs, seed, threads)
    frame = env.simulations.read(np.arange(num_envs))  # rules are tried before anything is spent
    task.outcome(env.scene, frame, task.memory(env.scene, frame), np.zeros((num_envs, task.model.nu)))
    return env


def check_settings(settings: Mapping[str, Any]) -> None:
    """Refuses functions that are not allowed or not there when a run is composed.

    Raises:
        ConfigError: names the setting.
    """
    _functions({name: settings.get(name) for name in ARGUMENTS if settings.get(name) != "???"})


make_mjcf.check_settings = check_settings  # type: ignore[attr-defined]


def _functions(given: Mapping[str, Any]) -> dict[str, Function]:
    named: Iterable[tuple[str, Any]] = ((name, path) for name, path in given.items() if path is not None)
    return {name: function_named(name, path, allowed()) for name, path in named}
