"""Which presets are one rule: their gradients on fixed batches, against the classes that the gallery states."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor

from unified_rl.correction import correction_names, load_correction, preset_config
from unified_rl.study.gallery import catalogue

ANCHORS = ("behavior", "proximal", "reference", "proxy", "teacher")
KINDS = {"advantage", "proximal", "wrapper", "thin"}
"""Fields that act outside the loss; all others are compared through the gradient."""


def batch(seed: int, rows: int, width: int, drift: float, group: Sequence[int], *, steps: int = 1) -> TensorDict:
    """Rows of uneven length with holes, in float64; every anchor ``drift`` away from the current policy."""
    g = torch.Generator().manual_seed(seed)

    def noise(*size: int) -> Tensor:
        return torch.randn(*size, generator=g, dtype=torch.float64)

    current = -2.5 + 0.8 * noise(rows, width)
    shared = noise(rows, 1)  # whole rows drift too, not only units around nothing
    others = {f"{name}_log_prob": current + drift * (noise(rows, width) + shared) for name in ANCHORS}
    mask = torch.rand(rows, width, generator=g) > 0.2
    mask &= torch.arange(width) < torch.randint(1, width + 1, (rows, 1), generator=g)
    mask[:, 0] = True
    reward = torch.zeros(rows, steps, dtype=torch.float64)
    reward[:, -1] = (torch.rand(rows, generator=g) > 0.6).double()
    step_index = (torch.arange(width) * steps // width).expand(rows, width).contiguous()
    return TensorDict(
        {
            "current": current.clamp(max=-0.05),
            **{key: value.clamp(max=-0.05) for key, value in others.items()},
            "mask": mask,
            "step_index": step_index,
            "reward": reward,
            "advantage": 1.5 * noise(rows),
            "group": torch.tensor(group),
            "source": torch.tensor([0, 2, 0, 3] * rows)[:rows],
            "policy_version": torch.zeros(rows, width, dtype=torch.int64),
        },
        batch_size=[rows],
    )


@cache
def batches() -> tuple[TensorDict, ...]:
    """On-policy; a hair, a little and far off-policy; several turns; one unit a row; many units; even drift."""
    return (
        batch(0, 8, 9, 0.0, [0] * 4 + [1] * 4, steps=3),
        batch(1, 8, 9, 1e-3, [0] * 4 + [1] * 4),
        batch(2, 8, 9, 0.25, [0] * 4 + [1] * 4, steps=3),
        batch(3, 9, 7, 2.0, [0, 0, 0, 0, 0, 1, 1, 1, 2], steps=2),
        batch(4, 8, 1, 0.7, [0] * 4 + [1] * 4),
        batch(5, 32, 16, 0.5, [n // 8 for n in range(32)], steps=4),
        even_drift(),
    )


def even_drift() -> TensorDict:
    """Rows that left the behavior policy by the same ratio on every unit, close to the bounds that rejections have."""
    record = batch(6, 12, 5, 0.0, [n // 4 for n in range(12)])
    offsets = [-2e-4, -1e-5, 0.0, 1e-5, 0.00999, -0.01002, 0.139, -0.139, 0.145, 0.6, -0.9, 3.0]
    shift = torch.tensor(offsets, dtype=torch.float64).unsqueeze(-1)
    record["behavior_log_prob"] = record["proximal_log_prob"] - shift  # proximal is the current policy here
    return record


def fingerprint(name: str, overrides: Mapping[str, Any] | None = None) -> list[Tensor]:
    """The gradient of a preset's loss on each batch, flattened."""
    correction, found = load_correction(name, **(overrides or {})), []
    for record in batches():
        leaf = record["current"].clone().requires_grad_()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # some presets reject a whole batch here
            correction(leaf, record).loss.backward()
        assert leaf.grad is not None
        found.append(leaf.grad.flatten())
    return found


@cache
def fingerprints() -> dict[str, list[Tensor]]:
    return {name: fingerprint(name) for name in correction_names()}


def close(x: Tensor, y: Tensor) -> bool:
    return bool((x - y).norm() <= 1e-9 * max(float(x.norm()), float(y.norm())))


def equal(x: Sequence[Tensor], y: Sequence[Tensor]) -> bool:
    return all(close(a, b) for a, b in zip(x, y, strict=True))


