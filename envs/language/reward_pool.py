"""Reward functions in processes of their own: nothing but names and plain data goes there and comes back, as JSON."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from unified_rl.envs.language.reward_calls import Failure, Spec, Task, Values
from unified_rl.errors import ConfigError

WORKER = Path(__file__).with_name("reward_worker.py")
START_SECONDS = 120.0
"""Wall time in which a worker imports the functions."""
GRACE = 2.0
"""Seconds beyond a call's limit that a worker has to say itself that the call took too long."""


class Worker:
    """One process. It is started with its first call, and again where a call ended it."""

    def __init__(self, start: dict[str, Any]) -> None:
        self.start, self._said = start, b""
        self._process: subprocess.Popen[bytes] | None = None

    def call(self, task: Task, seconds: float) -> Values | Failure:
        """The outcome of one call.

        Raises:
            ConfigError: the process does not start.
        """
        if self._process is None:
            self._begin()
        answer = self._ask({"task": task._asdict(), "seconds": seconds}, seconds + GRACE)
        if answer is None:
            self.close(at_once=True)
            return Failure(f"has not returned after {seconds:g} s", hung=True)
        if not answer:
            code = self.close(at_once=True)
            return Failure(f"ended its process ({_ended(code)})")
        return Failure(*answer["failed"]) if "failed" in answer else answer["values"]

    def _begin(self) -> None:
        # -P keeps this folder off the module path
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(WORKER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            process_group=0,
        )
        self._said = b""
        answer = self._ask(self.start, START_SECONDS)
        if not answer or "ready" not in answer:
            code = self.close(at_once=True)
            reason = (answer or {}).get("refused") or f"its process did not start ({_ended(code)})"
            raise ConfigError(f"reward_workers: {reason}")

    def _ask(self, request: dict[str, Any], seconds: float) -> dict[str, Any] | None:
        """The answer to one request; None where there is none in time, empty where the process ended."""
        process = self._process
        assert process is not None and process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(json.dumps(request).encode() + b"\n")
            process.stdin.flush()
        except OSError:
            return {}
        end = time.monotonic() + seconds
        while b"\n" not in self._said:
            left = end - time.monotonic()
            if left <= 0 or not select.select([process.stdout], [], [], left)[0]:
                return None
            more = os.read(process.stdout.fileno(), 1 << 16)
            if not more:
                return {}
            self._said += more
        line, _, self._said = self._said.partition(b"\n")
        out: dict[str, Any] = json.loads(line)
        return out

    def kill(self) -> None:
        """Ends the process in the middle of a call; whoever waits for the answer tidies up."""
        if self._process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)

    def close(self, at_once: bool = False) -> int | None:
        """Ends the process; its exit code."""
        process, self._process = self._process, None
        if process is None:
            return None
        for pipe in (process.stdin, process.stdout):
            with suppress(OSError):
                pipe.close()  # type: ignore[union-attr]
        if not at_once:
            with suppress(subprocess.TimeoutExpired):
                process.wait(GRACE)
        elif process.poll() is None:
            with suppress(subprocess.TimeoutExpired):
                process.wait(0.05)  # one that is dying says why itself
        if process.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        return process.wait()


class RewardPool:
    """Workers that take calls in the order in which they are given; outcomes come back in that order.

    Args:
        specs: of the functions.
        allow: packages that dotted paths may name, in the workers too.
        workers: processes.
    """

    def __init__(self, specs: Sequence[Spec], allow: Sequence[str], workers: int) -> None:
        start = {"path": sys.path, "allow": list(allow), "specs": [spec._asdict() for spec in specs]}
        self.workers = [Worker(start) for _ in range(workers)]
        self._free = list(self.workers)
        self._lock = threading.Lock()
        self._threads = ThreadPoolExecutor(workers, "rewards")
        self._finalizer = weakref.finalize(self, _close, self.workers)

    def run(self, tasks: Sequence[Task], seconds: float) -> list[Values | Failure]:
        """The outcome of each call."""
        return list(self._threads.map(lambda task: self._call(task, seconds), tasks))

    def _call(self, task: Task, seconds: float) -> Values | Failure:
        with self._lock:
            worker = self._free.pop(0)
        try:
            return worker.call(task, seconds)
        finally:
            with self._lock:
                self._free.append(worker)

    def close(self) -> None:
        """Ends the processes; calls under way are given up."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        with self._lock:
            busy = [worker for worker in self.workers if worker not in self._free]
        for worker in busy:
            worker.kill()
        self._threads.shutdown(wait=True)
        self._finalizer()


def _close(workers: Sequence[Worker]) -> None:
    for worker in workers:
        worker.close()


def _ended(code: int | None) -> str:
    if code is not None and code < 0:
        with suppress(ValueError):
            return f"signal {signal.Signals(-code).name}"
    return f"exit code {code}"
