"""Recorded rows against the environment that they are to be used in, before anything starts."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from tensordict import TensorDict
from torch import Tensor

from unified_rl.errors import ConfigError
from unified_rl.observations import Layout, layout_of
from unified_rl.spaces import Space

MOST_FAR = 0.05
"""Share of actions that may lie further outside the bounds than these are apart; a wide Gaussian policy has fewer."""

COLUMNS = {
    "observation": "observations",
    "next_observation": "next observations",
    "reward": "rewards",
    "action": "actions",
}
"""Columns of numbers that must be finite, and what they are called."""


def fitted(rows: TensorDict, space: Space, setting: str) -> TensorDict:
    """Rows of a robot's data set with their columns in the dtypes that policies take, all of them checked.

    Args:
        rows: ``[N]`` with ``observation`` and ``action``, and whatever else was recorded.
        space: of the environment.
        setting: that names the data set, for errors.

    Returns:
        The rows: observations ``[N, d]`` float32; actions ``[N, a]`` float32, or int64 choices from 0.

    Raises:
        ConfigError: the first of :func:`faults`; names the rows.
    """
    rows = rows.copy()
    for fault in faults(rows, space, setting):
        raise ConfigError(fault)
    return rows


def faults(rows: TensorDict, space: Space, setting: str) -> Iterator[str]:
    """What keeps rows from being used in an environment, a line each with the numbers of the rows.

    Another width, a NaN or infinity, choices that the environment does not have, or many actions far outside its
    bounds. Columns without a fault are cast in place; ``unified-rl data check`` tells all lines, a run the first.
    """
    flawed, layout = set(), layout_of(space.observation)
    for key, width in (
        ("observation", layout.width),
        ("next_observation", layout.width),
        ("reward", 1),
        ("action", space.action_dim),
    ):
        if key in rows.keys():
            wrong = _width_fault(rows[key], len(rows), key, width, setting)
            seen = key.endswith("observation")
            if wrong is None and seen and layout.images and rows[key].dtype != torch.uint8:
                wrong = f"{setting} holds {key}s of {rows[key].dtype}, and with images rows are of bytes (torch.uint8)"
            if wrong is not None:
                flawed.add(key)
                yield wrong
            elif not (seen and layout.images):
                rows[key] = _numbers(rows[key], len(rows), key)
    for key, what in COLUMNS.items():
        if key not in rows.keys() or key in flawed:
            continue
        wrong_rows = ~_finite(_numbers_of(rows, key, layout))
        if key == "next_observation" and "terminated" in rows.keys():  # nothing is read behind a terminal state
            wrong_rows &= ~rows["terminated"].reshape(len(rows))
        if bool(wrong_rows.any()):
            flawed.add(key)
            yield f"the {what} of {setting} are not finite: {named(wrong_rows)}; leave them out or mend them"
    if not flawed & {"observation", "next_observation"} and {"observation", "next_observation"} <= set(rows.keys()):
        after = rows["next_observation"]  # 0 * NaN is NaN: what is not read must be a number all the same
        whole = _finite(_numbers_of(rows, "next_observation", layout))
        rows["next_observation"] = torch.where(whole.unsqueeze(-1), after, rows["observation"])
    if "action" in rows.keys() and "action" not in flawed:
        yield from _chosen(rows, space, setting) if space.action.choices else _outside(rows, space, setting)


def _width_fault(column: Tensor, count: int, key: str, width: int, setting: str) -> str | None:
    """Another number of entries than the environment has; a single number a row may lack its dimension."""
    found = column[0].numel() if count else width
    if found == width and not column.is_complex():
        return None
    kind = "complex " if column.is_complex() else ""
    return (
        f"{setting} holds {key}s of {found} {kind}entries, but the environment's have {width}: the rows are of another "
        "environment"
    )


def _numbers(column: Tensor, count: int, key: str) -> Tensor:
    """A column as ``[N, width]`` float32, the reward as ``[N]``."""
    flat = column.reshape(count, -1).to(torch.float32)
    return flat.reshape(count) if key == "reward" else flat


def _numbers_of(rows: TensorDict, key: str, layout: Layout) -> Tensor:
    """A column, of observations with images the numbers in it."""
    return layout.unpack(rows[key])[0] if layout.images and key.endswith("observation") else rows[key]


def _finite(column: Tensor) -> Tensor:
    return torch.isfinite(column.reshape(len(column), -1)).all(-1)


def named(wrong: Tensor) -> str:
    """The first rows where a ``[N]`` mask is true, and how many there are."""
    found = wrong.nonzero().flatten().tolist()
    first = ", ".join(map(str, found[:5]))
    more = f" ... ({len(found)} of {len(wrong)})" if len(found) > 5 else f" (of {len(wrong)})"
    return f"row{'s' * (len(found) > 1)} {first}{more}"


def _chosen(rows: TensorDict, space: Space, setting: str) -> Iterator[str]:
    """Choices ``[N, a]`` int64, counted from 0."""
    action = rows["action"]
    counts = torch.tensor(space.action.choices, dtype=torch.float32)
    wrong = ((action != action.round()) | (action < 0) | (action >= counts)).any(-1)
    if bool(wrong.any()):
        example = action[wrong][0].tolist()
        yield (
            f"{setting} holds actions that are no choices of the environment, {space.action.describe()}, which rows "
            f"count from 0: {named(wrong)}, for example {example}"
        )
    else:
        rows["action"] = action.to(torch.int64)


def _outside(rows: TensorDict, space: Space, setting: str) -> Iterator[str]:
    """Actions of which few lie far outside the bounds; in another unit, such as degrees, nearly all would."""
    action, (low, high) = rows["action"], bounds(space)
    far = torch.maximum(low - action, action - high) > (high - low)
    share = far.float().mean(0)
    worst = int(share.argmax())
    if float(share[worst]) > MOST_FAR:
        column = action[:, worst]
        yield (
            f"{100 * float(share[worst]):.0f} % of the actions of {setting} lie far outside the environment's bounds: "
            f"entry {worst} is between {float(column.min()):g} and {float(column.max()):g}, its bounds are "
            f"{float(low[worst]):g} and {float(high[worst]):g} ({named(far[:, worst])}); scale them to its units"
        )


def bounds(space: Space) -> tuple[Tensor, Tensor]:
    """Lowest and highest action, ``[a]`` float32 each."""
    sizes = space.sizes()
    return torch.tensor(sizes["action_low"]), torch.tensor(sizes["action_high"])
