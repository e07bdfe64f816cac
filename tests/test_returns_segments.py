"""Credit over turns, steps and subgoals: hand numbers, and the cases in which it is the credit of units."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from unified_rl.errors import RecordError
from unified_rl.returns import Segments, gae, hierarchical_gae, segment_gae


def random_rows(seed: int, rows: int = 3, width: int = 8) -> tuple[list[Tensor], Tensor]:
    """Reward, value, next value, terminated and done of one episode a row; and a mask that keeps the first unit."""
    g = torch.Generator().manual_seed(seed)
    reward, value, free = (torch.randn(rows, width, generator=g, dtype=torch.float64) for _ in range(3))
    following = torch.cat([value[:, 1:], free[:, :1]], 1)
    done = torch.zeros(rows, width, dtype=torch.bool)
    done[:, -1] = True
    return [reward, value, following, torch.zeros_like(done), done], torch.ones_like(done)


def test_two_turns_by_hand_with_discounts_inside_them() -> None:
    """Turn 0 holds rewards 1, 2; turn 1 holds 4, 8; discount 0.5 a unit, trace 0.5."""
    reward = torch.tensor([[1.0, 2.0, math.nan, 4.0, 8.0]])
    value = torch.tensor([[10.0, math.nan, math.nan, 20.0, 77.0]])
    mask = torch.tensor([[True, True, False, True, True]])
    segment = torch.tensor([[0, 0, 1, 1, 1]])
    done = torch.tensor([[False, False, False, False, True]])
    following = torch.tensor([[0.0, 0.0, 0.0, 0.0, 6.0]])
    advantage, target = segment_gae(
        reward, value.nan_to_num(99.0), following, done & False, done, segment, mask, 2, gamma=0.5, lam=0.5
    )
    second = (4 + 0.5 * 8) + 0.25 * 6 - 20
    first = (1 + 0.5 * 2) + 0.25 * 20 - 10 + 0.25 * 0.5 * second
    assert advantage[0].tolist() == pytest.approx([first, first, 0.0, second, second])
    assert target[0].tolist() == pytest.approx([first + 10, first + 10, 0.0, second + 20, second + 20])


def test_one_segment_without_discount_is_return_minus_value_and_one_unit_a_segment_is_unit_gae() -> None:
    args, mask = random_rows(0)
    args[3] = args[4].clone()  # the end terminates
    whole, _ = segment_gae(*args, torch.zeros_like(mask).long(), mask, 1)
    torch.testing.assert_close(whole, (args[0].sum(1) - args[1][:, 0]).unsqueeze(1).expand(3, 8))
    each = torch.arange(8).expand(3, 8)
    got, target = segment_gae(*args, each, mask, 8, gamma=0.9, lam=0.7)
    want, want_target = gae(*args, 0.9, 0.7)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(target, want_target)


def test_segments_without_units_are_passed_over_and_a_cut_row_bootstraps() -> None:
    args, mask = random_rows(1)
    gapped = torch.tensor([0, 0, 2, 2, 2, 5, 5, 5]).expand(3, 8)
    dense = torch.tensor([0, 0, 1, 1, 1, 2, 2, 2]).expand(3, 8)
    for gamma in (0.9, torch.full((3, 8), 0.9, dtype=torch.float64)):
        got = segment_gae(*args, gapped, mask, 7, gamma, 0.6)
        want = segment_gae(*args, dense, mask, 3, gamma, 0.6)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b)
    last = segment_gae(*args, dense, mask, 3, 0.9, 0.6)[0][:, -1]
    reward = args[0][:, 5] + 0.9 * args[0][:, 6] + 0.81 * args[0][:, 7]
    torch.testing.assert_close(last, reward + 0.9**3 * args[2][:, -1] - args[1][:, 5])


def test_garbage_and_padding_under_the_mask_change_nothing() -> None:
    args, mask = random_rows(2)
    mask = mask.clone()
    mask[0, 5:], mask[1, 2:4] = False, False
    segment = torch.tensor([0, 0, 1, 1, 2, 2, 3, 3]).expand(3, 8)
    clean = segment_gae(*args, segment, mask, 4, 0.9, 0.8)
    dirty = [torch.where(mask, x, math.nan) if x.is_floating_point() else x | ~mask for x in args]
    for a, b in zip(segment_gae(*dirty, segment, mask, 4, 0.9, 0.8), clean, strict=True):
        assert torch.equal(a, b)


def test_an_episode_that_ends_inside_a_segment_is_refused() -> None:
    args, mask = random_rows(3)
    args[4] = args[4].clone()
    args[4][1, 2] = True
    with pytest.raises(RecordError, match="ends inside a segment"):
        Segments.of(*args, torch.tensor([0, 0, 0, 0, 1, 1, 1, 1]).expand(3, 8), mask, 2)


def test_two_levels_by_hand() -> None:
    """Two subgoals of two units; low and high values differ; discount 0.5, both traces 0.5."""
    reward = torch.tensor([[1.0, 2.0, 4.0, 8.0]])
    low_value, high_value = torch.tensor([[1.0, 2.0, 3.0, 4.0]]), torch.tensor([[10.0, 0.0, 20.0, 0.0]])
    end = torch.tensor([[False, False, False, True]])
    segment, mask = torch.tensor([[0, 0, 1, 1]]), torch.ones(1, 4, dtype=torch.bool)
    following = torch.full((1, 4), 99.0)
    low, high = hierarchical_gae(
        reward, low_value, high_value, following, end, end, segment, mask, 2, 0.5, low_lam=0.5, high_lam=0.5
    )
    second = 4 + 0.5 * 8 - 20
    first = 1 + 0.5 * 2 + 0.25 * 20 - 10 + 0.25 * 0.5 * second
    assert high[0].tolist() == pytest.approx([first, first, second, second])
    end_of_first, end_of_second = 2 + 0.5 * 20 - 2, 8 - 4
    assert low[0].tolist() == pytest.approx(
        [1 + 0.5 * 2 - 1 + 0.25 * end_of_first, end_of_first, 4 + 0.5 * 4 - 3 + 0.25 * end_of_second, end_of_second]
    )


def test_two_levels_are_unit_gae_where_every_unit_switches_and_where_none_does() -> None:
    args, mask = random_rows(4)
    reward, value, following, terminated, done = args
    each = torch.arange(8).expand(3, 8)
    _, high = hierarchical_gae(reward, 0 * value, value, following, terminated, done, each, mask, 8, 0.9, 0.3, 0.7)
    torch.testing.assert_close(high, gae(*args, 0.9, 0.7)[0])
    low, _ = hierarchical_gae(reward, value, value + 5, following, terminated, done, 0 * each, mask, 1, 0.9, 0.3, 0.7)
    torch.testing.assert_close(low, gae(*args, 0.9, 0.3)[0])
