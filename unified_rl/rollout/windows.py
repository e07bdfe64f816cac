"""Recorded steps as rows of a policy that sees a history or plans several actions, and episodes held out."""

from __future__ import annotations

import math
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor

from unified_rl.errors import ConfigError
from unified_rl.observations import Layout, layout_of
from unified_rl.rollout.recorded import fitted
from unified_rl.spaces import Box, Space


def sizes_of(env: Any) -> tuple[int, int]:
    """How many observations a policy of the environment sees at once, and how many actions it plans."""
    frames = horizon = 1
    while env is not None:
        frames *= int(getattr(env, "frames", 1))
        horizon *= int(getattr(env, "horizon", 1)) if hasattr(env, "plan") and not hasattr(env, "times") else 1
        env = getattr(env, "inner", None)
    return frames, horizon


def fitted_windows(rows: TensorDict, env: Any, space: Space, setting: str) -> TensorDict:
    """Rows of a data set, cut into the windows of an environment's policy where they are single steps, and checked.

    Args:
        rows: ``[N]``.
        env: of the run.
        space: of that.
        setting: that names the data set, for errors.

    Raises:
        ConfigError: as :func:`windowed` and :func:`~unified_rl.rollout.recorded.fitted`.
    """
    width = layout_of(space.observation).width, space.action_dim
    return fitted(windowed(rows, *sizes_of(env), width, setting, _single(env)), space, setting)


def _single(env: Any) -> Layout | None:
    """The layout of one observation, where an environment shows several."""
    while (inner := getattr(env, "inner", None)) is not None:
        if hasattr(env, "frames"):
            return layout_of(inner.space.observation)
        env = inner
    return None


