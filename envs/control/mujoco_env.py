"""One environment over K MuJoCo simulations, with the semantics of Gymnasium's v5 tasks."""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Mapping
from typing import Any, get_type_hints

import mujoco
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from unified_rl.configurable import configurable
from unified_rl.envs.control.base import ControlEnvBase, raise_non_finite
from unified_rl.envs.control.chunk import ActionChunk
from unified_rl.envs.control.locomotion import Ant, Humanoid
from unified_rl.envs.control.manipulation import InvertedDoublePendulum, InvertedPendulum, Pusher, Reacher
from unified_rl.envs.control.rendering import Camera
from unified_rl.envs.control.simulation import Simulations
from unified_rl.envs.control.tasks import HalfCheetah, Hopper, Scene, Swimmer, Task, Walker2d
from unified_rl.errors import CheckpointError, ConfigError
from unified_rl.instantiate import check_type
from unified_rl.protocols import StepResult
from unified_rl.ranges import Count, Seed, UnitInterval, ranged, shown
from unified_rl.spaces import Box, Space

TASKS: dict[str, type[Task]] = {
    "HalfCheetah-v5": HalfCheetah,
    "Hopper-v5": Hopper,
    "Walker2d-v5": Walker2d,
    "Ant-v5": Ant,
    "Humanoid-v5": Humanoid,
    "Swimmer-v5": Swimmer,
    "Reacher-v5": Reacher,
    "Pusher-v5": Pusher,
    "InvertedPendulum-v5": InvertedPendulum,
    "InvertedDoublePendulum-v5": InvertedDoublePendulum,
}
"""The batched tasks by their Gymnasium id."""


class Clock:
    """Steps of the running episodes, and which of them are at the limit."""

    def __init__(self, count: int, limit: int) -> None:
        self._start, self._calls, self._limit = np.zeros(count, dtype=np.int64), 0, limit
        self._due = limit
        """Before so many calls no episode can be at the limit, so that most need not look."""

    @property
    def steps(self) -> NDArray[np.int64]:
        """Of each episode, ``[K]``."""
        return self._calls - self._start

    def advance(self, running: NDArray[np.bool_] | None) -> NDArray[np.bool_] | None:
        """One step of the episodes ``running [K]`` (default: all); which are at the limit, ``[K]``, or None."""
        self._calls += 1
        if running is not None:
            self._start += ~running
        return None if self._calls < self._due else self.steps >= self._limit

    def set(self, lanes: NDArray[np.int64] | slice, steps: int | NDArray[np.int64]) -> None:
        """Sets the steps of some episodes."""
        self._start[lanes] = self._calls - steps
        self._due = self._limit + int(self._start.min())


