"""Statistics of a few runs: interquartile mean, stratified bootstrap, probability of improvement, profiles.

The estimators that "Deep Reinforcement Learning at the Edge of the Statistical Precipice" (arXiv 2108.13264) argues
for. Scores come in **strata** (one 1-D array of seeds for each task, of any lengths), and seeds are resampled within
their stratum. With one seed in a stratum there is no interval: its ends are NaN.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import trim_mean

from unified_rl.errors import ConfigError

Array = NDArray[np.float64]
Statistic = Callable[[Array], Array]
"""Reduces the last axis: ``[..., n]`` to ``[...]``."""


@dataclass(frozen=True)
class Interval:
    """An estimate and its bootstrap interval; ``low`` and ``high`` are NaN where there is none."""

    estimate: float
    low: float = float("nan")
    high: float = float("nan")

    @property
    def known(self) -> bool:
        """Whether there is an interval at all."""
        return bool(np.isfinite(self.low) and np.isfinite(self.high))


def iqm(scores: ArrayLike, axis: int = -1) -> Array:
    """Interquartile mean: the mean of the middle half of ``scores [..., n]``, ``[...]``.

    ``floor(n / 4)`` values are dropped at each end, so up to three scores give their plain mean.
    """
    return np.asarray(trim_mean(np.asarray(scores, dtype=np.float64), 0.25, axis=axis), dtype=np.float64)


def mean(scores: Array) -> Array:
    """Mean over the last axis."""
    return np.asarray(scores.mean(-1))


def stratified_bootstrap(
    strata: Sequence[ArrayLike],
    statistic: Statistic = iqm,
    *,
    level: float = 0.95,
    repetitions: int = 2000,
    seed: int = 0,
) -> Interval:
    """Percentile bootstrap of a statistic of all scores together, seeds resampled within their stratum.

    Args:
        strata: one 1-D array of scores for each task; lengths may differ.
        statistic: reduces the last axis of ``[repetitions, n]``.
        level: coverage of the interval.
        repetitions: bootstrap samples.
        seed: of the resampling; the same seed gives the same interval.

    Returns:
        The statistic of the scores as they are, with NaN ends where any stratum holds fewer than two seeds.

    Raises:
        ConfigError: no scores, or a score that is not finite.
    """
    arrays = [_scores(s) for s in strata]
    if not arrays:
        raise ConfigError("a bootstrap needs at least one stratum of scores")
    estimate = float(statistic(np.concatenate(arrays)))
    if min(a.size for a in arrays) < 2:
        return Interval(estimate)
    rng = np.random.default_rng(seed)
    drawn = [a[rng.integers(a.size, size=(repetitions, a.size))] for a in arrays]
    return _percentiles(estimate, statistic(np.concatenate(drawn, axis=1)), level)


def bootstrap_band(
    curves: ArrayLike, *, level: float = 0.95, repetitions: int = 500, seed: int = 0
) -> tuple[Array, Array, Array]:
    """IQM curve over seeds with a pointwise bootstrap band.

    Args:
        curves: ``[seeds, points]``, one curve for each seed on a common grid.
        level: coverage of the band.
        repetitions: bootstrap samples (whole curves are resampled).
        seed: of the resampling.

    Returns:
        ``(centre, low, high)``, each ``[points]``; the band is NaN with one seed.
    """
    values = np.asarray(curves, dtype=np.float64)
    centre = iqm(values, axis=0)
    if values.shape[0] < 2:
        return centre, np.full_like(centre, np.nan), np.full_like(centre, np.nan)
    picks = np.random.default_rng(seed).integers(values.shape[0], size=(repetitions, values.shape[0]))
    samples = iqm(values[picks], axis=1)
    low, high = np.quantile(samples, _tails(level), axis=0)
    return centre, low, high


def probability_of_improvement(
    x: Sequence[ArrayLike],
    y: Sequence[ArrayLike],
    *,
    level: float = 0.95,
    repetitions: int = 2000,
    seed: int = 0,
) -> Interval:
    """Probability that a random run of ``x`` beats a random run of ``y`` on a random task; ties count one half.

    Args:
        x: strata of scores, one 1-D array for each task.
        y: strata of the other method, the same tasks in the same order.
        level: coverage of the interval.
        repetitions: bootstrap samples; runs of both methods are resampled independently within their task.
        seed: of the resampling.

    Raises:
        ConfigError: the numbers of tasks differ, or are 0, or a score is not finite.
    """
    if len(x) != len(y) or not x:
        raise ConfigError(f"both methods need scores on the same tasks, got {len(x)} and {len(y)} strata")
    pairs = [(_scores(a), _scores(b)) for a, b in zip(x, y, strict=True)]
    wins = [(a[:, None] > b) + 0.5 * (a[:, None] == b) for a, b in pairs]
    estimate = float(np.mean([w.mean() for w in wins]))
    if min(min(w.shape) for w in wins) < 2:
        return Interval(estimate)
    rng = np.random.default_rng(seed)
    drawn = [np.einsum("rn,nm,rm->r", _weights(rng, n, repetitions), w, _weights(rng, m, repetitions))
             for w in wins for n, m in [w.shape]]  # fmt: skip
    return _percentiles(estimate, np.mean(drawn, axis=0), level)


def paired_difference(
    x: Mapping[Hashable, Mapping[int, float]],
    y: Mapping[Hashable, Mapping[int, float]],
    *,
    level: float = 0.95,
    repetitions: int = 2000,
    seed: int = 0,
) -> Interval:
    """Mean of ``x - y`` over the pairs that share a task and a seed, with a bootstrap over the pairs.

    Args:
        x: task to (seed to score).
        y: the same for the other method; pairs that only one side holds are left out.
        level: coverage of the interval.
        repetitions: bootstrap samples, pairs resampled within their task.
        seed: of the resampling.

    Raises:
        ConfigError: no pair in common.
    """
    strata = []
    for task in x:
        common = sorted(set(x[task]) & set(y.get(task, {})))
        if common:
            strata.append(np.array([x[task][s] - y[task][s] for s in common]))
    if not strata:
        raise ConfigError("the two methods share no task and seed, so that no difference can be paired")
    return stratified_bootstrap(strata, mean, level=level, repetitions=repetitions, seed=seed)


def performance_profile(strata: Sequence[ArrayLike], thresholds: ArrayLike) -> Array:
    """Share of runs that score above each threshold, every task counting the same, ``[len(thresholds)]``."""
    tau = np.asarray(thresholds, dtype=np.float64)
    return np.asarray(np.mean([(_scores(s)[:, None] > tau).mean(0) for s in strata], axis=0))


def _scores(values: ArrayLike) -> Array:
    array = np.atleast_1d(np.asarray(values, dtype=np.float64))
    if array.ndim != 1 or array.size == 0 or not np.isfinite(array).all():
        raise ConfigError(f"a stratum must be a non-empty list of finite scores, got {array.tolist()}")
    return array


def _weights(rng: np.random.Generator, n: int, repetitions: int) -> Array:
    """Share of each of ``n`` runs in ``repetitions`` resamples, ``[repetitions, n]``."""
    return rng.multinomial(n, np.full(n, 1 / n), size=repetitions) / n


def _tails(level: float) -> list[float]:
    if not 0 < level < 1:
        raise ConfigError(f"level is {level}; set a coverage between 0 and 1, such as 0.95")
    return [(1 - level) / 2, (1 + level) / 2]


def _percentiles(estimate: float, samples: Array, level: float) -> Interval:
    low, high = np.quantile(samples, _tails(level))
    return Interval(estimate, float(low), float(high))
