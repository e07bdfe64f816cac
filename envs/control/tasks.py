"""What makes a batched MuJoCo task: model, start states, observation, reward and end, as functions of arrays."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import gymnasium
import mujoco
import numpy as np
from numpy.typing import NDArray

from unified_rl.envs.control.simulation import Array, Frame
from unified_rl.ranges import Count, Extended, NonNegative

EINSUM = inspect.unwrap(np.einsum)
"""Without the look for other array types, a good part of what it costs once physics has emptied the caches."""
ASSETS = Path(gymnasium.__file__).parent / "envs" / "mujoco" / "assets"


@dataclass(frozen=True)
class Scene:
    """What rewards need of a model.

    Attributes:
        seconds: simulated time in one control step.
        mass_share: ``[bodies]`` float64, each body's share of the total mass.
    """

    seconds: float
    mass_share: Array


class Outcome(NamedTuple):
    """What one control step was worth.

    Attributes:
        reward: ``[K]`` float64.
        terminated: ``[K]`` bool.
        memory: ``[K, m]`` float64, what the next step's reward needs of this one.
        info: named ``[K]`` arrays.
    """

    reward: Array
    terminated: NDArray[np.bool_]
    memory: Array
    info: dict[str, NDArray[np.float64] | NDArray[np.bool_]]


def never(count: int) -> NDArray[np.bool_]:
    """No simulation has terminated, ``[count]``."""
    return np.zeros(count, dtype=np.bool_)


def square_sum(x: Array) -> Array:
    """Sum of squares over the last axis, ``[K, n]`` to ``[K]``."""
    out: Array = EINSUM("kn,kn->k", x, x)
    return out


def weighed(weight: float, x: Array | NDArray[np.bool_]) -> Any:
    """``weight * x``, without a product where the weight is 1."""
    return x if weight == 1.0 else weight * x


@contextmanager
def quiet_deprecations() -> Iterator[None]:
    """Keeps MuJoCo from printing, at every load, that gymnasium's own files use an attribute it will remove.

    Other warnings of the compiler become Python warnings. MuJoCo would also write them into a log file in the working
    directory.
    """
    if not hasattr(mujoco, "set_mju_user_warning"):  # an older release
        yield
        return
    said: list[str] = []
    previous = mujoco.get_mju_user_warning()
    mujoco.set_mju_user_warning(said.append)
    try:
        yield
    finally:
        mujoco.set_mju_user_warning(previous)
        for message in said:
            if "deprecated" not in message:
                warnings.warn(f"MuJoCo: {message}", stacklevel=3)


@dataclass(frozen=True)
class Task:
    """A task over one MuJoCo model. Fields are its options; ``K`` is the number of simulations.

    Attributes:
        frame_skip: physics steps in one control step.
        max_steps: control steps before an episode is truncated.
        reset_noise_scale: size of the noise on start states.
    """

    xml: ClassVar[str] = ""
    contact_forces: ClassVar[bool] = False
    synchronous: ClassVar[bool] = False
    """Whether what is derived from positions is of the same moment as they are, and not a physics step older."""

    frame_skip: Count = 5
    max_steps: Count = 1000
    reset_noise_scale: NonNegative = 0.1

    def load_model(self) -> mujoco.MjModel:
        """The compiled model."""
        with quiet_deprecations():
            return mujoco.MjModel.from_xml_path(str(ASSETS / self.xml))

    def views(self, data: mujoco.MjData) -> Frame:
        """Named one-dimensional views of the arrays that the other functions read."""
        return {"qpos": data.qpos, "qvel": data.qvel}

    def draw(self, data: mujoco.MjData) -> NDArray[np.uint8] | None:
        """A picture ``[H, W, 3]`` of one simulation that needs no graphics library; None leaves it to MuJoCo."""
        return None

    def initial(self, model: mujoco.MjModel, rng: np.random.Generator, count: int) -> tuple[Array, Array]:
        """Draws ``count`` start states: ``qpos [count, nq]``, ``qvel [count, nv]``. Default: uniform noise on both."""
        scale = self.reset_noise_scale
        qpos = model.qpos0 + rng.uniform(-scale, scale, (count, model.nq))
        return qpos, rng.uniform(-scale, scale, (count, model.nv))

    def memory(self, scene: Scene, frame: Frame) -> Array:
        """What the first step's reward needs of the start state, ``[K, m]``."""
        return np.zeros((len(frame["qpos"]), 0))

    def observe(self, frame: Frame) -> Array:
        """The observation, ``[K, d]`` float64."""
        raise NotImplementedError

    def outcome(self, scene: Scene, frame: Frame, memory: Array, action: Array) -> Outcome:
        """The worth of the step that led from ``memory [K, m]`` to ``frame`` under ``action [K, nu]``."""
        raise NotImplementedError

    def step(self, scene: Scene, frame: Frame, memory: Array, action: Array) -> tuple[Array, Outcome]:
        """Observation and outcome; a task may share work between them."""
        return self.observe(frame), self.outcome(scene, frame, memory, action)


