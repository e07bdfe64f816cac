"""Curves of several seeds brought onto one grid, with a band."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from unified_rl.study.results import RunData
from unified_rl.study.statistics import Array, bootstrap_band

POINTS = 200
"""The most points of a curve; more are averaged over equal bins."""


@dataclass(frozen=True)
class Curve:
    """The interquartile mean over seeds at each ``x``, and its bootstrap band (NaN with one seed)."""

    x: Array
    centre: Array
    low: Array
    high: Array
    seeds: int

    @property
    def banded(self) -> bool:
        """Whether there is a band."""
        return bool(np.isfinite(self.low).any())


def join(runs: Sequence[RunData], metric: str, *, x: str = "steps", points: int = POINTS) -> Curve | None:
    """One curve out of the runs of several seeds; None where no run logged the metric.

    Seeds are interpolated onto the union of their own points, within the range that all of them cover. Where that
    grid would exceed ``points``, every seed is first averaged over equal bins, so that noise is smoothed, not picked.

    Args:
        runs: runs that differ in their seed.
        metric: name of the metric.
        x: what it is drawn against, ``steps`` or ``update``.
        points: the most points of the result.
    """
    series = [s for s in (run.series(metric, x) for run in runs) if s[0].size]
    if not series:
        return None
    low, high = max(s[0][0] for s in series), min(s[0][-1] for s in series)
    grid = np.unique(np.concatenate([s[0] for s in series]))
    grid = grid[(grid >= low) & (grid <= high)]
    if grid.size > points:
        edges = np.linspace(low, high, points + 1)
        grid, series = (edges[:-1] + edges[1:]) / 2, [_bin(*s, edges) for s in series]
    if not grid.size:
        return None
    centre, below, above = bootstrap_band(np.stack([np.interp(grid, *s) for s in series]))
    return Curve(grid, centre, below, above, len(series))


def _bin(x: Array, y: Array, edges: Array) -> tuple[Array, Array]:
    """Means of ``x`` and ``y`` in each bin that holds a point."""
    index = np.clip(np.searchsorted(edges, x, side="right") - 1, 0, len(edges) - 2)
    count = np.bincount(index, minlength=len(edges) - 1)
    held = count > 0
    return tuple(np.bincount(index, v, len(edges) - 1)[held] / count[held] for v in (x, y))  # type: ignore[return-value]
