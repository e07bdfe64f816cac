"""Levels: where they agree, what they are at zero drift, and the methods that live by them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from correction_cases import drifted, record
from tensordict import TensorDict
from torch import Tensor

from unified_rl.correction import Correction, load_correction
from unified_rl.correction.kernels import KERNELS
from unified_rl.correction.levels import LEVELS, Layout

LEVEL_NODES: list[Any] = [
    "unit", "step", "step_sum", "sequence", "geometric", "prefix", "prefix_geometric", "min_prefix",
    {"name": "hoelder", "p": 2.0}, {"name": "hoelder", "p": -1.0}, {"name": "hoelder", "p": 0.0},
]  # fmt: skip

KERNELS_OF_ONE: list[Any] = [
    "constant", "ratio", "ppo", "clipped", "band", "ring", "sign_clamp", "tapered", "soft_gate", "gamma_density",
    "tv_mask", "kl_mask", "log_clip", "centered_ppo", "ess_cap", "ess_cap_mixed", "m2_mask", "searched_ppo",
    "spared_ppo", "demonstration_shape", "demonstration_mixture", "replay_shape", "teacher_ratio",
    {"name": "band", "weighted": False},
]  # fmt: skip

NOT_ONE = {
    "exp_advantage": "its weight is exp(A), whatever the ratio",
    "shaped": "its weight is gamma / (1 + gamma)^2 at ratio 1",
    "clip_cov": "it silences units whatever the drift",
    "residual": "its advantage is a residual of rewards",
    "likelihood_pair": "its advantage is a success rate's",
    "teacher_ppo": "its advantage is the teacher's",
    "f_divergence": "its advantage is a pseudo-reward",
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
    batch["teacher_log_prob"] = current.clone()
    return current, batch


@pytest.mark.parametrize("kernel", KERNELS_OF_ONE, ids=str)
@pytest.mark.parametrize("level", LEVEL_NODES, ids=str)
def test_at_zero_drift_every_level_and_kernel_with_weight_one_there_is_reinforce(level: Any, kernel: Any) -> None:
    current, batch = undrifted()
    for reduce, anchor in (("token-mean", "behavior"), ("sequence-mean-token-mean", "proximal")):
        expected = Correction(kernel="constant", reduce=reduce)(current, batch).weight
        assert bool((expected[batch["mask"]] != 0).all())
        got = Correction(level=level, kernel=kernel, reduce=reduce, anchor=anchor)(current, batch).weight
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("level", [x for x in LEVEL_NODES if x != "min_prefix"], ids=str)  # a minimum of equals
def test_attached_at_zero_drift_a_unit_counts_as_often_as_the_level_sums_it(level: Any) -> None:
    """Differentiated means are REINFORCE too; differentiated sums count a unit once for every unit that sees it."""
    current, batch = undrifted()
    mask = batch["mask"]
    plain = Correction(kernel="constant")(current, batch).weight
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
    Correction(level=level, kernel="ratio", attached=True)(leaf, batch).loss.backward()
    torch.testing.assert_close(-leaf.grad, plain * share)


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


def test_in_rows_of_one_unit_all_levels_agree() -> None:
    current, batch = drifted(width=1)
    expected = Correction(kernel="ratio")(current, batch).weight
    for level in LEVEL_NODES:
        torch.testing.assert_close(Correction(level=level, kernel="ratio")(current, batch).weight, expected)


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
    load_correction("gspo", kernel="ratio")(two, batch).loss.backward()
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
    load_correction("hoelder", **{"level.p": 1.0, "kernel": "ratio"})(leaf, batch).loss.backward()
    Correction(kernel="ratio", **mean)(plain, batch).loss.backward()
    torch.testing.assert_close(leaf.grad, plain.grad)
    d = current - batch["behavior_log_prob"]
    for p in (2.0, -1.5):
        leaf = current.clone().requires_grad_()
        load_correction("hoelder", **{"level.p": p, "kernel": "ratio"})(leaf, batch).loss.backward()
        ratio = (p * d).exp().mean(-1, keepdim=True) ** (1 / p)
        expected = ratio * (p * d).softmax(-1) * batch["advantage"][:, None] / 4
        torch.testing.assert_close(-leaf.grad, expected)
