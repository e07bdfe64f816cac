"""``unified-rl data show FOLDER``: what a set holds, in numbers and as a picture of its returns."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor

from unified_rl.files import replacing
from unified_rl.recordings.files import Episodes, read_about, read_robot_set

QUANTILES = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0)
MOST = 40
"""Entries that the text lists of a column."""


def describe_data(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """What a folder of rows holds.

    Returns:
        ``rows``, ``columns`` (dtype and shape of a row), ``episodes`` (``whole``, ``cut``, ``terminated``,
        ``truncated``), ``lengths`` and ``returns`` of the whole episodes (``mean``, ``std``, ``quantiles``),
        ``success`` (share of the whole episodes with a success, None where it is not told), ``entries`` (``min``,
        ``mean``, ``std``, ``max`` of every entry of observation, action and reward; with images of all bytes together)
        and ``about``.

    Raises:
        CheckpointError: the folder is missing or damaged.
        ConfigError: rows of a language task.
    """
    rows = read_robot_set(folder)
    episodes = Episodes.of(rows)
    whole, count = episodes.whole, len(rows)
    ends = {key: rows[key].reshape(count)[episodes.last] for key in ("terminated", "truncated") if key in rows.keys()}
    terminated = ends.get("terminated", torch.zeros(len(whole)).bool())
    truncated = ends.get("truncated", torch.zeros(len(whole)).bool()) & ~terminated
    returns = episodes.sums(rows["reward"])[whole] if "reward" in rows.keys() else torch.zeros(0)
    success = None
    if "success" in rows.keys():
        reached = episodes.sums(rows["success"]) > 0
        success = (reached[whole] if bool(whole.any()) else reached).double().mean()
    return {
        "folder": os.fspath(folder),
        "rows": count,
        "columns": {key: [str(v.dtype).removeprefix("torch."), list(v.shape[1:])] for key, v in sorted(rows.items())},
        "episodes": {
            "whole": int(whole.sum()),
            "cut": int((~whole).sum()),
            "terminated": int(terminated.sum()),
            "truncated": int(truncated.sum()),
        },
        "lengths": _summary(episodes.length[whole].double()),
        "returns": _summary(returns),
        "success": None if success is None else float(success),
        "entries": {key: _entries(rows, key) for key in ("observation", "action", "reward") if key in rows.keys()},
        "about": read_about(folder),
    }


def _summary(values: Tensor) -> dict[str, Any] | None:
    if not len(values):
        return None
    at = torch.tensor(QUANTILES, dtype=torch.float64)
    quantiles = torch.from_numpy(_quantiles(values, at))
    spread = float(values.std()) if len(values) > 1 else 0.0
    named = {f"{q:g}": float(value) for q, value in zip(QUANTILES, quantiles, strict=True)}
    return {"mean": float(values.mean()), "std": spread, "quantiles": named}


def _quantiles(values: Tensor, at: Tensor) -> Any:
    import numpy as np

    return np.quantile(values.double().numpy(), at.numpy())  # torch.quantile takes 16 million values at most


def _entries(rows: TensorDict, key: str) -> list[dict[str, float]]:
    if rows[key].dtype == torch.uint8:
        return [_of_bytes(rows[key])]
    flat = rows[key].double().reshape(len(rows), -1)
    low, high = flat.aminmax(dim=0)
    spread = flat.std(0) if len(flat) > 1 else torch.zeros(flat.shape[1])
    table = torch.stack([low, flat.mean(0), spread, high], 1).tolist()
    return [dict(zip(("min", "mean", "std", "max"), row, strict=True)) for row in table]


def _of_bytes(column: Tensor) -> dict[str, float]:
    """Of all bytes of a column together, some rows at a time: there are thousands a row."""
    counts = torch.zeros(256, dtype=torch.float64)
    for part in column.split(256):
        counts += torch.bincount(part.reshape(-1), minlength=256)
    level, there = torch.arange(256, dtype=torch.float64), counts.nonzero().flatten()
    mean = float(counts @ level / counts.sum())
    spread = float((counts @ (level - mean).square() / counts.sum()).sqrt())
    return {"min": float(there[0]), "mean": mean, "std": spread, "max": float(there[-1])}


def shown(told: Mapping[str, Any]) -> str:
    """The text of :func:`describe_data`."""
    episodes = told["episodes"]
    lines = [
        f"{told['folder']}: {told['rows']} rows, {episodes['whole']} whole episodes and {episodes['cut']} cut ones "
        f"({episodes['terminated']} terminated, {episodes['truncated']} truncated)"
    ]
    about = {key: value for key, value in told["about"].items() if key != "notes"}
    if isinstance(about.get("env"), dict):
        about["env"] = " ".join(f"{key}={value}" for key, value in about["env"].items())
    lines += [", ".join(f"{key}: {value}" for key, value in about.items())] if about else []
    for name in ("returns", "lengths"):
        found = told[name]
        if found is not None:
            spread = "  ".join(f"{100 * float(q):.0f} % {value:.4g}" for q, value in found["quantiles"].items())
            lines.append(f"{name:8s} {found['mean']:.4g} +- {found['std']:.4g}   {spread}")
    if told["success"] is not None:
        lines.append(f"success  {100 * told['success']:.1f} % of the whole episodes")
    lines.append("columns  " + ", ".join(f"{key} {dtype}{shape}" for key, (dtype, shape) in told["columns"].items()))
    lines.append(f"{'entry':18s}{'min':>12s}{'mean':>12s}{'std':>12s}{'max':>12s}")
    for key, entries in told["entries"].items():
        for at, entry in enumerate(entries[:MOST]):
            numbers = "".join(f"{entry[name]:12.4g}" for name in ("min", "mean", "std", "max"))
            lines.append(f"{f'{key} {at}' if key != 'reward' else key:18s}{numbers}")
        lines += [f"{key}: {len(entries) - MOST} more entries"] if len(entries) > MOST else []
    return "\n".join(lines)


def draw_returns(folder: str | os.PathLike[str], path: Path) -> Path:
    """Returns of the episodes in their order, and how they are spread, as a PNG.

    Raises:
        CheckpointError: a folder that is damaged, or a file that cannot be written.
    """
    from matplotlib.figure import Figure

    from unified_rl.study.figures import COLOURS, drawing

    rows = read_robot_set(folder)
    episodes = Episodes.of(rows)
    column = rows["reward"] if "reward" in rows.keys() else torch.ones(len(rows))
    name = "return" if "reward" in rows.keys() else "length (there are no rewards)"
    values, whole = episodes.sums(column), episodes.whole
    with drawing():
        figure = Figure(figsize=(9.0, 3.4), layout="constrained")
        order, spread = figure.subplots(1, 2)
        at = torch.arange(len(values))
        order.plot(at[whole], values[whole], ".", color=COLOURS[0], markersize=4, label="whole")
        if bool((~whole).any()):
            order.plot(at[~whole], values[~whole], "x", color=COLOURS[1], markersize=4, label="cut")
            order.legend()
        order.set(xlabel="episode", ylabel=name, title=f"{len(values)} episodes, {len(rows)} rows")
        spread.hist((values[whole] if bool(whole.any()) else values).numpy(), bins=30, color=COLOURS[0])
        spread.set(xlabel=name, ylabel="episodes", title="spread")
        with replacing(path) as aside:
            figure.savefig(aside, dpi=150, format="png")
    return path
