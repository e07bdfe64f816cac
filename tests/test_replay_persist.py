"""Saving and restoring: the next draw is the same, an older save survives a failure, damage is one clear error."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tensordict import TensorDict

from unified_rl import replay as room
from unified_rl.errors import CheckpointError, ConfigError, DamageError
from unified_rl.replay import Fresh, Replay, Sampler, Uniform, WithoutReplacement, persist

LANES = 2


def rows(first: int, slots: int) -> TensorDict:
    x = torch.arange(first * LANES, (first + slots) * LANES).view(slots, LANES)
    return TensorDict(
        {
            "x": x,
            "half": x.to(torch.bfloat16)[..., None],
            "flag": x % 3 == 0,
            "score": torch.sin(x.float()),
            "group": x // 4,
            "source": x % 2,
            "policy_version": x // 6 + 2 - x % 2,
        },
        batch_size=[slots, LANES],
    )


SAMPLERS: dict[str, Callable[[], Sampler]] = {
    "uniform": Uniform,
    "fresh": Fresh,
    "without": WithoutReplacement,
    "recency": lambda: room.Recency(4.0),
    "segment": lambda: room.Segment(3),
    "group": lambda: room.Group(4),
    "softmax": lambda: room.Softmax("score", 0.5),
    "priority": lambda: room.Priority(beta_draws=50),
    "staleness": lambda: room.StalenessBounded(998),
    "buckets": lambda: room.Buckets("score", [0.0]),
    "mixture": lambda: room.Mixture({"online": 1, "p": 1}, {"p": room.Priority()}),
    "queue": lambda: room.Mixture({"offline": 1, "f": 1, "s": 1}, {"f": Fresh(), "s": room.Softmax("score")}),
}


def draw(replay: Replay) -> TensorDict:
    batch = replay.sample(4, version=1_000)
    if "priority_weight" in batch.keys():
        replay.update_priority(batch["index"], batch["score"] ** 2)
    return batch


def same(a: TensorDict, b: TensorDict) -> bool:
    return set(a.keys()) == set(b.keys()) and all(torch.equal(a[key], b[key]) for key in a.keys())


def filled(sampler: Sampler, **options: Any) -> Replay:
    replay = Replay(24, lanes=LANES, sampler=sampler, seed=3, **options)
    for first in range(0, 15, 3):  # wraps: 30 rows in 24 places
        replay.extend(rows(first, 3))
        for _ in range(2):
            if replay.pending >= 4:
                draw(replay)
    return replay


def continues(original: Replay, restored: Replay) -> None:
    for step in range(3):
        original.extend(rows(15 + step, 1))
        restored.extend(rows(15 + step, 1))
        if original.pending >= 4:
            assert same(draw(original), draw(restored))
    assert original.write_count == restored.write_count


@pytest.mark.parametrize("name", SAMPLERS)
def test_after_dumps_and_loads_the_next_draws_and_writes_are_the_same(name: str, tmp_path: Path) -> None:
    original = filled(SAMPLERS[name]())
    original.dumps(tmp_path / "replay")
    restored = Replay(24, lanes=LANES, sampler=SAMPLERS[name](), seed=99)
    restored.loads(tmp_path / "replay")
    assert torch.equal(original.use_count, restored.use_count)
    continues(original, restored)


@pytest.mark.parametrize("name", SAMPLERS)
def test_state_dict_holds_tensors_and_one_string_and_restores_the_same_draws(name: str) -> None:
    original = filled(SAMPLERS[name]())
    state = original.state_dict()
    assert all(isinstance(value, torch.Tensor | str) for value in state.values())
    restored = Replay(24, lanes=LANES, sampler=SAMPLERS[name]())
    restored.extend(rows(7, 2))  # what it held before is gone
    restored.load_state_dict(state)
    continues(original, restored)


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_reopened_memory_mapped_replay_continues_with_the_same_draws(name: str, tmp_path: Path) -> None:
    left_alone = filled(SAMPLERS[name](), storage="memmap", path=str(tmp_path / "a"))
    filled(SAMPLERS[name](), storage="memmap", path=str(tmp_path / "b")).close()
    reopened = Replay(24, lanes=LANES, sampler=SAMPLERS[name](), storage="memmap", path=str(tmp_path / "b"))
    assert len(reopened) == 24
    continues(left_alone, reopened)


def test_a_checkpoint_moves_between_memory_and_files_and_rewinds_a_memory_mapped_replay(tmp_path: Path) -> None:
    mapped = filled(Uniform(), storage="memmap", path=str(tmp_path / "store"))
    mapped.dumps(tmp_path / "save")
    expected = [draw(mapped)["x"] for _ in range(3)]
    mapped.extend(rows(15, 9))
    mapped.loads(tmp_path / "save")
    assert mapped.write_count == 30
    in_memory = Replay(24, lanes=LANES, sampler=Uniform())
    in_memory.loads(tmp_path / "save")
    for want in expected:
        assert torch.equal(draw(mapped)["x"], want)
        assert torch.equal(draw(in_memory)["x"], want)


def test_only_live_rows_are_written(tmp_path: Path) -> None:
    replay = Replay(100_000, sampler=Uniform())
    replay.extend({"x": torch.arange(10)})
    replay.dumps(tmp_path)
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) < 4_000


def test_an_empty_replay_can_be_saved_and_restored(tmp_path: Path) -> None:
    Replay(8, sampler=Uniform()).dumps(tmp_path)
    restored = Replay(8, sampler=Uniform())
    restored.loads(tmp_path)
    assert len(restored) == 0


def test_a_save_that_fails_leaves_the_previous_one_intact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replay = filled(Uniform())
    replay.dumps(tmp_path)
    before = sorted(file.name for file in tmp_path.iterdir())
    replay.extend(rows(20, 1))

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(persist.os, "fsync", full)
    with pytest.raises(CheckpointError, match="No space left"):
        replay.dumps(tmp_path)
    monkeypatch.undo()
    assert sorted(file.name for file in tmp_path.iterdir()) == before
    restored = Replay(24, lanes=LANES, sampler=Uniform())
    restored.loads(tmp_path)
    assert restored.write_count == 30


def test_damage_of_a_saved_replay_is_one_clear_error_and_changes_nothing(tmp_path: Path) -> None:
    filled(Uniform()).dumps(tmp_path)
    target = Replay(24, lanes=LANES, sampler=Uniform())
    target.extend(rows(0, 2))

    def refused(match: str) -> None:
        with pytest.raises(CheckpointError, match=match):
            target.loads(tmp_path)
        assert target.write_count == 4

    file = next(tmp_path.glob("rows-*"))
    data = file.read_bytes()
    file.write_bytes(data[:-5])
    refused("damaged")
    flipped = bytearray(data)
    flipped[-3] ^= 1
    file.write_bytes(bytes(flipped))
    refused("damaged")
    file.unlink()
    refused("cannot be read")
    file.write_bytes(data)
    meta = json.loads((tmp_path / "replay.json").read_text())
    (tmp_path / "replay.json").write_text(json.dumps({**meta, "format": 99}))
    refused("format 99")
    (tmp_path / "replay.json").write_text("{")
    refused("damaged")
    (tmp_path / "replay.json").unlink()
    refused("missing")


def test_a_save_of_another_size_or_schema_is_refused(tmp_path: Path) -> None:
    filled(Uniform()).dumps(tmp_path)
    with pytest.raises(CheckpointError, match="capacity=24"):
        Replay(26, lanes=LANES, sampler=Uniform()).loads(tmp_path)
    with pytest.raises(CheckpointError, match="lanes=2"):
        Replay(24, sampler=Uniform()).loads(tmp_path)
    other = Replay(24, lanes=LANES, sampler=Uniform())
    other.set_schema({"x": torch.zeros(1, LANES)})
    with pytest.raises(CheckpointError, match="saved rows are"):
        other.loads(tmp_path)


def test_damage_of_a_memory_mapped_replay_is_one_clear_error(tmp_path: Path) -> None:
    def make(**options: Any) -> Replay:
        return Replay(**{"capacity": 24, "lanes": LANES, "sampler": Uniform(), "storage": "memmap", **options})

    with pytest.raises(ConfigError, match="needs a path"):
        make()
    filled(Uniform(), storage="memmap", path=str(tmp_path)).close()
    with pytest.raises(CheckpointError, match="capacity=24, not 26"):
        make(path=str(tmp_path), capacity=26)
    journal = (tmp_path / "journal.bin").read_bytes()
    (tmp_path / "journal.bin").write_bytes(b"\0" * len(journal))
    with pytest.raises(CheckpointError, match="names no commit"):
        make(path=str(tmp_path))
    (tmp_path / "journal.bin").write_bytes(journal)
    leaf = tmp_path / "rows" / "x.memmap"
    data = leaf.read_bytes()
    leaf.write_bytes(data[:10])
    with pytest.raises(CheckpointError, match="10 bytes"):
        make(path=str(tmp_path))
    leaf.write_bytes(data)
    (tmp_path / "replay.json").rename(tmp_path / "hidden")
    with pytest.raises(CheckpointError, match=r"replay.json is missing"):
        make(path=str(tmp_path))
    (tmp_path / "hidden").rename(tmp_path / "replay.json")
    assert len(make(path=str(tmp_path))) == 24


def test_a_journal_record_torn_by_a_kill_does_not_count_and_a_damaged_commit_is_an_error(tmp_path: Path) -> None:
    replay = Replay(24, lanes=LANES, sampler=Uniform(), storage="memmap", path=str(tmp_path))
    replay.extend(rows(0, 2))
    replay.extend(rows(2, 2))
    replay.close()
    journal = tmp_path / "journal.bin"
    data = journal.read_bytes()
    newest = max((0, 4096), key=lambda at: int.from_bytes(data[at : at + 8], "little"))
    torn = bytearray(data)
    torn[4096 - newest + 20] ^= 255  # where the next commit is written; the word behind still names this one
    journal.write_bytes(torn)
    reopened = Replay(24, lanes=LANES, sampler=Uniform(), storage="memmap", path=str(tmp_path))
    assert reopened.write_count == 8 and sorted(set(reopened.sample(60)["x"].tolist())) == list(range(8))
    reopened.close()
    for at in (newest + 20, 8192, 8199):  # the commit, and the word that names it
        damaged = bytearray(data)
        damaged[at] ^= 1
        journal.write_bytes(damaged)
        with pytest.raises(DamageError, match=r"journal\.bin is damaged"):
            Replay(24, lanes=LANES, sampler=Uniform(), storage="memmap", path=str(tmp_path))


def test_saved_rows_can_be_read_as_a_data_set_of_any_size(tmp_path: Path) -> None:
    filled(Uniform()).dumps(tmp_path / "lanes")
    data = room.read_rows(tmp_path / "lanes")
    assert data.batch_size == (12, LANES) and torch.equal(data["x"], torch.arange(6, 30).view(12, LANES))
    assert torch.equal(data["half"], rows(3, 12)["half"])
    bigger = Replay(100, lanes=LANES, sampler=Uniform())
    bigger.extend(data)
    assert len(bigger) == 24
    single = Replay(8, sampler=Uniform())
    single.dumps(tmp_path / "single")
    with pytest.raises(CheckpointError, match="holds no rows"):
        room.read_rows(tmp_path / "single")


def test_a_durable_replay_synchronises_rows_before_it_commits_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replay = Replay(24, lanes=LANES, sampler=Uniform(), storage="memmap", path=str(tmp_path), durable=True)
    replay.extend(rows(0, 2))
    synced: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.readlink(f"/proc/self/fd/{descriptor}")))
    replay.extend(rows(2, 2))
    names = {Path(name).name for name in synced}
    assert {"x.memmap", "half.memmap", "use_count.bin"} <= names


def test_a_memory_mapped_replay_that_does_not_fit_the_disk_says_so_before_writing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1 << 20))
    replay = Replay(10_000_000, sampler=Uniform(), storage="memmap", path=str(tmp_path))
    with pytest.raises(ConfigError, match="needs 85 MiB"):
        replay.extend({"x": torch.arange(3)})


@pytest.mark.parametrize("storage", ["memory", "memmap"])
def test_another_sampler_starts_afresh_from_the_saved_rows(storage: str, tmp_path: Path) -> None:
    path = str(tmp_path / "store") if storage == "memmap" else None
    replay = filled(Uniform(), storage=storage, path=path)
    replay.dumps(tmp_path / "save")
    replay.close()
    other = Replay(24, lanes=LANES, sampler=room.Priority(), storage=storage, path=path)
    if storage == "memory":
        other.loads(tmp_path / "save")
    assert sorted(set(other.sample(240)["x"].tolist())) == list(range(6, 30))
