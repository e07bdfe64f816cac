"""What is put around a control environment: a history of observations, actions that last for several steps."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from unified_rl.configurable import configurable
from unified_rl.envs.control.base import ControlEnvBase, EnvWrapper
from unified_rl.envs.control.chunk import ActionChunk
from unified_rl.errors import CheckpointError
from unified_rl.observations import layout_of, stacked
from unified_rl.protocols import StepResult
from unified_rl.ranges import Count, UnitInterval, ranged
from unified_rl.spaces import Space


@configurable
@ranged("env")
class ActionRepeat(ActionChunk):
    """Executes every action ``times`` times: an action chunk all of whose actions are the same.

    The reward is ``sum_i gamma^i r_i`` over the executed steps, and the discount of a decision that of its steps, so
    ``gamma`` means one step of the environment inside, as everywhere.

    Args:
        env: an environment whose :meth:`advance` accepts a mask of running simulations.
        times: steps of an action.
        gamma: discount between them; a run gives ``agent.gamma``, and None is 0.99.
    """

    def __init__(self, env: ControlEnvBase, times: Count = 2, gamma: UnitInterval | None = None) -> None:
        EnvWrapper.__init__(self, env, env.space, times)
        self.horizon = self.times = times
        self._gamma = 0.99 if gamma is None else gamma

    def plan(self, action: Tensor) -> Tensor:
        """The action ``[K, a]`` at each step, ``[K, times, a]``."""
        return action.reshape(self.num_envs, 1, -1).expand(-1, self.horizon, -1)


@configurable
@ranged("env")
class FrameStack(EnvWrapper):
    """Shows the newest ``frames`` observations together, oldest first, in rows ``[K, frames * w]``.

    The first observation of an episode stands for those before it, as in Gymnasium's ``FrameStackObservation``. Inside
    :class:`ActionChunk` every executed step counts, not every decision. An array of numbers becomes a vector, an image
    one with the channels of all (:func:`unified_rl.observations.stacked`).

    Args:
        env: an environment whose :meth:`advance` accepts a mask of running simulations.
        frames: how many.
    """

    def __init__(self, env: ControlEnvBase, frames: Count = 2) -> None:
        one = env.space.observation
        super().__init__(env, Space(stacked(one, frames), env.space.action))
        self.frames, self.layout = frames, layout_of(one)
        self._seen = env.current_observation().unsqueeze(1).repeat(1, frames, 1)

    def current_observation(self) -> Tensor:
        """What the policy sees now, rows ``[K, frames * w]``."""
        return self.layout.stack(self._seen).clone()

    def advance(self, action: Tensor, running: Tensor | None = None) -> StepResult:
        """Steps the simulations ``running [K]`` bool (default: all); the others keep their history."""
        step = self.inner.advance(action, running)
        shifted = torch.cat([self._seen[:, 1:], step.next_observation.unsqueeze(1)], 1)
        self._seen = shifted if running is None else torch.where(running[:, None, None], shifted, self._seen)
        seen = self.layout.stack(self._seen)
        return step._replace(observation=seen, next_observation=seen)

    def restart(self, ended: Tensor) -> Tensor:
        """Starts new episodes where ``ended [K]``; their rows ``[n, frames * w]``."""
        first = self.inner.restart(ended).unsqueeze(1).repeat(1, self.frames, 1)
        self._seen = self._seen.clone()
        self._seen[ended] = first
        return self.layout.stack(first)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The state of the environment inside, and the history."""
        return {"inner": self.inner.state_dict(), "seen": self._seen.clone()}

    def load_state_dict(self, state: dict[str, Any], *args: Any, **kwargs: Any) -> None:  # type: ignore[override]
        """Restores :meth:`state_dict`.

        Raises:
            CheckpointError: another number of simulations, or another history.
        """
        if state["seen"].shape != self._seen.shape:
            saved, mine = tuple(state["seen"].shape), tuple(self._seen.shape)
            raise CheckpointError(f"saved histories are {saved}, this environment's are {mine}: same env.frame_stack?")
        self.inner.load_state_dict(state["inner"])
        self._seen = state["seen"].clone()