def refuse_single_steps(rows: TensorDict, env: Any, setting: str) -> None:
    """Refuses rows of other steps than the run's, where a decision of the run repeats its action.

    Args:
        rows: ``[N]``; without ``discount`` they are of single steps, and with one it tells how many steps a row took.
            Rows that end an episode may have taken fewer. Powers of another discount are not judged here.
        env: of the run.
        setting: that names the data set, for errors.

    Raises:
        ConfigError: single steps, or no row that goes on took as many steps as a decision of the run.
    """
    times, gamma, inner = 1, 0.0, env
    while inner is not None:
        if hasattr(inner, "plan") and hasattr(inner, "times"):
            times, gamma = times * int(inner.times), float(inner.gamma)
        inner = getattr(inner, "inner", None)
    if times == 1:
        return
    held, theirs = "single steps", 1
    if "discount" in rows.keys():
        if gamma in (0.0, 1.0):  # whose powers tell nothing
            return
        whole = rows["action"].reshape(len(rows), -1).shape[1] == Space.of(env.policy_inputs()).action_dim
        wanted = env.steps_per_action if whole else times  # plans are cut from rows of one action
        taken = executed_steps(_going_on(rows), gamma).unique()
        if not len(taken) or bool((taken.isnan() | (taken == wanted)).any()):
            return
        most = int(taken.max())
        held, theirs = f"rows of {most} steps" if most > 1 else held, max(1, most * times // wanted)
    raise ConfigError(
        f"{setting} holds {held}, and env.action_repeat={times} lets every action last for {times}: set "
        f"env.action_repeat={theirs}, or record rows with the run's own environment ('unified-rl evaluate RUN --record "
        "FOLDER')"
    )


def _going_on(rows: TensorDict) -> Tensor:
    """Discounts ``[M]`` of the rows that end no episode."""
    ended = torch.zeros(len(rows), dtype=torch.bool)
    for key in ("terminated", "truncated"):
        if key in rows.keys():
            ended |= rows[key].reshape(len(rows)).bool()
    discount: Tensor = rows["discount"].reshape(len(rows))
    return discount[~ended]


def executed_steps(discount: Tensor, gamma: float) -> Tensor:
    """Of how many steps discounts ``[N]`` are, float64; NaN where they are no power of ``gamma``.

    A ``gamma`` of 0 or 1 has no other power: then 1, or NaN.
    """
    found = discount.double()
    power = (found.log() / math.log(gamma)).round().clamp(0, 1000) if 0 < gamma < 1 else torch.ones_like(found)
    return torch.where((found - gamma**power).abs() > 1e-6, torch.nan, power)


class Windows:
    """Which rows lie beside which in their episode.

    Args:
        rows: ``[N]`` with ``episode``; with ``step`` in any order, else each episode's in the order of time.
        setting: that names the data set, for errors.

    Raises:
        ConfigError: rows that tell no episodes.
    """

    def __init__(self, rows: TensorDict, setting: str) -> None:
        if "episode" not in rows.keys():
            raise ConfigError(
                f"the rows of {setting} tell no episodes (the column 'episode'), and nothing else says which steps "
                "follow one another: import them with 'unified-rl data import'"
            )
        episode = rows["episode"].reshape(len(rows))
        order = torch.arange(len(rows))
        if "step" in rows.keys():
            order = rows["step"].reshape(len(rows)).argsort(stable=True)
        self.order = order[episode[order].argsort(stable=True)]
        self.rank = torch.empty_like(self.order)
        self.rank[self.order] = torch.arange(len(rows))
        _, at, counts = torch.unique_consecutive(episode[self.order], return_inverse=True, return_counts=True)
        last = counts.cumsum(0)
        self.low, self.high = (last - counts)[at][self.rank], (last - 1)[at][self.rank]

    def beside(self, offset: int) -> Tensor:
        """Row numbers ``[N]`` of the steps ``offset`` later, the first or last of the episode where there is none."""
        return self.order[torch.maximum(torch.minimum(self.rank + offset, self.high), self.low)]


def windowed(
    rows: TensorDict, frames: int, horizon: int, width: tuple[int, int], setting: str, layout: Layout | None = None
) -> TensorDict:
    """Rows of single steps as those of a policy with a history of ``frames`` and plans of ``horizon`` actions.

    The first observation of an episode stands for those before it, and its last action for those behind it, as in
    "Diffusion Policy" (arXiv:2303.04137). Rows that have the wanted widths already stay as they are.

    Args:
        rows: ``[N]``.
        frames: observations, oldest first.
        horizon: actions, first action first.
        width: of the observation and the action that are wanted.
        setting: that names the data set, for errors.
        layout: of one observation; None is a vector.

    Raises:
        ConfigError: rows that tell no episodes, or plans wanted of rows that hold rewards.
    """
    count = len(rows)
    seen, action = (rows[key].reshape(count, -1) for key in ("observation", "action"))
    stacks = frames > 1 and seen.shape[1] * frames == width[0]
    plans = horizon > 1 and action.shape[1] * horizon == width[1]
    if not stacks and not plans:
        return rows
    if plans and "reward" in rows.keys():
        raise ConfigError(
            f"{setting} holds rewards of single steps, and the policy decides for {horizon} at once: critics learn "
            "from rows that such a policy recorded; set env.chunk=1, or imitate with agent=behavior_cloning"
        )
    windows, rows = Windows(rows, setting), rows.copy()
    if plans:
        rows["action"] = torch.cat([action[windows.beside(k)] for k in range(horizon)], -1)
    if stacks:
        layout = layout_of(Box((seen.shape[1],))) if layout is None else layout
        past = [seen[windows.beside(k - frames + 1)] for k in range(frames)]
        rows["observation"] = layout.stack(torch.stack(past, 1))
        if "next_observation" in rows.keys():
            later = [*past[1:], rows["next_observation"].reshape(count, -1)]
            rows["next_observation"] = layout.stack(torch.stack(later, 1))
    return rows


def held_out(rows: TensorDict, share: float, generator: torch.Generator, setting: str) -> tuple[TensorDict, TensorDict]:
    """Rows to train on, and those of a share of the episodes, at least one, that training never sees.

    Raises:
        ConfigError: rows that tell no episodes, or of one alone.
    """
    if "episode" not in rows.keys():
        raise ConfigError(
            f"rollout.validation holds out whole episodes, and the rows of {setting} tell none (the column 'episode'): "
            "import them with 'unified-rl data import', or leave it out"
        )
    episode = rows["episode"].reshape(len(rows))
    numbers = episode.unique()
    if len(numbers) < 2:
        raise ConfigError(f"rollout.validation={share} holds out episodes, and {setting} has one alone: leave it out")
    count = min(max(1, round(share * len(numbers))), len(numbers) - 1)
    chosen = numbers[torch.randperm(len(numbers), generator=generator)[:count]]
    apart = torch.isin(episode, chosen)
    return rows[~apart], rows[apart]
