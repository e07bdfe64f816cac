"""Any Gymnasium id as a batched environment."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from unified_rl.configurable import configurable
from unified_rl.envs.control.base import ControlEnvBase, raise_non_finite
from unified_rl.envs.control.goals import goals_of
from unified_rl.envs.control.gymnasium_copy import Copy, make_copies
from unified_rl.errors import CheckpointError, ConfigError, RestoreError
from unified_rl.interop.deadline import STEP_SECONDS
from unified_rl.protocols import Goals, StepResult
from unified_rl.ranges import Count, Positive, Seed, ranged
from unified_rl.spaces import Box, Discrete, Space

UNLIKE = (
    "replaying the running episodes gave other observations: this environment is not deterministic given its seed "
    "(a simulator with its own clock, a wrapper that keeps statistics)"
)


@configurable
@ranged("env")
class GymnasiumEnv(ControlEnvBase):
    """K copies of a registered Gymnasium environment, stepped one by one.

    Ended copies are reset in the step that ended them (Gymnasium's vector environments spend the next step on it), so
    every transition is a real one and the true final observation is kept. Every episode is reset with an explicit seed
    from one stream. Only some of the copies can be stepped, so chunks of actions of any length work.

    Numbers in the infos of a step that ends an episode (``is_success``, ``distance`` ...) are handed on under their
    own names, and ``is_success`` as ``success`` too. What a copy raises or returns wrongly is one
    :class:`~unified_rl.errors.EnvError` that names the copy and the step.

    A checkpoint holds each running episode's seed and actions, and restoring replays them: exact for every environment
    that is deterministic given its seed, refused with :class:`~unified_rl.errors.RestoreError` for any other.

    Actions are cast to the dtype of the action space and then clipped to its bounds, so a float32 action at a bound
    that float32 rounds outward is still inside. Observations and rewards are handed out as float32.

    Args:
        id: a registered id, for example ``Pendulum-v1``; or ``package:Id-v0`` with the package that registers it,
            which is imported only where ``--allow package`` is given.
        num_envs: K.
        seed: of the stream of episode seeds.
        flatten: flatten dict, image or discrete observations to one vector.
        max_episode_steps: the time limit; the registered one if None.
        make_kwargs: further arguments of ``gymnasium.make``.
        step_seconds: how long a step of all copies, or a reset, may take before it is given up; null waits for ever.

    Raises:
        ConfigError: an unknown id (names the nearest), a package that is missing or not allowed, an environment that
            cannot be made, no time limit, observations that are not a vector, or actions that are neither an array of
            numbers nor one discrete choice.
        EnvError: its first reset raised, or returned what its space does not hold.
    """

    name: str
    """What errors call it: its id."""
    costly_copies = True
    """A copy is an environment of its own, so evaluation uses few of them again and again."""

    def __init__(
        self,
        id: str,
        num_envs: Count = 1,
        seed: Seed = 0,
        flatten: bool = False,
        max_episode_steps: Count | None = None,
        make_kwargs: dict[str, Any] | None = None,
        step_seconds: Positive | None = STEP_SECONDS,
    ) -> None:
        options = {**(make_kwargs or {}), "max_episode_steps": max_episode_steps}
        self._make_copy: Callable[[], Copy] = lambda: make_copies(id, 1, flatten, options)[0]
        copies = make_copies(id, num_envs, flatten, options)
        limit = copies[0].time_limit
        if not limit:
            raise ConfigError(f"{id} has no time limit; set env.max_episode_steps")
        space = _space(id, copies[0])
        super().__init__(num_envs, space, limit)
        self.name, self._copies, self.step_seconds = id, copies, step_seconds
        self._seeds = np.zeros(num_envs, dtype=np.int64)
        self._played: list[list[np.ndarray[Any, Any]]] = [[] for _ in range(num_envs)]
        self._observation = torch.zeros(num_envs, space.observation_dim)
        self.seed_streams(seed)
        self.reset_batch()

    def seed_streams(self, seed: int) -> None:
        """Restarts the stream of episode seeds."""
        self._rng = np.random.default_rng(seed)

    def current_observation(self) -> Tensor:
        """What the policy sees now, ``[K, d]`` float32."""
        return self._observation.clone()

    def advance(self, action: Tensor, running: Tensor | None = None) -> StepResult:
        """Steps the copies ``running [K]`` bool (default: all) with ``action [K, a]`` and resets none.

        Discrete actions may be ``[K]`` or ``[K, 1]``. Copies that stand still keep their observation, with reward 0
        and no end.

        Raises:
            EnvError: a copy raised, or returned what is no step or lies in another space.
            NonFiniteError: a NaN or infinity in the action, an observation or a reward.
        """
        values = self._to_numpy(action)
        lanes = np.arange(self.num_envs) if running is None else np.flatnonzero(running.numpy())
        observation = self._observation.numpy().copy()
        reward = np.zeros(self.num_envs, dtype=np.float32)
        ends = np.zeros((2, self.num_envs), dtype=np.bool_)
        infos: dict[str, np.ndarray[Any, Any]] = {}
        kept = values.copy()  # an environment may write to its action
        for lane in lanes.tolist():
            played = self._played[lane]
            played.append(kept[lane])
            step = self._copies[lane].step(values[lane], len(played))
            observation[lane], reward[lane], ends[0, lane], ends[1, lane] = step.values
            for key, value in step.told.items():
                infos.setdefault(key, np.full(self.num_envs, np.nan, np.float32))[lane] = value
        self._observation = torch.from_numpy(observation)
        rewards = torch.from_numpy(reward)
        if not np.isfinite(np.add.reduce(observation, axis=None) + np.add.reduce(reward)):
            elapsed = torch.tensor([len(played) for played in self._played])
            raise_non_finite("observation", self._observation, elapsed, self.name)
            raise_non_finite("reward", rewards, elapsed, self.name)
        executed = torch.ones(self.num_envs, dtype=torch.int64) if running is None else running.long()
        return StepResult(
            self._observation,
            rewards,
            torch.from_numpy(ends[0]),
            torch.from_numpy(ends[1]),
            self._observation,
            executed,
            {key: torch.from_numpy(value) for key, value in infos.items()},
        )

    def _to_numpy(self, action: Tensor) -> np.ndarray[Any, Any]:
        """What the environment takes: in its space's dtype, and inside its bounds."""
        if not bool(torch.isfinite(action).all()):
            raise_non_finite("action", action, torch.tensor([len(played) for played in self._played]))
        return self.space.action.cast(action.detach().reshape(self.num_envs, -1).numpy())

    def restart(self, ended: Tensor) -> Tensor:
        """Starts new episodes where ``ended [K]`` bool; their observations ``[n, d]`` float32.

        Raises:
            EnvError: a copy raised in reset, or returned what its space does not hold.
            NonFiniteError: a NaN or infinity in an observation.
        """
        mask = ended.numpy().copy()
        self._seeds[mask] = self._rng.integers(2**31, size=int(mask.sum()))
        self._observation = self._observation.clone()
        for lane in np.flatnonzero(mask).tolist():
            self._observation[lane] = torch.from_numpy(self._copies[lane].reset(int(self._seeds[lane])))
            self._played[lane] = []
        fresh = self._observation[ended]
        if not bool(torch.isfinite(fresh.sum())):
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
        rows = [self._replay(lane) for lane in range(self.num_envs)]
        self._observation = torch.from_numpy(np.stack(rows).astype(np.float32))
        if not torch.equal(self._observation, state["observation"]):
            raise RestoreError(UNLIKE)
        self._rng.bit_generator.state = json.loads(state["rng"])

    def resumable(self) -> str | bool:
        """Whether the run can be resumed bit for bit, or why not: tries it on one lane, in a new copy.

        False where no episode has a step yet, which tells nothing.
        """
        begun = [(len(played), lane) for lane, played in enumerate(self._played) if played]
        if not begun:
            return False
        lane, copy = min(begun)[1], self._make_copy()
        try:
            same = np.array_equal(self._replay(lane, copy).astype(np.float32), self._observation[lane].numpy())
        finally:
            copy.close()
        return same or UNLIKE

    @property
    def goals(self) -> Goals | None:
        """Of a dictionary with ``achieved_goal`` and ``desired_goal``, flattened; None of any other environment."""
        return goals_of(self._copies[0].env)

    @property
    def frames_per_second(self) -> float:
        """As the environment's metadata say; 30 where they say nothing."""
        return float(self._copies[0].env.metadata.get("render_fps") or 30.0)

    def render_lane(self, lane: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """What a copy draws, ``[H, W, 3]``; it must be made with ``render_mode: rgb_array``.

        Raises:
            ConfigError: it was made to draw nothing.
        """
        env = self._copies[lane].env
        if env.render_mode != "rgb_array":
            raise ConfigError(
                f"{self.name} was made without render_mode=rgb_array, so it draws nothing: add it to env.make_kwargs"
            )
        drawn: np.ndarray[Any, np.dtype[np.uint8]] = env.render()
        return drawn

    def _replay(self, lane: int, copy: Copy | None = None) -> np.ndarray[Any, Any]:
        copy = self._copies[lane] if copy is None else copy
        observation = copy.reset(int(self._seeds[lane]))
        for number, action in enumerate(self._played[lane], 1):
            observation = copy.step(action, number).values[0]
        return observation

    def close(self, *, raise_if_closed: bool = True) -> None:
        """Closes every copy."""
        for copy in self._copies:
            copy.close()
        super().close(raise_if_closed=False)


def _space(id: str, copy: Copy) -> Space:
    try:
        space = Space.from_gymnasium(copy.env.observation_space, copy.env.action_space)
    except (ConfigError, AttributeError) as error:
        raise ConfigError(f"{id} cannot be used: {error}") from error
    if not isinstance(space.observation, Box) or len(space.observation.shape) != 1:
        raise ConfigError(
            f"{id} observes {space.observation.describe()}, not one vector; set env.flatten=true "
            "(wrappers.FlattenObservation)"
        )
    if not isinstance(space.action, Box | Discrete):
        raise ConfigError(
            f"{id} acts in {space.action.describe()}; a vector or one Discrete choice is supported: make one of those "
            "of it with gymnasium.wrappers.TransformAction in your own id"
        )
    return space
