"""Writing and reading: the ring against a Python list, the schema, windows, trimming, the fresh queue."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tensordict import TensorDict

from unified_rl.errors import ConfigError, RecordError
from unified_rl.replay import Fresh, Replay, Segment, Uniform

DEVICES = [
    "cpu",
    pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]),
]


def block(first: int, slots: int, lanes: int, horizon: int = 5) -> TensorDict:
    """Transitions that say where they come from: observation = (time, lane); episodes of ``horizon`` + lane steps."""
    time = torch.arange(first, first + slots)[:, None].expand(slots, lanes)
    lane = torch.arange(lanes).expand(slots, lanes)
    length = horizon + lane
    return TensorDict(
        {
            "observation": torch.stack([time, lane], -1).float(),
            "terminated": time % length == length - 1,
            "truncated": torch.zeros(slots, lanes, dtype=torch.bool),
            "episode": time // length * lanes + lane,
        },
        batch_size=[slots, lanes],
    )


def rows(first: int, count: int, width: int = 3) -> TensorDict:
    x = torch.arange(first, first + count)
    return TensorDict({"x": x, "wide": x[:, None].expand(count, width).float()}, batch_size=[count])


@pytest.mark.parametrize("device", DEVICES)
def test_the_ring_holds_the_newest_rows_whatever_the_sizes_of_the_writes(device: str) -> None:
    rng = np.random.default_rng(0)
    for capacity in (1, 7, 10):
        replay = Replay(capacity, sampler=Uniform(), device=device)
        model: list[int] = []
        while len(model) < 60:
            count = int(rng.integers(1, capacity + 1))
            index = replay.extend(rows(len(model), count).to(device))
            assert index.tolist() == [i % capacity for i in range(len(model), len(model) + count)]
            model += range(len(model), len(model) + count)
            live = model[-capacity:]
            assert (len(replay), replay.write_count) == (len(live), len(model))
            drawn = replay.sample(200)
            assert set(drawn["x"].tolist()) <= set(live)
            assert torch.equal(drawn["index"], drawn["x"] % capacity)
            assert torch.equal(drawn["wide"], drawn["x"][:, None].expand(-1, 3).float())
            assert drawn["x"].device.type == device
        assert set(replay.sample(500)["x"].tolist()) == set(live)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("lanes", [1, 3])
def test_windows_stay_in_a_lane_never_cross_the_newest_row_and_reach_every_start(lanes: int, device: str) -> None:
    slots, length = 8, 4
    replay = Replay(slots * lanes + lanes - 1, lanes=lanes, sampler=Uniform(), device=device, seed=1)
    assert replay.capacity == slots * lanes
    time = 0
    for count in (3, 1, 5, 2, 8, 4, 7):
        index = replay.extend(block(time, count, lanes).to(device))
        assert index.shape == (count, lanes)
        time += count
        if min(time, slots) < length:
            continue
        batch = replay.sample(300, length=length).cpu()
        when, lane = batch["observation"].unbind(-1)
        assert batch.batch_size == (300, length)
        assert bool((when.diff(dim=1) == 1).all()) and bool((lane == lane[:, :1]).all())
        starts = {(int(t), int(k)) for t, k in zip(when[:, 0], lane[:, 0], strict=True)}
        oldest = max(0, time - slots)
        assert starts == {(t, k) for t in range(oldest, time - length + 1) for k in range(lanes)}
        assert torch.equal(batch["index"], ((when % slots) * lanes + lane).long())


def test_step_mask_ends_with_the_first_episode_of_the_window() -> None:
    replay = Replay(40, lanes=2, sampler=Segment(6), cut=True)
    replay.extend(block(0, 20, 2))
    batch = replay.sample(100)
    episode = batch["episode"]
    for row in range(100):
        expected = [int(e) == int(episode[row, 0]) for e in episode[row]]
        assert batch["step_mask"][row].tolist() == expected
    ended = batch["terminated"] & batch["step_mask"]
    assert bool(ended.any()) and bool((ended.sum(1) <= 1).all())


def test_step_mask_follows_the_flags_alone_where_no_episode_is_stored_and_nothing_is_lost_unless_asked_for() -> None:
    transitions = block(0, 20, 2).exclude("episode")
    replay = Replay(40, lanes=2, sampler=Uniform(), cut=True)
    replay.extend(transitions)
    batch = replay.sample(50, length=8)
    before = batch["terminated"].long().cumsum(1) - batch["terminated"].long()
    assert torch.equal(batch["step_mask"], before == 0)
    uncut = Replay(40, lanes=2, sampler=Uniform())
    uncut.extend(transitions)
    assert bool(uncut.sample(50, length=8)["step_mask"].all())


def test_every_violation_of_the_schema_names_its_key_and_writes_nothing() -> None:
    replay = Replay(8, sampler=Uniform())
    replay.extend(rows(0, 4))
    good = rows(4, 2)
    wrong = {
        "lack wide": good.exclude("wide"),
        "unknown extra": good.clone().update({"extra": torch.zeros(2)}),
        "wide is torch.float64": good.clone().update({"wide": torch.zeros(2, 3, dtype=torch.float64)}),
        r"wide has shape \(2, 4\)": good.clone().update({"wide": torch.zeros(2, 4)}),
        "x is torch.int32": good.clone().update({"x": torch.zeros(2, dtype=torch.int32)}),
        "9 rows do not fit": rows(0, 9),
    }
    for message, batch in wrong.items():
        with pytest.raises(RecordError, match=message):
            replay.extend(batch)
    assert replay.write_count == 4 and set(replay.sample(100)["x"].tolist()) == {0, 1, 2, 3}
    with pytest.raises(RecordError, match="lack wide"):
        replay.set_schema({"x": torch.zeros(1)})


def test_the_schema_can_be_fixed_before_the_first_write_and_keeps_float64() -> None:
    replay = Replay(8, sampler=Uniform())
    replay.set_schema({"x": torch.zeros(1, 2, dtype=torch.float64)})
    with pytest.raises(RecordError, match=r"x is torch\.float32"):
        replay.extend({"x": torch.zeros(3, 2)})
    value = torch.full((3, 2), 1 / 3, dtype=torch.float64)
    replay.extend({"x": value})
    assert torch.equal(replay.sample(3)["x"], value)


def test_a_reused_slot_keeps_nothing_of_the_row_before() -> None:
    replay = Replay(4, sampler=Uniform())
    replay.extend(rows(0, 4))
    replay.sample(64)
    index = replay.extend(rows(100, 2))
    assert replay.use_count[index].tolist() == [0, 0] and int(replay.use_count.sum()) > 0
    for key in ("x", "wide"):
        stored = replay.storage._storage[key][index]
        assert torch.equal(stored, rows(100, 2)[key])


def test_rows_of_the_wrong_layout_are_refused() -> None:
    replay = Replay(12, lanes=3, sampler=Uniform())
    with pytest.raises(RecordError, match="3 lane"):
        replay.extend(block(0, 4, 2))
    with pytest.raises(RecordError, match="3 lane"):
        replay.extend(rows(0, 6))
    with pytest.raises(ConfigError, match="at least one slot"):
        Replay(2, lanes=3, sampler=Uniform())
    single = Replay(12, sampler=Uniform())
    single.extend(block(0, 4, 1))
    assert len(single) == 4


def test_sampling_reads_only_the_keys_that_were_asked_for_and_counts_uses() -> None:
    replay = Replay(8, sampler=Uniform())
    with pytest.raises(RecordError, match="empty"):
        replay.sample(1)
    replay.extend(rows(0, 8))
    batch = replay.sample(50, keys=["x"])
    assert set(batch.keys()) == {"x", "index"}
    assert torch.equal(replay.use_count.long(), torch.bincount(batch["index"], minlength=8))
    with pytest.raises(RecordError, match="rows hold no z"):
        replay.sample(1, keys=["z"])
    with pytest.raises(RecordError, match="length 9 needs 9"):
        replay.sample(1, length=9)


def test_token_rows_are_cut_to_the_longest_of_the_batch_and_step_keys_are_not() -> None:
    lengths = torch.tensor([2, 5, 3])
    mask = torch.arange(8) < lengths[:, None]
    replay = Replay(3, sampler=Fresh(), trim_key="token_mask")
    reward = torch.arange(24.0).view(3, 8)
    replay.extend({"tokens": mask * 7, "token_mask": mask, "reward": reward, "group": torch.arange(3)})
    first = replay.sample(1)
    assert first["tokens"].tolist() == [[7, 7]] and first["reward"].shape == (1, 8)
    rest = replay.sample(2)
    assert rest["tokens"].shape == (2, 5) and rest["token_mask"].sum(1).tolist() == [5, 3]
    assert torch.equal(rest["reward"], reward[1:])


def test_fresh_returns_every_row_once_and_oldest_first() -> None:
    replay = Replay(10, sampler=Fresh())
    taken: list[int] = []
    written = 0
    for count, wanted in ((4, 3), (5, 2), (4, 8), (10, 10), (3, 0)):
        replay.extend(rows(written, count))
        written += count
        if wanted:
            taken += replay.sample(wanted)["x"].tolist()
        assert replay.pending == written - len(taken)
    assert taken == list(range(23))
    with pytest.raises(RecordError, match="4 fresh rows were asked for, but 3"):
        replay.sample(4)
    with pytest.raises(RecordError, match="overwrite 1 that no draw"):
        replay.extend(rows(written, 8))
    assert replay.sample(3)["x"].tolist() == [23, 24, 25]


def test_fresh_counts_what_it_was_allowed_to_drop() -> None:
    sampler = Fresh(drop=True)
    replay = Replay(4, sampler=sampler)
    for first in (0, 3, 6):
        replay.extend(rows(first, 3))
    assert sampler.dropped == 5 and replay.sample(4)["x"].tolist() == [5, 6, 7, 8]


def test_fresh_windows_are_the_oldest_slots_of_every_lane() -> None:
    replay = Replay(36, lanes=3, sampler=Fresh())
    replay.extend(block(0, 10, 3))
    first = replay.sample(3, length=4)
    assert first["observation"][..., 0].tolist() == [[0, 1, 2, 3]] * 3
    assert first["observation"][:, 0, 1].tolist() == [0, 1, 2]
    second = replay.sample(6, length=3)
    assert second["observation"][:, 0, 0].tolist() == [4] * 3 + [7] * 3
    with pytest.raises(RecordError, match="all 3 lanes"):
        replay.sample(2, length=2)
    replay.extend(block(10, 12, 3))
    assert replay.sample(3, length=12)["observation"][0, :, 0].tolist() == list(range(10, 22))


def test_one_slot_at_a_time_equals_a_block() -> None:
    whole, single = (Replay(12, lanes=2, sampler=Uniform(), seed=3) for _ in range(2))
    data = block(0, 6, 2)
    whole.extend(data)
    for slot in data:
        single.add(slot)
    a, b = whole.sample(20, length=3), single.sample(20, length=3)
    assert all(torch.equal(a[key], b[key]) for key in a.keys())


def test_the_random_stream_is_its_own() -> None:
    state = torch.get_rng_state()
    replay = Replay(8, sampler=Uniform(), seed=5)
    replay.extend(rows(0, 8))
    torch.manual_seed(1)
    np.random.seed(1)
    a = replay.sample(16)["x"]
    again = Replay(8, sampler=Uniform(), seed=5)
    again.extend(rows(0, 8))
    torch.manual_seed(2)
    assert torch.equal(a, again.sample(16)["x"])
    torch.set_rng_state(state)
