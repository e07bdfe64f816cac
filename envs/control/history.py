"""The last few observations at once, over environments that are stepped in batches."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from unified_rl.envs.control.base import ControlEnvBase
from unified_rl.envs.control.chunk import ActionChunk
from unified_rl.errors import ConfigError
from unified_rl.interop.deadline import seconds_of
from unified_rl.observations import layout_of
from unified_rl.protocols import StepResult, TellsResumable
from unified_rl.ranges import TwoOrMore, ranged
from unified_rl.spaces import Box, Space


@ranged("env")
class History(ControlEnvBase):
    """Shows the last ``n`` observations, the oldest first; the first of an episode stands for those before it.

    As ``gymnasium.wrappers.FrameStackObservation`` with padding by the reset's observation.

    Args:
        env: an environment whose observations are vectors.
        history: n.

    Raises:
        ConfigError: observations of another kind.
    """

    def __init__(self, env: ControlEnvBase, history: TwoOrMore) -> None:
        one = env.space.observation
        if not isinstance(one, Box) or len(one.shape) != 1:
            raise ConfigError(f"env.history stacks vectors, and these are {one.describe()}")
        low, high = (tuple(bound.ravel().tolist()) * history for bound in (one.low_array, one.high_array))
        stacked = Box((history, *one.shape), one.dtype, low, high)
        super().__init__(env.num_envs, Space(stacked, env.space.action), env.max_steps)
        self.inner, self.history, self._width = env, history, layout_of(one).width
        self.steps_per_action = env.steps_per_action
        self._rows = env.current_observation().repeat(1, history)

    @property
    def step_seconds(self) -> float | None:
        """Time limit of a step: that of the environment inside."""
        return seconds_of(self.inner)

    def advance(self, action: Tensor, running: Tensor | None = None) -> StepResult:
        """Steps the environment inside; simulations that stand still keep what they see."""
        step = self.inner.advance(action, running)
        later = torch.cat((self._rows[:, self._width :], step.next_observation), dim=1)
        self._rows = later if running is None else torch.where(running.unsqueeze(-1), later, self._rows)
        return step._replace(observation=self._rows, next_observation=self._rows)

    def restart(self, ended: Tensor) -> Tensor:
        """Starts new episodes where ``ended [K]``; their observations ``[m, n * d]`` float32."""
        fresh = self.inner.restart(ended).repeat(1, self.history)
        self._rows = self._rows.clone()
        self._rows[ended] = fresh
        return fresh

    def current_observation(self) -> Tensor:
        """What the policy sees now, ``[K, n * d]`` float32."""
        return self._rows.clone()

    def seed_streams(self, seed: int) -> None:
        """Restarts the random streams of the environment inside."""
        self.inner.seed_streams(seed)

    def resumable(self) -> str | bool:
        """As the environment inside; True where that knows no other way."""
        return self.inner.resumable() if isinstance(self.inner, TellsResumable) else True

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The environment inside, and the observations that are shown."""
        return {"env": self.inner.state_dict(), "rows": self._rows.clone()}

    def load_state_dict(self, state: dict[str, Any], *args: Any, **kwargs: Any) -> None:  # type: ignore[override]
        """Restores :meth:`state_dict`."""
        self.inner.load_state_dict(state["env"])
        self._rows = state["rows"].clone()

    def close(self, *, raise_if_closed: bool = True) -> None:
        """Closes the environment inside."""
        self.inner.close(raise_if_closed=False)
        super().close(raise_if_closed=False)


def with_history_and_chunk(env: ControlEnvBase, history: int, chunk: int, gamma: float | None) -> ControlEnvBase:
    """The environment as ``env.history`` and ``env.chunk`` ask for it: every single step is remembered."""
    env = env if history == 1 else History(env, history)
    return env if chunk == 1 else ActionChunk(env, chunk, gamma)