@ranged("env")
class BatchedMujocoEnv(ControlEnvBase):
    """K simulations of a :class:`~unified_rl.envs.control.tasks.Task`.

    Actions are not clipped; MuJoCo itself clamps controls to the model's range, as in Gymnasium's v5 tasks.

    Args:
        task: what is simulated and rewarded.
        num_envs: K.
        seed: of the one generator that draws every start state.
        threads: worker threads for the physics; 1 is best below some 64 simulations.
    """

    def __init__(self, task: Task, num_envs: Count = 1, seed: Seed = 0, threads: Count = 1) -> None:
        model = task.load_model()
        options = (task.frame_skip, task.contact_forces, threads, task.synchronous)
        simulations = Simulations(model, num_envs, task.views, *options)
        dim = task.observe(simulations.read(np.arange(1))).shape[1]
        low, high = (tuple(bound.tolist()) for bound in control_ranges(model))
        super().__init__(num_envs, Space(Box((dim,)), Box((len(low),), low=low, high=high)), task.max_steps)
        self.task, self.model, self.simulations = task, model, simulations
        self.vouched = type(self) is BatchedMujocoEnv and type(task) in TASKS.values()
        """Whether no code of a user's runs in a step, so that a rollout need not check what comes back."""
        self._clock = Clock(num_envs, task.max_steps)
        self._action = np.zeros((num_envs, model.nu))
        self._observation = np.zeros((num_envs, dim))
        self._flat_action, self._flat_observation = self._action.reshape(-1), self._observation.reshape(-1)
        self.scene = Scene(simulations.dt, model.body_mass / model.body_mass.sum())
        self._memory = task.memory(self.scene, simulations.read(np.arange(num_envs)))
        self._ones, self._none = torch.ones(num_envs, dtype=torch.int64), torch.zeros(num_envs, dtype=torch.bool)
        self._camera: Camera | None = None
        self.seed_streams(seed)
        self.reset_batch()

    @property
    def observation64(self) -> np.ndarray[Any, np.dtype[np.float64]]:
        """The current observation before the cast to float32, ``[K, d]`` float64; overwritten by the next step."""
        return self._observation

    def seed_streams(self, seed: int) -> None:
        """Restarts the generator of start states."""
        self._rng = np.random.default_rng(seed)

    def advance(self, action: Tensor, running: Tensor | None = None) -> StepResult:
        """Steps the simulations ``running [K]`` (default: all) with ``action [K, nu]`` and resets none."""
        return self._move(action, None if running is None else running.numpy())[0]

    def step_batch(self, action: Tensor) -> StepResult:
        """Steps every simulation with ``action [K, a]`` and resets those that ended.

        Raises:
            NonFiniteError: a NaN or infinity in the action, observation or reward; names the simulation and its step.
        """
        if "advance" in vars(self) or type(self).advance is not BatchedMujocoEnv.advance:  # somebody watches, or knows
            return super().step_batch(action)
        step, ended = self._move(action)
        if ended is None:
            return step
        self.restart(torch.from_numpy(ended))
        return step._replace(observation=self.current_observation())

    def _move(
        self, action: Tensor, running: NDArray[np.bool_] | None = None
    ) -> tuple[StepResult, NDArray[np.bool_] | None]:
        """As :meth:`advance`, and which episodes ended, ``[K]``, or None.

        Physics empties the caches, so that every operation here is a cold one: each costs some 0.2 % of a step.
        """
        values, observation, clock, task, tensor = (
            self._action,
            self._observation,
            self._clock,
            self.task,
            torch.from_numpy,
        )
        values[...] = (action.detach() if action.requires_grad else action).numpy()
        if not _finite(self._flat_action):
            raise_non_finite("action", tensor(values), tensor(clock.steps))
        frame = self.simulations.step(values, None if running is None else np.flatnonzero(running))
        late = clock.advance(running)
        observation[...], outcome = task.step(self.scene, frame, self._memory, values)
        reward, over, self._memory[...], info = outcome
        if not (_finite(self._flat_observation) and _finite(reward)):
            raise_non_finite("observation", tensor(observation), tensor(clock.steps))
            raise_non_finite("reward", tensor(reward), tensor(clock.steps))
        successor = tensor(observation.astype(np.float32))
        ends = late is not None or np.count_nonzero(over)
        step = StepResult(
            successor,
            tensor(reward.astype(np.float32)),
            tensor(over) if ends else self._none,
            self._none if late is None else tensor(late),
            successor,
            self._ones,
            {name: tensor(value) for name, value in info.items()} if info else {},
        )
        if not ends:
            return step, None
        ended = over if late is None else over | late
        return step, ended if ended.any() else None

    def restart(self, ended: Tensor) -> Tensor:
        """Draws new start states where ``ended [K]`` bool; their observations ``[n, d]`` float32."""
        lanes = np.flatnonzero(ended.numpy())
        return self.restart_at(lanes, *self.task.initial(self.model, self._rng, len(lanes)))

    def restart_at(self, lanes: np.ndarray[Any, Any], qpos: np.ndarray[Any, Any], qvel: np.ndarray[Any, Any]) -> Tensor:
        """Starts new episodes of simulations ``lanes [n]`` in given states; observations ``[n, d]`` float32."""
        frame = self.simulations.reset(lanes, qpos, qvel)
        self._clock.set(lanes, 0)
        self._memory[lanes] = self.task.memory(self.scene, frame)
        self._observation[lanes] = self.task.observe(frame)
        return torch.from_numpy(self._observation[lanes].astype(np.float32))

    def current_observation(self) -> Tensor:
        """What the policy sees now, ``[K, d]`` float32."""
        return torch.from_numpy(self._observation.astype(np.float32))

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Physics with warm starts, current observation, what the next reward needs, elapsed steps, generator."""
        return {
            "physics": torch.from_numpy(self.simulations.state()),
            "observation": torch.from_numpy(self._observation.copy()),
            "memory": torch.from_numpy(self._memory.copy()),
            "elapsed": torch.from_numpy(self._clock.steps.copy()),
            "rng": json.dumps(self._rng.bit_generator.state),
        }

    def load_state_dict(self, state: dict[str, Any], *args: Any, **kwargs: Any) -> None:  # type: ignore[override]
        """Restores :meth:`state_dict` bit for bit and recomputes nothing.

        Raises:
            CheckpointError: the state is of another task or number of simulations.
        """
        mine = self.simulations.state().shape
        if tuple(state["physics"].shape) != mine or state["observation"].shape != self._observation.shape:
            raise CheckpointError(
                f"the saved simulations are {tuple(state['physics'].shape)}, this environment's are {mine}: "
                "resume with the same env and num_envs"
            )
        self.simulations.load(state["physics"].numpy())
        self._observation[:] = state["observation"].numpy()
        self._memory[:] = state["memory"].numpy()
        self._clock.set(slice(None), state["elapsed"].numpy())
        self._rng.bit_generator.state = json.loads(state["rng"])

    @property
    def frames_per_second(self) -> float:
        """Control steps in a second of simulated time."""
        return 1.0 / self.simulations.dt

    def render_lane(self, lane: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """A picture ``[H, W, 3]`` of a simulation: the task's own drawing, else MuJoCo's.

        Raises:
            ConfigError: this machine has no offscreen renderer.
        """
        data = self.simulations.data[lane]
        own = self.task.draw(data)
        if own is not None:
            return own
        if self._camera is None:
            self._camera = Camera(self.model)
        return self._camera.picture(data)

    def close(self, *, raise_if_closed: bool = True) -> None:
        """Stops the worker threads, and gives a graphics context back."""
        if self._camera is not None:
            self._camera.close()
            self._camera = None
        self.simulations.close()
        super().close(raise_if_closed=False)


def _finite(x: NDArray[np.float64]) -> bool:
    """Whether ``x [n]`` is certain to be finite: a sum of squares, the cheapest look, may also overflow."""
    return math.isfinite(x.dot(x))


def control_ranges(model: mujoco.MjModel) -> NDArray[np.float32]:
    """Lower and upper bounds of controls, ``[2, nu]``; infinite where an actuator has none."""
    ranges = model.actuator_ctrlrange.astype(np.float32).T
    free = ~model.actuator_ctrllimited.astype(np.bool_)
    return np.where(free, np.array([[-np.inf], [np.inf]], np.float32), ranges)


@configurable
def make_mujoco(
    name: str,
    num_envs: Count = 1,
    seed: Seed = 0,
    threads: Count = 1,
    chunk: Count = 1,
    gamma: UnitInterval | None = None,
    options: dict[str, Any] | None = None,
) -> ControlEnvBase:
    """A batched MuJoCo task by its Gymnasium id.

    Args:
        name: a key of :data:`TASKS`.
        num_envs: number of simulations K.
        seed: of the start states.
        threads: worker threads for the physics.
        chunk: actions executed open loop per policy decision.
        gamma: discount inside a chunk; a run gives ``agent.gamma``, and None is 0.99.
        options: fields of the task to change, for example ``{ctrl_cost_weight: 0.0}``.

    Raises:
        ConfigError: an unknown name or option, with the nearest known one.
    """
    env = BatchedMujocoEnv(_task(name, options or {}), num_envs, seed, threads)
    return env if chunk == 1 else ActionChunk(env, chunk, gamma)


def check_settings(settings: Mapping[str, Any]) -> None:
    """Refuses a task or an option of it that does not exist, or is out of its range, when a run is composed.

    Raises:
        ConfigError: names the setting.
    """
    if "name" in settings:
        _task(settings["name"], settings.get("options") or {})


make_mujoco.check_settings = check_settings  # type: ignore[attr-defined]


def _task(name: str, options: Mapping[str, Any]) -> Task:
    if name not in TASKS:
        raise ConfigError(
            f"env.name={shown(name)} is no batched MuJoCo task{_nearest(name, TASKS)}; any other id runs with "
            "env=gymnasium"
        )
    known = TASKS[name].__dataclass_fields__
    hints = get_type_hints(TASKS[name], include_extras=True)
    for option, value in options.items():
        if option not in known:
            raise ConfigError(f"{name} has no option {option!r}{_nearest(option, known)}; it has {', '.join(known)}")
        check_type(value, hints[option], f"env.options.{option}")
    return TASKS[name](**options)


def _nearest(name: str, known: Any) -> str:
    near = difflib.get_close_matches(name, list(known), 1, 0.3)
    return f", did you mean {near[0]!r}?" if near else ""
