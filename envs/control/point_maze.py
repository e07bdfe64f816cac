"""Mazes with a point: reach a goal behind walls, as in D4RL's Maze2D and Gymnasium-Robotics' PointMaze."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, NamedTuple

import mujoco
import numpy as np
import torch
from numpy.typing import NDArray
from tensordict import TensorDict
from torch import Tensor

from unified_rl.configurable import configurable
from unified_rl.envs.control.mujoco_env import BatchedMujocoEnv
from unified_rl.envs.control.simulation import Array, Frame
from unified_rl.envs.control.tasks import Outcome, Scene, Task, square_sum
from unified_rl.protocols import Goals
from unified_rl.ranges import Count, NonNegative, Seed, ranged

MAZES = {
    "open": ("#######", "#.....#", "#.....#", "#.....#", "#######"),
    "umaze": ("#####", "#...#", "###.#", "#...#", "#####"),
    "medium": (
        "########", "#..##..#", "#..#...#", "##...###", "#..#...#", "#.#..#.#", "#...#..#", "########",
    ),
    "large": (
        "############", "#....#.....#", "#.##.#.#.#.#", "#......#...#", "#.####.###.#", "#..#.#.....#", "##.#.#.#.###",
        "#..#...#...#", "############",
    ),
}  # fmt: skip
"""Walls and free cells of a metre each; the layouts of D4RL (arXiv:2004.07219)."""
RADIUS, GOAL_RADIUS = 0.1, 0.3
NOISE = 0.25
"""How far from the middle of its cell a start or a goal may lie, along each axis; metres."""
SPEED = 2.5
"""Metres a second that a full force leads to."""


class Plan(NamedTuple):
    """Shortest ways between the ``C`` free cells of a maze.

    Attributes:
        middle: ``[C, 2]`` of the cells; x to the right and y up, the origin in the middle of the maze.
        cell: ``[rows, columns]`` number of the free cell at a place, of a wall the nearest one.
        steps: ``[C, C]`` cells from one to another.
        first: ``[C, C]`` the next cell on the way.
    """

    middle: Array
    cell: NDArray[np.int64]
    steps: NDArray[np.int64]
    first: NDArray[np.int64]

    def at(self, place: Array) -> NDArray[np.int64]:
        """``[K, 2]`` to the numbers of the cells, ``[K]``."""
        rows, columns = self.cell.shape
        column = np.clip(np.floor(place[:, 0] + columns / 2).astype(np.int64), 0, columns - 1)
        row = np.clip(np.floor(rows / 2 - place[:, 1]).astype(np.int64), 0, rows - 1)
        found: NDArray[np.int64] = self.cell[row, column]
        return found

    def ahead(self, place: Array, goal: Array) -> Array:
        """Where to go now, ``[K, 2]``: the middle of the next cell, or the goal once no wall is between."""
        here, there = self.at(place), self.at(goal)
        near = (self.steps[here, there] <= 1)[:, None]
        return np.where(near, goal, self.middle[self.first[here, there]])

    def left(self, place: Array, goal: Array) -> Array:
        """Metres of the way from ``place [K, 2]`` to ``goal [K, 2]`` through the middles of the cells, ``[K]``."""
        here, there = self.at(place), self.at(goal)
        steps, before = self.steps[here, there], self.middle[self.first[there, here]]
        around = _distance(place, self.middle[self.first[here, there]]) + (steps - 2) + _distance(before, goal)
        return np.where(steps <= 1, _distance(place, goal), around)


def _distance(a: Array, b: Array) -> Array:
    out: Array = np.sqrt(square_sum(a - b))
    return out


@lru_cache
def plan_of(maze: str) -> Plan:
    """The ways through a maze of :data:`MAZES`."""
    rows = MAZES[maze]
    free = [(r, c) for r, row in enumerate(rows) for c, letter in enumerate(row) if letter == "."]
    number = {place: at for at, place in enumerate(free)}
    half = np.array([(len(rows) - 1) / 2, (len(rows[0]) - 1) / 2])
    middle = np.array([(c - half[1], half[0] - r) for r, c in free])
    cell = np.empty((len(rows), len(rows[0])), dtype=np.int64)
    for r, c in np.ndindex(*cell.shape):
        cell[r, c] = number.get((r, c), int(np.argmin([(r - i) ** 2 + (c - j) ** 2 for i, j in free])))
    steps, first = (np.zeros((len(free), len(free)), dtype=np.int64) for _ in range(2))
    for goal in free:
        found, queue = {goal: (0, goal)}, deque([goal])
        while queue:
            r, c = here = queue.popleft()
            for after in ((r - 1, c), (r + 1, c), (r, c - 1), (r, c + 1)):
                if after in number and after not in found:
                    found[after] = (found[here][0] + 1, here)
                    queue.append(after)
        for place, (away, towards) in found.items():
            steps[number[place], number[goal]], first[number[place], number[goal]] = away, number[towards]
    return Plan(middle, cell, steps, first)


@dataclass(frozen=True)
class PointMaze(Task):
    """A point on a plane, driven by forces, goes from a random cell to a goal in another one.

    ``info`` holds ``success`` (bool).
    """

    frame_skip: Count = 5
    max_steps: Count = 200
    reset_noise_scale: NonNegative = NOISE
    maze: str = "umaze"
    reward: str = "path"

    def load_model(self) -> mujoco.MjModel:
        """The compiled model."""
        rows = MAZES[self.maze]
        height, width = len(rows), len(rows[0])
        walls = "".join(
            f'<geom type="box" size="0.5 0.5 0.2" pos="{c - (width - 1) / 2} {(height - 1) / 2 - r} 0" '
            'rgba="0.6 0.6 0.65 1"/>'
            for r, row in enumerate(rows)
            for c, letter in enumerate(row)
            if letter == "#"
        )
        return mujoco.MjModel.from_xml_string(f"""
