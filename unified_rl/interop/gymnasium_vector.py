"""Gymnasium's own environments: a vector environment as it is, and copies of one that a function makes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from unified_rl.config import build
from unified_rl.errors import ConfigError, EnvError, RestoreError
from unified_rl.interop.deadline import seconds_of
from unified_rl.interop.words import OWN_NAMES, describe, one_line
from unified_rl.observations import MisfitError, layout_of
from unified_rl.protocols import ControlEnv, StepResult
from unified_rl.spaces import Box, PolicyInputs, Space

Array: TypeAlias = NDArray[Any]
COPIES = "unified_rl.envs.control.GymnasiumEnv"
"""What steps copies of one environment."""
INEXACT = "a Gymnasium vector environment offers no way to put it back to where it was"
LIMIT = 1000
"""Length after which evaluation gives up on an episode of an environment that has no time limit."""


class GymnasiumVectorEnv:
    """Steps a ``gymnasium.vector.VectorEnv`` with auto-reset and true final observations.

    In the mode ``SAME_STEP`` final observations and infos are those that it reports (``final_obs``, ``final_info``); in
    ``DISABLED``, and in Gymnasium's own vector environments in ``NEXT_STEP`` too, ended copies are reset here at once,
    by ``reset(options={"reset_mask": ...})``. Else ``NEXT_STEP`` is refused: it spends a step of every ended copy on
    its reset, and a row of a step that never happened would be learnt from.

    Args:
        env: the vector environment.
        seed: of its first reset, where that is given none.

    Raises:
        ConfigError: such an environment, or a space without rows.
    """

    domain = "control"

    def __init__(self, env: Any, seed: int | None = None) -> None:
        from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv

        self.env, self.name, self.num_envs = env, type(env.unwrapped).__name__, int(env.num_envs)
        self.step_seconds = seconds_of(env)
        mode = env.metadata.get("autoreset_mode", AutoresetMode.NEXT_STEP)
        own = isinstance(env.unwrapped, SyncVectorEnv | AsyncVectorEnv)
        if mode == AutoresetMode.NEXT_STEP and not own:
            raise ConfigError(
                f"{self.name} resets ended copies in the next step, which makes a row of a step that never happened; "
                "let its metadata say autoreset_mode SAME_STEP (with final_obs in the infos) or DISABLED"
            )
        self._resets_itself = mode == AutoresetMode.SAME_STEP
        try:
            self.space = Space.from_gymnasium(env.single_observation_space, env.single_action_space)
        except ConfigError as error:
            raise ConfigError(f"{self.name} cannot be used: {error}") from error
        if self.space.action.choices is None and not isinstance(self.space.action, Box):
            raise ConfigError(f"{self.name} acts in {self.space.action.describe()}; a vector and choices are supported")
        self.layout = layout_of(self.space.observation)
        self.max_steps = int(getattr(env.spec, "max_episode_steps", None) or LIMIT)
        self._begun, self._count, self._seed = False, 0, seed

    def policy_inputs(self) -> dict[str, Any]:
        """What a policy's constructor takes: ``space``."""
        return PolicyInputs(self.space)

    def reset_batch(self, seed: int | None = None) -> Tensor:
        """Resets every copy; rows ``[K, w]``.

        Raises:
            EnvError: it raised, or returned what its space does not hold.
        """
        self._begun, self._count = True, 0
        first, self._seed = self._seed, None
        return self._rows(self._call("reset", self.env.reset, seed=first if seed is None else seed)[0], "reset")

    def step_batch(self, action: Tensor) -> StepResult:
        """Steps every copy with ``action [K, a]`` and resets those that ended.

        Numbers in the infos are told where episodes end.

        Raises:
            EnvError: it raised, or returned something else than five values of its spaces.
        """
        if not self._begun:
            self.reset_batch()
        self._count += 1
        where = f"step {self._count}"
        values = self.space.action.cast(action.detach().reshape(self.num_envs, -1).numpy())
        answer = self._call(where, self.env.step, values)
        if not isinstance(answer, tuple) or len(answer) != 5:
            raise EnvError(
                f"{self.name} returned {describe(answer)} from {where}; five values are expected: observations, "
                "rewards, terminations, truncations, infos"
            )
        shown, reward, terminated, truncated, infos = answer
        terminated, truncated = (self._column(x, where).astype(np.bool_) for x in (terminated, truncated))
        observation = final = self._rows(shown, where)
        ended = terminated | truncated
        if ended.any():
            told = infos.get("final_info", {}) if self._resets_itself else infos
            observation, final, infos = (*self._after(shown, final, infos, ended, where), told)
        return StepResult(
            observation,
            torch.from_numpy(self._column(reward, where).astype(np.float32)),
            torch.from_numpy(terminated),
            torch.from_numpy(truncated),
            final,
            torch.ones(self.num_envs, dtype=torch.int64),
            self._told(infos, ended) if ended.any() else {},
        )

    def _after(
        self, shown: Any, rows: Tensor, infos: Mapping[str, Any], ended: NDArray[np.bool_], where: str
    ) -> tuple[Tensor, Tensor]:
        """What the policy sees next and what it would have seen, where episodes ended."""
        if not self._resets_itself:
            answer = self._call("reset", self.env.reset, options={"reset_mask": ended.copy()})
            fresh = self._rows(answer[0], "reset")
            return torch.where(torch.from_numpy(ended).unsqueeze(-1), fresh, rows), rows
        last = infos.get("final_obs")
        if last is None:
            raise EnvError(
                f"{self.name} resets ended copies in the same step, but its infos of {where} hold no final_obs: the "
                "value of a state that was cut off is needed"
            )
        final = rows.clone()
        for lane in np.flatnonzero(ended).tolist():
            final[lane] = self._rows(_of(last, lane), where, ())
        return rows, final

    def _told(self, infos: Mapping[str, Any], ended: NDArray[np.bool_]) -> dict[str, Tensor]:
        """Numbers of infos where episodes ended, ``is_success`` as ``success`` too; NaN elsewhere."""
        found: dict[str, Tensor] = {}
        for key, value in infos.items():
            numbers = np.asarray(value) if not isinstance(value, Mapping) else np.empty(0)
            if isinstance(key, str) and numbers.dtype.kind in "biuf" and numbers.shape == (self.num_envs,):
                there = ended & np.asarray(infos.get(f"_{key}", ended), np.bool_)
                if there.any() and not key.startswith("_"):
                    found[key] = torch.from_numpy(
                        np.where(there, numbers.astype(np.float32), np.nan).astype(np.float32)
                    )
        if "is_success" in found:
            found.setdefault("success", found["is_success"])
        return {key: value for key, value in found.items() if key not in OWN_NAMES}

    def _call(self, where: str, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        try:
            return call(*args, **kwargs)
        except (Exception, SystemExit) as error:
            raise EnvError(f"{self.name} raised in {where}: {one_line(error)}") from error

    def _rows(self, value: Any, where: str, lead: tuple[int, ...] | None = None) -> Tensor:
        try:
            rows = self.layout.pack(value, (self.num_envs,) if lead is None else lead)
        except MisfitError as error:
            raise EnvError(
                f"{self.name} returned observation{f'[{error.where}]' if error.where else ''}={describe(error.value)} "
                f"from {where}; {error.expected} is expected, for each of {self.num_envs} copies"
            ) from None
        return torch.from_numpy(np.array(rows))

    def _column(self, value: Any, where: str) -> Array:
        found = np.asarray(value)
        if found.dtype.kind not in "biuf" or found.shape != (self.num_envs,):
            raise EnvError(f"{self.name} returned {describe(value)} from {where}; {self.num_envs} numbers are expected")
        return found

    def state_dict(self) -> dict[str, Any]:
        """Nothing: see :meth:`load_state_dict`."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises RestoreError: transitions from the stored observation on would never have happened."""
        raise RestoreError(INEXACT)

    def resumable(self) -> str | bool:
        """Why a run in it cannot be resumed bit for bit."""
        return INEXACT

    def close(self) -> None:
        """Closes the environment."""
        self.env.close()


def _of(batch: Any, lane: int) -> Any:
    """One copy's entry of a batch: of an array, or of dictionaries and tuples of arrays."""
    if isinstance(batch, Mapping):
        return {key: _of(value, lane) for key, value in batch.items()}
    return tuple(_of(value, lane) for value in batch) if isinstance(batch, tuple) else batch[lane]


def from_gymnasium(env: Any, again: Callable[[], Any] | None, num_envs: int, seed: int) -> ControlEnv | None:
    """An environment of Gymnasium's as a control environment of ours; None of anything else.

    Args:
        env: the environment.
        again: makes another one like it.
        num_envs: copies of an environment that is one.
        seed: of the episodes.

    Raises:
        ConfigError: one environment that nobody can make again, or one that cannot be used.
    """
    import gymnasium

    if isinstance(env, gymnasium.vector.VectorEnv):
        return GymnasiumVectorEnv(env, seed)
    if not isinstance(env, gymnasium.Env):
        return None
    if again is None:
        raise ConfigError(
            f"{type(env).__name__} is a Gymnasium environment, and a run steps several: give what makes it, "
            "env=gymnasium env.make=module:function with --allow module, or GymnasiumEnv(make=function, num_envs=K)"
        )
    made, more = [env], again

    def make() -> Any:
        return made.pop() if made else more()

    make.__name__ = getattr(again, "__name__", type(env).__name__)
    given: dict[str, Any] = {"make": make, "num_envs": num_envs, "seed": seed, "several_choices": True}
    copies: ControlEnv = build({"_target_": COPIES}, **given)
    return copies
