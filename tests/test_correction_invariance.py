"""What must not matter (batch split, padding, row order, garbage under the mask) and what must stay finite."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
from correction_cases import three_turns
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tensordict import TensorDict
from torch import Tensor

from unified_rl.correction import Correction, correction_names, load_correction
from unified_rl.units import STEP_KEYS

NAMES = correction_names()
LOG_PROBS = ("behavior", "proximal", "reference", "proxy", "teacher")
# looser bounds than the presets', so that random drift does not reject everything
LOOSE: dict[str, dict[str, Any]] = {
    "geo_reject": {"reject.0.low": 0.8, "reject.0.high": 1.25},
    "geo_reject_token_tis": {"reject.0.low": 0.8, "reject.0.high": 1.25},
    "k1_mean_reject": {"reject.0.high": 0.1},
    "k2_mean_reject": {"reject.0.high": 0.04},
    "k3_reject": {"reject.0.high": 0.04},
    "clip_cov": {"kernel.fraction": 0.1, "kernel.cov_low": 0.0},
    "kl_cov": {"penalty.0.select.fraction": 0.1},
    "lp_reg": {"kernel.fraction": 0.3},
}


def make(seed: int = 0, rows: int = 8, width: int = 7, drift: float = 0.2) -> tuple[Tensor, TensorDict]:
    g = torch.Generator().manual_seed(seed)

    def noisy() -> Tensor:
        return current + drift * torch.randn(rows, width, generator=g, dtype=torch.float64)

    current = -1.0 - 2 * torch.rand(rows, width, generator=g, dtype=torch.float64)
    items: dict[str, Tensor] = {f"{name}_log_prob": noisy() for name in LOG_PROBS}
    return current, three_turns(items, g, hidden=0.3)


def preset(name: str, **overrides: Any) -> Correction:
    return load_correction(name, **{**LOOSE.get(name, {}), **overrides})


def gradient(correction: Correction, log_prob: Tensor, batch: TensorDict, size: int | None = None) -> Tensor:
    leaf = log_prob.clone().requires_grad_()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        stats = correction.prepare(leaf.detach(), batch)
    size = size or len(leaf)
    for start in range(0, len(leaf), size):
        part = slice(start, start + size)
        correction.loss(leaf[part], batch[part], stats[part]).loss.backward()
    assert leaf.grad is not None
    return leaf.grad


@pytest.mark.parametrize("denominator", ["original", "kept"])
@pytest.mark.parametrize("name", NAMES)
def test_any_split_into_micro_batches_gives_the_same_gradient(name: str, denominator: str) -> None:
    log_prob, batch = make()
    correction = preset(name, denominator=denominator)
    whole = gradient(correction, log_prob, batch)
    assert whole.abs().sum() > 0
    for size in (1, 3):
        torch.testing.assert_close(gradient(correction, log_prob, batch, size), whole, rtol=1e-9, atol=1e-12)


GARBAGE = torch.tensor([math.nan, math.inf, -math.inf, 1e30, -1e30], dtype=torch.float64)


def padded(log_prob: Tensor, batch: TensorDict, units: int, steps: int, rows: int) -> tuple[Tensor, TensorDict]:
    """The same data in a larger rectangle: more units, steps and empty rows, garbage wherever the mask is False."""
    (height, width), old_steps = log_prob.shape, batch["reward"].shape[1]
    shapes = {1: (height + rows,), width: (height + rows, width + units), old_steps: (height + rows, old_steps + steps)}
    out: dict[str, Tensor] = {}
    for key, value in {**batch, "current": log_prob}.items():
        wide = key in STEP_KEYS
        shape = shapes[1] if value.ndim == 1 else shapes[old_steps if wide else width]
        out[key] = value.new_zeros(shape)
        out[key][tuple(slice(0, n) for n in value.shape)] = value
    out["step_mask"] = torch.zeros(shapes[old_steps], dtype=torch.bool)
    out["step_mask"][:height, :old_steps] = True
    out["step_index"][:height, width:] = batch["step_index"][:, -1:]
    out["group"][height:] = 1000 + torch.arange(rows)

    def spoiled(value: Tensor, keep: Tensor) -> Tensor:
        return torch.where(keep, value, GARBAGE[torch.arange(value.numel()) % 5].view_as(value))

    mask = out["mask"]
    for name in LOG_PROBS:
        out[f"{name}_log_prob"] = spoiled(out[f"{name}_log_prob"], mask)
    out["advantage"] = spoiled(out["advantage"][:, None].expand_as(mask).contiguous(), mask)
    out["reward"] = spoiled(out["reward"], out["step_mask"])
    out["policy_version"] = torch.where(mask, out["policy_version"], 10**9)
    current = spoiled(out.pop("current"), mask)
    return current, TensorDict(out, batch_size=[height + rows])


@pytest.mark.parametrize("name", NAMES)
def test_padding_and_garbage_under_the_mask_change_nothing(name: str) -> None:
    log_prob, batch = make()
    correction = preset(name)
    whole = gradient(correction, log_prob, batch)
    wide, record = padded(log_prob, batch, units=4, steps=2, rows=3)
    got = gradient(correction, wide, record)
    torch.testing.assert_close(got[:8, :7], whole, rtol=1e-9, atol=1e-12)
    assert bool((got[~record["mask"]] == 0).all())
    for size in (1, 4):
        torch.testing.assert_close(gradient(correction, wide, record, size), got, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_padding_and_garbage_do_not_show_in_the_diagnostics(name: str) -> None:
    log_prob, batch = make()
    wide, record = padded(log_prob, batch, units=4, steps=2, rows=3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        clean = preset(name).diagnostics(log_prob, batch, version=3)
        dirty = preset(name).diagnostics(wide, record, version=3)
    assert clean.keys() == dirty.keys()
    for key in clean.keys() - {"mask/fraction"}:
        assert float(dirty[key]) == pytest.approx(float(clean[key]), rel=1e-6, abs=1e-12), key


def test_an_advantage_of_a_row_or_a_step_may_be_garbage_where_nothing_is_masked_in() -> None:
    log_prob, batch = make()
    batch["mask"][2] = False
    expected = gradient(preset("grpo"), log_prob, batch)
    by_row = batch.clone()
    by_row["advantage"][2] = math.nan
    assert torch.equal(gradient(preset("grpo"), log_prob, by_row), expected)
    by_step = batch.clone()
    by_step["advantage"] = by_row["advantage"][:, None].expand(8, 3).contiguous()
    torch.testing.assert_close(gradient(preset("grpo"), log_prob, by_step), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_row_order_does_not_matter(name: str) -> None:
    log_prob, batch = make()
    correction = preset(name)
    order = torch.tensor([3, 7, 0, 5, 1, 6, 2, 4])
    expected = gradient(correction, log_prob, batch)[order]
    torch.testing.assert_close(gradient(correction, log_prob[order], batch[order]), expected, rtol=1e-9, atol=1e-12)


def edge_cases(log_prob: Tensor, batch: TensorDict, name: str) -> dict[str, tuple[dict[str, Tensor], dict[str, float]]]:
    """What to change in the batch, and which metrics must tell of it with which value."""
    mask, lone = batch["mask"], torch.zeros_like(batch["mask"])
    lone[2, 3] = True
    flat = torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64).expand(8, 3)
    nothing = torch.full_like(log_prob, math.nan)
    return {
        "nothing masked in": ({"mask": lone & False}, {"mask/units": 0.0, "ratio/max": 0.0, "ratio/min": 0.0}),
        "one unit": ({"mask": lone}, {"mask/units": 1.0, "ess/unit_count": 1.0}),
        "groups of one": ({"group": torch.arange(8)}, {"mask/units": float(mask.sum())}),
        "all rewards equal": (
            {"reward": flat.clone(), "advantage": torch.zeros(8, dtype=torch.float64)},
            {"clip/fraction_positive": 0.0, "clip/fraction_negative": 0.0},
        ),
        "behavior far below": (
            {"behavior_log_prob": log_prob - 1e4, "proximal_log_prob": log_prob - 1e4},
            {"ratio/clamped": 1.0, "ratio/max": math.exp(20)},
        ),
        "behavior far above": (
            {"behavior_log_prob": log_prob + 1e4, "reference_log_prob": log_prob + 1e4},
            {"ratio/clamped": 1.0, "ratio/max": math.exp(-20)},
        ),
        "behavior not finite": (
            {"behavior_log_prob": torch.full_like(log_prob, -math.inf), "proximal_log_prob": nothing},
            {"ess/unit_count": 0.0},
        ),
    }


@pytest.mark.parametrize("name", NAMES)
def test_edge_cases_have_a_finite_outcome_and_a_metric_that_tells_of_them(name: str) -> None:
    correction = preset(name)
    log_prob, batch = make()
    for case, (change, told) in edge_cases(log_prob, batch, name).items():
        altered = batch.clone().update(change)
        assert torch.isfinite(gradient(correction, log_prob, altered)).all(), case
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            report = correction.diagnostics(log_prob, altered, version=3)
            out = correction(log_prob, altered)
        assert all(torch.isfinite(x) for x in report.values()), (case, report)
        assert torch.isfinite(out.loss), case
        assert all(torch.isfinite(x) for x in out.metrics.values()), case
        if case == "all rewards equal" and correction.kernel_name in ("teacher_ppo", "residual"):
            continue  # their advantages come from log-probs too
        for key, value in told.items():
            assert float(report[key]) == pytest.approx(value, rel=1e-6), (case, key)
        if case == "behavior not finite" and correction.anchor in ("behavior", "proximal"):
            assert float(report["reject/nonfinite"]) == 1.0
            assert bool((out.weight == 0).all())


@pytest.mark.parametrize("name", NAMES)
def test_all_units_rejected_is_a_policy_term_of_exactly_zero_with_a_graph_and_a_metric(name: str) -> None:
    log_prob, batch = make()
    leaf = log_prob.clone().requires_grad_()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rule = {"name": "band", "level": "unit", "low": 1e3, "high": 1e4, "numerator": "current"}
        out = preset(name, reject=[rule], penalty=[])(leaf, batch)
    assert out.loss.requires_grad
    assert out.loss.item() == 0.0
    out.loss.backward()
    assert bool((leaf.grad == 0).all())
    assert float(out.metrics["reject/fraction"]) == 1.0


def test_nothing_masked_in_is_a_loss_of_exactly_zero_with_a_graph() -> None:
    log_prob, batch = make()
    batch["mask"] = torch.zeros_like(batch["mask"])
    out = load_correction("grpo")(log_prob.requires_grad_(), batch)
    assert out.loss.item() == 0.0
    assert out.loss.requires_grad


def test_everything_rejected_is_zero_with_a_graph_a_metric_and_a_warning_that_names_the_band() -> None:
    log_prob, batch = make(drift=2.0)
    with pytest.warns(UserWarning, match=r"band \(level=geometric, low=0.99, high=1.01\) leaves 0 of \d+ units: 100 %"):
        out = load_correction("geo_reject")(log_prob.requires_grad_(), batch)
    assert out.loss.item() == 0.0
    assert out.loss.requires_grad
    assert float(out.metrics["reject/fraction"]) == 1.0


def test_a_non_finite_log_prob_takes_out_its_unit_alone_and_is_counted() -> None:
    log_prob, batch = make()
    batch["mask"] = torch.ones_like(batch["mask"])
    correction = load_correction("ppo", denominator="kept")
    broken = batch.clone()
    broken["behavior_log_prob"][2, 3] = math.nan
    expected = batch.clone()
    expected["mask"][2, 3] = False
    torch.testing.assert_close(
        gradient(correction, log_prob, broken), gradient(correction, log_prob, expected), rtol=1e-12, atol=1e-14
    )
    report = correction.diagnostics(log_prob, broken)
    assert float(report["reject/nonfinite"]) == pytest.approx(1 / 56)


def test_half_precision_log_probs_are_compared_in_float32() -> None:
    log_prob, batch = make()
    half = log_prob.bfloat16()
    batch = batch.apply(lambda x: x.float() if x.is_floating_point() else x)
    out = load_correction("ppo")(half.requires_grad_(), batch)
    assert out.weight.dtype == torch.float32
    expected = load_correction("ppo")(half.detach().float(), batch).weight
    torch.testing.assert_close(out.weight, expected)


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    seed=st.integers(0, 10_000),
    rows=st.sampled_from([1, 4, 9]),
    width=st.sampled_from([1, 2, 6]),
    name=st.sampled_from(NAMES),
    size=st.integers(1, 9),
    drift=st.sampled_from([0.0, 0.05, 0.5, 30.0]),
)
def test_random_shapes_masks_and_drifts_split_alike_and_stay_finite(
    seed: int, rows: int, width: int, name: str, size: int, drift: float
) -> None:
    log_prob, batch = make(seed, rows, width, drift)
    whole = gradient(preset(name), log_prob, batch)
    assert torch.isfinite(whole).all()
    scale = float(whole.abs().max())
    part = gradient(preset(name), log_prob, batch, size)
    torch.testing.assert_close(part, whole, rtol=1e-8, atol=1e-12 * (1 + scale))
    assert bool((whole[~batch["mask"]] == 0).all())


@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    seed=st.integers(0, 10_000),
    rows=st.sampled_from([1, 4, 9]),
    width=st.sampled_from([2, 6]),
    name=st.sampled_from(NAMES),
    padding=st.tuples(st.integers(0, 3), st.integers(0, 2), st.integers(0, 2)),
    drift=st.sampled_from([0.0, 0.05, 0.5, 30.0]),
)
def test_random_padding_garbage_and_row_order_change_nothing(
    seed: int, rows: int, width: int, name: str, padding: tuple[int, int, int], drift: float
) -> None:
    log_prob, batch = make(seed, rows, width, drift)
    whole = gradient(preset(name), log_prob, batch)
    wide, record = padded(log_prob, batch, *padding)
    order = torch.randperm(len(wide), generator=torch.Generator().manual_seed(seed))
    mixed = gradient(preset(name), wide[order], record[order], size=3)
    got = torch.empty_like(mixed)
    got[order] = mixed
    scale = float(whole.abs().max())
    torch.testing.assert_close(got[:rows, :width], whole, rtol=1e-8, atol=1e-12 * (1 + scale))
    assert bool((got[~record["mask"]] == 0).all())
