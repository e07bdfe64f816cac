"""What episodes of a simulation begin with, as numbers: rows with the same start are compared with each other."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from unified_rl.configurable import configurable
from unified_rl.errors import ConfigError
from unified_rl.observations import FLOAT, Layout, layout_of
from unified_rl.protocols import ControlEnv, HasGoals
from unified_rl.ranges import Positive, Whole, ranged
from unified_rl.spaces import Space

FARTHEST = 2.0**62
"""Cells are counted up to here, and everything beyond lies in the last one."""


@configurable
@ranged("rollout.starts")
class Starts:
    """Numbers the starts of episodes by their first observation: the same cell is the same start.

    In a simulation that is what a prompt is in language: ``prompt_id`` for a success tracker, and the ``group`` within
    which rows are compared.

    Args:
        of: what tells starts apart: ``observation`` (all of it), ``goal`` (the desired goal of an environment that has
            goals), or a list of entries of the observation, from 0: its numbers in their order, then its pixels.
        grid: width of a cell, in the units of the observation. Cells are centred at its multiples, so a start that
            jitters around 0 by less than half of it is one. Bytes of images and one-hot choices are told apart by every
            width below 1.

    Raises:
        ConfigError: an empty list, or ``grid`` that is not above 0.
    """

    def __init__(self, of: Literal["observation", "goal"] | list[Whole] = "observation", grid: Positive = 0.1) -> None:
        self.of, self.grid = of, grid
        if not isinstance(of, str) and not of:
            raise ConfigError("rollout.starts.of=[] looks at nothing, so all starts would be one: name an entry")
        self._layout: Layout | None = None
        self._at: Tensor | None = None if isinstance(of, str) else torch.tensor(list(of), dtype=torch.int64)

    def attach(self, env: ControlEnv) -> None:
        """Finds the entries that it looks at among those of an environment's observation.

        Raises:
            ConfigError: there are no such entries, or no goal.
        """
        self._layout = layout_of(Space.of(env.policy_inputs()).observation)
        if self.of == "goal":
            goals = env.goals if isinstance(env, HasGoals) else None
            if goals is None:
                raise ConfigError(
                    "rollout.starts.of=goal needs observations with achieved_goal and desired_goal (env=gymnasium "
                    "env.flatten=true, or env=point_maze env.reward=sparse), no images, and none of env.frame_stack, "
                    f"env.action_repeat, env.chunk; {type(env).__name__} shows no goals: name the goal's entries of "
                    "the observation, rollout.starts.of=[4,5]"
                )
            self._at = goals.desired
        elif self._at is not None:
            entries = self._layout.vector + sum(leaf.part.width for leaf in self._layout.images)
            if int(self._at.max()) >= entries:
                raise ConfigError(
                    f"rollout.starts.of names entry {int(self._at.max())} of the observation, whose entries are 0 to "
                    f"{entries - 1}"
                )

    def number(self, observation: Tensor) -> Tensor:
        """Numbers of starts, ``[n]`` int64 from 0; the same in every process and every run.

        They are hashes of 63 bits: two cells share one with a probability of about 2 ** -63.

        Args:
            observation: ``[n, w]``, rows of float32 or bytes, of the first step of an episode each.
        """
        entries = self._entries(observation.detach().cpu())
        seen = entries if self._at is None else entries[:, self._at]
        cells = np.rint(seen.numpy().astype(np.float64) / self.grid)
        whole = cells.clip(-FARTHEST, FARTHEST).astype(np.int64).astype(np.uint64)  # -0.0 and 0.0 are one
        place = _mixed(np.arange(1, whole.shape[1] + 1, dtype=np.uint64))
        number = _mixed(_mixed(whole + place).sum(1, dtype=np.uint64)) >> np.uint64(1)
        return torch.from_numpy(number.astype(np.int64))

    def _entries(self, rows: Tensor) -> Tensor:
        """Numbers and pixels ``[n, e]``; of an observation with both, the numbers lie in the rows as bytes."""
        if self._layout is None or not (self._layout.images and self._layout.vector):
            return rows
        pixels = rows[:, FLOAT * self._layout.vector :]
        return torch.cat([self._layout.unpack(rows)[0], pixels.float()], -1)


def _mixed(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of SplitMix64 (Steele, Lea and Flood, 2014): every bit depends on every other, modulo 2 ** 64."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    out: NDArray[Any] = x ^ (x >> np.uint64(31))
    return out
