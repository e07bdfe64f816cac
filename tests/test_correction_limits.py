"""Limiting cases that tie the methods to each other, and small numbers worked out by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor

from unified_rl.correction import Correction, load_correction
from unified_rl.correction.levels import LEVELS, Layout
from unified_rl.correction.proximal import MovingAverage, interpolated
from unified_rl.correction.tables import KERNELS

LEVEL_NODES: list[Any] = [
    "unit", "step", "step_sum", "sequence", "geometric", "prefix", "prefix_geometric", "min_prefix",
    {"name": "hoelder", "p": 2.0}, {"name": "hoelder", "p": -1.0}, {"name": "hoelder", "p": 0.0},
]  # fmt: skip
KERNELS_OF_ONE: list[Any] = [
    "one", "is", "ppo", "clamp", "band", "ring", "sign_clamp", "taper", "gate", "gamma", "tv_mask", "kl_mask",
    "log_clip", "centered_ppo", "ess_cap", "ess_cap_mixed", "m2_mask", "searched_ppo", "spared_ppo",
    "demonstration_shape",
    {"name": "band", "weighted": False},
]  # fmt: skip


def record(log_ratio: Tensor, advantage: Tensor, **extra: Tensor) -> tuple[Tensor, TensorDict]:
    """A record whose current log-probs lie ``log_ratio`` above those of behavior, proximal and reference alike."""
    rows, width = log_ratio.shape
    current = torch.full_like(log_ratio, -2.0)
    behind = current - log_ratio
    items = {
        "behavior_log_prob": behind,
        "proximal_log_prob": behind.clone(),
        "reference_log_prob": behind.clone(),
        "mask": torch.ones(rows, width, dtype=torch.bool),
        "step_index": torch.arange(width).expand(rows, width).contiguous(),
        "reward": torch.zeros(rows, width, dtype=log_ratio.dtype),
        "advantage": advantage,
        "group": torch.zeros(rows, dtype=torch.int64),
        "policy_version": torch.zeros(rows, width, dtype=torch.int64),
    }
    return current, TensorDict({**items, **extra}, batch_size=[rows])


def ratios(*values: float) -> Tensor:
    return torch.tensor([values], dtype=torch.float64).log()


def weights(correction: Correction, log_ratio: Tensor, advantage: float = 1.0) -> list[float]:
    """The kernel's weights of one row: the total coefficient without reduction and advantage."""
    current, batch = record(log_ratio, torch.full((log_ratio.shape[0],), advantage, dtype=torch.float64))
    out = correction(current, batch)
    return (out.weight * log_ratio.numel() / advantage).flatten().tolist()


NOT_ONE = {
    "exp_advantage": "its weight is exp(A), whatever the ratio",
    "shape": "its weight is gamma / (1 + gamma)^2 at ratio 1",
    "clip_cov": "it silences units whatever the drift",
    "residual": "its advantage is a residual of rewards",
    "likelihood_pair": "its advantage is a success rate's",
    "teacher_ppo": "its advantage is the teacher's",
}
"""Kernels whose weight at ratio 1 is not 1 times the given advantage, and why."""


def test_the_list_of_pairs_leaves_no_kernel_and_no_level_out() -> None:
    def names(nodes: list[Any]) -> set[str]:
        return {node if isinstance(node, str) else node["name"] for node in nodes}

    assert names(LEVEL_NODES) == set(LEVELS)
    assert names(KERNELS_OF_ONE) | set(NOT_ONE) == set(KERNELS)
    assert not names(KERNELS_OF_ONE) & set(NOT_ONE)