def scaled(x: Sequence[Tensor], y: Sequence[Tensor]) -> bool:
    """Equal directions on every batch; the factor may differ from batch to batch, and is positive."""
    pairs = [(a, b) for a, b in zip(x, y, strict=True) if float(a.norm()) > 0 or float(b.norm()) > 0]
    if any(float(a.norm()) == 0 or float(b.norm()) == 0 for a, b in pairs):
        return False
    return all(close(a / a.norm(), b / b.norm()) for a, b in pairs)


def partition(same: Any) -> set[frozenset[str]]:
    """Classes of more than one preset under a relation that is transitive."""
    classes: list[list[str]] = []
    for name, mark in fingerprints().items():
        home = next((c for c in classes if same(fingerprints()[c[0]], mark)), None)
        if home is None:
            classes.append([name])
        else:
            home.append(name)
    return {frozenset(c) for c in classes if len(c) > 1}


def stated(relation: str) -> set[frozenset[str]]:
    return {frozenset(group["presets"]) for group in catalogue.data("classes")[relation]}


def test_the_batches_reach_what_tells_presets_apart() -> None:
    """Each batch but the one without drift has units of both signs, and every preset a gradient on some batch."""
    for record in batches():
        assert {-1.0, 1.0} <= set(record["advantage"].sign().tolist())
    far = [float((r["current"] - r["behavior_log_prob"])[r["mask"]].abs().max()) for r in batches()]
    assert far[0] == 0 and far[1] < 0.01 and far[3] > 4
    assert all(any(float(g.norm()) > 0 for g in marks) for marks in fingerprints().values())


def test_presets_that_are_equal_are_those_that_the_gallery_lists() -> None:
    assert partition(equal) == stated("equal")


def test_presets_that_are_equal_up_to_a_positive_factor_are_those_that_the_gallery_lists() -> None:
    """Classes that are equal outright are not listed again."""
    assert partition(scaled) - partition(equal) == stated("scaled")


@pytest.mark.parametrize("group", catalogue.data("classes")["equal"], ids=lambda g: g["presets"][0])
def test_equal_presets_differ_in_the_fields_that_are_listed_and_in_no_part_of_the_loss(group: dict[str, Any]) -> None:
    from unified_rl.study.gallery.expand import expanded

    rules = [expanded(preset_config(name)) for name in group["presets"]]
    about = {"name", "summary", "source", "confidence", "experimental"}
    differing = {key for key in rules[0] if key not in about and any(rule[key] != rules[0][key] for rule in rules)}
    assert differing == set(group["differ"]) and differing <= KINDS


@pytest.mark.parametrize("group", catalogue.data("classes")["given"], ids=lambda g: "-".join(g["presets"]))
def test_presets_coincide_under_the_stated_settings_and_not_without_them(group: dict[str, Any]) -> None:
    same = {"equal": equal, "scaled": scaled}[group["relation"]]
    chosen = [i for i, r in enumerate(batches()) if not group.get("equal_groups") or len(set(counts(r))) == 1]
    first, *others = group["presets"]
    given = {name: group["given"].get(name, {}) for name in group["presets"]}
    assert set(group["given"]) <= set(group["presets"])

    def mark(name: str, overrides: Mapping[str, Any]) -> list[Tensor]:
        gradients = fingerprint(name, overrides)
        return [gradients[i] for i in chosen]

    for name in others:
        assert same(mark(first, given[first]), mark(name, given[name])), name
    for name in group["given"]:
        rest = next(other for other in group["presets"] if other != name)
        assert not same(mark(name, {}), mark(rest, given[rest])), f"{name} needs no settings"


def counts(record: TensorDict) -> list[int]:
    return torch.bincount(record["group"]).tolist()


def test_a_negative_factor_or_a_vanished_gradient_is_not_the_same_rule() -> None:
    x = [torch.tensor([1.0, 2.0]), torch.zeros(2)]
    assert scaled(x, [2 * x[0], x[1]]) and not equal(x, [2 * x[0], x[1]])
    assert not scaled(x, [-x[0], x[1]])
    assert not scaled(x, [x[0], torch.tensor([0.0, 1e-3])])
