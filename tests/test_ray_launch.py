"""Learners of several processes whose rows Ray actors collect (``make scale``): the run of one process, nobody left."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from test_ranks import same
from test_ray import DOMAINS, TESTS, alive, descendants

pytestmark = pytest.mark.skipif(
    not os.environ.get("UNIFIED_RL_SCALE") or importlib.util.find_spec("ray") is None,
    reason="starts Ray, which is slow: make scale",
)
WORKERS = ("engine=ray", "engine.workers=2", "rollout.staleness=1")
DIVIDED = ("launch", "--processes", "2", "train", "learner=data_parallel")


def started(folder: Path, verb: Sequence[str], *words: str) -> subprocess.Popen[str]:
    """A command on the control task, in a session of its own."""
    command = [sys.executable, "-m", "unified_rl.cli", *verb, "--allow", "ray_cases", "--allow", "run_cases",
               *(w for w in DOMAINS["control"] if not w.startswith("updates")), "checkpoint_every=0",
               f"run_dir={folder}", *words]  # fmt: skip
    return subprocess.Popen(
        command, env={**os.environ, "PYTHONPATH": TESTS}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip


def test_two_learners_and_two_actors_are_one_learner_and_two_actors(tmp_path: Path) -> None:
    for verb, name in ((("train",), "one"), (DIVIDED, "two")):
        process = started(tmp_path / name, verb, *WORKERS, "updates=6")
        seen: set[int] = set()
        while process.poll() is None:
            seen |= descendants(process.pid)
            time.sleep(0.02)
        assert process.returncode == 0, process.communicate()[1]
        assert len(seen) > 3 and not gone_within(seen, 10.0)
    same(tmp_path / "one", tmp_path / "two")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_no_actor_outlives_the_launcher(number: signal.Signals, tmp_path: Path) -> None:
    process = started(tmp_path / "run", DIVIDED, *WORKERS, "updates=5000")
    record, seen, until = tmp_path / "run" / "metrics.jsonl", set[int](), time.monotonic() + 120
    while not (record.exists() and len(record.read_text().splitlines()) > 3):
        assert process.poll() is None and time.monotonic() < until
        seen |= descendants(process.pid)
        time.sleep(0.02)
    seen |= descendants(process.pid)
    process.send_signal(number)
    process.wait(60)
    assert len(seen) > 3 and not gone_within(seen, 60.0)
    assert len(list((tmp_path / "run").rglob("state.json"))) == 1, "the update under way was not saved, once"


def gone_within(pids: set[int], seconds: float) -> list[str]:
    """Who of them is still there after so long."""
    until = time.monotonic() + seconds
    while (left := alive(pids)) and time.monotonic() < until:
        time.sleep(0.1)
    return left
