"""Scoring by third-party verifiers, where a model's text could hang or exhaust the process that scores it."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import threading
from collections import OrderedDict
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from unified_rl.errors import ConfigError

WORKER = Path(__file__).with_name("scoring_worker.py")


class Score(NamedTuple):
    """What came back: ``value`` is 0 where ``failed``, that is where scoring raised, ran out of time or of memory."""

    value: float
    failed: bool


FAILED = Score(0.0, True)

SLOW = 0.1
"""CPU seconds above which a request counts against the budget of its batch, and that it has when nothing is left."""

REMEMBERED = 4096
"""Failed requests that are remembered, the latest first."""


GRACE = 1.0
"""Seconds that a worker has to end by itself."""


class GuardedScorer:
    """Sends requests to a worker process, which replaces what a request killed. Safe to call from threads.

    The worker imports what it needs once and answers from forks of itself, so that a request that ends its process
    costs a fork and not an import. A request that failed is remembered and not tried again. The requests of a batch
    share a budget: once slow ones have used it up, each further request has only :data:`SLOW` seconds, so that a batch
    of hostile answers ends in seconds while ordinary answers still get their score.

    The worker's hashes are not randomised, so that what it generates is the same in every run.

    Args:
        warm_up: a harmless request, sent first to every new worker so that imports do not count as scoring time.
        limit: CPU seconds of one request.
        first_limit: CPU seconds of the warm-up.
        memory: gigabytes of address space of the worker.
        budget: CPU seconds that the slow requests of one batch may take together, see :meth:`renew`.
    """

    def __init__(
        self,
        warm_up: dict[str, Any],
        limit: float = 5.0,
        first_limit: float = 60.0,
        memory: float = 4.0,
        budget: float = math.inf,
    ) -> None:
        self.warm_up, self.limit, self.first_limit, self.memory = warm_up, limit, first_limit, memory
        self.budget = self.left = budget
        self.restarts = 0
        self._failed: OrderedDict[str, None] = OrderedDict()
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None

    def renew(self) -> None:
        """Begins a batch: the budget is whole again. Failed requests stay remembered."""
        self.left = self.budget

    def score(self, **request: Any) -> Score:
        """The score of one request, which holds ``kind`` and what the worker's function of that name reads.

        Raises:
            ConfigError: the worker does not start, or cannot import the verifier.
        """
        key = json.dumps(request, sort_keys=True)
        if key in self._failed:
            return FAILED
        allowed = min(self.limit, max(SLOW, self.left))
        answer = self.ask(allowed, **request)
        used = float(answer.get("cpu", allowed))
        if used > SLOW:
            self.left = max(0.0, self.left - used)
        value = answer.get("score")
        if value is not None and math.isfinite(value):
            return Score(value, False)
        if allowed == self.limit or "cpu" in answer:  # with a shortened limit it may do better in another batch
            self._remember(key)
        return FAILED

    def ask(self, limit: float, **request: Any) -> dict[str, Any]:
        """The worker's answer to any request; it has an entry ``error`` where there is none.

        Raises:
            ConfigError: the worker does not start, or cannot import what it needs.
        """
        with self._lock:
            if self._process is None:
                self._process = self._start()
                error = self._send({**self.warm_up, "limit": self.first_limit, "keep": True}).get("error")
                if error is not None:
                    if self._process is not None:
                        self._end(self._process)
                    raise ConfigError(
                        f"the process that scores answers ({request['kind']}) did not start ({error}); check that its "
                        "verifier can be imported, and that memory suffices"
                    )
            return self._send({**request, "limit": limit})

    def _remember(self, key: str) -> None:
        self._failed[key] = None
        if len(self._failed) > REMEMBERED:
            self._failed.popitem(last=False)

    def close(self) -> None:
        """Ends the worker."""
        with self._lock:
            if self._process is not None:
                self._end(self._process)

    def _send(self, request: dict[str, Any]) -> dict[str, Any]:
        process = self._process
        assert process is not None and process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
            out: dict[str, Any] = json.loads(process.stdout.readline())
            self.restarts += bool(out.get("died"))
            return out
        except (OSError, ValueError):  # the worker died: a broken pipe, or an empty line
            self._end(process)
            self.restarts += 1
            return {"error": "the process ended"}

    def _start(self) -> subprocess.Popen[str]:
        # -P keeps this folder off the module path; one thread, or the libraries' pools eat the memory limit
        settings = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYTHONHASHSEED": "0"}
        return subprocess.Popen(
            [sys.executable, "-P", str(WORKER), str(self.memory)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, **settings},
            process_group=0,
        )

    def _end(self, process: subprocess.Popen[str]) -> None:
        self._process = None
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                with suppress(OSError):  # unsent bytes of a request to a dead worker
                    pipe.close()
        try:
            process.wait(GRACE)  # it sees its input end, and takes its fork along
        except subprocess.TimeoutExpired:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
