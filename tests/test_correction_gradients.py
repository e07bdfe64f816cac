"""Every preset's gradient against its published surrogate, differentiated by autograd."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from correction_surrogates import OVERRIDES, SURROGATES, B, N, make_batch, problem
from tensordict import TensorDict
from torch import Tensor

from unified_rl.correction import correction_names, load_correction
from unified_rl.correction.levels import Layout
from unified_rl.correction.weights.thinning import prefix as prefix_thinning
from unified_rl.correction.weights.thinning import uniform

STOCHASTIC = {"clip_cov", "red_drop", "nat_uniform", "nat_prefix"}


def gradient(name: str, batch: TensorDict, **overrides: Any) -> Tensor:
    lp = batch["current"].clone().requires_grad_()
    load_correction(name, **{**OVERRIDES.get(name, {}), **overrides})(lp, batch).loss.backward()
    assert lp.grad is not None
    return lp.grad


def test_every_preset_has_a_surrogate_or_a_test_of_its_own() -> None:
    assert set(SURROGATES) | STOCHASTIC == set(correction_names())


@pytest.mark.parametrize("name", sorted(SURROGATES))
def test_gradient_equals_that_of_the_published_surrogate(name: str) -> None:
    for seed in (0, 1, 2):
        batch = make_batch(seed)
        if name == "per_decision_is":
            batch["advantage"] = torch.randn(B, N, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        lp = batch["current"].clone().requires_grad_()
        SURROGATES[name](problem(batch, lp)).backward()
        assert lp.grad is not None
        expected = lp.grad
        assert expected.abs().sum() > 0
        torch.testing.assert_close(gradient(name, batch), expected, rtol=1e-9, atol=1e-11)


def test_clip_cov_silences_the_asked_number_of_units_inside_its_band_and_nothing_else() -> None:
    batch = make_batch()
    plain = gradient("ppo", batch)
    got = gradient("clip_cov", batch, **{"kernel.fraction": 0.06, "kernel.cov_low": 0.05, "kernel.cov_high": 5.0})
    live = batch["mask"]
    a = batch["advantage"][:, None].expand(B, N)
    lp = batch["current"]
    cov = (a - a[live].mean()) * (lp - lp[live].mean())
    changed = plain != got
    assert int(changed.sum()) == int(0.06 * live.sum())
    assert bool((got[changed] == 0).all())
    assert bool(((cov > 0.05) & (cov < 5) & live)[changed].all())
    constant = batch.clone().set("advantage", torch.ones(B, dtype=torch.float64))
    assert torch.equal(gradient("clip_cov", constant), gradient("ppo", constant))


def test_red_drop_balances_every_group_and_centres_on_what_is_left() -> None:
    batch = make_batch()
    batch["group"] = torch.tensor([3, 3, 3, 3, 3, 7, 7, 7])
    reward = torch.tensor([1.0, 0, 0, 0, 0, 1, 1, 0], dtype=torch.float64)
    batch["advantage"] = reward - torch.tensor([0.2] * 5 + [2 / 3] * 3, dtype=torch.float64)
    left = gradient("red_drop", batch).abs().sum(-1) > 0
    assert left[[0, 5, 6, 7]].all() and int(left[1:5].sum()) == 1  # one bad answer beside one good; two beside one
    stats = load_correction("red_drop").prepare(batch["current"], batch)
    expected = torch.tensor([0.5, -0.5, -0.5, -0.5, -0.5, 1 / 3, 1 / 3, -2 / 3], dtype=torch.float64)
    torch.testing.assert_close(stats["advantage"][:, 0], expected)
    drawn = {
        tuple(
            load_correction("red_drop", **{"thin.seed": seed})
            .prepare(batch["current"], batch)["weight"][:5, 0]
            .tolist()
        )
        for seed in range(40)
    }
    assert len(drawn) == 4  # any of the four may be the one that stays
    plain = load_correction("red_drop", **{"thin.recenter": False}).prepare(batch["current"], batch)
    torch.testing.assert_close(plain["advantage"][:, 0], batch["advantage"])


@pytest.mark.parametrize("rule", [uniform, prefix_thinning])
def test_thinning_weighs_every_unit_by_one_in_expectation(rule: Callable[..., Tensor]) -> None:
    batch = make_batch()
    layout = Layout(batch["mask"], batch)
    one = torch.ones(B, N, dtype=torch.float64)
    draws = torch.stack([rule(batch, layout, one, seed=seed) for seed in range(1500)])
    largest = draws.amax(0)  # 1 / probability: the variance of a draw is that minus 1
    error = (draws.mean(0) - 1).abs()[batch["mask"]]
    assert bool((error <= 4.5 * ((largest - 1) / 1500).sqrt()[batch["mask"]] + 1e-9).all())
    assert 0.3 < float((draws[:, batch["mask"]] == 0).double().mean()) < 0.6


@pytest.mark.parametrize("name", ["nat_uniform", "nat_prefix"])
def test_a_thinned_gradient_is_the_full_one_times_the_weights(name: str) -> None:
    batch = make_batch()
    stats = load_correction(name).prepare(batch["current"], batch)
    torch.testing.assert_close(gradient(name, batch), gradient("grpo", batch) * stats["weight"])
