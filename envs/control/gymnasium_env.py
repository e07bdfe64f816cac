"""Any Gymnasium environment as a batched environment."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from unified_rl.configurable import configurable
from unified_rl.envs.control.base import ControlEnvBase, raise_non_finite
from unified_rl.envs.control.goals import goals_of
from unified_rl.envs.control.gymnasium_copy import Copy, Source, factory
from unified_rl.envs.control.gymnasium_pool import Copies, Pool, Workers, shapes_of
from unified_rl.errors import CheckpointError, ConfigError, RestoreError
from unified_rl.instantiate import allowed
from unified_rl.interop.deadline import STEP_SECONDS
from unified_rl.interop.gymnasium_vector import LIMIT
from unified_rl.protocols import Goals, StepResult
from unified_rl.ranges import Count, Name, Positive, Seed, Whole, ranged
from unified_rl.spaces import Box, MultiBinary, MultiDiscrete, Space

UNLIKE = (
    "replaying the running episodes gave other observations: this environment is not deterministic given its seed "
    "(a simulator with its own clock, a wrapper that keeps statistics)"
)


@configurable
@ranged("env")
class GymnasiumEnv(ControlEnvBase):
    """K copies of a Gymnasium environment, stepped one by one, or shared out among processes.

    Ended copies are reset in the step that ended them (Gymnasium's vector environments spend the next step on it), so
    every transition is a real one and the true final observation is kept. Every episode is reset with an explicit seed
    from one stream. Only some of the copies can be stepped, so chunks of actions of any length work.

    Numbers in the infos of a step that ends an episode (``is_success``, ``distance`` ...) are handed on under their
    own names, and ``is_success`` as ``success`` too. What a copy raises or returns wrongly is one
    :class:`~unified_rl.errors.EnvError` that names the copy and the step.

    A checkpoint holds each running episode's seed and actions, and restoring replays them: exact for every environment
    that is deterministic given its seed, refused with :class:`~unified_rl.errors.RestoreError` for any other.

    Actions are cast to the dtype of the action space and then clipped to its bounds, so a float32 action at a bound
    that float32 rounds outward is still inside. Rewards are handed out as float32, observations as rows (see
    :mod:`unified_rl.observations`): float32 vectors, or bytes where there are images.

    Args:
        id: a registered id, for example ``Pendulum-v1``; or ``package:Id-v0`` with the package that registers it,
            which is imported only where ``--allow package`` is given.
        num_envs: K.
        seed: of the stream of episode seeds.
        flatten: flatten images too, so that one vector of numbers is observed.
        max_episode_steps: the time limit; the environment's own if None.
        make_kwargs: further arguments of ``gymnasium.make``, or of ``make``.
        step_seconds: how long a step of all copies, or a reset, may take before it is given up; null waits for ever.
        make: instead of ``id``: a function or class that makes one ``gymnasium.Env``, ``module:function`` with
            ``--allow module``.
        workers: processes that the copies are shared out among; 0 steps them here. Results are the same.
        several_choices: take actions of several choices (``MultiDiscrete``, ``MultiBinary``), for policies that choose
            each entry by a token of its own; ``env=gymnasium`` does.

    Raises:
        ConfigError: an unknown id (names the nearest), a package that is missing or not allowed, an environment that
            cannot be made, a registered one without a time limit, a space without rows, or actions that are neither
            an array of numbers nor choices.
        EnvError: its first reset raised, or returned what its space does not hold.
    """

    name: str
    """What errors call it: its id, or the name of what makes it."""
    goals: Goals | None
    """Of a dictionary with ``achieved_goal`` and ``desired_goal``, where it lies in a row; None of any other."""
    costly_copies = True
    """A copy is an environment of its own, so evaluation uses few of them again and again."""
    alternatives = (("id", "make"),)

    def __init__(
        self,
        id: str | None = None,
        num_envs: Count = 1,
        seed: Seed = 0,
        flatten: bool = False,
        max_episode_steps: Count | None = None,
        make_kwargs: dict[str, Any] | None = None,
        step_seconds: Positive | None = STEP_SECONDS,
        make: Name | Callable[..., Any] | None = None,
        workers: Whole = 0,
        several_choices: bool = False,
    ) -> None:
        if (id is None) == (make is None):
            raise ConfigError("env.id=NAME or env.make=module:function says where the environment comes from: give one")
        source = Source(id, make, flatten, max_episode_steps, make_kwargs or {}, allowed())
        copy = source.copy(0)
        limit = copy.time_limit
        if not limit and id is not None:
            raise ConfigError(f"{id} has no time limit; set env.max_episode_steps")
        super().__init__(num_envs, _space(copy, several_choices), limit or LIMIT)
        self.name, self.step_seconds, self.frames_per_second = copy.id, step_seconds, copy.frames_per_second
        self.goals: Goals | None = None if copy.layout.images else goals_of(copy.env)
        self._make_copy: Callable[[], Copy] = lambda: source.copy(0)
        self._pool: Pool
        if workers:
            copy.close()
            self._pool = Workers(source, num_envs, workers, shapes_of(copy))
        else:
            self._pool = Copies(source, num_envs, [copy])
        self._seeds = np.zeros(num_envs, dtype=np.int64)
        self._played: list[list[np.ndarray[Any, Any]]] = [[] for _ in range(num_envs)]
        self.seed_streams(seed)
        self.reset_batch()

    @staticmethod
    def check_settings(settings: Mapping[str, Any]) -> None:
        """Refuses a factory that is not allowed or not there when a run is composed.

        Raises:
            ConfigError: says which.
        """
        if settings.get("make") is not None:
            factory(settings["make"], allowed())

    def seed_streams(self, seed: int) -> None:
        """Restarts the stream of episode seeds."""
        self._rng = np.random.default_rng(seed)

    def current_observation(self) -> Tensor:
        """What the policy sees now, rows ``[K, w]``."""
        return self._observation.clone()

    def advance(self, action: Tensor, running: Tensor | None = None) -> StepResult:
        """Steps the copies ``running [K]`` bool (default: all) with ``action [K, a]`` and resets none.

        Discrete actions may be ``[K]`` or ``[K, 1]``. Copies that stand still keep their observation, with reward 0
        and no end.

        Raises:
            EnvError: a copy raised, or returned what is no step or lies in another space.
            NonFiniteError: a NaN or infinity in the action, an observation or a reward.
        """
        values, board = self._to_numpy(action), self._pool.board
        lanes = np.arange(self.num_envs) if running is None else np.flatnonzero(running.numpy())
        board.action[:] = values  # an environment may write to its action; what was played is kept beside it
        for lane in lanes.tolist():
            self._played[lane].append(values[lane])
        told = self._pool.step(lanes.tolist(), [len(self._played[lane]) for lane in lanes.tolist()])
        moved = np.zeros(self.num_envs, dtype=np.bool_)
        moved[lanes] = True
        self._observation = torch.from_numpy(board.row.copy())
        rewards = torch.from_numpy(np.where(moved, board.reward, 0.0).astype(np.float32))
        self._check_finite(rewards)
        infos: dict[str, np.ndarray[Any, Any]] = {}
        for lane, numbers in told.items():
            for key, value in numbers.items():
                infos.setdefault(key, np.full(self.num_envs, np.nan, np.float32))[lane] = value
        return StepResult(
            self._observation,
            rewards,
            torch.from_numpy(board.ends[0] & moved),
            torch.from_numpy(board.ends[1] & moved),
            self._observation,
            torch.from_numpy(moved.astype(np.int64)),
            {key: torch.from_numpy(value) for key, value in infos.items()},
        )

    def _check_finite(self, rewards: Tensor) -> None:
        row, reward = self._observation.numpy(), rewards.numpy()
        if not np.isfinite(np.add.reduce(row, axis=None) + np.add.reduce(reward)):
            elapsed = torch.tensor([len(played) for played in self._played])
            raise_non_finite("observation", self._observation, elapsed, self.name)
            raise_non_finite("reward", rewards, elapsed, self.name)

    def _to_numpy(self, action: Tensor) -> np.ndarray[Any, Any]:
        """What the environment takes: in its space's dtype, and inside its bounds."""
        if not bool(torch.isfinite(action).all()):
            raise_non_finite("action", action, torch.tensor([len(played) for played in self._played]))
        return self.space.action.cast(action.detach().reshape(self.num_envs, -1).numpy())

    def restart(self, ended: Tensor) -> Tensor:
        """Starts new episodes where ``ended [K]`` bool; the rows of their observations ``[n, w]``.

        Raises:
            EnvError: a copy raised in reset, or returned what its space does not hold.
            NonFiniteError: a NaN or infinity in an observation.
        """
        mask = ended.numpy().copy()
        self._seeds[mask] = self._rng.integers(2**31, size=int(mask.sum()))
        lanes = np.flatnonzero(mask).tolist()
        for lane in lanes:
            self._played[lane] = []
        self._pool.reset(lanes, [int(self._seeds[lane]) for lane in lanes])
        self._observation = torch.from_numpy(self._pool.board.row.copy())
        fresh = self._observation[ended]
        if fresh.is_floating_point() and not bool(torch.isfinite(fresh.sum())):
            raise_non_finite("observation", self._observation, torch.zeros(self.num_envs), self.name)
        return fresh

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Seed and actions of each running episode, the current observation and the stream of seeds."""
        return {
            "seeds": torch.from_numpy(self._seeds.copy()),
            "played": [torch.from_numpy(np.array(played)) for played in self._played],
            "observation": self._observation.clone(),
            "rng": json.dumps(self._rng.bit_generator.state),
        }

    def load_state_dict(self, state: dict[str, Any], *args: Any, **kwargs: Any) -> None:  # type: ignore[override]
        """Replays each running episode of :meth:`state_dict`.

        Raises:
            CheckpointError: another number of copies.
            RestoreError: an environment that its seed does not determine.
        """
        if state["observation"].shape != self._observation.shape:
            saved, mine = tuple(state["observation"].shape), tuple(self._observation.shape)
            raise CheckpointError(
                f"saved observations are {saved}, this environment's are {mine}: same env and num_envs?"
            )
        self._seeds[:] = state["seeds"].numpy()
        self._played = [list(played.numpy()) for played in state["played"]]
        for lane in range(self.num_envs):
            self._pool.board.row[lane] = self._pool.replay(lane, int(self._seeds[lane]), self._actions(lane))
        self._observation = torch.from_numpy(self._pool.board.row.copy())
        if not torch.equal(self._observation, state["observation"]):
            raise RestoreError(UNLIKE)
        self._rng.bit_generator.state = json.loads(state["rng"])

    def _actions(self, lane: int) -> np.ndarray[Any, Any]:
        """What a running episode played, ``[n, *shape]``; an environment may write to it."""
        action = self._pool.board.action
        return np.array(self._played[lane], dtype=action.dtype).reshape(-1, *action.shape[1:])

    def resumable(self) -> str | bool:
        """Whether the run can be resumed bit for bit, or why not: tries it on one lane, in a new copy.

        False where no episode has a step yet, which tells nothing.
        """
        begun = [(len(played), lane) for lane, played in enumerate(self._played) if played]
        if not begun:
            return False
        lane, copy = min(begun)[1], self._make_copy()
        try:
            row = copy.replay(int(self._seeds[lane]), self._actions(lane))
        finally:
            copy.close()
        return np.array_equal(row, self._observation[lane].numpy()) or UNLIKE

    def render_lane(self, lane: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """What a copy draws, ``[H, W, 3]``; it must be made with ``render_mode: rgb_array``.

        Raises:
            ConfigError: it was made to draw nothing.
        """
        return self._pool.picture(lane)

    def close(self, *, raise_if_closed: bool = True) -> None:
        """Closes every copy, and ends the processes."""
        self._pool.close()
        super().close(raise_if_closed=False)


def _space(copy: Copy, several: bool) -> Space:
    space = copy.space
    if not several and isinstance(space.action, MultiDiscrete | MultiBinary):
        raise ConfigError(
            f"{copy.id} acts in {space.action.describe()}: say several_choices=True for policies that choose each "
            "entry by a token of its own (policy=autoregressive); env=gymnasium does"
        )
    if space.action.choices is None and not isinstance(space.action, Box):
        raise ConfigError(
            f"{copy.id} acts in {space.action.describe()}; an array of numbers or choices is supported: make one of "
            "those of it with gymnasium.wrappers.TransformAction"
        )
    return space
