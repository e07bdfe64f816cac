"""The two walkers whose observations hold contact forces: Ant and Humanoid."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import mujoco
import numpy as np
from numpy.typing import NDArray

from unified_rl.envs.control.simulation import Array, Frame
from unified_rl.envs.control.tasks import (
    Outcome,
    Scene,
    Task,
    between,
    gaussian_velocity,
    never,
    square_sum,
    weighed,
)
from unified_rl.ranges import Bound, Extended, NonNegative


@dataclass(frozen=True)
class Ant(Task):
    """Ant-v5: velocity of the torso along x, healthy reward, control and contact costs."""

    xml: ClassVar[str] = "ant.xml"
    contact_forces: ClassVar[bool] = True

    forward_reward_weight: float = 1.0
    ctrl_cost_weight: float = 0.5
    contact_cost_weight: float = 5e-4
    healthy_reward: float = 1.0
    terminate_when_unhealthy: bool = True
    healthy_z: tuple[Extended, Extended] = (0.2, 1.0)
    contact_force_range: tuple[Extended, Extended] = (-1.0, 1.0)

    def views(self, data: mujoco.MjData) -> Frame:
        """State, the torso's position and every body's contact force."""
        return {"qpos": data.qpos, "qvel": data.qvel, "torso": data.xpos[1], "contact": data.cfrc_ext.reshape(-1)}

    def initial(self, model: mujoco.MjModel, rng: np.random.Generator, count: int) -> tuple[Array, Array]:
        """Uniform position noise, normal velocity noise."""
        return gaussian_velocity(model, rng, count, self.reset_noise_scale)

    def memory(self, scene: Scene, frame: Frame) -> Array:
        """The torso's x, ``[K, 1]``: where the last physics step began, one step behind ``qpos``."""
        return frame["torso"][:, :1].copy()

    def observe(self, frame: Frame) -> Array:
        """Positions but x and y, velocities, clipped contact forces of all bodies but the world."""
        return self._observed(frame, self.clipped(frame))

    def _observed(self, frame: Frame, contact: Array) -> Array:
        return np.concatenate((frame["qpos"][:, 2:], frame["qvel"], contact[:, 6:]), axis=1)

    def clipped(self, frame: Frame) -> Array:
        """Contact forces of all bodies within ``contact_force_range``, ``[K, 6 * bodies]``."""
        low, high = self.contact_force_range
        return np.minimum(np.maximum(frame["contact"], low), high)

    def healthy(self, frame: Frame) -> NDArray[np.bool_]:
        """Torso height within bounds (a state that is not finite never gets here), ``[K]``."""
        height = frame["qpos"][:, 2]
        return (height >= self.healthy_z[0]) & (height <= self.healthy_z[1])

    def outcome(self, scene: Scene, frame: Frame, memory: Array, action: Array) -> Outcome:
        """Ends when unhealthy."""
        return self._judged(scene, frame, memory, action, self.clipped(frame))

    def step(self, scene: Scene, frame: Frame, memory: Array, action: Array) -> tuple[Array, Outcome]:
        """Observation and outcome, with contact forces clipped once, unless a subclass has its own of one."""
        if type(self).observe is not Ant.observe or type(self).outcome is not Ant.outcome:
            return super().step(scene, frame, memory, action)
        contact = self.clipped(frame)
        return self._observed(frame, contact), self._judged(scene, frame, memory, action, contact)

    def _judged(self, scene: Scene, frame: Frame, memory: Array, action: Array, contact: Array) -> Outcome:
        here, healthy = self.memory(scene, frame), self.healthy(frame)
        velocity = (here - memory)[:, 0] / scene.seconds
        reward = weighed(self.forward_reward_weight, velocity) + weighed(self.healthy_reward, healthy)
        reward -= self.ctrl_cost_weight * square_sum(action) + self.contact_cost_weight * square_sum(contact)
        return Outcome(reward, ~healthy if self.terminate_when_unhealthy else never(len(reward)), here, {})


@dataclass(frozen=True)
class Humanoid(Task):
    """Humanoid-v5: velocity of the centre of mass along x, healthy reward, control and contact costs."""

    xml: ClassVar[str] = "humanoid.xml"
    contact_forces: ClassVar[bool] = True

    reset_noise_scale: NonNegative = 1e-2
    forward_reward_weight: float = 1.25
    ctrl_cost_weight: float = 0.1
    contact_cost_weight: float = 5e-7
    contact_cost_limit: Bound = 10.0
    healthy_reward: float = 5.0
    terminate_when_unhealthy: bool = True
    healthy_z: tuple[Extended, Extended] = (1.0, 2.0)

    def views(self, data: mujoco.MjData) -> Frame:
        """State, inertias and velocities of bodies about the centre of mass, actuator and contact forces."""
        return {
            "qpos": data.qpos,
            "qvel": data.qvel,
            "inertia": data.cinert[1:].reshape(-1),
            "velocity": data.cvel[1:].reshape(-1),
            "actuator": data.qfrc_actuator[6:],
            "contact": data.cfrc_ext.reshape(-1),
            "bodies": data.xipos.reshape(-1),
        }

    def memory(self, scene: Scene, frame: Frame) -> Array:
        """The centre of mass along x, ``[K, 1]``."""
        return (frame["bodies"][:, ::3] @ scene.mass_share)[:, None]

    def observe(self, frame: Frame) -> Array:
        """Positions but x and y, velocities, inertias, body velocities, actuator and contact forces."""
        rest = ("qvel", "inertia", "velocity", "actuator")
        parts = [frame["qpos"][:, 2:], *(frame[name] for name in rest), frame["contact"][:, 6:]]
        return np.concatenate(parts, axis=1)

    def outcome(self, scene: Scene, frame: Frame, memory: Array, action: Array) -> Outcome:
        """Ends when the torso leaves the healthy height."""
        here, healthy = self.memory(scene, frame), between(frame["qpos"][:, 2], self.healthy_z)
        velocity = (here[:, 0] - memory[:, 0]) / scene.seconds
        contact = np.minimum(self.contact_cost_weight * square_sum(frame["contact"]), self.contact_cost_limit)
        reward = self.forward_reward_weight * velocity + self.healthy_reward * healthy
        reward -= self.ctrl_cost_weight * square_sum(action) + contact
        return Outcome(reward, ~healthy & self.terminate_when_unhealthy, here, {})
