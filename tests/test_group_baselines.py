"""Group baselines and normalisers by hand and by identity."""

from __future__ import annotations

import pytest
import torch

from unified_rl.errors import ConfigError, RecordError
from unified_rl.returns import SuccessTracker, group_advantage, stratified_advantage

REWARD = torch.tensor([1.0, 0.0, 4.0, 3.0, 2.0, 2.0], dtype=torch.float64)
GROUP = torch.tensor([7, 7, -3, 7, -3, -3])


def test_mean_and_z_score_by_hand() -> None:
    centred = group_advantage(REWARD, GROUP)
    assert centred.tolist() == pytest.approx([-1 / 3, -4 / 3, 4 / 3, 5 / 3, -2 / 3, -2 / 3])
    unbiased = [1.5275252317, 1.1547005384]
    scaled = group_advantage(REWARD, GROUP, scale="std", eps=0.0)
    want = [-1 / 3 / unbiased[0], -4 / 3 / unbiased[0], 4 / 3 / unbiased[1]]
    assert scaled[:3].tolist() == pytest.approx(want)
    population = group_advantage(REWARD, GROUP, scale="std", eps=0.0, ddof=0)
    torch.testing.assert_close(population, scaled * (3 / 2) ** 0.5)


def test_z_scores_do_not_change_when_rewards_are_scaled_and_shifted() -> None:
    a = group_advantage(REWARD, GROUP, scale="std", eps=1e-12)
    torch.testing.assert_close(group_advantage(5 * REWARD - 2, GROUP, scale="std", eps=1e-12), a)


def test_leave_one_out_is_a_multiple_of_mean_centring_and_two_rows_differ_by_their_difference() -> None:
    loo = group_advantage(REWARD, GROUP, baseline="leave_one_out")
    torch.testing.assert_close(loo, 1.5 * group_advantage(REWARD, GROUP))
    pair = group_advantage(torch.tensor([3.0, 1.0]), torch.tensor([0, 0]), baseline="leave_one_out")
    assert pair.tolist() == [2.0, -2.0]


@pytest.mark.parametrize("baseline", ["mean", "leave_one_out", "max", "soft"])
@pytest.mark.parametrize("scale", ["none", "std", "batch", "whiten"])
def test_equal_rewards_give_exactly_zero_whatever_rounding_does(baseline: str, scale: str) -> None:
    reward = torch.full((7,), 0.1)
    assert bool((group_advantage(reward, torch.zeros(7), baseline=baseline, scale=scale) == 0).all())


def test_a_row_alone_in_its_group_follows_the_singleton_rule() -> None:
    reward, group = torch.tensor([5.0, 1.0, 0.0]), torch.tensor([0, 1, 1])
    for scale in ("none", "std"):
        assert float(group_advantage(reward, group, scale=scale)[0]) == 0.0
        assert float(group_advantage(reward, group, scale=scale, singleton=None)[0]) == 5.0


def test_a_lone_row_is_whitened_with_the_batch_by_hand() -> None:
    reward, group = torch.tensor([5.0, 1.0, 0.0], dtype=torch.float64), torch.tensor([0, 1, 1])
    centred = torch.tensor([5.0, 0.5, -0.5], dtype=torch.float64)  # verl: the mean of a group of one is taken to be 0
    expected = (centred - 5 / 3) / centred.std()
    for options in ({}, {"singleton": None}):
        got = group_advantage(reward, group, scale="whiten", eps=0.0, **options)
        torch.testing.assert_close(got, expected)
    units = torch.tensor([1, 3, 2])
    each = centred.repeat_interleave(units)
    got = group_advantage(reward, group, scale="whiten", eps=0.0, units=units)
    torch.testing.assert_close(got.repeat_interleave(units), (each - each.mean()) / each.std())
    batch = group_advantage(reward, group, scale="batch", singleton=None, eps=0.0)
    torch.testing.assert_close(batch, centred / reward.std())
    zero = group_advantage(reward, group, scale="whiten", singleton=0.0)
    assert float(zero[0]) == 0.0 and float(group_advantage(reward, group, scale="batch")[0]) == 0.0
    for scale in ("std", "batch", "whiten", "none"):
        assert group_advantage(reward[:1], group[:1], scale=scale).tolist() == [0.0]  # a batch of one
    three = group_advantage(reward, torch.arange(3), scale="whiten", eps=0.0)  # nobody has company
    torch.testing.assert_close(three, (reward - 2.0) / reward.std())


def test_minimum_spread_keeps_a_trace_of_reward_small() -> None:
    reward = torch.tensor([0.01, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0])
    group = torch.arange(8) // 4
    blown = group_advantage(reward, group, scale="std")
    floored = group_advantage(reward, group, scale="std", min_spread=0.25)
    assert float(blown[0]) == pytest.approx(1.5, abs=1e-3)
    assert float(floored[0]) == pytest.approx(0.03, abs=1e-3)
    torch.testing.assert_close(floored[4:], blown[4:])


def test_length_weighted_baseline_is_the_mean_for_equal_lengths_and_leans_to_the_long() -> None:
    equal = group_advantage(REWARD, GROUP, baseline="weighted", weight=torch.full((6,), 9))
    torch.testing.assert_close(equal, group_advantage(REWARD, GROUP))
    reward, weight = torch.tensor([1.0, 0.0]), torch.tensor([1, 3])
    a = group_advantage(reward, torch.zeros(2), baseline="weighted", weight=weight)
    assert a.tolist() == pytest.approx([0.75, -0.25])


