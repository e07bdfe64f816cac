"""Mismatch weights, rejection, reductions, penalties, proximal policies and diagnostics, by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from correction_cases import drifted, ratios, record
from torch import Tensor

from unified_rl.correction import Correction, load_correction
from unified_rl.correction.proximal import MovingAverage, interpolated


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
    original = Correction(kernel="ratio", reject=[rule])(current, batch).weight
    kept = Correction(kernel="ratio", reject=[rule], denominator="kept")(current, batch).weight
    assert original.flatten().tolist() == pytest.approx([0.25, 0.25, 0, 0])
    assert kept.flatten().tolist() == pytest.approx([0.5, 0.5, 0, 0])
    zeroed = Correction(kernel={"name": "band", "low": 0.5, "high": 2.0}, denominator="kept")(current, batch).weight
    assert zeroed.flatten().tolist() == pytest.approx([0.25, 0.25, 0, 0])


def test_rejected_units_lose_or_keep_their_penalties_by_hand() -> None:
    log_ratio = torch.tensor([[0.0, 0.1], [2.0, 0.3]], dtype=torch.float64)
    current, batch = record(log_ratio, torch.ones(2, dtype=torch.float64))
    parts = {
        "kernel": "constant",
        "reject": [{"name": "band", "level": "unit", "low": 0.5, "high": 2.0}],
        "penalty": [{"name": "k2", "anchor": "behavior", "coefficient": 3.0}],
    }
    policy = torch.tensor([[1.0, 1.0], [0.0, 1.0]], dtype=torch.float64)

    def gradient(**more: Any) -> Tensor:
        x = current.clone().requires_grad_(True)
        Correction(**{**parts, **more})(x, batch).loss.backward()
        assert x.grad is not None
        return x.grad

    drop, keep = (-policy + 3.0 * log_ratio * policy) / 4, (-policy + 3.0 * log_ratio) / 4
    assert torch.equal(gradient(), gradient(rejected="drop"))
    torch.testing.assert_close(gradient(), drop)
    torch.testing.assert_close(gradient(rejected="keep"), keep)
    kept = gradient(rejected="keep", denominator="kept")
    torch.testing.assert_close(kept, keep * 4 / 3)
    batch["behavior_log_prob"][0, 0] = float("nan")  # bad data is not rejection: nothing of it is left
    assert float(gradient(rejected="keep")[0, 0]) == 0.0


def test_units_that_are_thinned_out_lose_or_keep_their_penalties_by_hand() -> None:
    log_ratio = torch.full((8, 6), 0.25, dtype=torch.float64)
    current, batch = record(log_ratio, torch.ones(8, dtype=torch.float64))
    penalty = [{"name": "k2", "anchor": "behavior", "coefficient": 3.0}]

    def gradient(**more: Any) -> Tensor:
        x = current.clone().requires_grad_(True)
        thin = {"name": "uniform", "keep": 0.5}
        Correction(kernel="constant", thin=thin, penalty=penalty, reduce="token-sum", **more)(x, batch).loss.backward()
        assert x.grad is not None
        return x.grad

    drop, keep = gradient(rejected="drop"), gradient()
    assert torch.equal(keep, gradient(rejected="keep"))
    assert set(keep.flatten().tolist()) == {-2.0 + 0.75, 0.75}  # weight 1 / 0.5 where kept, and the penalty everywhere
    assert set(drop.flatten().tolist()) == {-2.0 + 0.75, 0.0}
    assert torch.equal(drop == 0.0, keep == 0.75)


def test_micro_batches_of_rejected_rows_that_keep_their_penalties_add_up() -> None:
    drift = torch.randn(6, 4, generator=torch.Generator().manual_seed(3)).double()
    current, batch = record(drift, torch.ones(6).double())
    reject = [{"name": "band", "level": "geometric", "low": 0.7, "high": 1.3}]
    correction = Correction(reject=reject, penalty=[{"name": "k3", "anchor": "behavior"}], rejected="keep")
    x, y = (current.clone().requires_grad_(True) for _ in range(2))
    correction(x, batch).loss.backward()
    stats = correction.prepare(current, batch)
    for rows in (slice(0, 1), slice(1, 4), slice(4, 6)):
        correction.loss(y[rows], batch[rows], stats[rows]).loss.backward()
    assert x.grad is not None and y.grad is not None and bool((x.grad != 0).all())
    torch.testing.assert_close(x.grad, y.grad)


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
        w = Correction(kernel="constant", reduce=reduce, horizon=10)(current, batch).weight
        assert w[0].tolist() == pytest.approx([first, 0, 0, 0])
        assert w[1].tolist() == pytest.approx([second, second, second, 0])


def test_off_policy_sequence_mask_never_drops_positive_rows_and_nothing_on_policy() -> None:
    log_ratio = torch.tensor([[-1.0, -1.0], [-1.0, -1.0], [0.0, 0.0]], dtype=torch.float64)
    current, batch = record(log_ratio, torch.tensor([1.0, -1.0, -1.0], dtype=torch.float64))
    rows = (Correction(kernel="constant", reject=["off_policy_sequence"])(current, batch).weight != 0).any(-1)
    assert rows.tolist() == [True, False, True]


def test_penalty_values_and_gradients_at_hand_worked_points() -> None:
    for name, slope in (("k1", 1.0), ("k2", 0.5), ("k3", 1 - math.exp(-0.5)), ("k3_plus", 0.5), ("abs", 1.0)):
        current, batch = record(torch.full((1, 1), 0.5, dtype=torch.float64), torch.zeros(1, dtype=torch.float64))
        leaf = current.requires_grad_()
        out = Correction(kernel="constant", penalty=[{"name": name, "coefficient": 2.0}])(leaf, batch)
        out.loss.backward()
        assert float(leaf.grad) == pytest.approx(2 * slope), name
        if name.startswith("k3"):
            assert float(out.loss.detach()) == pytest.approx(2 * (math.exp(-0.5) + 0.5 - 1))


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


def test_a_unit_that_no_policy_said_has_no_age() -> None:
    current, batch = record(ratios(1.0, 2.0, 4.0), torch.tensor([1.0], dtype=torch.float64))
    batch["policy_version"] = torch.tensor([[-1, 4, 5]])
    report = load_correction("ppo").diagnostics(current, batch, version=7)
    assert float(report["staleness/mean"]) == 2.5 and float(report["staleness/max"]) == 3.0


def test_equal_lengths_make_the_two_means_one() -> None:
    current, batch = drifted()
    one = Correction(kernel="ratio", reduce="token-mean")(current, batch).weight
    torch.testing.assert_close(
        Correction(kernel="ratio", reduce="sequence-mean-token-mean")(current, batch).weight, one
    )


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
