"""The scan against plain loops, TorchRL, and small tables where the answer is known."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torchrl.objectives.value.functional import generalized_advantage_estimate, vtrace_advantage_estimate

from unified_rl.errors import ConfigError, RecordError
from unified_rl.returns import (
    Episodes,
    action_value_target,
    corrected_td_lambda,
    cut_bootstrap,
    doubly_robust,
    expected_sarsa,
    gae,
    importance_sampling,
    monte_carlo,
    n_step,
    per_decision,
    retrace,
    td_lambda,
    to_segments,
    tree_backup,
    vtrace,
    weighted_importance_sampling,
    weighted_per_decision,
)
from unified_rl.returns.scan import _scan_blocks, _scan_doubling, _scan_loop


class Data:
    """Random rows with both kinds of ends; next values consistent inside episodes, free at their ends."""

    def __init__(self, seed: int = 0, rows: int = 5, width: int = 11) -> None:
        g = torch.Generator().manual_seed(seed)

        def normal() -> Tensor:
            return torch.randn(rows, width, generator=g, dtype=torch.float64)

        self.reward, self.value, self.log_ratio = normal(), normal(), 0.5 * normal()
        self.done = torch.rand(rows, width, generator=g) < 0.2
        self.terminated = self.done & (torch.rand(rows, width, generator=g) < 0.5)
        following = torch.cat([self.value[:, 1:], normal()[:, :1]], 1)
        self.next_value = torch.where(self.done, normal(), following)
        self.rows, self.width = rows, width

    @property
    def args(self) -> tuple[Tensor, ...]:
        return self.reward, self.value, self.next_value, self.terminated, self.done


def column(*xs: Tensor) -> list[Tensor]:
    return [x.unsqueeze(-1) for x in xs]


def loop(d: Data, gamma: float, rho: Tensor, c: Tensor) -> Tensor:
    """The definition, one number at a time: the error e."""
    out = torch.zeros_like(d.reward)
    for b in range(d.rows):
        e = 0.0
        for t in reversed(range(d.width)):
            boot = 0.0 if d.terminated[b, t] else gamma * float(d.next_value[b, t])
            delta = float(d.reward[b, t]) + boot - float(d.value[b, t])
            e = float(rho[b, t]) * delta + (0.0 if d.done[b, t] else gamma * float(c[b, t]) * e)
            out[b, t] = e
    return out


def test_gae_and_vtrace_equal_torchrl() -> None:
    d = Data()
    value, following, reward, done, terminated = column(d.value, d.next_value, d.reward, d.done, d.terminated)
    expected = generalized_advantage_estimate(0.97, 0.9, value, following, reward, done, terminated)
    for got, want in zip(gae(*d.args, 0.97, 0.9), expected, strict=True):
        torch.testing.assert_close(got, want.squeeze(-1))
    zero = torch.zeros_like(value)
    expected = vtrace_advantage_estimate(
        0.97, d.log_ratio.unsqueeze(-1), zero, value, following, reward, done, terminated
    )
    for got, want in zip(vtrace(*d.args, d.log_ratio, 0.97), expected, strict=True):
        torch.testing.assert_close(got, want.squeeze(-1))


def test_every_rule_of_the_state_value_table_equals_the_loop() -> None:
    d, gamma, lam = Data(1), 0.95, 0.8
    ratio, one = d.log_ratio.exp(), torch.ones_like(d.reward)
    torch.testing.assert_close(gae(*d.args, gamma, lam)[0], loop(d, gamma, one, lam * one))
    torch.testing.assert_close(td_lambda(*d.args, gamma, 0.0), d.value + loop(d, gamma, one, 0 * one))
    corrected = corrected_td_lambda(*d.args, d.log_ratio, gamma, lam)
    torch.testing.assert_close(corrected, d.value + loop(d, gamma, ratio, lam * ratio))
    for alpha in (0.0, 0.3, 1.0):
        rho = (1 - alpha) * ratio + alpha * ratio.clamp(max=1.5)
        c = (1 - alpha) * ratio + alpha * ratio.clamp(max=1.1)
        got = vtrace(*d.args, d.log_ratio, gamma, lam, 1.5, 1.1, 1.0, None, alpha)[1]
        torch.testing.assert_close(got, d.value + loop(d, gamma, rho, lam * c))


def test_monte_carlo_and_n_step_by_hand() -> None:
    reward = torch.tensor([[1.0, 2.0, 4.0, 8.0]])
    value = torch.tensor([[10.0, 20.0, 30.0, 40.0]])
    following = torch.tensor([[20.0, 30.0, 40.0, 50.0]])
    done = torch.tensor([[False, False, False, True]])
    assert monte_carlo(reward, done, done, 0.5).tolist() == [[4.0, 6.0, 8.0, 8.0]]
    none = torch.zeros_like(done)
    two = n_step(reward, value, following, none, done, 0.5, 2)
    assert two.tolist() == [[1 + 1 + 7.5, 2 + 2 + 10, 4 + 4 + 12.5, 8 + 25]]
    torch.testing.assert_close(
        n_step(reward, value, following, none, done, 0.5, 9), td_lambda(reward, value, following, none, done, 0.5, 1.0)
    )
    with pytest.raises(ConfigError, match="at least 1"):
        n_step(reward, value, following, none, done, 0.5, 0)


def test_on_policy_and_untruncated_limits() -> None:
    d, zero = Data(2), torch.zeros(5, 11, dtype=torch.float64)
    advantage, target = vtrace(*d.args, zero, 0.9)
    torch.testing.assert_close(target, td_lambda(*d.args, 0.9, 1.0))
    torch.testing.assert_close(advantage, gae(*d.args, 0.9, 1.0)[0])
    mixed = vtrace(*d.args, zero, 0.9, lam=0.7)[0]
    torch.testing.assert_close(mixed, gae(*d.args, 0.9, 0.7)[0])
    free = vtrace(*d.args, d.log_ratio, 0.9, 1.0, math.inf, math.inf, math.inf)[1]
    torch.testing.assert_close(free, corrected_td_lambda(*d.args, d.log_ratio, 0.9))
    one_step = vtrace(*d.args, d.log_ratio, 0.9, 0.0, math.inf)[1]
    torch.testing.assert_close(one_step, d.value + loop(d, 0.9, d.log_ratio.exp(), zero))


def test_retrace_family_equals_the_loop_and_its_limits() -> None:
    d, gamma, lam = Data(3), 0.9, 0.8
    q, following = d.value, d.next_value + 0.3  # expected Q differs from the next action's Q
    c = lam * d.log_ratio.exp().clamp(max=1.0)
    expected = torch.zeros_like(q)
    for b in range(d.rows):
        for t in reversed(range(d.width)):
            g = float(d.reward[b, t]) + (0.0 if d.terminated[b, t] else gamma * float(following[b, t]))
            if t + 1 < d.width and not d.done[b, t]:
                g += gamma * float(c[b, t + 1]) * float(expected[b, t + 1] - q[b, t + 1])
            expected[b, t] = g
    args = (d.reward, q, following, d.terminated, d.done)
    torch.testing.assert_close(retrace(*args, d.log_ratio, gamma, lam), expected)
    log_prob = -d.log_ratio.abs()
    tree = tree_backup(*args, log_prob, gamma)
    torch.testing.assert_close(tree, action_value_target(*args, gamma, log_prob.exp()))
    abtd = torch.minimum(1e9 * log_prob.exp(), d.log_ratio.exp().clamp(max=1.0))
    torch.testing.assert_close(action_value_target(*args, gamma, abtd), retrace(*args, d.log_ratio, gamma, 1.0))
    sarsa = expected_sarsa(d.reward, following, d.terminated, gamma)
    torch.testing.assert_close(sarsa, retrace(*args, d.log_ratio, gamma, 0.0))
    state_only = retrace(d.reward, d.value, d.next_value, d.terminated, d.done, torch.zeros_like(q), gamma)
    torch.testing.assert_close(state_only, td_lambda(*d.args, gamma, 1.0))


def test_masked_steps_are_transparent_wherever_they_stand() -> None:
    """Gaps and tails full of NaN give what the compacted row gives, and exactly 0 inside."""
    d = Data(4, rows=1, width=6)
    where = torch.tensor([0, 2, 3, 6, 7, 8])
    mask = torch.zeros(1, 11, dtype=torch.bool)
    mask[:, where] = True

    def spread(x: Tensor, fill: float | bool) -> Tensor:
        return torch.full((1, 11), fill, dtype=x.dtype).index_copy(1, where, x)

    gapped = [spread(x, math.nan) for x in (d.reward, d.value, d.next_value)]
    # what a critic says about the step right after, inside a gap, must not be used
    gapped[2] = torch.where(
        mask & ~spread(d.done, False) & (torch.arange(11) != 8), torch.tensor(77.0).double(), gapped[2]
    )
    contiguous = torch.tensor([2, 6, 7])
    gapped[2][:, contiguous] = spread(d.next_value, 0.0)[:, contiguous]
    flags = [spread(x, True) for x in (d.terminated, d.done)]
    log_ratio = spread(d.log_ratio, math.nan)
    gamma = spread(torch.full((1, 6), 0.9, dtype=torch.float64), math.nan)
    pairs = [
        (gae(*gapped, *flags, gamma, 0.8, mask), gae(*d.args, 0.9, 0.8)),
        (vtrace(*gapped, *flags, log_ratio, gamma, 0.8, mask=mask), vtrace(*d.args, d.log_ratio, 0.9, 0.8)),
    ]
    for got, want in pairs:
        for g, w in zip(got, want, strict=True):
            torch.testing.assert_close(g, spread(w, 0.0))
    q_args = (gapped[0], gapped[1], spread(d.next_value, math.nan), *flags)
    got_q = retrace(*q_args, log_ratio, gamma, 0.8, mask)
    torch.testing.assert_close(got_q, spread(retrace(*d.args, d.log_ratio, 0.9, 0.8), 0.0))


def test_gamma_may_differ_from_step_to_step() -> None:
    reward, none = torch.tensor([[1.0, 1.0, 1.0]]), torch.zeros(1, 3, dtype=torch.bool)
    end = torch.tensor([[False, False, True]])
    got = monte_carlo(reward, none, end, torch.tensor([[0.5, 0.1, 0.9]]))
    assert got[0].tolist() == pytest.approx([1 + 0.5 * 1.1, 1.1, 1.0])


def test_cutting_an_episode_by_truncation_changes_traces_but_not_errors() -> None:
    d = Data(5)
    d.done[:], d.terminated[:] = False, False
    d.next_value = torch.cat([d.value[:, 1:], d.next_value[:, -1:]], 1)
    cut = d.done.clone()
    cut[:, 4] = True
    whole, parts = gae(*d.args, 0.9, 1.0)[0], gae(*d.args[:4], cut, 0.9, 1.0)[0]
    torch.testing.assert_close(parts[:, 5:], whole[:, 5:])
    torch.testing.assert_close(parts[:, 4], d.reward[:, 4] + 0.9 * d.next_value[:, 4] - d.value[:, 4])
    torch.testing.assert_close(whole[:, 3] - parts[:, 3], 0.9**2 * whole[:, 5])


def test_doubling_and_loop_scans_agree_and_leave_their_inputs_alone() -> None:
    g = torch.Generator().manual_seed(0)
    for width in (1, 2, 7, 64, 100):
        start = torch.randn(3, width, generator=g, dtype=torch.float64)
        decay = 1.2 * torch.rand(3, width, generator=g, dtype=torch.float64)
        before = start.clone(), decay.clone()
        torch.testing.assert_close(_scan_loop(start, decay), _scan_doubling(start, decay))
        torch.testing.assert_close(_scan_loop(start, decay), _scan_blocks(start, decay))
        assert torch.equal(start, before[0]) and torch.equal(decay, before[1])


def test_one_row_or_one_column_does_not_alias_the_input() -> None:
    for shape in ((1, 6), (6, 1)):
        start, decay = torch.ones(shape), torch.full(shape, 0.5)
        _scan_loop(start, decay)
        assert bool((start == 1).all())


def test_results_are_detached_and_half_precision_is_lifted() -> None:
    d = Data(6)
    value = d.value.clone().requires_grad_()
    assert not any(x.requires_grad for x in gae(d.reward, value, d.next_value, d.terminated, d.done, 0.9, 0.9))
    half = gae(d.reward.half(), d.value.half(), d.next_value.half(), d.terminated, d.done, 0.9, 0.9)[0]
    assert half.dtype == torch.float32


def test_shapes_that_disagree_are_named() -> None:
    d = Data(7)
    with pytest.raises(RecordError, match=r"done has shape \(5, 3\), but reward has \(5, 11\)"):
        gae(d.reward, d.value, d.next_value, d.terminated, d.done[:, :3], 0.9, 0.9)


def test_a_cut_answer_bootstraps_from_the_value_before_the_cut() -> None:
    value, following = torch.tensor([[1.0, 2.0]]), torch.tensor([[2.0, 9.0]])
    done, terminated = torch.tensor([[False, True]]), torch.tensor([[False, False]])
    assert cut_bootstrap(value, following, terminated, done).tolist() == [[2.0, 2.0]]
    error = gae(torch.zeros(1, 2), value, cut_bootstrap(value, following, terminated, done), terminated, done, 1.0, 0.0)
    assert float(error[0][0, 1]) == 0.0


def test_segments_sum_rewards_and_take_the_first_units_value() -> None:
    reward = torch.tensor([[1.0, 2.0, math.nan, 4.0, 8.0, 16.0]])
    value = torch.tensor([[10.0, 20, 30, 40, 50, 60]])
    mask = torch.tensor([[True, True, False, True, True, False]])
    segment = torch.tensor([[0, 0, 1, 1, 2, 3]])
    total, first, valid = to_segments(reward, value, segment, mask, 4)
    assert total.tolist() == [[3, 4, 8, 0]]
    assert first.tolist() == [[10, 40, 50, 0]]
    assert valid.tolist() == [[True, True, True, False]]


# ---------------------------------------------------------------- off-policy evaluation


def mdp(rows: int, seed: int) -> tuple[Tensor, Tensor, Tensor, float]:
    """Two independent binary actions; reward 2 for action 1 first, 1 second; behavior 0.5, target 0.8."""
    g = torch.Generator().manual_seed(seed)
    action = (torch.rand(rows, 2, generator=g, dtype=torch.float64) < 0.5).double()
    reward = action * torch.tensor([2.0, 1.0])
    log_ratio = torch.where(action > 0, math.log(0.8 / 0.5), math.log(0.2 / 0.5)).double()
    return action, reward, log_ratio, 0.8 * 2 + 0.9 * 0.8


def test_evaluation_estimators_cover_the_truth_and_report_their_ess() -> None:
    action, reward, log_ratio, truth = mdp(20_000, 0)
    episodes = Episodes(reward, log_ratio, 0.9)
    wrong_q = 0.3 + 0.1 * action
    estimates = {
        "is": importance_sampling(episodes),
        "wis": weighted_importance_sampling(episodes),
        "pdis": per_decision(episodes),
        "pdwis": weighted_per_decision(episodes),
        "dr": doubly_robust(episodes, wrong_q, torch.full_like(wrong_q, 0.3 + 0.08)),
        "wdr": doubly_robust(episodes, wrong_q, torch.full_like(wrong_q, 0.3 + 0.08), weighted=True),
    }
    for name, e in estimates.items():
        low, high = e.interval(4.0)
        assert low < truth < high, name
        assert high - low < 0.2, name
    assert 0 < float(estimates["is"].ess) < 20_000
    assert float(estimates["pdis"].standard_error) < float(estimates["is"].standard_error)


def test_doubly_robust_with_the_true_values_has_no_variance_and_with_none_is_per_decision() -> None:
    action, reward, log_ratio, truth = mdp(50, 1)
    episodes = Episodes(reward, log_ratio, 0.9)
    later = torch.tensor([0.9 * 0.8, 0.0], dtype=torch.float64)
    q = action * torch.tensor([2.0, 1.0]) + later
    expected_q = torch.tensor([1.6 + 0.9 * 0.8, 0.8], dtype=torch.float64).expand(50, 2)
    exact = doubly_robust(episodes, q, expected_q)
    # rewards and values enter step by step, so the model's future values telescope
    assert float(doubly_robust(episodes, q * 0, expected_q * 0).value) == pytest.approx(
        float(per_decision(episodes).value)
    )
    assert float(exact.value) == pytest.approx(truth)
    assert float(exact.standard_error) == pytest.approx(0.0, abs=1e-12)


def test_on_policy_all_estimators_are_the_plain_mean_and_padding_keeps_the_last_ratio() -> None:
    _, reward, _, _ = mdp(10, 2)
    episodes = Episodes(reward, torch.zeros_like(reward), 0.9)
    plain = float((reward * torch.tensor([1.0, 0.9])).sum(-1).mean())
    for estimator in (importance_sampling, weighted_importance_sampling, per_decision, weighted_per_decision):
        assert float(estimator(episodes).value) == pytest.approx(plain)
    log_ratio = torch.full((3, 4), 0.2, dtype=torch.float64)
    mask = torch.tensor([[True, True, False, False]]).expand(3, 4)
    short = Episodes(torch.ones(3, 4), log_ratio.where(mask, math.nan), 1.0, mask)
    assert float(short.cumulative[0, -1]) == pytest.approx(math.exp(0.4))
    with pytest.raises(RecordError, match="finite log-ratio"):
        Episodes(torch.ones(1, 1), torch.full((1, 1), math.nan), 1.0)
