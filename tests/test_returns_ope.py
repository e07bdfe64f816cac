"""Off-policy evaluation: whether intervals cover, weighted estimators by their own sums, and what is refused."""

from __future__ import annotations

import math

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor

from unified_rl.errors import RecordError
from unified_rl.returns import (
    Episodes,
    Estimate,
    doubly_robust,
    importance_sampling,
    per_decision,
    weighted_importance_sampling,
    weighted_per_decision,
)
from unified_rl.units import UnitLogProb

GAMMA = 0.9
TRUTH = 0.8 * 2 + GAMMA * 0.8


def draw(rows: int, g: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Actions, rewards and log-ratios of two independent binary decisions; behavior 0.5, target 0.8."""
    action = (torch.rand(rows, 2, generator=g, dtype=torch.float64) < 0.5).double()
    reward = action * torch.tensor([2.0, 1.0]) + 0.1 * torch.randn(rows, 2, generator=g, dtype=torch.float64)
    return action, reward, torch.where(action > 0, math.log(0.8 / 0.5), math.log(0.2 / 0.5)).double()


def estimates(rows: int, g: torch.Generator) -> dict[str, Estimate]:
    action, reward, log_ratio = draw(rows, g)
    episodes = Episodes(reward, log_ratio, GAMMA)
    model, expected = 0.5 + 0.7 * action, torch.full_like(action, 0.5 + 0.7 * 0.8)  # a wrong model
    return {
        "importance_sampling": importance_sampling(episodes),
        "weighted_importance_sampling": weighted_importance_sampling(episodes),
        "per_decision": per_decision(episodes),
        "weighted_per_decision": weighted_per_decision(episodes),
        "doubly_robust": doubly_robust(episodes, model, expected),
        "weighted_doubly_robust": doubly_robust(episodes, model, expected, weighted=True),
    }


def test_ninety_five_percent_intervals_cover_about_so_often_and_errors_are_of_the_size_they_say() -> None:
    """600 repetitions of 150 episodes: a share of 0.95 has a standard error of 0.009."""
    g = torch.Generator().manual_seed(0)
    runs = [estimates(150, g) for _ in range(600)]
    for name in runs[0]:
        inside = [low < TRUTH < high for low, high in (run[name].interval() for run in runs)]
        assert 0.91 < sum(inside) / len(inside) < 0.98, name
        values = torch.tensor([float(run[name].value) for run in runs])
        said = torch.tensor([float(run[name].standard_error) for run in runs])
        assert float(said.mean() / values.std()) == pytest.approx(1.0, abs=0.12), name


def test_the_model_and_the_weights_lower_the_standard_error() -> None:
    found = {name: float(e.standard_error) for name, e in estimates(20_000, torch.Generator().manual_seed(1)).items()}
    assert found["per_decision"] < found["importance_sampling"]
    assert found["weighted_importance_sampling"] < found["importance_sampling"]
    assert found["weighted_per_decision"] < found["per_decision"]
    assert found["doubly_robust"] < found["per_decision"]
    assert found["weighted_doubly_robust"] < found["doubly_robust"]


def test_weighted_doubly_robust_is_the_published_sum() -> None:
    """``mean V(s_0)`` and each step's normalised error, after Thomas and Brunskill, eq. 9, one number at a time."""
    g = torch.Generator().manual_seed(2)
    reward, q, expected, log_ratio = (torch.randn(5, 3, generator=g, dtype=torch.float64) for _ in range(4))
    rho = log_ratio.cumsum(1).exp()
    total = 0.0
    for t in range(3):
        for i in range(5):
            w = float(rho[i, t] / rho[:, t].sum())
            w_before = 1 / 5 if t == 0 else float(rho[i, t - 1] / rho[:, t - 1].sum())
            total += GAMMA**t * (w * float(reward[i, t] - q[i, t]) + w_before * float(expected[i, t]))
    got = doubly_robust(Episodes(reward, log_ratio, GAMMA), q, expected, weighted=True)
    assert float(got.value) == pytest.approx(total)


def test_self_normalised_estimates_stay_inside_the_returns_seen_and_constant_rewards_are_exact() -> None:
    g = torch.Generator().manual_seed(3)
    log_ratio = 3 * torch.randn(30, 4, generator=g, dtype=torch.float64)
    reward = torch.randn(30, 4, generator=g, dtype=torch.float64)
    returns = (reward * GAMMA ** torch.arange(4.0)).sum(1)
    value = float(weighted_importance_sampling(Episodes(reward, log_ratio, GAMMA)).value)
    assert float(returns.min()) <= value <= float(returns.max())
    for estimator in (weighted_importance_sampling, weighted_per_decision):
        found = estimator(Episodes(torch.ones(30, 4), log_ratio, 1.0))
        assert float(found.value) == pytest.approx(4.0)
        assert float(found.standard_error) == pytest.approx(0.0, abs=1e-9)


def test_effective_sample_size_by_hand_and_the_clamp_is_reported() -> None:
    log_ratio = torch.tensor([[math.log(1.0)], [math.log(3.0)], [0.0]], dtype=torch.float64)
    found = importance_sampling(Episodes(torch.ones(3, 1), log_ratio, 1.0))
    assert float(found.ess) == pytest.approx(25 / 11)
    assert float(found.clamped) == 0.0
    wild = importance_sampling(Episodes(torch.ones(2, 2), torch.tensor([[15.0, 10.0], [0.0, 0.0]]), 1.0))
    assert float(wild.clamped) == 0.5


def test_episodes_of_a_record_sum_units_to_steps_and_refuse_inexact_ratios() -> None:
    """Two steps, of two units and of one; tool text between them; the second row ends after its first step."""
    record = TensorDict(
        {
            "behavior_log_prob": torch.tensor([[-1.0, -2.0, torch.nan, -1.0], [-1.0, -1.0, torch.nan, torch.nan]]),
            "mask": torch.tensor([[True, True, False, True], [True, True, False, False]]),
            "step_index": torch.tensor([[0, 0, 1, 1], [0, 0, 0, 0]]),
            "reward": torch.tensor([[1.0, 2.0], [5.0, torch.nan]]),
            "step_mask": torch.tensor([[True, True], [True, False]]),
        },
        batch_size=[2],
    )
    log_prob = torch.tensor([[-0.5, -2.25, 9.0, -3.0], [-1.5, -1.0, 9.0, 9.0]])
    episodes = Episodes.of(record, UnitLogProb(log_prob, record["mask"]), 0.5)
    torch.testing.assert_close(
        episodes.cumulative.log(), torch.tensor([[0.25, -1.75], [-0.5, -0.5]], dtype=torch.float64)
    )
    value = per_decision(episodes).value
    expected = (math.exp(0.25) * 1 + 0.5 * math.exp(-1.75) * 2 + math.exp(-0.5) * 5) / 2
    assert float(value) == pytest.approx(expected)
    with pytest.raises(RecordError, match="exact importance ratios"):
        Episodes.of(record, UnitLogProb(log_prob, record["mask"], exact=False), 0.5)


def rows_of(reward: Tensor, **columns: Tensor) -> tuple[TensorDict, UnitLogProb]:
    """Rows of steps of one unit each, and a target policy that is log 2 more likely to do each."""
    unit = {
        "behavior_log_prob": torch.zeros_like(reward),
        "mask": torch.ones_like(reward, dtype=torch.bool),
        "step_index": torch.arange(reward.shape[1]).expand_as(reward).clone(),
    }
    record = TensorDict({"reward": reward, **unit, **columns}, batch_size=[len(reward)])
    return record, UnitLogProb(torch.full_like(reward, math.log(2.0)), record["mask"], True)


def test_rows_that_hold_several_episodes_are_taken_apart() -> None:
    """Rewards 1 2 | 3 4 5 and 6 | 7 8 9 10 at gamma 1/2: returns 2, 6.25, 6 and 14.5; ratios 4, 8, 2 and 16."""
    reward = torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0], [6.0, 7.0, 8.0, 9.0, 10.0]])
    ends = torch.tensor([[0, 1, 0, 0, 1], [1, 0, 0, 0, 1]]).bool()
    episode = torch.tensor([[0, 0, 2, 2, 2], [1, 3, 3, 3, 3]])
    returns = [1 + 1, 3 + 2 + 1.25, 6, 7 + 4 + 2.25 + 1.25]
    want = sum(ratio * value for ratio, value in zip([4, 8, 2, 16], returns, strict=True)) / 4
    for columns in ({"terminated": ends}, {"truncated": ends, "episode": episode}, {"episode": episode}):
        episodes = Episodes.of(*rows_of(reward, **columns), gamma=0.5)
        assert float(importance_sampling(episodes).value) == pytest.approx(want)
        zero = torch.zeros_like(reward)
        assert float(doubly_robust(episodes, zero, zero).value) == pytest.approx(float(per_decision(episodes).value))
        whole, apart = doubly_robust(episodes, reward, reward), episodes.arranged(reward)
        assert whole.value.isfinite() and torch.equal(doubly_robust(episodes, apart, apart).value, whole.value)
    bonus = doubly_robust(episodes, reward, zero).value  # every error is 0, and so is every expected value
    assert float(bonus) == pytest.approx(0.0)


