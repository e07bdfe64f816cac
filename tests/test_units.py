"""The record: reductions, layouts, splitting and validation."""

import pytest
import torch
from tensordict import TensorDict

from unified_rl.errors import RecordError
from unified_rl.units import Steps, record_from_steps, split_episodes, split_steps, trim_units, validate_record


def ragged() -> Steps:
    # row 0: step 0 has units 1, 2 (3 masked), step 1 has unit 4; row 1: steps 0 and 2, nothing in step 1
    index = torch.tensor([[0, 0, 0, 1], [0, 2, 2, 2]])
    mask = torch.tensor([[True, True, False, True], [True, True, True, False]])
    return Steps(index, mask, 3)


def test_steps_sum_and_mean_skip_masked_units_even_when_they_are_nan() -> None:
    x = torch.tensor([[1.0, 2.0, float("nan"), 5.0], [3.0, 4.0, 6.0, float("inf")]])
    assert ragged().sum(x).tolist() == [[3.0, 5.0, 0.0], [3.0, 0.0, 10.0]]
    assert ragged().mean(x).tolist() == [[1.5, 5.0, 0.0], [3.0, 0.0, 5.0]]


def test_steps_broadcast_gives_each_unit_its_step() -> None:
    y = torch.tensor([[10.0, 20.0, 30.0], [1.0, 2.0, 3.0]])
    assert ragged().broadcast(y).tolist() == [[10.0, 10.0, 10.0, 20.0], [1.0, 3.0, 3.0, 3.0]]


def test_regular_steps_agree_with_the_general_path() -> None:
    generator = torch.Generator().manual_seed(0)
    index = torch.arange(5).repeat_interleave(3).expand(4, -1)
    mask = torch.rand(4, 15, generator=generator) > 0.3
    x = torch.randn(4, 15, generator=generator)
    fast, slow = Steps(index, mask, 5, units_per_step=3), Steps(index, mask, 5)
    torch.testing.assert_close(fast.mean(x), slow.mean(x))
    y = torch.randn(4, 5, generator=generator)
    assert torch.equal(fast.broadcast(y), slow.broadcast(y))


def segment(rows: int = 2, steps: int = 3, units: int = 2) -> TensorDict:
    generator = torch.Generator().manual_seed(1)
    return TensorDict(
        {
            "observation": torch.randn(rows, steps, 4, generator=generator),
            "behavior_log_prob": torch.randn(rows, steps, units, generator=generator),
            "reward": torch.randn(rows, steps, generator=generator),
            "policy_version": torch.arange(rows * steps).reshape(rows, steps),
            "episode": torch.zeros(rows, steps, dtype=torch.int64),
            "group": torch.arange(rows)[:, None].expand(rows, steps).contiguous(),
            "source": torch.zeros(rows, steps, dtype=torch.int64),
        },
        batch_size=[rows, steps],
    )


def test_a_segment_becomes_a_record_of_units_in_time_order() -> None:
    seg = segment()
    record = record_from_steps(seg)
    assert record.batch_size == torch.Size([2])
    assert torch.equal(record["behavior_log_prob"][1], seg["behavior_log_prob"][1].flatten())
    assert record["step_index"][0].tolist() == [0, 0, 1, 1, 2, 2]
    assert record["policy_version"][1].tolist() == [3, 3, 4, 4, 5, 5]
    assert record["group"].tolist() == [0, 1]
    validate_record(record)


def test_split_steps_keeps_every_unit_with_its_own_observation() -> None:
    seg = segment()
    split = split_steps(record_from_steps(seg))
    assert split.batch_size == torch.Size([6])
    assert torch.equal(split["observation"][4, 0], seg["observation"][1, 1])
    assert torch.equal(split["behavior_log_prob"][4], seg["behavior_log_prob"][1, 1])
    assert split["group"].tolist() == [0, 0, 0, 1, 1, 1]
    validate_record(split)


def test_split_episodes_cuts_rows_where_the_episode_changes() -> None:
    seg = segment(rows=2, steps=4)
    seg["episode"] = torch.tensor([[5, 5, 6, 6], [7, 8, 8, 8]])
    seg["step_mask"] = torch.tensor([[True] * 4, [True, True, True, False]])
    pieces = split_episodes(seg)
    assert pieces["step_mask"].sum(-1).tolist() == [2, 2, 1, 2]
    assert [row[0].item() for row in pieces["episode"]] == [5, 6, 7, 8]
    assert torch.equal(pieces["reward"][1, :2], seg["reward"][0, 2:])
    assert torch.equal(pieces["reward"][3, :2], seg["reward"][1, 1:3])
    assert pieces["group"][2].tolist() == [1, 1]  # padding repeats the piece's first


def test_trim_cuts_padding_from_unit_keys_only() -> None:
    rows = TensorDict(
        {
            "tokens": torch.ones(2, 6, dtype=torch.int64),
            "mask": torch.ones(2, 6, dtype=torch.bool),
            "reward": torch.ones(2, 1),
        },
        batch_size=[2],
    )
    cut = trim_units(rows, 4)
    assert cut["tokens"].shape == (2, 4) and cut["mask"].shape == (2, 4) and cut["reward"].shape == (2, 1)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("behavior_log_prob", torch.full((2, 6), float("nan")), "behavior_log_prob is NaN"),
        ("policy_version", torch.full((2, 6), 9), "newer than 3"),
        ("step_index", torch.zeros(2, 6, dtype=torch.int32), "step_index has dtype"),
        ("step_index", torch.tensor([[0, 0, 1, 0, 2, 2]] * 2), "step_index decreases"),
        ("reward", torch.full((2, 3), float("inf")), "reward is not finite"),
        ("mask", torch.ones(2, 5, dtype=torch.bool), "has shape"),
    ],
)
def test_a_bad_record_is_refused_by_name(key: str, value: torch.Tensor, message: str) -> None:
    record = record_from_steps(segment())
    record["policy_version"] = torch.zeros(2, 6, dtype=torch.int64)
    validate_record(record, current_version=3)
    record[key] = value
    with pytest.raises(RecordError, match=message):
        validate_record(record, current_version=3)


def test_a_discrete_log_prob_above_zero_and_a_missing_key_are_refused() -> None:
    record = record_from_steps(segment())
    with pytest.raises(RecordError, match="above 0"):
        validate_record(record, discrete=True)
    with pytest.raises(RecordError, match="lacks mask"):
        validate_record(record.exclude("mask"))
