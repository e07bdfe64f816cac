"""A process that is killed while it writes loses no committed row, and the next draw is the one it would have made."""

from __future__ import annotations

import errno
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from unified_rl.errors import CheckpointError
from unified_rl.replay import Priority, Replay, Uniform
from unified_rl.replay.store import MemmapStore

CAPACITY, WIDTH, SEED = 500, 512, 7


def open_store(path: Path) -> Replay:
    return Replay(CAPACITY, sampler=Priority(), storage="memmap", path=str(path), seed=SEED)


def content(first: int, count: int) -> dict[str, torch.Tensor]:
    """Rows whose every number says which row it belongs to."""
    x = torch.arange(first, first + count)
    return {"x": x, "wide": (x[:, None] * 1_000 + torch.arange(WIDTH)).double(), "policy_version": x // 10}


def size(first: int) -> int:
    return 1 + first * 7 % 90


def act(replay: Replay) -> None:
    """One round: a write, then a draw; each commits."""
    replay.extend(content(replay.write_count, size(replay.write_count)))
    replay.sample(16)


def write_until_killed(path: Path, report: int) -> None:
    replay = open_store(path)
    while True:
        act(replay)
        os.write(report, replay.write_count.to_bytes(8, "little"))


def kill_writers(folder: Path, kills: int) -> None:
    """Starts writers, each with a store of its own, and kills each at a moment of chance; prints what they said."""
    rng = random.Random(SEED)
    for kill in range(kills):
        receive, send = os.pipe()
        child = os.fork()
        if child == 0:
            write_until_killed(folder / str(kill), send)
        os.close(send)
        heard = 0
        while heard <= CAPACITY:  # until it overwrites
            heard = int.from_bytes(os.read(receive, 8), "little")
        time.sleep(rng.uniform(0.0, 0.03))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        while data := os.read(receive, 8):
            heard = int.from_bytes(data, "little")
        os.close(receive)
        print(heard, flush=True)


def check_rows(replay: Replay) -> None:
    """Every live row is whole, and they are the newest."""
    low, high = max(0, replay.write_count - CAPACITY), replay.write_count
    state = replay.state_dict()
    expected = content(low, high - low)
    for key, value in expected.items():
        assert torch.equal(state[f"row.{key}"], value), key


def test_killed_writers_lose_no_committed_row_and_the_next_draw_is_the_same(tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, str(tmp_path), "5"]
    out = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert out.returncode == 0, out.stderr
    for kill, reported in enumerate(out.stdout.split()):
        reopened = open_store(tmp_path / str(kill))
        assert reopened.write_count >= int(reported) > CAPACITY
        assert len(reopened) == CAPACITY
        check_rows(reopened)
        # the same program, not killed, stopped before and after the draw that follows the last write
        alone = open_store(tmp_path / f"alone{kill}")
        while alone.write_count + size(alone.write_count) < reopened.write_count:
            act(alone)
        alone.extend(content(alone.write_count, min(size(alone.write_count), reopened.write_count - alone.write_count)))
        drawn = reopened.sample(16)["x"]
        assert any(torch.equal(drawn, alone.sample(16)["x"]) for _ in range(2))
        act(reopened)  # and it goes on
        check_rows(reopened)


def test_a_store_that_is_open_elsewhere_is_refused(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    child = os.fork()
    if child == 0:  # exit code 7 is the refusal
        try:
            open_store(tmp_path)
            os._exit(0)
        except CheckpointError as error:
            os._exit(7 if "in use by another process" in str(error) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    store.close()
    open_store(tmp_path).close()


if __name__ == "__main__":
    kill_writers(Path(sys.argv[1]), int(sys.argv[2]))


@pytest.mark.parametrize("part", ["_create", "_map_column"])
def test_a_full_disk_under_a_replay_made_by_itself_is_one_error(
    part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(MemmapStore, part, full)
    with pytest.raises(CheckpointError, match=f"replay at {tmp_path}.*No space left"):
        Replay(capacity=8, sampler=Uniform(), storage="memmap", path=str(tmp_path)).extend({"x": torch.zeros(2)})