<mujoco model="point_maze">
  <option timestep="0.01" gravity="0 0 0" integrator="implicitfast"/>
  <default><geom condim="1"/></default>
  <worldbody>
    <light pos="0 0 10"/>
    <camera name="above" pos="0 0 {1.3 * max(height, width)}"/>
    <geom name="floor" type="plane" size="{width / 2} {height / 2} 0.1" pos="0 0 -0.2" contype="0" conaffinity="0"/>
    {walls}
    <body name="point">
      <joint name="x" type="slide" axis="1 0 0" damping="4"/>
      <joint name="y" type="slide" axis="0 1 0" damping="4"/>
      <geom name="point" type="sphere" size="{RADIUS}" mass="1" rgba="0.2 0.4 0.9 1"/>
    </body>
    <body name="goal">
      <joint name="goal_x" type="slide" axis="1 0 0"/>
      <joint name="goal_y" type="slide" axis="0 1 0"/>
      <geom type="sphere" size="{GOAL_RADIUS}" mass="1" contype="0" conaffinity="0" rgba="0.3 0.8 0.3 0.5"/>
    </body>
  </worldbody>
  <actuator>
    <motor joint="x" gear="{4 * SPEED}" ctrllimited="true" ctrlrange="-1 1"/>
    <motor joint="y" gear="{4 * SPEED}" ctrllimited="true" ctrlrange="-1 1"/>
  </actuator>
