"""Limiting cases that tie the methods to each other, and small numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from correction_cases import drifted, ratios, record, weights
from torch import Tensor

from unified_rl.correction import Correction, load_correction


def test_ppo_keeps_harmless_directions_and_drops_harmful_ones() -> None:
    r = ratios(0.5, 0.9, 1.0, 1.1, 1.5, 4.0)
    ppo = Correction(kernel={"name": "ppo", "clip_low": 0.2, "clip_high": 0.28, "dual_clip": 3.0})
    assert weights(ppo, r, 1.0) == pytest.approx([0.5, 0.9, 1.0, 1.1, 0.0, 0.0])
    assert weights(ppo, r, -1.0) == pytest.approx([0.0, 0.9, 1.0, 1.1, 1.5, 0.0])


def test_vespo_peaks_at_k_over_lambda_with_the_published_values() -> None:
    vespo = Correction(kernel="gamma_density")
    assert weights(vespo, ratios(1.0, 2 / 3, 2.0, 0.1), 1.0) == pytest.approx([1.0, 1.208, 0.199, 0.149], abs=1e-3)
    assert weights(vespo, ratios(1.0, 1.5, 2.0, 0.1), -1.0) == pytest.approx([1.0, 1.242, 1.083, 0.006], abs=1e-3)
    flat = Correction(kernel={"name": "gamma_density", "k_positive": 0.0, "lam_positive": 0.0})
    assert weights(flat, ratios(0.1, 5.0)) == pytest.approx([1.0, 1.0])


def test_sapo_is_one_at_one_and_fades_on_both_sides() -> None:
    curve = load_correction("sapo").weight_curve(torch.linspace(-8, 8, 65).double(), 1.0)
    assert float(curve[32]) == pytest.approx(1.0)
    assert curve[0] < 1e-2 and curve[-1] < 1e-2
    steep = Correction(kernel={"name": "soft_gate", "tau_positive": 1.0, "tau_negative": 2.0})
    assert weights(steep, ratios(3.0), -1.0)[0] < weights(steep, ratios(3.0), 1.0)[0]


def test_shape_peaks_at_gamma_with_a_quarter() -> None:
    shape = Correction(kernel={"name": "shaped", "gamma": 0.1}, anchor="none")
    curve = shape.weight_curve(torch.tensor([0.1, 0.05, 0.2]).double().log(), 1.0)
    assert float(curve[0]) == pytest.approx(0.25)
    assert (curve[1:] < 0.25).all()


def test_dispo_with_equal_bounds_is_cispo_and_with_trivial_ones_topr() -> None:
    r = ratios(0.3, 0.9, 1.6)
    equal = {f"{side}_{sign}": v for sign in ("positive", "negative") for side, v in (("low", 0.0), ("high", 1.2))}
    for a in (1.0, -1.0):
        assert weights(Correction(kernel={"name": "sign_clamp", **equal}), r, a) == pytest.approx(
            weights(load_correction("cispo"), r, a)
        )
        topr = {"low_positive": 1.0, "high_positive": 1.0, "low_negative": 0.0, "high_negative": 1.0}
        assert weights(Correction(kernel={"name": "sign_clamp", **topr}), r, a) == pytest.approx(
            weights(load_correction("topr"), r, a)
        )


def test_ess_is_scale_free_and_one_over_n_where_one_weight_stands_out() -> None:
    p3o = Correction(kernel="ess_cap")
    assert weights(p3o, ratios(5.0, 5.0, 5.0)) == pytest.approx([1.0, 1.0, 1.0])
    assert weights(p3o, ratios(1e-8, 1e-8, 1.0, 1e-8))[2] == pytest.approx(0.25, rel=1e-4)


def test_m2_budget_of_infinity_masks_nothing_and_of_zero_all_harmful_units() -> None:
    r = ratios(0.5, 0.9, 1.1, 1.6)
    assert weights(Correction(kernel={"name": "m2_mask", "budget": math.inf}), r) == pytest.approx([0.5, 0.9, 1.1, 1.6])
    assert weights(Correction(kernel={"name": "m2_mask", "budget": 0.0}), r) == pytest.approx([0.5, 0.9, 0.0, 0.0])
    kept = weights(Correction(kernel={"name": "m2_mask", "budget": 0.12}), r)
    assert kept == pytest.approx([0.5, 0.9, 1.1, 1.6])  # mean of ln(1.1)^2 and ln(1.6)^2 is 0.115
    assert weights(Correction(kernel={"name": "m2_mask", "budget": 0.11}), r) == pytest.approx([0.5, 0.9, 1.1, 0.0])


def test_bapo_with_target_zero_keeps_its_first_bounds_and_never_leaves_its_last() -> None:
    r = ratios(0.5, 0.7, 1.25, 2.5)
    easy = {"name": "searched_ppo", "target": 0.0}
    assert weights(Correction(kernel=easy), r) == pytest.approx([0.5, 0.7, 0.0, 0.0])
    log_ratio = torch.cat([r, r])
    current, batch = record(log_ratio, torch.tensor([1e-6, -1.0], dtype=torch.float64))
    c = Correction(kernel={"name": "searched_ppo", "target": 1.0})
    stats = c.prepare(current, batch)
    assert float(stats["low"][0]) == pytest.approx(0.8)
    assert float(stats["high"][0]) == pytest.approx(2.0)


def test_nft_on_policy_is_reward_minus_mean_or_the_population_z_score() -> None:
    reward = torch.tensor([1.0, 0, 0, 1, 0, 0, 0, 0], dtype=torch.float64)
    step_reward = torch.stack([torch.zeros(8, dtype=torch.float64), reward], -1)
    current, batch = record(torch.zeros(8, 2, dtype=torch.float64), torch.zeros(8), reward=step_reward)
    batch["group"] = torch.arange(8) // 4
    mean = torch.tensor([0.5] * 4 + [0.0] * 4, dtype=torch.float64)
    for normalize, expected in ((1, reward - mean), (2, (reward - mean) / 0.5)):
        out = Correction(kernel={"name": "likelihood_pair", "normalize": normalize}, reduce="token-sum")(current, batch)
        torch.testing.assert_close(out.weight[:, 0], expected)


def test_residual_methods_are_one_rule_up_to_the_published_factors() -> None:
    g = torch.Generator().manual_seed(3)
    reward = torch.randn(5, 4, generator=g, dtype=torch.float64)
    current, batch = record(0.3 * torch.randn(5, 4, generator=g, dtype=torch.float64), torch.zeros(5), reward=reward)
    beta, n, size = 0.2, 5, 5

    def weight(name: str) -> Tensor:
        scale = {"tba": 2 / beta, "gvpo": beta, "copg": 1.0}[name]
        return load_correction(name, **{"kernel.beta": beta, "kernel.scale": scale})(current, batch).weight

    torch.testing.assert_close(weight("tba") * n * beta**2 / (2 * (size - 1)), weight("gvpo"))
    torch.testing.assert_close(weight("copg"), size * (size - 1) / beta * weight("gvpo"))
    shifted = batch.clone().set("reward", reward + 7.0)
    torch.testing.assert_close(
        load_correction("gvpo")(current, shifted).weight, load_correction("gvpo")(current, batch).weight
    )
    batch["group"] = torch.arange(5)
    assert float(load_correction("gvpo")(current, batch).weight.abs().max()) == 0.0


def test_asymre_shift_equals_a_likelihood_penalty() -> None:
    g = torch.Generator().manual_seed(0)
    advantage = torch.randn(3, generator=g, dtype=torch.float64)
    current, batch = record(torch.zeros(3, 4, dtype=torch.float64), advantage + 0.1)
    one, two = current.clone().requires_grad_(), current.clone().requires_grad_()
    Correction(kernel="constant")(one, batch).loss.backward()
    batch["advantage"] = advantage
    Correction(kernel="constant", penalty=[{"name": "k1", "anchor": "none", "coefficient": -0.1}])(
        two, batch
    ).loss.backward()
    torch.testing.assert_close(one.grad, two.grad)


def test_humanline_with_wide_bounds_is_ppo_and_gives_no_gradient_outside() -> None:
    current, batch = record(torch.tensor([[-3.0, 0.1, 3.0]]).double(), torch.ones(1).double())
    wide = {"pre.low": -50.0, "pre.high": 50.0, "penalty": []}
    leaf, plain = current.clone().requires_grad_(), current.clone().requires_grad_()
    load_correction("humanline", **wide)(leaf, batch).loss.backward()
    load_correction("ppo", anchor="reference")(plain, batch).loss.backward()
    torch.testing.assert_close(leaf.grad, plain.grad)
    leaf = current.clone().requires_grad_()
    load_correction("humanline", penalty=[])(leaf, batch).loss.backward()
    assert [bool(x) for x in leaf.grad[0] != 0] == [False, True, False]


def test_ctpo_window_widens_with_the_position_as_published() -> None:
    """At positions 1, 100 and 1000 the window of the ratio is [0.975, 1.051], [0.779, 1.649], [0.454, 4.860]."""
    for position, low, high in ((1, 0.975, 1.051), (100, 0.779, 1.649), (1000, 0.454, 4.860)):
        edges = torch.tensor([low - 2e-3, low + 2e-3, high - 2e-3, high + 2e-3], dtype=torch.float64).log()
        d = torch.zeros(4, position, dtype=torch.float64)
        d[:, -1] = edges
        for a, expected in ((1.0, [1, 1, 1, 0]), (-1.0, [0, 1, 1, 1])):
            current, batch = record(d, torch.full((4,), a, dtype=torch.float64))
            kernel = {"name": "log_clip", "dual": None}
            weight = Correction(level="prefix", kernel=kernel)(current, batch).weight[:, -1]
            assert (weight != 0).int().tolist() == expected, (position, a)


def test_cispo_gives_every_unit_of_nonzero_advantage_a_gradient_however_far_it_drifted() -> None:
    current, batch = drifted(size=3.0)
    assert bool((load_correction("cispo")(current, batch).weight != 0).all())
    assert bool((load_correction("ppo")(current, batch).weight == 0).any())


@pytest.mark.parametrize("name", ["opmd", "dro"])
@pytest.mark.parametrize("strength", [0.0, 0.1, 7.0])
def test_squared_penalties_to_the_own_policy_leave_reinforce_on_policy(name: str, strength: float) -> None:
    current, batch = drifted(size=0.0)
    leaf, plain = current.clone().requires_grad_(), current.clone().requires_grad_()
    correction = load_correction(name, **{"penalty.0.coefficient": strength})
    correction(leaf, batch).loss.backward()
    Correction(kernel="constant", reduce=correction.reduce, horizon=correction.horizon)(plain, batch).loss.backward()
    torch.testing.assert_close(leaf.grad, plain.grad)


@pytest.mark.parametrize("name", ["tba", "gvpo", "copg"])
def test_residuals_at_the_anchor_are_reinforce_with_the_group_mean(name: str) -> None:
    g = torch.Generator().manual_seed(1)
    reward = torch.randn(6, 3, generator=g, dtype=torch.float64)
    current, batch = record(torch.zeros(6, 3, dtype=torch.float64), torch.zeros(6), reward=reward)
    batch["group"] = torch.tensor([0, 0, 0, 1, 1, 1])
    weight = load_correction(name)(current, batch).weight
    total = reward.sum(-1).view(2, 3)
    centred = (total - total.mean(-1, keepdim=True)).flatten()
    ratio = weight / centred[:, None]
    torch.testing.assert_close(ratio, ratio[0, 0].expand_as(ratio))
    assert float(ratio[0, 0]) > 0


def test_m2_budget_keeps_harmless_units_and_the_kept_mean_within_it_and_one_more_would_not_fit() -> None:
    for seed in range(5):
        current, batch = drifted(seed, rows=8, width=20)
        d = current - batch["behavior_log_prob"]
        kept = Correction(kernel={"name": "m2_mask", "budget": 0.04}).prepare(current, batch)["m2_keep"]
        harmful = batch["advantage"][:, None] * d > 0
        assert bool(kept[~harmful].all())
        square = d.square()[harmful].sort().values
        number = int(kept[harmful].sum())
        assert 0 < number < len(square)
        assert float(d.square()[harmful & kept].mean()) <= 0.04 * (1 + 1e-5)
        assert float(square[: number + 1].mean()) > 0.04