def test_a_piece_of_an_episode_is_refused() -> None:
    reward = torch.ones(2, 4)
    ends = torch.tensor([[0, 1, 0, 1], [0, 1, 0, 0]]).bool()
    with pytest.raises(RecordError, match=r"row 1 leaves an episode at step 3 .*\(1 such pieces\).*step_mask"):
        Episodes.of(*rows_of(reward, terminated=ends), gamma=1.0)
    valid = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]).bool()
    episodes = Episodes.of(*rows_of(reward, terminated=ends, step_mask=valid), gamma=1.0)
    assert float(importance_sampling(episodes).value) == pytest.approx(4 * 2.0), "three episodes of two steps"
    changed = torch.tensor([[0, 0, 1, 1], [2, 2, 2, 3]])
    with pytest.raises(RecordError, match="row 1 leaves an episode at step 2"):
        Episodes.of(*rows_of(reward, terminated=ends | (changed == 3), episode=changed), gamma=1.0)


def test_steps_that_are_left_out_make_no_episode_and_do_not_join_others() -> None:
    """Left out are an episode in the middle, the piece before a row's first, and a whole row; returns 1, 2 and 1."""
    reward = torch.tensor([[1.0, 9.0, 2.0, 0.0], [9.0, 9.0, 1.0, 0.0], [9.0, 9.0, 9.0, 9.0]])
    valid = torch.tensor([[1, 0, 1, 0], [0, 0, 1, 0], [0, 0, 0, 0]]).bool()
    ends = torch.tensor([[1, 1, 1, 0], [0, 1, 1, 0], [0, 0, 0, 0]]).bool()
    episode = torch.tensor([[0, 3, 4, 5], [6, 6, 6, 7], [2, 2, 2, 2]])
    for columns in ({"terminated": ends}, {"episode": episode}, {"truncated": ends, "episode": episode}):
        episodes = Episodes.of(*rows_of(reward, step_mask=valid, **columns), gamma=0.5)
        assert sorted(episodes.reward.sum(-1).tolist()) == [1.0, 1.0, 2.0]
        assert float(importance_sampling(episodes).value) == pytest.approx(2 * 4 / 3)
        assert torch.equal(episodes.arranged(reward)[episodes.mask], reward[valid].double())
    none = Episodes.of(*rows_of(reward, step_mask=torch.zeros_like(valid), terminated=ends), gamma=0.5)
    assert not bool(none.mask.any())


