"""Kernels that make their own signal: soft values, a teacher in the denominator, f-divergences from a tilted target."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from tensordict import TensorDict

from unified_rl.correction import Correction
from unified_rl.correction.generators import GENERATORS
from unified_rl.correction.kernels.group import soft_value, tilt_to
from unified_rl.errors import ConfigError
from unified_rl.returns.groups import Groups

DRIFT = torch.tensor([[0.3, -0.1], [0.2, 0.1], [-0.4, 0.0], [0.1, 0.1]], dtype=torch.float64)
REWARD = torch.tensor([1.0, 0.0, 2.0, 0.5], dtype=torch.float64)


def batch(**more: Any) -> TensorDict:
    zero = torch.zeros(4, 2, dtype=torch.float64)
    items = {
        "behavior_log_prob": zero,
        "reference_log_prob": zero,
        "mask": torch.ones(4, 2, dtype=torch.bool),
        "step_index": torch.zeros(4, 2, dtype=torch.int64),
        "reward": REWARD[:, None],
        "group": torch.tensor([0, 0, 1, 1]),
        **more,
    }
    return TensorDict(items, batch_size=[4])


def signal(**settings: Any) -> torch.Tensor:
    """Each row's advantage, read off the weights of its first unit."""
    made = Correction(reduce="token-sum", anchor="reference", **settings)
    weight = made(DRIFT, batch()).weight
    assert torch.equal(weight[:, 0], weight[:, 1])
    return weight[:, 0] * 4  # rows of the batch


def test_a_soft_value_takes_the_place_of_the_mean_and_not_both_are_set() -> None:
    with pytest.raises(ConfigError, match=r"correction.kernel.centered=false .* correction.kernel.soft"):
        signal(kernel={"name": "residual", "soft": 1.0, "centered": False})


def test_the_soft_value_goes_from_the_best_to_the_mean() -> None:
    groups = Groups(torch.tensor([0, 0, 1, 1]))
    one = math.log((math.exp(2.0) + 1) / 2) / 2  # rewards 1 and 0 at temperature 0.5
    assert soft_value(REWARD, groups, 0.5)[:2].tolist() == pytest.approx([one, one])
    assert soft_value(REWARD, groups, 1e-4).tolist() == pytest.approx([1.0, 1.0, 2.0, 2.0], abs=1e-4)
    for large in (1e9, math.inf):
        assert soft_value(REWARD, groups, large).tolist() == pytest.approx([0.5, 0.5, 1.25, 1.25], abs=1e-6)


def test_a_soft_value_stands_for_the_mean_of_the_residual() -> None:
    got = signal(kernel={"name": "residual", "beta": 0.2, "soft": 0.5})
    value = soft_value(REWARD, Groups(torch.tensor([0, 0, 1, 1])), 0.5)
    wanted = REWARD - 0.2 * DRIFT.sum(-1) - value
    torch.testing.assert_close(got / got[0], wanted / wanted[0])


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "js", "pearson_chi2"])
def test_the_pseudo_reward_is_minus_the_slope_of_the_ratio_to_the_tilted_target(name: str) -> None:
    got = signal(kernel={"name": "f_divergence", "generator": name, "beta": 0.5})
    unnormalised = (REWARD / 0.5 - DRIFT.sum(-1)).exp()  # of target / policy
    ratio = unnormalised / unnormalised.view(2, 2).mean(-1).repeat_interleave(2)
    reward = -GENERATORS[name]().slope(-ratio.log())
    wanted = reward - reward.view(2, 2).mean(-1).repeat_interleave(2)
    torch.testing.assert_close(got / got[0], wanted / wanted[0])
    assert abs(float(wanted[0])) > 1e-2


def test_the_forward_kl_weighs_rows_by_target_over_policy() -> None:
    got = signal(kernel={"name": "f_divergence", "generator": "forward_kl", "beta": 0.5})
    raw = (REWARD / 0.5 - DRIFT.sum(-1)).exp()
    share = raw / raw.view(2, 2).sum(-1).repeat_interleave(2)
    assert float(got[0] / got[2]) == pytest.approx(float((share[0] - 0.5) / (share[2] - 0.5)))


def test_a_tilt_has_the_moment_that_is_asked_for() -> None:
    reward, weight = torch.tensor([0.0, 1.0, 1.0, 0.0]), torch.tensor([0.3, -0.2, 0.1, 0.0])
    tilt = tilt_to(0.9, reward, weight, lambda x: x)
    mass = (weight + tilt * reward).exp()
    assert float((mass * reward).sum() / mass.sum()) == pytest.approx(0.9, abs=1e-6)
    odds = (math.exp(-0.2) + math.exp(0.1)) / (math.exp(0.3) + 1.0)
    assert float(tilt) == pytest.approx(math.log(9.0 / odds), abs=1e-5)
    assert float(tilt_to(2.0, reward, weight, lambda x: x)) == pytest.approx(100.0)  # beyond what rows reach
    assert float(tilt_to(-1.0, reward, weight, lambda x: x)) == pytest.approx(-100.0)
    elsewhere = tilt_to(0.9, reward, weight, lambda x: torch.full_like(x, -1.0))  # sums of all processes decide
    assert float(elsewhere) == pytest.approx(100.0)
    tilt = float(tilt_to(1.3, REWARD, -DRIFT.sum(-1), lambda x: x))
    given, fitted = (
        signal(kernel={"name": "f_divergence", "generator": "forward_kl", **one})
        for one in ({"beta": 1 / tilt}, {"moment": 1.3})
    )
    torch.testing.assert_close(fitted, given, atol=1e-5, rtol=1e-5)


def test_a_generator_that_does_not_exist_is_refused_when_the_kernel_is_made() -> None:
    with pytest.raises(ConfigError, match=r"correction\.kernel\.generator 'kl' is unknown"):
        Correction(kernel={"name": "f_divergence", "generator": "kl"})


def test_the_teacher_is_part_of_the_denominator() -> None:
    teacher = torch.tensor([[0.2, -0.3], [0.0, 0.4], [-0.1, 0.0], [0.9, -0.9]], dtype=torch.float64)
    advantage = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64)
    rows = batch(teacher_log_prob=teacher, advantage=advantage)
    made = Correction(kernel={"name": "teacher_ratio", "share": 0.75}, reduce="token-sum")
    got = made(DRIFT, rows).weight * 4
    ratio = (0.75 * DRIFT + 0.25 * (DRIFT - teacher)).exp()
    up = advantage[:, None] > 0
    inside = ~((up & (ratio > 1.2)) | (~up & (ratio < 0.8)))
    wanted = torch.where(inside, ratio, 0.0) * advantage[:, None]
    torch.testing.assert_close(got / got[1, 0], wanted / wanted[1, 0])
    assert int((~inside).sum()) >= 1
    plain = Correction(kernel={"name": "teacher_ratio", "share": 1.0}, reduce="token-sum")(DRIFT, rows).weight
    assert torch.equal(plain, Correction(kernel="ppo", reduce="token-sum")(DRIFT, rows).weight)
