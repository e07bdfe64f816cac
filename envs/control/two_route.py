"""The two-route task: a point must pass an obstacle on one of two equally good sides.

A behaviour-cloned Gaussian averages the two routes and runs into the obstacle; a policy that can hold two modes does
not. Rewarding one side more shows whether reinforcement learning can move mass between the modes.
"""

from __future__ import annotations

from dataclasses import dataclass

import mujoco
import numpy as np
import torch
from numpy.typing import NDArray
from tensordict import TensorDict
from torch import Tensor

from unified_rl.configurable import configurable
from unified_rl.envs.control.chunk import ActionChunk
from unified_rl.envs.control.mujoco_env import BatchedMujocoEnv
from unified_rl.envs.control.simulation import Array, Frame
from unified_rl.envs.control.tasks import Outcome, Scene, Task, square_sum
from unified_rl.ranges import Count, NonNegative, Seed, UnitInterval, ranged

START, GOAL = np.array([-0.8, 0.0]), np.array([0.8, 0.0])
POINT_RADIUS, OBSTACLE_RADIUS, GOAL_RADIUS = 0.05, 0.3, 0.1
FAR, NEAR, SWERVE = 0.52, 0.24, 0.44
"""Where, in |x|, the expert begins and ends its swerve, and how far to the side it goes; metres."""

SCALE = 130
"""Pixels of a metre in a picture."""

MODEL = f"""
<mujoco model="two_route">
  <option timestep="0.01" gravity="0 0 0" integrator="implicitfast"/>
  <default><geom condim="1"/><joint type="slide" limited="true" range="-1.2 1.2"/></default>
  <worldbody>
    <light pos="0 0 3"/>
    <geom name="floor" type="plane" size="1.3 1.3 0.1" pos="0 0 -0.1" contype="0" conaffinity="0"/>
    <geom name="obstacle" type="cylinder" size="{OBSTACLE_RADIUS} 0.1" rgba="0.8 0.3 0.3 1"/>
    <site name="goal" pos="{GOAL[0]} {GOAL[1]} 0" size="{GOAL_RADIUS}" rgba="0.3 0.8 0.3 0.5"/>
    <body name="point">
      <joint name="x" axis="1 0 0"/>
      <joint name="y" axis="0 1 0"/>
      <geom name="point" type="sphere" size="{POINT_RADIUS}" mass="1" rgba="0.2 0.4 0.9 1"/>
    </body>
  </worldbody>
  <actuator>
    <velocity joint="x" kv="20" ctrllimited="true" ctrlrange="-1 1"/>
    <velocity joint="y" kv="20" ctrllimited="true" ctrlrange="-1 1"/>
  </actuator>
</mujoco>
"""


@dataclass(frozen=True)
class TwoRoute(Task):
    """A point on a plane, driven by velocity, goes from (-0.8, 0) to (0.8, 0) around a cylinder at the origin.

    The reward of a control step is the decrease of the distance to the goal minus ``time_penalty``. Arrival ends the
    episode and adds ``success_bonus`` (and ``left_bonus`` where the point passed on the left, that is at positive y);
    touching the obstacle ends it too and costs ``crash_penalty``.

    ``info`` holds ``success`` (bool), ``collision`` (bool) and ``route`` (1 left, -1 right, 0 before passing x = 0).
    """

    max_steps: Count = 64
    reset_noise_scale: NonNegative = 0.02
    success_bonus: float = 1.0
    time_penalty: float = 0.02
    crash_penalty: float = 0.5
    left_bonus: float = 0.0

    def load_model(self) -> mujoco.MjModel:
        """The compiled model."""
        return mujoco.MjModel.from_xml_string(MODEL)

    def initial(self, model: mujoco.MjModel, rng: np.random.Generator, count: int) -> tuple[Array, Array]:
        """At rest near (-0.8, 0)."""
        scale = self.reset_noise_scale
        return START + rng.uniform(-scale, scale, (count, 2)), np.zeros((count, 2))

    def memory(self, scene: Scene, frame: Frame) -> Array:
        """Distance to the goal, x and the route so far, ``[K, 3]``."""
        place = frame["qpos"]
        return np.stack((np.sqrt(square_sum(place - GOAL)), place[:, 0], np.zeros(len(place))), axis=1)

    def observe(self, frame: Frame) -> Array:
        """Position and velocity, ``[K, 4]``."""
        return np.concatenate((frame["qpos"], frame["qvel"]), axis=1)

    def outcome(self, scene: Scene, frame: Frame, memory: Array, action: Array) -> Outcome:
        """Ends on arrival at the goal or at the obstacle."""
        here, place = self.memory(scene, frame), frame["qpos"]
        passing = (memory[:, 1] < 0) & (here[:, 1] >= 0) & (memory[:, 2] == 0)
        here[:, 2] = route = np.where(passing, np.sign(place[:, 1]), memory[:, 2])
        success = here[:, 0] < GOAL_RADIUS
        touching = square_sum(place) < (OBSTACLE_RADIUS + POINT_RADIUS + 1e-3) ** 2
        reward = memory[:, 0] - here[:, 0] - self.time_penalty - self.crash_penalty * touching
        reward += (self.success_bonus + self.left_bonus * (route > 0)) * success
        return Outcome(reward, success | touching, here, {"success": success, "collision": touching, "route": route})

    def draw(self, data: mujoco.MjData) -> NDArray[np.uint8]:
        """The plane from above, ``[240, 320, 3]``: x to the right and y up."""
        from PIL import Image, ImageDraw

        page = Image.new("RGB", (320, 240), (245, 245, 245))
        pen = ImageDraw.Draw(page)
        discs = (
            (np.zeros(2), OBSTACLE_RADIUS, (205, 80, 80)),
            (GOAL, GOAL_RADIUS, (120, 205, 130)),
            (data.qpos, POINT_RADIUS, (50, 90, 220)),
        )
        for place, radius, color in discs:
            x, y, r = 160 + SCALE * place[0], 120 - SCALE * place[1], SCALE * radius
            pen.ellipse((x - r, y - r, x + r, y + r), fill=color)
        return np.array(page)