def test_soft_baseline_goes_from_mean_to_max() -> None:
    hot = group_advantage(REWARD, GROUP, baseline="soft", temperature=1e5)
    torch.testing.assert_close(hot, group_advantage(REWARD, GROUP), atol=1e-4, rtol=0)
    cold = group_advantage(REWARD, GROUP, baseline="soft", temperature=1e-3)
    torch.testing.assert_close(cold, group_advantage(REWARD, GROUP, baseline="max"), atol=2e-3, rtol=0)


def test_given_baseline_and_shift() -> None:
    greedy = torch.tensor([0.5] * 6)
    torch.testing.assert_close(group_advantage(REWARD, GROUP, baseline="given", given=greedy), REWARD - 0.5)
    torch.testing.assert_close(group_advantage(REWARD, GROUP, shift=-0.1), group_advantage(REWARD, GROUP) + 0.1)


def test_whitening_has_mean_zero_and_unit_spread() -> None:
    a = group_advantage(REWARD, GROUP, scale="whiten", eps=0.0)
    assert float(a.mean()) == pytest.approx(0.0, abs=1e-12)
    assert float(a.std()) == pytest.approx(1.0)


def test_decoupled_rewards_tell_apart_what_a_sum_confuses() -> None:
    """Totals {0, 1} and {0, 2}: the sum gives both groups +-0.71, normalising each reward first 0.71 and 1.41."""
    reward = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 0.0], [1.0, 1.0]], dtype=torch.float64)
    group = torch.tensor([0, 0, 1, 1])
    together = group_advantage(reward, group, scale="std")
    apart = group_advantage(reward, group, scale="std", combine="normalize_first")
    assert together.tolist() == pytest.approx([-0.7071, 0.7071, -0.7071, 0.7071], abs=1e-3)
    assert apart.tolist() == pytest.approx([-0.7071, 0.7071, -1.4142, 1.4142], abs=1e-3)
    one = group_advantage(reward[:, :1], group, scale="std", combine="normalize_first")
    torch.testing.assert_close(one, group_advantage(reward[:, 0], group, scale="std"))
    weighted = group_advantage(reward, group, reward_weights=[2.0, 0.0])
    torch.testing.assert_close(weighted, 2 * group_advantage(reward[:, 0], group))


def test_strata_with_population_spread_have_mean_zero_and_variance_one() -> None:
    g = torch.Generator().manual_seed(0)
    reward = torch.randn(12, generator=g, dtype=torch.float64)
    group, stratum = torch.zeros(12, dtype=torch.int64), torch.arange(12) % 3
    a = stratified_advantage(reward, group, stratum, blend=1.0)
    assert float(a.mean()) == pytest.approx(0.0, abs=1e-9)
    assert float(a.square().mean()) == pytest.approx(1.0, abs=1e-4)
    plain = group_advantage(reward, group, scale="std", ddof=0)
    torch.testing.assert_close(stratified_advantage(reward, group, stratum, blend=0.0), plain)
    torch.testing.assert_close(stratified_advantage(reward, group, torch.zeros_like(stratum)), plain)
    alone = stratified_advantage(reward, group, torch.arange(12), blend=1.0)
    torch.testing.assert_close(alone, plain)


def test_rows_of_replay_join_a_fresh_group_by_its_id() -> None:
    fresh = group_advantage(torch.tensor([0.0, 0.0]), torch.tensor([4, 4]))
    joined = group_advantage(torch.tensor([0.0, 0.0, 1.0]), torch.tensor([4, 4, 4]))
    assert fresh.tolist() == [0.0, 0.0]
    assert joined.tolist() == pytest.approx([-1 / 3, -1 / 3, 2 / 3])


def test_unknown_options_and_missing_arguments_are_errors() -> None:
    with pytest.raises(ConfigError, match="unknown baseline 'median'"):
        group_advantage(REWARD, GROUP, baseline="median")
    with pytest.raises(ConfigError, match="scale must be"):
        group_advantage(REWARD, GROUP, scale="group")
    with pytest.raises(RecordError, match="baseline=weighted needs the argument weight"):
        group_advantage(REWARD, GROUP, baseline="weighted")
    with pytest.raises(RecordError, match=r"group has shape \(2,\)"):
        group_advantage(REWARD, GROUP[:2])


def test_tracker_counts_settle_at_the_forgetting_horizon_and_success_is_learnt() -> None:
    tracker = SuccessTracker()
    prompt = torch.tensor([1])
    assert float(tracker.value(prompt)) == 0.5
    for _ in range(200):
        tracker.update(prompt, torch.tensor([1.0]), torch.tensor([9.9]))
    assert sum(tracker.counts[1]) == pytest.approx(8.0, rel=1e-3)
    assert float(tracker.value(prompt)) == pytest.approx(1.0, abs=1e-3)
    assert float(tracker.value(torch.tensor([0]))) == 0.5
    tracker.update(torch.tensor([0]), torch.tensor([0.0]), torch.tensor([0.0]))
    assert tracker.counts[0][0] == pytest.approx(0.48)  # nothing drifted: the slowest forgetting, 0.96