def test_chunks_are_discounted_by_what_they_executed() -> None:
    """Chunks of 2, 1 and 2 commands at gamma 1/2: the second is discounted by 1/4, the third by 1/8."""
    reward, ends = torch.tensor([[1.0, 1.0, 1.0]]), torch.tensor([[False, False, True]])
    discount = torch.tensor([[0.25, 0.5, 0.25]])
    record, scored = rows_of(reward, terminated=ends, discount=discount)
    assert float(importance_sampling(Episodes.of(record, scored, 0.5)).value) == pytest.approx(8 * 1.375)
    with pytest.raises(RecordError, match=r"discount holds 0\.25, which is no power of gamma=0\.9"):
        Episodes.of(record, scored, 0.9)
    plain, scored = rows_of(reward, terminated=ends, discount=torch.ones(1, 3))
    with pytest.raises(RecordError, match=r"discount holds 1, which is no power of gamma=0\.5"):
        Episodes.of(plain, scored, 0.5)
    assert float(importance_sampling(Episodes.of(plain, scored, 1.0)).value) == pytest.approx(8 * 3.0)
    columns = {"step_mask": torch.tensor([[True, False, False]]), "terminated": torch.tensor([[True, False, False]])}
    for padding in (torch.nan, 0.3):
        padded = discount.clone()
        padded[0, 1:] = padding
        record, scored = rows_of(reward, discount=padded, **columns)
        assert float(importance_sampling(Episodes.of(record, scored, 0.5)).value) == pytest.approx(2 * 1.0)
