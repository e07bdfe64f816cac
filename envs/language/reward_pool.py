"""Reward functions in processes of their own: nothing but names and plain data goes there and comes back, as JSON."""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from unified_rl.envs.language.reward_calls import Failure, Spec, Task, Values
from unified_rl.errors import ConfigError
from unified_rl.interop.line_process import LineProcess

WORKER = Path(__file__).with_name("reward_worker.py")
START_SECONDS = 120.0
"""Wall time in which a worker imports the functions."""
GRACE = 2.0
"""Seconds beyond a call's limit that a worker has to say itself that the call took too long."""
DYING = 0.05
"""Seconds in which a process that is dying says why itself."""


class Worker:
    """One process. It is started with its first call, and again where a call ended it."""

    def __init__(self, start: dict[str, Any]) -> None:
        self.start = start
        self._process: LineProcess | None = None

    def call(self, task: Task, seconds: float) -> Values | Failure:
        """The outcome of one call.

        Raises:
            ConfigError: the process does not start.
        """
        process = self._begin() if self._process is None else self._process
        process.tell({"task": task._asdict(), "seconds": seconds})
        try:
            answer = process.answer(seconds + GRACE)
        except EOFError:
            return Failure(f"ended its process ({self.close(DYING)})")
        if answer is None:
            self.close(DYING)
            return Failure(f"has not returned after {seconds:g} s", hung=True)
        return Failure(*answer["failed"]) if "failed" in answer else answer["values"]

    def _begin(self) -> LineProcess:
        self._process = process = LineProcess(WORKER)
        process.tell(self.start)
        answer: dict[str, Any] = {}
        with suppress(EOFError):
            answer = process.answer(START_SECONDS) or {}
        if "ready" not in answer:
            ended = self.close(DYING)
            raise ConfigError(f"reward_workers: {answer.get('refused') or f'its process did not start ({ended})'}")
        return process

    def kill(self) -> None:
        """Ends the process in the middle of a call; whoever waits for the answer tidies up."""
        if self._process is not None:
            self._process.kill_group()

    def close(self, grace: float = GRACE) -> str | None:
        """Ends the process, after ``grace`` seconds by force; how it ended, in words."""
        process, self._process = self._process, None
        return None if process is None else process.end(grace)


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