def gaussian_velocity(model: mujoco.MjModel, rng: np.random.Generator, count: int, scale: float) -> tuple[Array, Array]:
    """Start states with uniform position noise and normal velocity noise, both of size ``scale``."""
    qpos = model.qpos0 + rng.uniform(-scale, scale, (count, model.nq))
    return qpos, scale * rng.standard_normal((count, model.nv))


@dataclass(frozen=True)
class Runner(Task):
    """Moves along x: forward velocity minus control cost, observing all but the first ``hidden`` positions."""

    hidden: ClassVar[int] = 1

    forward_reward_weight: float = 1.0
    ctrl_cost_weight: float = 0.1

    def memory(self, scene: Scene, frame: Frame) -> Array:
        """The position along x, ``[K, 1]``."""
        return frame["qpos"][:, :1].copy()

    def observe(self, frame: Frame) -> Array:
        """Positions but the hidden ones, then velocities."""
        return np.concatenate((frame["qpos"][:, self.hidden :], frame["qvel"]), axis=1)

    def outcome(self, scene: Scene, frame: Frame, memory: Array, action: Array) -> Outcome:
        """Never terminates."""
        here = self.memory(scene, frame)
        velocity = (here - memory)[:, 0] / scene.seconds
        reward = weighed(self.forward_reward_weight, velocity) - self.ctrl_cost_weight * square_sum(action)
        return Outcome(reward, never(len(reward)), here, {})


@dataclass(frozen=True)
class HalfCheetah(Runner):
    """HalfCheetah-v5."""

    xml: ClassVar[str] = "half_cheetah.xml"

    def initial(self, model: mujoco.MjModel, rng: np.random.Generator, count: int) -> tuple[Array, Array]:
        """Uniform position noise, normal velocity noise."""
        return gaussian_velocity(model, rng, count, self.reset_noise_scale)


@dataclass(frozen=True)
class Swimmer(Runner):
    """Swimmer-v5."""

    xml: ClassVar[str] = "swimmer.xml"
    hidden: ClassVar[int] = 2

    frame_skip: Count = 4
    ctrl_cost_weight: float = 1e-4


@dataclass(frozen=True)
class Hopper(Runner):
    """Hopper-v5: as a runner, plus a reward for staying healthy; ends when unhealthy."""

    xml: ClassVar[str] = "hopper.xml"

    frame_skip: Count = 4
    reset_noise_scale: NonNegative = 5e-3
    ctrl_cost_weight: float = 1e-3
    healthy_reward: float = 1.0
    terminate_when_unhealthy: bool = True
    healthy_z: tuple[Extended, Extended] = (0.7, float("inf"))
    healthy_angle: tuple[Extended, Extended] = (-0.2, 0.2)
    healthy_state: tuple[Extended, Extended] = (-100.0, 100.0)

    def observe(self, frame: Frame) -> Array:
        """Positions but x, then velocities clipped to +-10."""
        return np.concatenate((frame["qpos"][:, 1:], np.clip(frame["qvel"], -10, 10)), axis=1)

    def healthy(self, frame: Frame) -> NDArray[np.bool_]:
        """Upright, above the ground and within state bounds, ``[K]``."""
        height, angle = frame["qpos"][:, 1], frame["qpos"][:, 2]
        state = np.concatenate((frame["qpos"][:, 2:], frame["qvel"]), axis=1)
        inside = ((state > self.healthy_state[0]) & (state < self.healthy_state[1])).all(axis=1)
        return inside & between(height, self.healthy_z) & between(angle, self.healthy_angle)

    def outcome(self, scene: Scene, frame: Frame, memory: Array, action: Array) -> Outcome:
        """Runner's reward plus the healthy reward."""
        base = super().outcome(scene, frame, memory, action)
        healthy = self.healthy(frame)
        terminated = ~healthy if self.terminate_when_unhealthy else base.terminated
        return base._replace(reward=base.reward + self.healthy_reward * healthy, terminated=terminated)


@dataclass(frozen=True)
class Walker2d(Hopper):
    """Walker2d-v5."""

    xml: ClassVar[str] = "walker2d_v5.xml"

    healthy_z: tuple[Extended, Extended] = (0.8, 2.0)
    healthy_angle: tuple[Extended, Extended] = (-1.0, 1.0)

    def healthy(self, frame: Frame) -> NDArray[np.bool_]:
        """Upright and at walking height, ``[K]``."""
        return between(frame["qpos"][:, 1], self.healthy_z) & between(frame["qpos"][:, 2], self.healthy_angle)


def between(x: Array, bounds: tuple[float, float]) -> NDArray[np.bool_]:
    """Strictly inside ``bounds``, elementwise."""
    return (x > bounds[0]) & (x < bounds[1])
