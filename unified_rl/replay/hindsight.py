"""Hindsight: rows as if the goal had been what was reached later."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
from tensordict import TensorDict
from torch import Tensor

from unified_rl.configurable import configurable
from unified_rl.errors import ConfigError, RecordError
from unified_rl.protocols import Goals
from unified_rl.ranges import Count, ranged
from unified_rl.replay.buffer import Replay
from unified_rl.replay.ring import IntArray

READ = ("observation", "next_observation", "reward", "terminated")


@configurable
@ranged("replay")
class HindsightReplay(Replay):
    """Single rows, of which ``k`` of ``k + 1`` are given another goal: one that the same episode reached afterwards.

    Goals are exchanged when rows are drawn, so a row meets others every time; what is stored stays. "Hindsight
    Experience Replay" (arXiv:1707.01495). Rewards are computed anew by the environment's ``compute_reward``, of the
    goal reached by the row's next observation; with ``compute_terminated``, so is the end.

    Args:
        k: relabelled rows for each that keeps its own goal.
        strategy: ``future`` takes the goal reached at a random step of the rest of the episode, this one included;
            ``final`` that at its last step.
        options: of :class:`~unified_rl.replay.Replay`.

    Attributes:
        goals: of the environment; a run sets them.

    Raises:
        ConfigError: rewards of the environment that ``compute_reward`` does not give (at the first draw).
    """

    def __init__(
        self, capacity: Count, *, k: Count = 4, strategy: Literal["future", "final"] = "future", **options: Any
    ) -> None:
        super().__init__(capacity, **options)
        self.k, self.strategy = k, strategy
        self.goals: Goals | None = None
        self._agrees = False

    def sample(
        self, batch_size: int | None, *, length: int | None = None, keys: Any = None, **options: Any
    ) -> TensorDict:
        """As :meth:`Replay.sample`, for a number of single rows.

        Raises:
            RecordError: windows, or a draw of no given size.
        """
        if length is not None or batch_size is None or self.goals is None:
            raise RecordError("hindsight relabels a given number of single rows, in an environment with goals")
        drawn = self._rng.random((2, batch_size))
        out = super().sample(batch_size, keys=None if keys is None else [*dict.fromkeys([*keys, *READ])], **options)
        if not self._agrees:
            self._check(out, self.goals)
        chosen = torch.from_numpy(np.flatnonzero(drawn[0] * (self.k + 1) < self.k)).to(self.device)
        if len(chosen):
            at = self._later(out["index"][chosen].cpu().numpy(), drawn[1][chosen.cpu().numpy()])
            self._relabel(out, chosen, torch.from_numpy(at), self.goals)
        return out if keys is None else out.select(*keys, "index")

    def _later(self, position: IntArray, share: Any) -> IntArray:
        """Positions of steps of the same episodes, as the strategy says."""
        serial = self.ring.serial(position)
        left = self._left(serial, self._episodes(position))
        ahead = left if self.strategy == "final" else np.floor(share * (left + 1)).astype(np.int64)
        return np.asarray(self.ring.position(serial + ahead * self.lanes), dtype=np.int64)

    def _left(self, serial: IntArray, episode: IntArray) -> IntArray:
        """Steps that each row's episode still has in the replay, by bisection: along a lane its number only rises."""
        low = np.zeros_like(serial)
        high = (self.ring.written - 1 - serial) // self.lanes
        while bool((low < high).any()):
            middle = (low + high + 1) // 2
            same = self._episodes(self.ring.position(serial + middle * self.lanes)) == episode
            low, high = np.where(same, middle, low), np.where(same, high, middle - 1)
        return low

    def _episodes(self, position: IntArray) -> IntArray:
        return np.asarray(self._read("episode", torch.from_numpy(position)).cpu().numpy(), dtype=np.int64)

    def _read(self, key: str, position: Tensor) -> Tensor:
        index = position.to(self.device)
        found: Tensor = self._gather(position.numpy(), index, [key])[key]
        return found

    def _relabel(self, rows: TensorDict, chosen: Tensor, later: Tensor, goals: Goals) -> None:
        reached, wanted = goals.achieved, goals.desired
        goal = self._read("next_observation", later)[:, reached]
        after = rows["next_observation"][chosen]
        for key in ("observation", "next_observation"):
            seen = rows[key].clone()
            seen[chosen.unsqueeze(-1), wanted] = goal
            rows[key] = seen
        reward = goals.reward(after[:, reached], goal)
        rows["reward"] = rows["reward"].index_copy(0, chosen, reward.to(rows["reward"]))
        if goals.terminated is not None:
            ended = goals.terminated(after[:, reached], goal).to(rows["terminated"])
            rows["terminated"] = rows["terminated"].index_copy(0, chosen, ended)

    def _check(self, rows: TensorDict, goals: Goals) -> None:
        """Refuses an environment whose own rewards its ``compute_reward`` does not give."""
        after = rows["next_observation"]
        again = goals.reward(after[:, goals.achieved], after[:, goals.desired]).to(rows["reward"])
        wrong = (again - rows["reward"]).abs() > 1e-4 * (1 + rows["reward"].abs())
        if bool(wrong.any()):
            row = int(wrong.nonzero()[0])
            raise ConfigError(
                f"replay=her computes rewards anew by compute_reward, which gives {float(again[row]):g} where the "
                f"environment's step gave {float(rows['reward'][row]):g}: leave out wrappers that change rewards, or "
                "use replay=uniform"
            )
        if goals.terminated is not None:
            ended = goals.terminated(after[:, goals.achieved], after[:, goals.desired]).to(rows["terminated"])
            if bool((ended & ~rows["terminated"]).any()):
                raise ConfigError(
                    "replay=her asks compute_terminated anew, which ends episodes that the environment's own step went "
                    "on with: leave out wrappers that change ends, or use replay=uniform"
                )
        self._agrees = True