def undrifted() -> tuple[Tensor, TensorDict]:
    """Four rows of three steps of two units each, some masked, at zero drift from every anchor."""
    g = torch.Generator().manual_seed(0)
    current, batch = record(torch.zeros(4, 6, dtype=torch.float64), torch.randn(4, generator=g, dtype=torch.float64))
    batch["mask"] = torch.rand(4, 6, generator=g) > 0.3
    batch["step_index"] = (torch.arange(6) // 2).expand(4, 6).contiguous()
    batch["reward"] = torch.zeros(4, 3, dtype=torch.float64)
    batch["proxy_log_prob"] = current.clone()
    return current, batch


@pytest.mark.parametrize("kernel", KERNELS_OF_ONE, ids=str)
@pytest.mark.parametrize("level", LEVEL_NODES, ids=str)
def test_at_zero_drift_every_level_and_kernel_with_weight_one_there_is_reinforce(level: Any, kernel: Any) -> None:
    current, batch = undrifted()
    for reduce, anchor in (("token-mean", "behavior"), ("sequence-mean-token-mean", "proximal")):
        expected = Correction(kernel="one", reduce=reduce)(current, batch).weight
        assert bool((expected[batch["mask"]] != 0).all())
        got = Correction(level=level, kernel=kernel, reduce=reduce, anchor=anchor)(current, batch).weight
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("level", [x for x in LEVEL_NODES if x != "min_prefix"], ids=str)  # a minimum of equals
def test_attached_at_zero_drift_a_unit_counts_as_often_as_the_level_sums_it(level: Any) -> None:
    """Differentiated means are REINFORCE too; differentiated sums count a unit once for every unit that sees it."""
    current, batch = undrifted()
    mask = batch["mask"]
    plain = Correction(kernel="one")(current, batch).weight
    position, count = mask.cumsum(-1), mask.sum(-1, keepdim=True)
    step = batch["step_index"].unsqueeze(-1) == batch["step_index"].unsqueeze(-2)
    in_step = (step & mask.unsqueeze(-2)).sum(-1)
    later = (mask / position.clamp(min=1)).flip(-1).cumsum(-1).flip(-1)  # sum of 1 / t over t from this unit on
    share = {
        "unit": 1.0,
        "step": 1.0,
        "geometric": 1.0,
        "hoelder": 1.0,
        "step_sum": in_step,
        "sequence": count.expand_as(mask),
        "prefix": count - position + 1,
        "prefix_geometric": later,
    }[level if isinstance(level, str) else level["name"]]
    leaf = current.clone().requires_grad_()
    Correction(level=level, kernel="is", attached=True)(leaf, batch).loss.backward()
    torch.testing.assert_close(-leaf.grad, plain * share)


def test_ppo_keeps_harmless_directions_and_drops_harmful_ones() -> None:
    r = ratios(0.5, 0.9, 1.0, 1.1, 1.5, 4.0)
    ppo = Correction(kernel={"name": "ppo", "clip_low": 0.2, "clip_high": 0.28, "dual_clip": 3.0})
    assert weights(ppo, r, 1.0) == pytest.approx([0.5, 0.9, 1.0, 1.1, 0.0, 0.0])
    assert weights(ppo, r, -1.0) == pytest.approx([0.0, 0.9, 1.0, 1.1, 1.5, 0.0])


def test_vespo_peaks_at_k_over_lambda_with_the_published_values() -> None:
    vespo = Correction(kernel="gamma")
    assert weights(vespo, ratios(1.0, 2 / 3, 2.0, 0.1), 1.0) == pytest.approx([1.0, 1.208, 0.199, 0.149], abs=1e-3)
    assert weights(vespo, ratios(1.0, 1.5, 2.0, 0.1), -1.0) == pytest.approx([1.0, 1.242, 1.083, 0.006], abs=1e-3)
    flat = Correction(kernel={"name": "gamma", "k_positive": 0.0, "lam_positive": 0.0})
    assert weights(flat, ratios(0.1, 5.0)) == pytest.approx([1.0, 1.0])


def test_sapo_is_one_at_one_and_fades_on_both_sides() -> None:
    curve = load_correction("sapo").weight_curve(torch.linspace(-8, 8, 65).double(), 1.0)
    assert float(curve[32]) == pytest.approx(1.0)
    assert curve[0] < 1e-2 and curve[-1] < 1e-2
    steep = Correction(kernel={"name": "gate", "tau_positive": 1.0, "tau_negative": 2.0})
    assert weights(steep, ratios(3.0), -1.0)[0] < weights(steep, ratios(3.0), 1.0)[0]


def test_shape_peaks_at_gamma_with_a_quarter() -> None:
    shape = Correction(kernel={"name": "shape", "gamma": 0.1}, anchor="none")
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
    Correction(kernel="one")(one, batch).loss.backward()
    batch["advantage"] = advantage
    Correction(kernel="one", penalty=[{"name": "k1", "anchor": "none", "coefficient": -0.1}])(
        two, batch
    ).loss.backward()
    torch.testing.assert_close(one.grad, two.grad)


def test_levels_agree_at_their_ends() -> None:
    g = torch.Generator().manual_seed(0)
    d = 0.4 * torch.randn(3, 6, generator=g, dtype=torch.float64)
    mask = torch.rand(3, 6, generator=g) > 0.3
    mask[:, -1] = True
    d = d * mask
    _, batch = record(d, torch.zeros(3))
    batch["mask"] = mask

    def level(name: str, **kw: Any) -> Tensor:
        return LEVELS[name](d, Layout(mask, batch), **kw)

    torch.testing.assert_close(level("prefix")[:, -1], level("sequence")[:, -1])
    torch.testing.assert_close(level("prefix_geometric")[:, -1], level("geometric")[:, -1])
    torch.testing.assert_close(level("step")[mask], level("unit")[mask])  # one unit a step
    one_turn = batch.clone().set("step_index", torch.zeros(3, 6, dtype=torch.int64))
    torch.testing.assert_close(LEVELS["step"](d, Layout(mask, one_turn)), level("geometric"))
    torch.testing.assert_close(LEVELS["step_sum"](d, Layout(mask, one_turn)), level("sequence"))
    torch.testing.assert_close(level("hoelder", p=0.0), level("geometric"))
    torch.testing.assert_close(level("hoelder", p=1e-6), level("geometric"), rtol=1e-4, atol=1e-5)
    arithmetic = ((d.exp() * mask).sum(-1) / mask.sum(-1)).log()
    torch.testing.assert_close(level("hoelder", p=1.0)[:, 0], arithmetic)
    largest = d.where(mask, -torch.inf).amax(-1)
    assert ((largest - level("hoelder", p=50.0)[:, 0]).abs() <= mask.sum(-1).double().log() / 50 + 1e-12).all()
    assert (level("hoelder", p=2.0) > level("hoelder", p=-2.0)).all()


def test_min_prefix_of_a_constant_fall_is_twice_it_and_of_two_units_the_prefix() -> None:
    d = torch.full((1, 5), -0.3, dtype=torch.float64)
    _, batch = record(d, torch.zeros(1))
    got = LEVELS["min_prefix"](d, Layout(batch["mask"], batch))
    assert got.flatten().tolist() == pytest.approx([-0.3, -0.6, -0.6, -0.6, -0.6])
    d = torch.tensor([[0.2, -0.5]], dtype=torch.float64)
    _, batch = record(d, torch.zeros(1))
    layout = Layout(batch["mask"], batch)
    torch.testing.assert_close(LEVELS["min_prefix"](d, layout), LEVELS["prefix"](d, layout))
    assert (LEVELS["min_prefix"](d, layout, capped=True) <= d).all()


def test_gspo_straight_through_equals_differentiating_the_geometric_mean() -> None:
    g = torch.Generator().manual_seed(1)
    current, batch = record(1e-4 * torch.randn(4, 5, generator=g, dtype=torch.float64), torch.ones(4).double())
    for reduce in ("token-mean", "sequence-mean-token-mean"):
        grads = []
        for attached in (False, True):
            leaf = current.clone().requires_grad_()
            load_correction("gspo", reduce=reduce, attached=attached)(leaf, batch).loss.backward()
            grads.append(leaf.grad)
        torch.testing.assert_close(grads[0], grads[1])


def test_decoupled_ppo_with_equal_policies_is_ppo_and_at_the_proximal_policy_importance_sampling() -> None:
    g = torch.Generator().manual_seed(2)
    current, batch = record(
        0.3 * torch.randn(4, 5, generator=g, dtype=torch.float64), torch.randn(4, generator=g).double()
    )
    same = load_correction("decoupled_ppo")(current, batch).weight
    torch.testing.assert_close(same, load_correction("ppo")(current, batch).weight)
    batch["proximal_log_prob"] = current
    torch.testing.assert_close(
        load_correction("decoupled_ppo")(current, batch).weight,
        load_correction("importance_sampling")(current, batch).weight,
    )


def test_mismatch_limits() -> None:
    g = torch.Generator().manual_seed(4)
    current, batch = record(torch.zeros(4, 1, dtype=torch.float64), torch.randn(4, generator=g).double())
    plain = load_correction("tis", mismatch=[])(current, batch).weight
    for name in ("tis", "icepop", "veto", "geo_reject", "normalized_tis"):
        torch.testing.assert_close(load_correction(name)(current, batch).weight, plain)
    batch["behavior_log_prob"] = current - torch.tensor([[0.5], [-0.2], [1.0], [0.0]])
    token, whole = load_correction("tis")(current, batch), load_correction("sequence_tis")(current, batch)
    torch.testing.assert_close(token.weight, whole.weight)  # rows of one unit
    tiny = load_correction("normalized_tis", **{"mismatch.0.high": 1e-6})(current, batch).weight
    torch.testing.assert_close(tiny, plain)  # truncation at almost 0, then normalised: all ones
    exact = load_correction("icepop", **{"mismatch.0.low": 1.0, "mismatch.0.high": 1.0})(current, batch).weight
    assert (exact != 0).flatten().tolist() == [False, False, False, True]


def test_rejection_bands_are_about_the_ratio_and_not_its_inverse() -> None:
    _, batch = record(torch.zeros(1, 1, dtype=torch.float64), torch.ones(1))
    current = batch["proximal_log_prob"]
    batch["behavior_log_prob"] = current - math.log(2.2255)
    kept = Correction(anchor="proximal", reject=[{"name": "band", "level": "unit", "low": 0.7, "high": 2.5}])
    assert float(kept(current, batch).weight) != 0


def test_kept_denominator_shrinks_by_rejection_alone() -> None:
    log_ratio = torch.tensor([[0.0, 0.0], [2.0, 2.0]], dtype=torch.float64)
    current, batch = record(log_ratio, torch.ones(2, dtype=torch.float64))
    rule = {"name": "band", "level": "unit", "low": 0.5, "high": 2.0}
    original = Correction(kernel="is", reject=[rule])(current, batch).weight
    kept = Correction(kernel="is", reject=[rule], denominator="kept")(current, batch).weight
    assert original.flatten().tolist() == pytest.approx([0.25, 0.25, 0, 0])
    assert kept.flatten().tolist() == pytest.approx([0.5, 0.5, 0, 0])
    zeroed = Correction(kernel={"name": "band", "low": 0.5, "high": 2.0}, denominator="kept")(current, batch).weight
    assert zeroed.flatten().tolist() == pytest.approx([0.25, 0.25, 0, 0])


def test_reductions_by_hand_and_a_constant_horizon_forgets_the_padding() -> None:
    current, batch = record(torch.zeros(3, 4, dtype=torch.float64), torch.ones(3, dtype=torch.float64))
    batch["mask"] = torch.tensor([[1, 0, 0, 0], [1, 1, 1, 0], [0, 0, 0, 0]], dtype=torch.bool)
    expected = {
        "token-mean": (0.25, 0.25),
        "sequence-mean-token-mean": (0.5, 1 / 6),
        "sequence-mean-token-sum": (0.5, 0.5),
        "sequence-mean-token-sum-norm": (0.05, 0.05),
        "token-sum": (0.1, 0.1),
    }
    for reduce, (first, second) in expected.items():
        w = Correction(kernel="one", reduce=reduce, horizon=10)(current, batch).weight
        assert w[0].tolist() == pytest.approx([first, 0, 0, 0])
        assert w[1].tolist() == pytest.approx([second, second, second, 0])


def test_off_policy_sequence_mask_never_drops_positive_rows_and_nothing_on_policy() -> None:
    log_ratio = torch.tensor([[-1.0, -1.0], [-1.0, -1.0], [0.0, 0.0]], dtype=torch.float64)
    current, batch = record(log_ratio, torch.tensor([1.0, -1.0, -1.0], dtype=torch.float64))
    rows = (Correction(kernel="one", reject=["off_policy_sequence"])(current, batch).weight != 0).any(-1)
    assert rows.tolist() == [True, False, True]


def test_penalty_values_and_gradients_at_hand_worked_points() -> None:
    for name, slope in (("k1", 1.0), ("k2", 0.5), ("k3", 1 - math.exp(-0.5)), ("k3_plus", 0.5), ("abs", 1.0)):
        current, batch = record(torch.full((1, 1), 0.5, dtype=torch.float64), torch.zeros(1, dtype=torch.float64))
        leaf = current.requires_grad_()
        out = Correction(kernel="one", penalty=[{"name": name, "coefficient": 2.0}])(leaf, batch)
        out.loss.backward()
        assert float(leaf.grad) == pytest.approx(2 * slope), name
        if name.startswith("k3"):
            assert float(out.loss.detach()) == pytest.approx(2 * (math.exp(-0.5) + 0.5 - 1))


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


def test_interpolated_proximal_policy_at_lags_one_two_and_many() -> None:
    behavior, current = torch.full((1, 4), -2.0), torch.full((1, 4), -1.0)
    version = torch.tensor([[9, 8, -1, 10]])
    got = interpolated(current, behavior, version, 10)
    assert got.flatten().tolist() == pytest.approx([-2.0, -1.5, -2.0, -2.0])
    far = interpolated(current, behavior, torch.zeros(1, 4, dtype=torch.int64), 10_000)
    torch.testing.assert_close(far, current, atol=1e-3, rtol=0)


def test_moving_average_of_weights_is_the_debiased_ewma() -> None:
    layer = torch.nn.Linear(1, 1, bias=False)
    seen = []
    with torch.no_grad():
        layer.weight.fill_(1.0)
        average = MovingAverage(layer, decay=0.5)
        for value in (2.0, 4.0):
            layer.weight.fill_(value)
            average.update(layer)
            seen.append(float(average.module.weight))
    # weights 1, 1 -> W = 0.5 * 1 + 1 = 1.5, then 0.5 * 1.5 + 1 = 1.75
    assert seen == pytest.approx([1 / 3 + 2 * 2 / 3, (1 - 1 / 1.75) * (1 / 3 + 4 / 3) + 4 / 1.75])


def test_diagnostics_by_hand() -> None:
    current, batch = record(ratios(1.0, 2.0, 4.0), torch.tensor([1.0], dtype=torch.float64))
    batch["policy_version"] = torch.tensor([[3, 4, 5]])
    report = load_correction("ppo").diagnostics(current, batch, version=7)
    d = [0.0, math.log(2), math.log(4)]
    expected = {
        "ess/unit": 49 / 21 / 3,
        "ess/unit_count": 49 / 21,
        "ess/sequence": 1.0,
        "ess/processed_count": 1.0,
        "kl/k1": -sum(d) / 3,
        "kl/k2": sum(x * x for x in d) / 6,
        "kl/k3": (7 - 3 - sum(d)) / 3,
        "chi2": 21 / 3 - 1,
        "chi2/sequence": 63.0,
        "ratio/max": 4.0,
        "ratio/q50": 2.0,
        "clip/fraction_positive": 2 / 3,
        "clip/fraction_negative": 0.0,
        "reject/fraction": 0.0,
        "staleness/mean": 3.0,
        "staleness/max": 4.0,
    }
    for name, value in expected.items():
        assert float(report[name]) == pytest.approx(value), name


def drifted(seed: int = 0, rows: int = 4, width: int = 6, size: float = 0.3) -> tuple[Tensor, TensorDict]:
    g = torch.Generator().manual_seed(seed)
    log_ratio = size * torch.randn(rows, width, generator=g, dtype=torch.float64)
    return record(log_ratio, torch.randn(rows, generator=g, dtype=torch.float64))


def test_in_rows_of_one_unit_all_levels_agree() -> None:
    current, batch = drifted(width=1)
    expected = Correction(kernel="is")(current, batch).weight
    for level in LEVEL_NODES:
        torch.testing.assert_close(Correction(level=level, kernel="is")(current, batch).weight, expected)


def test_equal_lengths_make_the_two_means_one() -> None:
    current, batch = drifted()
    one = Correction(kernel="is", reduce="token-mean")(current, batch).weight
    torch.testing.assert_close(Correction(kernel="is", reduce="sequence-mean-token-mean")(current, batch).weight, one)


def test_power_means_grow_with_their_order_and_end_at_the_extremes() -> None:
    d = 0.5 * torch.randn(5, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    layout = Layout(torch.ones_like(d, dtype=torch.bool), record(d, torch.zeros(5))[1])
    orders = (-60.0, -3.0, -1.0, 0.0, 0.5, 1.0, 4.0, 60.0)
    means = torch.stack([LEVELS["hoelder"](d, layout, p=p)[:, 0] for p in orders])
    assert bool((means.diff(dim=0) > 0).all())
    for p, extreme in ((60.0, d.amax(-1)), (-60.0, d.amin(-1))):
        gap = (LEVELS["hoelder"](d, layout, p=p)[:, 0] - extreme).abs()
        assert bool((gap <= math.log(7) / 60 + 1e-12).all())


def test_gmpo_without_a_clip_is_gspo_without_one() -> None:
    current, batch = drifted()
    one, two = current.clone().requires_grad_(), current.clone().requires_grad_()
    load_correction("gmpo", **{"pre.low": 50.0, "pre.high": 50.0})(one, batch).loss.backward()
    load_correction("gspo", kernel="is")(two, batch).loss.backward()
    torch.testing.assert_close(one.grad, two.grad)


def test_gmpo_clips_one_outlier_alone_and_only_in_the_direction_of_the_advantage() -> None:
    log_ratio = torch.tensor([[0.1, 3.0, -0.2], [0.1, 3.0, -3.0]], dtype=torch.float64)
    current, batch = record(log_ratio, torch.tensor([1.0, -1.0], dtype=torch.float64))
    leaf = current.clone().requires_grad_()
    load_correction("gmpo")(leaf, batch).loss.backward()
    assert (leaf.grad != 0).tolist() == [[True, False, True], [True, True, False]]


def test_arithmetic_hoelder_without_a_clip_is_the_unit_ratio_and_its_weights_are_a_softmax() -> None:
    current, batch = drifted()
    mean = {"reduce": "sequence-mean-token-mean"}
    leaf, plain = current.clone().requires_grad_(), current.clone().requires_grad_()
    load_correction("hoelder", **{"level.p": 1.0, "kernel": "is"})(leaf, batch).loss.backward()
    Correction(kernel="is", **mean)(plain, batch).loss.backward()
    torch.testing.assert_close(leaf.grad, plain.grad)
    d = current - batch["behavior_log_prob"]
    for p in (2.0, -1.5):
        leaf = current.clone().requires_grad_()
        load_correction("hoelder", **{"level.p": p, "kernel": "is"})(leaf, batch).loss.backward()
        ratio = (p * d).exp().mean(-1, keepdim=True) ** (1 / p)
        expected = ratio * (p * d).softmax(-1) * batch["advantage"][:, None] / 4
        torch.testing.assert_close(-leaf.grad, expected)


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
    Correction(kernel="one", reduce=correction.reduce, horizon=correction.horizon)(plain, batch).loss.backward()
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


def test_effective_sample_size_lies_between_one_over_n_and_one() -> None:
    for size in (0.0, 0.3, 3.0):
        current, batch = drifted(size=size)
        ess = float(Correction(kernel="ess_cap").prepare(current, batch)["ess"][0])
        w = (current - batch["behavior_log_prob"]).exp()
        assert ess == pytest.approx(float(w.sum() ** 2 / (24 * w.square().sum())))
        assert 1 / 24 <= ess <= 1 + 1e-12


def test_truncation_without_a_bound_is_exact_importance_sampling_and_masks_never_raise_a_weight() -> None:
    current, batch = drifted(size=1.0)
    batch["proximal_log_prob"] = current.clone()
    u = (current - batch["behavior_log_prob"]).exp()
    plain = load_correction("tis", mismatch=[])(current, batch).weight
    free = load_correction("tis", **{"mismatch.0.high": math.inf})(current, batch).weight
    torch.testing.assert_close(free, plain * u)
    masked = load_correction("icepop", **{"mismatch.0.low": 0.5, "mismatch.0.high": 1.5})(current, batch).weight
    share = masked / plain
    assert bool((share <= 1.5).all())
    torch.testing.assert_close(share, torch.where((u >= 0.5) & (u <= 1.5), u, 0.0))
