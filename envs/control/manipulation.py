"""Arms and pendulums: Reacher, Pusher, InvertedPendulum, InvertedDoublePendulum."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import mujoco
import numpy as np

from unified_rl.envs.control.simulation import Array, Frame
from unified_rl.envs.control.tasks import Outcome, Scene, Task, gaussian_velocity, never, square_sum
from unified_rl.ranges import Count, NonNegative


def draw_points(rng: np.random.Generator, count: int, low: Array, high: Array, radius: float, sign: int) -> Array:
    """``count`` uniform points of the box with norm below (``sign`` 1) or above (-1) ``radius``, ``[count, 2]``."""
    out = np.empty((count, 2))
    for row in out:
        while True:
            row[:] = rng.uniform(low, high)
            if sign * (np.linalg.norm(row) - radius) < 0:
                break
    return out


@dataclass(frozen=True)
class Reacher(Task):
    """Reacher-v5: a two-link arm reaches for a point."""

    xml: ClassVar[str] = "reacher.xml"

    frame_skip: Count = 2
    max_steps: Count = 50
    reward_dist_weight: float = 1.0
    reward_control_weight: float = 1.0

    def views(self, data: mujoco.MjData) -> Frame:
        """State, fingertip and target."""
        tip, target = data.body("fingertip").xpos, data.body("target").xpos
        return {"qpos": data.qpos, "qvel": data.qvel, "tip": tip, "target": target}

    def initial(self, model: mujoco.MjModel, rng: np.random.Generator, count: int) -> tuple[Array, Array]:
        """Noise on the arm, a target within reach."""
        qpos = model.qpos0 + rng.uniform(-self.reset_noise_scale, self.reset_noise_scale, (count, model.nq))
        qpos[:, -2:] = draw_points(rng, count, np.full(2, -0.2), np.full(2, 0.2), 0.2, 1)
        qvel = rng.uniform(-0.005, 0.005, (count, model.nv))
        qvel[:, -2:] = 0
        return qpos, qvel

    def observe(self, frame: Frame) -> Array:
        """Cosines and sines of the joints, the target, joint velocities, fingertip minus target."""
        theta = np.ascontiguousarray(frame["qpos"][:, :2])
        offset = (frame["tip"] - frame["target"])[:, :2]
        parts = (np.cos(theta), np.sin(theta), frame["qpos"][:, 2:], frame["qvel"][:, :2], offset)
        return np.concatenate(parts, axis=1)

    def outcome(self, scene: Scene, frame: Frame, memory: Array, action: Array) -> Outcome:
        """Minus the distance to the target minus the control cost; never terminates."""
        distance = np.sqrt(square_sum(frame["tip"] - frame["target"]))
        reward = -self.reward_dist_weight * distance - self.reward_control_weight * square_sum(action)
        return Outcome(reward, never(len(reward)), memory, {})


@dataclass(frozen=True)
class Pusher(Task):
    """Pusher-v5: a seven-joint arm pushes a cylinder to a goal."""

    xml: ClassVar[str] = "pusher_v5.xml"

    max_steps: Count = 100
    reward_near_weight: float = 0.5
    reward_dist_weight: float = 1.0
    reward_control_weight: float = 0.1

    def views(self, data: mujoco.MjData) -> Frame:
        """State, fingertip, object and goal."""
        bodies = {name: data.body(name).xpos for name in ("tips_arm", "object", "goal")}
        return {"qpos": data.qpos, "qvel": data.qvel, **bodies}

    def initial(self, model: mujoco.MjModel, rng: np.random.Generator, count: int) -> tuple[Array, Array]:
        """The arm at rest, the object at least 0.17 m from the goal."""
        qpos = np.tile(model.qpos0, (count, 1))
        qpos[:, -4:-2] = draw_points(rng, count, np.array([-0.3, -0.2]), np.array([0.0, 0.2]), 0.17, -1)
        qpos[:, -2:] = 0
        qvel = rng.uniform(-0.005, 0.005, (count, model.nv))
        qvel[:, -4:] = 0
        return qpos, qvel

    def observe(self, frame: Frame) -> Array:
        """Joint positions and velocities, then fingertip, object and goal."""
        names = ("tips_arm", "object", "goal")
        return np.concatenate((frame["qpos"][:, :7], frame["qvel"][:, :7], *(frame[name] for name in names)), axis=1)

    def outcome(self, scene: Scene, frame: Frame, memory: Array, action: Array) -> Outcome:
        """Minus the distances object-fingertip and object-goal minus the control cost; never terminates."""
        near = np.sqrt(square_sum(frame["object"] - frame["tips_arm"]))
        distance = np.sqrt(square_sum(frame["object"] - frame["goal"]))
        cost = self.reward_control_weight * square_sum(action)
        reward = -self.reward_dist_weight * distance - cost - self.reward_near_weight * near
        return Outcome(reward, never(len(reward)), memory, {})


@dataclass(frozen=True)
class InvertedPendulum(Task):
    """InvertedPendulum-v5: 1 a step while the pole stands."""

    xml: ClassVar[str] = "inverted_pendulum.xml"

    frame_skip: Count = 2
    reset_noise_scale: NonNegative = 0.01

    def observe(self, frame: Frame) -> Array:
        """Positions and velocities."""
        return np.concatenate((frame["qpos"], frame["qvel"]), axis=1)

    def outcome(self, scene: Scene, frame: Frame, memory: Array, action: Array) -> Outcome:
        """Ends when the pole leans more than 0.2 rad."""
        terminated = np.abs(frame["qpos"][:, 1]) > 0.2
        return Outcome((~terminated).astype(np.float64), terminated, memory, {})


@dataclass(frozen=True)
class InvertedDoublePendulum(Task):
    """InvertedDoublePendulum-v5: alive bonus minus distance and velocity penalties."""

    xml: ClassVar[str] = "inverted_double_pendulum.xml"

    healthy_reward: float = 10.0

    def views(self, data: mujoco.MjData) -> Frame:
        """State, the tip, the constraint force on the cart."""
        force = data.qfrc_constraint[:1]
        return {"qpos": data.qpos, "qvel": data.qvel, "tip": data.site_xpos[0], "force": force}

    def initial(self, model: mujoco.MjModel, rng: np.random.Generator, count: int) -> tuple[Array, Array]:
        """Uniform position noise, normal velocity noise."""
        return gaussian_velocity(model, rng, count, self.reset_noise_scale)

    def observe(self, frame: Frame) -> Array:
        """Cart position, sines and cosines of the angles, clipped velocities, clipped constraint force."""
        angle = np.ascontiguousarray(frame["qpos"][:, 1:])
        clipped = (np.clip(frame[name], -10, 10) for name in ("qvel", "force"))
        return np.concatenate((frame["qpos"][:, :1], np.sin(angle), np.cos(angle), *clipped), axis=1)

    def outcome(self, scene: Scene, frame: Frame, memory: Array, action: Array) -> Outcome:
        """Ends when the tip is at or below height 1."""
        x, y = frame["tip"][:, 0], frame["tip"][:, 2]
        terminated = y <= 1
        distance = 0.01 * x**2 + (y - 2) ** 2
        velocity = 0.001 * frame["qvel"][:, 1] ** 2 + 0.005 * frame["qvel"][:, 2] ** 2
        return Outcome(self.healthy_reward * ~terminated - distance - velocity, terminated, memory, {})
