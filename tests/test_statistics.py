"""Statistics against numbers worked out by hand, and against scipy's own bootstrap."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats

from unified_rl.errors import ConfigError
from unified_rl.study.statistics import (
    bootstrap_band,
    iqm,
    paired_difference,
    performance_profile,
    probability_of_improvement,
    stratified_bootstrap,
)


def test_iqm_drops_a_quarter_at_each_end() -> None:
    assert iqm([100.0, 1, 2, 3, 4, 5, 6, -50]) == pytest.approx(3.5)  # the middle four are 2, 3, 4, 5
    assert iqm([0.0, 1, 2, 3, 9]) == pytest.approx(2.0)  # floor(5 / 4) = 1 dropped at each end
    assert iqm([1.0, 2, 6]) == pytest.approx(3.0)  # nothing to drop
    assert iqm([7.0]) == 7.0


def test_iqm_reduces_the_axis_it_is_told() -> None:
    np.testing.assert_allclose(iqm(np.arange(8.0).reshape(4, 2), axis=0), [3.0, 4.0])


def test_bootstrap_agrees_with_scipy_on_one_stratum() -> None:
    scores = np.random.default_rng(3).normal(size=40)
    ours = stratified_bootstrap([scores], repetitions=20000, seed=1)
    theirs = scipy.stats.bootstrap(
        (scores,), lambda x, axis: scipy.stats.trim_mean(x, 0.25, axis=axis), n_resamples=20000, method="percentile"
    ).confidence_interval
    assert ours.estimate == pytest.approx(scipy.stats.trim_mean(scores, 0.25))
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=0.02)


def test_bootstrap_resamples_within_strata_only() -> None:
    """Constant strata at 0 and 1 leave nothing to vary; pooled resampling would spread from 0 to 1."""
    found = stratified_bootstrap([[0.0, 0.0, 0.0], [1.0, 1.0, 1.0]], lambda x: x.mean(-1))
    assert (found.low, found.estimate, found.high) == (0.5, 0.5, 0.5)


def test_bootstrap_of_two_scores_has_the_exact_quantiles() -> None:
    """The mean of two draws from {0, 1} is 0, 1/2, 1 with 1/4, 1/2, 1/4: the middle 40 % is 1/2 alone."""
    assert (stratified_bootstrap([[0.0, 1.0]], level=0.4).low, stratified_bootstrap([[0.0, 1.0]]).low) == (0.5, 0.0)


def test_one_seed_has_an_estimate_and_no_interval() -> None:
    found = stratified_bootstrap([[2.0], [4.0]])
    assert found.estimate == 3.0 and math.isnan(found.low) and not found.known
    assert not stratified_bootstrap([[1.0, 2.0], [3.0]]).known


def test_the_same_seed_gives_the_same_interval() -> None:
    scores = [np.random.default_rng(0).normal(size=5)]
    assert stratified_bootstrap(scores, seed=7) == stratified_bootstrap(scores, seed=7)
    assert stratified_bootstrap(scores, seed=7) != stratified_bootstrap(scores, seed=8)


def test_probability_of_improvement_by_hand() -> None:
    """Of the nine pairs, x wins 6 and ties 1: 6.5 / 9; over two tasks the average."""
    x, y = [3.0, 2.0, 5.0], [1.0, 2.0, 4.0]
    assert probability_of_improvement([x], [y]).estimate == pytest.approx(6.5 / 9)
    assert probability_of_improvement([x, [0.0] * 3], [y, [1.0] * 3]).estimate == pytest.approx(6.5 / 18)
    there, back = probability_of_improvement([x], [y]), probability_of_improvement([y], [x])
    assert there.estimate + back.estimate == pytest.approx(1.0)
    assert 0 <= there.low < there.estimate < there.high <= 1


def test_probability_of_improvement_is_certain_when_the_scores_do_not_overlap() -> None:
    found = probability_of_improvement([[2.0, 3.0]], [[0.0, 1.0]])
    assert (found.low, found.estimate, found.high) == (1.0, 1.0, 1.0)
    assert not probability_of_improvement([[2.0]], [[0.0, 1.0]]).known


def test_probability_of_improvement_interval_agrees_with_a_slow_bootstrap() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(0.5, 1, 8), rng.normal(0, 1, 6)
    slow = [(rng.choice(x, 8)[:, None] > rng.choice(y, 6)).mean() for _ in range(4000)]
    found = probability_of_improvement([x], [y], repetitions=4000)
    assert (found.low, found.high) == pytest.approx(np.quantile(slow, [0.025, 0.975]), abs=0.03)


def test_paired_differences_cancel_what_seeds_share() -> None:
    """Seeds shift both methods alike, so the difference is exactly 1 with no width; seed 9 has no partner."""
    x = {"a": {1: 11.0, 2: 1.0, 9: 500.0}, "b": {1: 3.0, 2: 5.0}}
    y = {"a": {1: 10.0, 2: 0.0}, "b": {1: 2.0, 2: 4.0}}
    found = paired_difference(x, y)
    assert (found.low, found.estimate, found.high) == (1.0, 1.0, 1.0)
    with pytest.raises(ConfigError, match="no task and seed"):
        paired_difference({"a": {1: 0.0}}, {"a": {2: 0.0}})


def test_performance_profile_counts_every_task_the_same() -> None:
    profile = performance_profile([[0.0, 1.0], [1.0, 1.0, 1.0, 2.0]], [-1.0, 0.5, 1.5])
    np.testing.assert_allclose(profile, [1.0, 0.75, 0.125])


def test_band_is_the_interval_at_each_point_and_absent_with_one_seed() -> None:
    curves = np.array([[0.0, 1.0], [0.0, 3.0]])
    centre, low, high = bootstrap_band(curves)
    np.testing.assert_allclose([centre, low, high], [[0, 2], [0, 1], [0, 3]])
    assert np.isnan(bootstrap_band(curves[:1])[1]).all()


@pytest.mark.parametrize("bad", [[[]], [[1.0, float("nan")]], []])
def test_scores_that_are_missing_or_not_finite_are_refused(bad: list[list[float]]) -> None:
    with pytest.raises(ConfigError):
        stratified_bootstrap(bad)