</mujoco>""")

    def initial(self, model: mujoco.MjModel, rng: np.random.Generator, count: int) -> tuple[Array, Array]:
        """At rest in a random cell, the goal in another one."""
        middle = plan_of(self.maze).middle
        start = rng.integers(len(middle), size=count)
        goal = (start + rng.integers(1, len(middle), size=count)) % len(middle)
        noise = rng.uniform(-self.reset_noise_scale, self.reset_noise_scale, (count, 4))
        return np.concatenate((middle[start], middle[goal]), axis=1) + noise, np.zeros((count, 4))

    def memory(self, scene: Scene, frame: Frame) -> Array:
        """The way that is left, ``[K, 1]``."""
        return plan_of(self.maze).left(frame["qpos"][:, :2], frame["qpos"][:, 2:])[:, None]

    def observe(self, frame: Frame) -> Array:
        """Place, velocity and goal, ``[K, 6]``."""
        return np.concatenate((frame["qpos"][:, :2], frame["qvel"][:, :2], frame["qpos"][:, 2:]), axis=1)

    def outcome(self, scene: Scene, frame: Frame, memory: Array, action: Array) -> Outcome:
        """Ends at the goal."""
        left = self.memory(scene, frame)
        away = _distance(frame["qpos"][:, :2], frame["qpos"][:, 2:])
        success = away < GOAL_RADIUS
        if self.reward == "sparse":
            reward = success.astype(np.float64)
        elif self.reward == "dense":
            reward = np.exp(-away)
        else:
            reward = memory[:, 0] - left[:, 0] + success
        return Outcome(reward, success, left, {"success": success})

    def draw(self, data: mujoco.MjData) -> NDArray[np.uint8]:
        """The maze from above, at most 320 pixels wide."""
        from PIL import Image, ImageDraw

        rows = MAZES[self.maze]
        height, width = len(rows), len(rows[0])
        scale = min(40, 320 // width)
        page = Image.new("RGB", (scale * width, scale * height), (245, 245, 245))
        pen = ImageDraw.Draw(page)
        for r, c in ((r, c) for r, row in enumerate(rows) for c, letter in enumerate(row) if letter == "#"):
            pen.rectangle((c * scale, r * scale, (c + 1) * scale - 1, (r + 1) * scale - 1), fill=(150, 150, 160))
        discs = ((data.qpos[2:], GOAL_RADIUS, (120, 205, 130)), (data.qpos[:2], RADIUS, (50, 90, 220)))
        for place, radius, color in discs:
            x, y, size = scale * (width / 2 + place[0]), scale * (height / 2 - place[1]), scale * radius
            pen.ellipse((x - size, y - size, x + size, y + size), fill=color)
        return np.array(page)


@configurable
@ranged("env")
class PointMazeEnv(BatchedMujocoEnv):
    """K points in a maze, each on its way from a random cell to a goal in another one.

    Observation ``[x, y, vx, vy, goal x, goal y]`` in metres and metres a second, action the force along x and y in
    [-1, 1], 20 steps a second, 2.5 m/s at most. An episode ends within 0.3 m of the goal, and is cut after
    ``max_steps``. The mazes ``umaze``, ``medium`` and ``large`` have the walls of D4RL (arXiv:2004.07219); the point
    has dynamics of its own, so that its sets are none of D4RL's.

    Args:
        num_envs: K.
        seed: of starts and goals.
        maze: which walls; ``open`` has none inside.
        reward: ``path``: the decrease of the way that is left around the walls, plus 1 at the goal; ``sparse``: 1 at
            the goal; ``dense``: exp(-distance), which knows of no walls.
        max_steps: before an episode is truncated.
        threads: worker threads for the physics.
    """

    def __init__(
        self,
        num_envs: Count = 1,
        seed: Seed = 0,
        maze: Literal["open", "umaze", "medium", "large"] = "umaze",
        reward: Literal["path", "sparse", "dense"] = "path",
        max_steps: Count = 200,
        threads: Count = 1,
    ) -> None:
        super().__init__(PointMaze(maze=maze, reward=reward, max_steps=max_steps), num_envs, seed, threads)

    @property
    def goals(self) -> Goals | None:
        """For hindsight, where a step's reward is that of its place: ``sparse`` and ``dense``."""
        assert isinstance(self.task, PointMaze)
        if self.task.reward == "path":
            return None
        place, goal, sparse = torch.tensor([0, 1]), torch.tensor([4, 5]), self.task.reward == "sparse"

        def reached(achieved: Tensor, desired: Tensor) -> Tensor:
            near: Tensor = (achieved - desired).norm(dim=-1) < GOAL_RADIUS
            return near

        def reward(achieved: Tensor, desired: Tensor) -> Tensor:
            return reached(achieved, desired).float() if sparse else torch.exp(-(achieved - desired).norm(dim=-1))

        return Goals(place, goal, reward, reached)

    def demonstrations(self, n: int, generator: torch.Generator | None = None, noise: float = 0.1) -> TensorDict:
        """``[n]`` pairs of a scripted expert that goes from cell to cell on a shortest way and succeeds always.

        Args:
            n: number of pairs.
            generator: draws starts, goals and noise; a fixed one if None.
            noise: standard deviation of the normal noise on every executed and recorded force.

        Returns:
            ``observation [n, 6]`` and ``action [n, 2]``, float32, in random order.
        """
        generator = torch.Generator().manual_seed(0) if generator is None else generator
        lanes = min(256, max(1, n // 64))
        seed = int(torch.randint(2**31, (1,), generator=generator))
        assert isinstance(self.task, PointMaze)
        env = BatchedMujocoEnv(self.task, lanes, seed)
        rng, seen, done = np.random.default_rng((seed, 1)), [], []
        for _ in range(-(-n // lanes)):
            seen.append(env.current_observation())
            action = expert(env.observation64, self.task.maze) + noise * rng.standard_normal((lanes, 2))
            done.append(torch.from_numpy(np.clip(action, -1.0, 1.0).astype(np.float32)))
            env.step_batch(done[-1])
        env.close()
        order = torch.randperm(lanes * len(seen), generator=generator)[:n]
        pairs = {"observation": torch.cat(seen)[order], "action": torch.cat(done)[order]}
        return TensorDict(pairs, batch_size=[n])


def expert(observation: Array, maze: str) -> Array:
    """The scripted expert's force ``[K, 2]`` for observations ``[K, 6]``: towards the next cell, braking before it."""
    place, velocity, goal = observation[:, :2], observation[:, 2:4], observation[:, 4:]
    out: Array = np.clip(3.0 * (plan_of(maze).ahead(place, goal) - place) - 0.5 * velocity, -1.0, 1.0)
    return out
