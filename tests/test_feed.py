"""Tickets: who waits where, how old rows are, what an update takes, and what older checkpoints still mean."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tensordict import TensorDict

from unified_rl.config import compose
from unified_rl.errors import ConfigError, RecordError
from unified_rl.replay import Fresh, Replay, Uniform, WithDataset
from unified_rl.rollout.feed import Feed, LocalFeed
from unified_rl.training.run import Job
from unified_rl.training.settings import TrainSettings
from unified_rl.training.trainer import Trainer


class Numbered:
    """A rollout whose n-th collection brings ``1 + n % 3`` rows that hold n and the version."""

    steps_per_collect = 2

    def __init__(self, staleness: int = 0) -> None:
        self.staleness, self.number = staleness, 0

    def collect(self, version: int) -> tuple[TensorDict, dict[str, float]]:
        count = 1 + self.number % 3
        rows = {"x": torch.full((count,), self.number), "version": torch.full((count,), version)}
        self.number += 1
        return TensorDict(rows, batch_size=[count]), {"rollout/number": float(self.number - 1)}

    def state_dict(self) -> dict[str, Any]:
        return {"number": self.number}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.number = state["number"]


class Taker:
    """An agent that keeps what it drew."""

    def __init__(self) -> None:
        self.version, self.seen = 0, []

    def update(self, replay: Replay, progress: float = 0.0) -> dict[str, Any]:
        batch = replay.sample(None if replay.sampler.queue else 4)
        self.seen.append((batch["x"].tolist(), [self.version - v for v in batch["version"].tolist()]))
        self.version += 1
        return {}

    def state_dict(self) -> dict[str, Any]:
        return {"version": self.version}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.version = state["version"]


def trainer(folder: Path, staleness: int, sampler: Any, steps: int = 12) -> Trainer:
    folder.mkdir(exist_ok=True)
    settings = TrainSettings(steps=steps, log_every=2, eval_every=0, checkpoint_every=4)
    replay = Replay(64, sampler=sampler)
    return Trainer(settings, folder, Taker(), LocalFeed(Numbered(staleness)), replay, lambda: {})


@pytest.mark.parametrize("staleness", [0, 2])
def test_an_update_takes_what_one_collection_wrote_and_no_row_is_older_than_the_bound(
    staleness: int, tmp_path: Path
) -> None:
    run = trainer(tmp_path / "run", staleness, Fresh())
    run.run()
    assert isinstance(run.feed, Feed)
    assert [x for x, _ in run.agent.seen] == [[n] * (1 + n % 3) for n in range(6)]
    assert [set(lag) for _, lag in run.agent.seen] == [{min(n, staleness)} for n in range(6)]


def test_what_waits_is_not_in_the_replay_so_staleness_means_the_same_for_every_sampler(tmp_path: Path) -> None:
    run = trainer(tmp_path / "run", 3, Uniform())
    run.run()
    drawn = [max(x) for x, _ in run.agent.seen]
    assert all(newest <= update for update, newest in enumerate(drawn))  # never a batch that still waits
    assert all(min(lag) >= min(update, 3) for update, (_, lag) in enumerate(run.agent.seen))


def test_metrics_are_logged_with_the_update_that_takes_their_batch(tmp_path: Path) -> None:
    import json

    run = trainer(tmp_path / "run", 2, Fresh())
    run.run()
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["rollout/number"] for row in rows if "rollout/number" in row] == [0, 1, 2, 3, 4, 5]


def test_batches_that_wait_are_part_of_a_checkpoint(tmp_path: Path) -> None:
    from unified_rl.training.checkpoint import checkpoints, read_checkpoint

    whole = trainer(tmp_path / "whole", 2, Fresh())
    whole.run()
    first = checkpoints(tmp_path / "whole" / "checkpoints")[0]
    state = read_checkpoint(first)
    assert len(state["feed"]["waiting"]) == 2
    again = trainer(tmp_path / "again", 2, Fresh())
    again.load_state_dict(state, first)
    again.run()
    assert again.agent.seen == whole.agent.seen[state["updates"] :]


def test_a_negative_staleness_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"rollout.staleness=-1 must be at least 0"):
        LocalFeed(Numbered(-1))


# ------------------------------------------------------------------------------------------- the queue of writes


def numbers(low: int, high: int, lanes: int = 1) -> TensorDict:
    values = torch.arange(low, high)
    if lanes > 1:
        values = values[:, None] * 10 + torch.arange(lanes)
    return TensorDict({"x": values}, batch_size=values.shape)


def test_a_draw_of_no_size_is_the_oldest_write_and_survives_a_save(tmp_path: Path) -> None:
    replay = Replay(16, sampler=Fresh())
    for low, high in ((0, 3), (3, 4), (4, 9)):
        replay.extend(numbers(low, high))
    assert replay.sample(None)["x"].tolist() == [0, 1, 2]
    replay.dumps(tmp_path / "replay")
    other = Replay(16, sampler=Fresh())
    other.loads(tmp_path / "replay")
    for one in (replay, other):
        assert one.sample(None)["x"].tolist() == [3]
        assert one.sample(2)["x"].tolist() == [4, 5]
        assert one.sample(None)["x"].tolist() == [6, 7, 8]  # what is left of it
        with pytest.raises(RecordError, match="no write waits"):
            one.sample(None)
        one.extend(numbers(9, 11))
        assert one.sample(None)["x"].tolist() == [9, 10]


def test_windows_of_one_write_come_lane_by_lane() -> None:
    replay = Replay(64, lanes=3, sampler=Fresh())
    replay.extend(numbers(0, 4, 3))
    replay.extend(numbers(4, 6, 3))
    assert replay.sample(None, length=4)["x"][:, 0].tolist() == [0, 1, 2]
    assert replay.sample(None, length=2)["x"].tolist() == [[40, 50], [41, 51], [42, 52]]
    replay.extend(numbers(6, 9, 3))
    with pytest.raises(RecordError, match="9 rows, no multiple of windows of 2"):
        replay.sample(None, length=2)


def test_dropped_rows_leave_the_queue(tmp_path: Path) -> None:
    replay = Replay(4, sampler=Fresh(drop=True))
    replay.extend(numbers(0, 3))
    replay.extend(numbers(3, 5))  # overwrites row 0
    assert replay.sample(None)["x"].tolist() == [1, 2]
    assert replay.sample(None)["x"].tolist() == [3, 4]


def test_a_memory_mapped_write_in_parts_is_one_write(tmp_path: Path) -> None:
    options: dict[str, Any] = {"storage": "memmap", "path": str(tmp_path / "rows")}
    replay = Replay(64, sampler=Fresh(), **options)
    replay.extend(numbers(0, 64))
    assert replay._room < 64
    replay.close()
    again = Replay(64, sampler=Fresh(), **options)
    assert again.sample(None)["x"].tolist() == list(range(64))
    again.close()


def test_other_samplers_and_shares_of_a_data_set(tmp_path: Path) -> None:
    replay = Replay(16, sampler=Uniform())
    replay.extend(numbers(0, 6))
    with pytest.raises(RecordError, match="Uniform keeps no queue of writes"):
        replay.sample(None)
    replay.dumps(tmp_path / "data")
    mixed = WithDataset(16, data=str(tmp_path / "data"), share=0.5, sampler=Fresh())
    mixed.extend(numbers(100, 103))
    assert (mixed.sample(None)["x"] >= 100).tolist() == [True] * 3 + [False] * 3


def test_uniform_replay_at_staleness_0_sees_what_was_collected_for_each_update(tmp_path: Path) -> None:
    overrides = ["env=inverted_pendulum", "agent=sac", "steps=8", "progress=false", "rollout.random_steps=0"]
    run = Job(compose(overrides)).make_trainer(tmp_path)
    for update in range(1, 5):
        run.collect()
        assert len(run.replay) == update and run.feed.admitted == update  # type: ignore[union-attr]
        run.updates += 1
