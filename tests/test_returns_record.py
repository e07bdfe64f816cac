"""Advantages chosen by configuration, straight from a record."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import yaml
from tensordict import TensorDict

from unified_rl.errors import ConfigError, RecordError
from unified_rl.returns import SuccessTracker, group_advantage, record_advantage


def record(**extra: torch.Tensor) -> TensorDict:
    """Two groups; rewards 1, 0, 1 and 4, 2, 0 over two steps (a third is padding with NaN); 1 to 6 units a row."""
    total = torch.tensor([1.0, 0.0, 1.0, 4.0, 2.0, 0.0])
    reward = torch.stack([0.25 * total, 0.75 * total, torch.full_like(total, torch.nan)], -1)
    items = {
        "mask": torch.arange(6) <= torch.arange(6).unsqueeze(1),
        "reward": reward,
        "step_mask": torch.tensor([[True, True, False]]).expand(6, 3),
        "group": torch.tensor([0, 0, 0, 1, 1, 1]),
        "prompt_id": torch.tensor([2**40, 7, 2**40, 7, 7, 9]),
        **extra,
    }
    return TensorDict(items, batch_size=[6])


def test_mean_and_spread_of_the_summed_valid_rewards() -> None:
    got = record_advantage(record(), {"baseline": "mean", "scale": "std", "eps": 0.0})
    assert got.tolist() == pytest.approx([0.57735, -1.154701, 0.57735, 1, 0, -1], abs=1e-5)


def test_weights_are_the_numbers_of_units_unless_an_entry_is_named() -> None:
    """Lengths 1, 2, 3 and 4, 5, 6: baselines 4/6 and 26/15."""
    got = record_advantage(record(), {"baseline": "weighted"})
    assert got.tolist() == pytest.approx([1 / 3, -2 / 3, 1 / 3, 4 - 26 / 15, 2 - 26 / 15, -26 / 15])
    norms = torch.tensor([0.0, 1.0, 0.0, 0.0, 0.0, 1.0])
    got = record_advantage(record(norms=norms), {"baseline": "weighted", "weight": "norms"})
    assert got.tolist() == pytest.approx([1, 0, 1, 4, 2, 0])


def test_a_greedy_answers_reward_as_baseline_holds_for_lone_rows_too() -> None:
    greedy = torch.tensor([1.0, 1.0, 1.0, 3.0, 3.0, 3.0])
    rows = record(greedy=greedy, own=torch.arange(6))
    got = record_advantage(rows, {"baseline": "given", "given": "greedy", "group": "own"})
    assert got.tolist() == pytest.approx([0, -1, 0, 1, -1, -3])


def test_several_rewards_strata_and_compound_groups() -> None:
    columns = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 0.0], [1.0, 1.0], [0.0, 1.0], [1.0, 0.0]])
    rows = record(scores=columns, stratum=torch.tensor([0, 0, 1, 0, 0, 1]), turn=torch.tensor([0, 1, 0, 1, 0, 1]))
    got = record_advantage(rows, {"reward": "scores", "reward_weights": [2.0, 0.0], "group": "turn"})
    assert got.tolist() == pytest.approx([0, 0, 0, 0, 0, 0])
    got = record_advantage(rows, {"reward": "scores", "reward_weights": [0.0, 3.0], "group": "turn"})
    assert got.tolist() == pytest.approx([-1, -1, -1, 2, 2, -1])
    # within strata: (1, 0) and a lone row that falls back to its group, then (4, 2) and a lone row
    got = record_advantage(rows, {"stratum": "stratum", "blend": 1.0, "scale": "none"})
    assert got.tolist() == pytest.approx([0.5, -0.5, 1 / 3, 1, -1, -2])


def test_decoupled_rewards_are_whitened_after_their_sum() -> None:
    columns = torch.tensor(
        [[0.0, 0.0], [1.0, 0.0], [0.0, 0.0], [1.0, 1.0], [0.0, 1.0], [1.0, 0.0]], dtype=torch.float64
    )
    settings = {"reward": "scores", "scale": "whiten", "combine": "normalize_first", "eps": 0.0, "ddof": 0}
    got = record_advantage(record(scores=columns), settings)
    first = torch.tensor([-(0.5**0.5), 2**0.5, -(0.5**0.5), 0.5**0.5, -(2**0.5), 0.5**0.5], dtype=torch.float64)
    second = torch.tensor([0, 0, 0, 0.5**0.5, 0.5**0.5, -(2**0.5)], dtype=torch.float64)
    total = first + second
    torch.testing.assert_close(got, (total - total.mean()) / total.std(correction=0))


def test_whitening_over_units_gives_the_units_mean_zero_and_variance_one() -> None:
    rows = record()
    got = record_advantage(rows, {"baseline": "none", "scale": "whiten", "whiten_over": "units", "ddof": 0, "eps": 0.0})
    units = got.unsqueeze(1).expand(6, 6)[rows["mask"]]
    assert float(units.mean()) == pytest.approx(0.0, abs=1e-6)
    assert float(units.var(correction=0)) == pytest.approx(1.0, abs=1e-5)
    by_row = record_advantage(rows, {"baseline": "none", "scale": "whiten", "ddof": 0, "eps": 0.0})
    assert float(by_row.mean()) == pytest.approx(0.0, abs=1e-6)
    assert float(units.mean() - by_row.unsqueeze(1).expand(6, 6)[rows["mask"]].mean()) != pytest.approx(0.0, abs=1e-3)


def test_equal_lengths_and_one_group_make_whitening_over_units_the_group_z_score() -> None:
    reward, group = torch.tensor([1.0, 0.0, 0.0, 3.0]), torch.zeros(4, dtype=torch.int64)
    over_units = group_advantage(reward, group, scale="whiten", units=torch.full((4,), 9), ddof=0, eps=0.0)
    torch.testing.assert_close(over_units, group_advantage(reward, group, scale="std", ddof=0, eps=0.0))


def test_tracked_success_is_asked_by_prompt_id_and_needs_no_group() -> None:
    tracker = SuccessTracker()
    rows = record()
    tracker.seed(torch.tensor([2**40]), torch.tensor([6.0]), trials=8)  # 8 * 6.5 / 9 of 8
    got = record_advantage(rows, {"baseline": "tracker"}, tracker)
    assert got.tolist() == pytest.approx([1 - 6.5 / 9, -0.5, 1 - 6.5 / 9, 3.5, 1.5, -0.5])
    tracker.update(torch.tensor([7, 7]), torch.tensor([1.0, 0.0]), torch.tensor([0.0, 9.0]))
    # 0.96 * 0.5 + 1, then 0.875 times that; failures 0.96 * 0.5, then 0.875 times that + 1
    success, failure = 0.875 * 1.48, 0.875 * 0.48 + 1
    assert tracker.value(torch.tensor([7, 3])).tolist() == pytest.approx([success / (success + failure), 0.5])
    copy = SuccessTracker()
    copy.load_state_dict(tracker.state_dict())
    assert copy.counts == tracker.counts


def test_bad_settings_are_one_clear_error() -> None:
    with pytest.raises(ConfigError, match="no setting 'basline'"):
        record_advantage(record(), {"basline": "mean"})
    with pytest.raises(RecordError, match="'greedy', which the record lacks"):
        record_advantage(record(), {"baseline": "given", "given": "greedy"})
    with pytest.raises(ConfigError, match="needs a SuccessTracker"):
        record_advantage(record(), {"baseline": "tracker"})
    with pytest.raises(ConfigError, match="whiten_over must be"):
        record_advantage(record(), {"scale": "whiten", "whiten_over": "tokens"})
    with pytest.raises(ConfigError, match="stratum goes with"):
        record_advantage(record(turn=torch.zeros(6)), {"stratum": "turn", "eps": 1.0})


def test_every_setting_that_the_page_shows_works(source: Path) -> None:
    lines = re.findall(r"^advantage: .*$", (source / "docs/returns.md").read_text(), re.MULTILINE)
    assert len(lines) > 8
    extra = {
        "greedy_reward": torch.ones(6),
        "expected": torch.full((6,), 0.25),
        "scores": torch.rand(6, 2, generator=torch.Generator().manual_seed(0)),
        "tool_calls": torch.tensor([0, 0, 1, 1, 1, 1]),
    }
    results = [record_advantage(record(**extra), yaml.safe_load(line)["advantage"], SuccessTracker()) for line in lines]
    for result in results:
        assert result.shape == (6,)
        assert bool(torch.isfinite(result).all()) and bool(result.any())
