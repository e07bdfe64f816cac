"""Any Gymnasium id as a batched environment."""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from torch import Tensor

from unified_rl.envs.control.base import ControlEnvBase, check_count, raise_non_finite
from unified_rl.errors import CheckpointError, ConfigError, RestoreError
from unified_rl.protocols import StepResult
from unified_rl.spaces import Box, Discrete, Space

UNLIKE = (
    "replaying the running episodes gave other observations: this environment is not deterministic given its seed "
    "(a simulator with its own clock, a wrapper that keeps statistics)"
)


class GymnasiumEnv(ControlEnvBase):
    """K copies of a registered Gymnasium environment in one vector adapter.

    The adapter resets ended copies itself in the step that ended them (Gymnasium's default would spend the next step
    on it), so every transition is a real one and the true final observation is kept. Every episode is reset with an
    explicit seed from one stream.

    A checkpoint holds each running episode's seed and actions, and restoring replays them: exact for every environment
    that is deterministic given its seed, refused with :class:`~unified_rl.errors.RestoreError` for any other.

    Actions are cast to the dtype of the action space and then clipped to its bounds, so a float32 action at a bound
    that float32 rounds outward is still inside. Observations and rewards are handed out as float32.

    Args:
        id: a registered id, for example ``Pendulum-v1``.
        num_envs: K.
        seed: of the stream of episode seeds.
        flatten: flatten dict, image or discrete observations to one vector.
        max_episode_steps: the time limit; the registered one if None.
        make_kwargs: further arguments of ``gymnasium.make``.

    Raises:
        ConfigError: an unknown id (names the nearest), a missing package, no time limit, observations that are not a
            vector, or actions that are neither an array of numbers nor one discrete choice.
    """

    def __init__(
        self,
        id: str,
        num_envs: int = 1,
        seed: int = 0,
        flatten: bool = False,
        max_episode_steps: int | None = None,
        make_kwargs: dict[str, Any] | None = None,
    ) -> None:
        check_count(num_envs)
        options = {**(make_kwargs or {}), "max_episode_steps": max_episode_steps}
        vector = _make_vector(id, num_envs, flatten, options)
        self._make_copy: Callable[[], gymnasium.Env[Any, Any]] = lambda: _make_vector(id, 1, flatten, options).envs[0]
        limit = vector.envs[0].spec.max_episode_steps if vector.envs[0].spec else None
        if not limit:
            raise ConfigError(f"{id} has no time limit; set env.max_episode_steps")
        space = _space(id, vector.single_observation_space, vector.single_action_space)
        super().__init__(num_envs, space, limit)
        self._vector = vector
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
        """Steps every copy with ``action [K, a]`` (discrete: ``[K]`` or ``[K, 1]``) and resets none."""
        if running is not None and not bool(running.all()):
            raise ConfigError("a Gymnasium environment cannot step only some of its copies; use chunks of length 1")
        values = self._to_numpy(action)
        observation, reward, terminated, truncated, _ = self._vector.step(values)
        for played, value in zip(self._played, values, strict=True):
            played.append(np.copy(value))
        self._observation = torch.from_numpy(observation.astype(np.float32))
        rewards = torch.from_numpy(reward.astype(np.float32))
        if not bool(torch.isfinite(self._observation.sum() + rewards.sum())):
            elapsed = torch.tensor([len(played) for played in self._played])
            raise_non_finite("observation", self._observation, elapsed)
            raise_non_finite("reward", rewards, elapsed)
        return StepResult(
            self._observation,
            rewards,
            torch.from_numpy(terminated),
            torch.from_numpy(truncated),
            self._observation,
            torch.ones(self.num_envs, dtype=torch.int64),
            {},
        )

    def _to_numpy(self, action: Tensor) -> np.ndarray[Any, Any]:
        """What the environment takes: in its space's dtype, and inside its bounds."""
        if not bool(torch.isfinite(action).all()):
            raise_non_finite("action", action, torch.tensor([len(played) for played in self._played]))
        return self.space.action.cast(action.detach().reshape(self.num_envs, -1).numpy())

    def restart(self, ended: Tensor) -> Tensor:
        """Starts new episodes where ``ended [K]`` bool; their observations ``[n, d]`` float32."""
        mask = ended.numpy().copy()
        self._seeds[mask] = self._rng.integers(2**31, size=int(mask.sum()))
        seeds: list[int | None] = [int(seed) for seed in self._seeds]
        observation, _ = self._vector.reset(seed=seeds, options={"reset_mask": mask})
        for lane in np.flatnonzero(mask):
            self._played[lane] = []
        fresh = torch.from_numpy(observation[mask].astype(np.float32))
        self._observation = self._observation.clone()
        self._observation[ended] = fresh
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
        self.restart(torch.ones(self.num_envs, dtype=torch.bool))  # clears the adapter's flags of ended episodes
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
            copy.close()  # type: ignore[no-untyped-call]
        return same or UNLIKE

    def _replay(self, lane: int, copy: gymnasium.Env[Any, Any] | None = None) -> np.ndarray[Any, Any]:
        copy = self._vector.envs[lane] if copy is None else copy
        observation, _ = copy.reset(seed=int(self._seeds[lane]))
        for action in self._played[lane]:
            observation = copy.step(action)[0]
        out: np.ndarray[Any, Any] = observation
        return out

    def close(self, *, raise_if_closed: bool = True) -> None:
        """Closes every copy."""
        self._vector.close()
        super().close(raise_if_closed=False)


def _make_vector(id: str, num_envs: int, flatten: bool, make_kwargs: dict[str, Any]) -> SyncVectorEnv:
    if id not in gymnasium.registry:
        near = difflib.get_close_matches(id, list(gymnasium.registry), 1, 0.3)
        hint = f", did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"Gymnasium has no environment {id!r}{hint} (your own must be registered before it is named)")
    wrappers = [gymnasium.wrappers.FlattenObservation] if flatten else []
    try:
        vector = gymnasium.make_vec(
            id,
            num_envs,
            vectorization_mode="sync",
            vector_kwargs={"autoreset_mode": AutoresetMode.DISABLED},
            wrappers=wrappers,
            **make_kwargs,
        )
    except (gymnasium.error.Error, ImportError, TypeError) as error:
        raise ConfigError(f"{id} could not be made: {error}") from error
    assert isinstance(vector, SyncVectorEnv)
    return vector


def _space(id: str, observation: gymnasium.Space[Any], action: gymnasium.Space[Any]) -> Space:
    try:
        space = Space.from_gymnasium(observation, action)
    except ConfigError as error:
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
