"""Every rule of every table of a correction acts when it is chosen: the gradient is another than without it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from correction_cases import drifted
from correction_surrogates import make_batch
from tensordict import TensorDict
from torch import Tensor

from unified_rl.correction import Correction
from unified_rl.correction.kernels import KERNELS
from unified_rl.correction.levels import LEVELS
from unified_rl.correction.penalties.penalty import PENALTIES
from unified_rl.correction.penalties.selection import SELECTIONS
from unified_rl.correction.reduction import REDUCTIONS
from unified_rl.correction.transforms import PRES
from unified_rl.correction.weights.mismatch import MISMATCHES
from unified_rl.correction.weights.rejection import ESTIMATORS, OVER, REJECTS
from unified_rl.correction.weights.thinning import THINS

TIGHT: dict[str, dict[str, Any]] = {
    "hoelder": {"p": 2.0},
    "pessimistic_clip": {"low": 0.1, "high": 0.1},
    "clamp": {"low": -0.1, "high": 0.1},
    "band": {"low": 0.9, "high": 1.1},
    "clipped": {"high": 1.1},
    "tv_mask": {"low": 0.02, "high": 0.02},
    "kl_mask": {"low": 0.01, "high": 0.01},
    "veto": {"low": 0.6},
    "divergence": {"high": 0.05},
    "truncate": {"high": 0.9},
    "clip": {"low": 0.9, "high": 1.1},
    "mask": {"low": 0.9, "high": 1.1},
    "top_covariance": {"fraction": 0.1},
    "clip_cov": {"fraction": 0.2, "cov_low": 0.0},
    "spared_ppo": {"fraction": 0.3, "clip_low": 0.2, "clip_high": 0.2},
    "drop_negatives": {"surplus": 0.5},
}
"""Settings under which a rule has something to do on this batch."""


def far() -> TensorDict:
    """Rows whose proximal policy lies further off than the one that acted."""
    batch = make_batch()
    g = torch.Generator().manual_seed(1)
    batch["source"][4] = 1  # a row of replay
    batch["proximal_log_prob"] += 0.6 * torch.randn(batch["mask"].shape, generator=g, dtype=torch.float64)
    return batch


def gradient(**fields: Any) -> Tensor:
    batch = far()
    leaf = batch["current"].clone().requires_grad_()
    Correction(**fields)(leaf, batch).loss.backward()
    assert leaf.grad is not None and bool(torch.isfinite(leaf.grad).all())
    return leaf.grad


def node(name: str, **more: Any) -> dict[str, Any]:
    return {"name": name, **TIGHT.get(name, {}), **more}


def all_differ(gradients: dict[str, Tensor]) -> None:
    names = list(gradients)
    same = [(a, b) for i, a in enumerate(names) for b in names[:i] if torch.allclose(gradients[a], gradients[b])]
    assert not same and all(float(g.norm()) > 0 for g in gradients.values()), same


def test_no_two_kernels_have_the_same_gradient() -> None:
    all_differ({name: gradient(kernel=node(name)) for name in KERNELS})


def test_no_two_levels_have_the_same_gradient() -> None:
    all_differ({name: gradient(kernel="ratio", level=node(name)) for name in LEVELS})


def test_no_two_reductions_have_the_same_gradient() -> None:
    all_differ({name: gradient(kernel="ratio", reduce=name, horizon=7.0) for name in REDUCTIONS})


@pytest.mark.parametrize(
    ("field", "table", "common"),
    [
        ("pre", PRES, {"kernel": "ratio"}),
        ("thin", THINS, {"kernel": "ratio"}),
        ("mismatch", MISMATCHES, {"kernel": "ppo", "anchor": "proximal"}),
        ("reject", REJECTS, {"kernel": "ppo"}),
        ("penalty", PENALTIES, {"kernel": "ratio"}),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_no_two_rules_have_the_same_gradient_and_each_another_than_none(
    field: str, table: dict[str, Any], common: dict[str, Any]
) -> None:
    listed = field in ("mismatch", "reject", "penalty")
    found = {name: gradient(**{field: [node(name)] if listed else node(name)}, **common) for name in table}
    equal = {"k3_plus"} if field == "penalty" else set()  # k2's gradient, beside k3's value
    all_differ({"none": gradient(**common), **{name: g for name, g in found.items() if name not in equal}})
    if equal:
        torch.testing.assert_close(found["k3_plus"], found["k2"])


@pytest.mark.filterwarnings("ignore:divergence")
def test_every_estimator_over_every_span_rejects_some_units_and_leaves_some() -> None:
    """At a bound in the middle of what it measures."""
    batch = far()
    for estimator in ESTIMATORS:
        for over in OVER:
            shares = []
            for high in torch.logspace(-4, 2, 60).tolist():
                rule = {"name": "divergence", "estimator": estimator, "over": over, "high": high}
                stats = Correction(kernel="ratio", reject=[rule]).prepare(batch["current"], batch)
                shares.append(float(stats["kept"].sum() / stats["original"].sum()))
                if 0.0 < shares[-1] < 1.0:
                    break
            assert 0.0 < shares[-1] < 1.0, (estimator, over)


def test_every_selection_narrows_the_penalty_to_the_units_that_it_names() -> None:
    batch = far()
    advantage = batch["advantage"][:, None].expand_as(batch["mask"])
    kernel = node("spared_ppo")
    plain = gradient(kernel=kernel)
    whole = gradient(kernel=kernel, penalty=["k2"]) - plain
    chosen = {}
    for name in SELECTIONS:
        part = gradient(kernel=kernel, penalty=[{"name": "k2", "select": node(name)}]) - plain
        at = part.abs() > 1e-12
        assert 0 < int(at.sum()) < int(batch["mask"].sum())
        torch.testing.assert_close(part[at], whole[at])
        chosen[name] = at
    assert torch.equal(chosen["negative"], batch["mask"] & (advantage < 0))
    assert torch.equal(chosen["positive"], batch["mask"] & (advantage > 0))
    assert not torch.equal(chosen["selected"], chosen["top_covariance"])


def test_the_exact_mismatch_weight_is_the_ratio_itself() -> None:
    current, batch = drifted(size=1.0)
    batch["proximal_log_prob"] = current - 0.1
    stats = Correction(kernel="ppo", anchor="proximal", mismatch=["exact"]).prepare(current, batch)
    torch.testing.assert_close(stats["weight"], (batch["proximal_log_prob"] - batch["behavior_log_prob"]).exp())