def expert(place: Array, side: Array, speed: float = 0.8) -> Array:
    """The scripted expert's velocity at ``place [K, 2]`` for a route ``side [K]`` (1 left, -1 right), ``[K, 2]``.

    It drives straight at the obstacle, swerves late to ``y = side * SWERVE``, passes, and comes back as it swerved.
    The late swerve leaves a policy that hesitates between the sides no room to recover.
    """
    x, y = place[:, 0], place[:, 1]
    phase = np.clip((FAR - np.abs(x)) / (FAR - NEAR), 0.0, 1.0)  # 0 before the swerve, 1 beside the obstacle
    height = side * SWERVE * phase**2 * (3 - 2 * phase)
    slope = -np.sign(x) * side * SWERVE * 6 * phase * (1 - phase) / (FAR - NEAR)
    forward = speed / np.sqrt(1 + slope**2)
    return np.clip(np.stack((forward, forward * slope + 4.0 * (height - y)), axis=1), -1.0, 1.0)


@configurable
@ranged("env")
class TwoRouteEnv(ActionChunk):
    """K two-route tasks with open-loop chunks of ``chunk`` velocity commands, action ``[K, chunk * 2]``.

    Args:
        num_envs: K.
        seed: of the start states.
        chunk: commands a decision.
        gamma: discount between the commands of a chunk; a run gives ``agent.gamma``, and None is 0.99.
        left_bonus: extra reward for arriving by the left route.
        max_steps: commands before an episode is truncated.
        threads: worker threads for the physics.
    """

    def __init__(
        self,
        num_envs: Count = 1,
        seed: Seed = 0,
        chunk: Count = 4,
        gamma: UnitInterval | None = None,
        left_bonus: float = 0.0,
        max_steps: Count = 64,
        threads: Count = 1,
    ) -> None:
        task = TwoRoute(left_bonus=left_bonus, max_steps=max_steps)
        super().__init__(BatchedMujocoEnv(task, num_envs, seed, threads), chunk, gamma)

    def demonstrations(self, n: int, generator: torch.Generator | None = None, noise: float = 0.1) -> TensorDict:
        """``[n]`` pairs of the scripted expert, which goes left or right at random and succeeds always.

        Args:
            n: number of pairs.
            generator: draws sides, start states and noise; a fixed one if None.
            noise: standard deviation of the normal noise on every executed and recorded command.

        Returns:
            ``observation [n, 4]`` and ``action [n, chunk * 2]``, float32, in random order.
        """
        generator = torch.Generator().manual_seed(0) if generator is None else generator
        lanes = min(256, max(1, n // 48))  # each lane plays whole episodes several times over
        seed = int(torch.randint(2**31, (1,), generator=generator))
        env = TwoRouteEnv(lanes, seed, self.horizon, self._gamma)
        observations, actions = _play(env, -(-n // lanes), np.random.default_rng((seed, 1)), noise)
        order = torch.randperm(lanes * -(-n // lanes), generator=generator)[:n]
        pairs = {"observation": observations[order], "action": actions[order]}
        return TensorDict(pairs, batch_size=[n])


def _play(env: TwoRouteEnv, decisions: int, rng: np.random.Generator, noise: float) -> tuple[Tensor, Tensor]:
    """Lets the expert act for ``decisions`` chunks in every lane; observations and chunks, ``[K * decisions, ...]``."""
    inner, horizon = env.inner, env.horizon
    assert isinstance(inner, BatchedMujocoEnv)
    side = rng.choice((-1.0, 1.0), env.num_envs)
    seen, done_actions = [], []
    for _ in range(decisions):
        seen.append(inner.current_observation())
        running, plan = torch.ones(env.num_envs, dtype=torch.bool), []
        for _ in range(horizon):
            action = expert(inner.observation64[:, :2], side) + noise * rng.standard_normal((env.num_envs, 2))
            plan.append(torch.from_numpy(np.clip(action, -1.0, 1.0).astype(np.float32)))
            step = inner.advance(plan[-1], running)
            running &= ~(step.terminated | step.truncated)
        done_actions.append(torch.cat(plan, 1))
        if not bool(running.all()):
            inner.restart(~running)
            side[~running.numpy()] = rng.choice((-1.0, 1.0), int((~running).sum()))
    return torch.cat(seen), torch.cat(done_actions)
