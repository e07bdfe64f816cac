"""Recorded rows against the environment that they are to be used in, before anything starts."""

from __future__ import annotations

import torch
from tensordict import TensorDict
from torch import Tensor

from unified_rl.errors import ConfigError
from unified_rl.spaces import Space

MOST_FAR = 0.05
"""Share of actions that may lie further outside the bounds than these are apart; a wide Gaussian policy has fewer."""


def fitted(rows: TensorDict, space: Space, setting: str) -> TensorDict:
    """Rows of a robot's data set with their columns in the dtypes that policies take, all of them checked.

    Args:
        rows: ``[N]`` with ``observation`` and ``action``, and whatever else was recorded.
        space: of the environment.
        setting: that names the data set, for errors.

    Returns:
        The rows: observations ``[N, d]`` float32; actions ``[N, a]`` float32, or int64 choices from 0.

    Raises:
        ConfigError: another width, a NaN or infinity, choices that the environment does not have, or many actions far
            outside its bounds; names the rows.
    """
    rows = rows.copy()
    count = len(rows)
    for key in ("observation", "next_observation"):
        if key in rows.keys():
            rows[key] = _numbers(rows[key], count, key, space.observation_dim, setting)
    _refuse(~_finite(rows["observation"]), f"the observations of {setting} are not finite")
    if "next_observation" in rows.keys():
        over = rows["terminated"].reshape(count) if "terminated" in rows.keys() else torch.zeros(count).bool()
        _refuse(~_finite(rows["next_observation"]) & ~over, f"the next observations of {setting} are not finite")
    if "reward" in rows.keys():
        rows["reward"] = _numbers(rows["reward"], count, "reward", 1, setting).reshape(count)
        _refuse(~_finite(rows["reward"]), f"the rewards of {setting} are not finite")
    action = _numbers(rows["action"], count, "action", space.action_dim, setting)
    _refuse(~_finite(action), f"the actions of {setting} are not finite")
    rows["action"] = _chosen(action, space, setting) if space.action.choices else _inside(action, space, setting)
    return rows


def _numbers(column: Tensor, count: int, key: str, width: int, setting: str) -> Tensor:
    """A column as ``[N, width]`` float32; a single number a row may lack its dimension."""
    flat = column.reshape(count, -1)
    if flat.shape[1] != width or column.is_complex():
        kind = "complex " if column.is_complex() else ""
        raise ConfigError(
            f"{setting} holds {key}s of {flat.shape[1]} {kind}entries, but the environment's have {width}: the rows "
            "are of another environment"
        )
    return flat.to(torch.float32)


def _finite(column: Tensor) -> Tensor:
    return torch.isfinite(column.reshape(len(column), -1)).all(-1)


def _refuse(wrong: Tensor, what: str) -> None:
    """Raises ConfigError where a row is wrong; names the first ones."""
    if bool(wrong.any()):
        raise ConfigError(f"{what}: {_named(wrong)}; leave them out or mend them")


def _named(wrong: Tensor) -> str:
    found = wrong.nonzero().flatten().tolist()
    first = ", ".join(map(str, found[:5]))
    more = f" ... ({len(found)} of {len(wrong)})" if len(found) > 5 else f" (of {len(wrong)})"
    return f"row{'s' * (len(found) > 1)} {first}{more}"


def _chosen(action: Tensor, space: Space, setting: str) -> Tensor:
    """Choices ``[N, a]`` int64, counted from 0."""
    counts = torch.tensor(space.action.choices, dtype=torch.float32)
    wrong = ((action != action.round()) | (action < 0) | (action >= counts)).any(-1)
    if bool(wrong.any()):
        example = action[wrong][0].tolist()
        raise ConfigError(
            f"{setting} holds actions that are no choices of the environment, {space.action.describe()}, which rows "
            f"count from 0: {_named(wrong)}, for example {example}"
        )
    return action.to(torch.int64)


def _inside(action: Tensor, space: Space, setting: str) -> Tensor:
    """Actions of which few lie far outside the bounds; in another unit, such as degrees, nearly all would."""
    sizes = space.sizes()
    low, high = (torch.tensor(sizes[key]) for key in ("action_low", "action_high"))
    far = torch.maximum(low - action, action - high) > (high - low)
    share = far.float().mean(0)
    worst = int(share.argmax())
    if float(share[worst]) > MOST_FAR:
        column = action[:, worst]
        raise ConfigError(
            f"{100 * float(share[worst]):.0f} % of the actions of {setting} lie far outside the environment's bounds: "
            f"entry {worst} is between {float(column.min()):g} and {float(column.max()):g}, its bounds are "
            f"{float(low[worst]):g} and {float(high[worst]):g} ({_named(far[:, worst])}); scale them to its units"
        )
    return action
