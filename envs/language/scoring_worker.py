"""Scores answers in a process of its own: run by path, JSON lines in, JSON lines out. Imports nothing of the package.

The first process imports the verifiers and never sees an answer. It forks one that does: a request that takes more CPU
time than its limit ends that process (the timer's default action, which also interrupts one long computation in C),
and the next request gets a new fork. Memory is limited and files cannot be written. See
:mod:`unified_rl.envs.language.scoring`.
"""

from __future__ import annotations

import inspect
import json
import os
import re
import resource
import signal
import sys
import time
from contextlib import suppress
from functools import lru_cache
from typing import IO, Any

COMMON = (
    *("x^2+2x-1", "\\frac{\\sqrt{2}}{3}", "\\{1,2\\}", "\\left(3,\\frac{\\pi}{2}\\right)", "(-\\infty,2]\\cup[3,4)"),
    *("\\begin{pmatrix}1\\\\2\\end{pmatrix}", "\\text{word}", "x=3", "2^{10}", "3\\cdot 4", "5!", "1,2", "28\\%"),
)
EVALUATES = re.compile(r"\b(?:eval|exec|parse_expr|sympify)\(")


def score_math(request: dict[str, Any]) -> dict[str, Any]:
    """Score 1 where math-verify finds the answer in ``text`` equal to ``reference``."""
    from math_verify import parse, verify

    answer = parse(request["text"], parsing_timeout=None)
    return {"score": float(verify(_reference(request["reference"]), answer, timeout_seconds=None))}


def load_math(request: dict[str, Any]) -> dict[str, Any]:
    """Imports math-verify and parses a little of everything, so that no answer pays for its grammar."""
    for text in COMMON:
        score_math({"reference": text, "text": f"${text}$"})
    return {}


@lru_cache(maxsize=4096)
def _reference(text: str) -> Any:
    from math_verify import parse

    return parse(f"${text}$", parsing_timeout=None)


def load_gym(request: dict[str, Any]) -> dict[str, Any]:
    """Imports reasoning-gym."""
    import reasoning_gym

    return {"version": str(getattr(reasoning_gym, "__version__", ""))}


def make_gym(request: dict[str, Any]) -> dict[str, Any]:
    """Every item of a reasoning-gym data set, and whether its scorer's module evaluates text as code."""
    from reasoning_gym.factory import DATASETS

    if request["dataset"] not in DATASETS:
        return {"names": sorted(DATASETS)}
    try:
        dataset = _dataset(request["dataset"], json.dumps(request["options"]))
    except (TypeError, ValueError, AssertionError) as error:
        return {"refused": str(error)}
    items = []
    for index in range(len(dataset)):
        item = _item(request["dataset"], json.dumps(request["options"]), index)
        key, metadata = request["prompt_key"], item["metadata"]
        if key is not None and key not in metadata:
            return {"metadata": sorted(map(str, metadata))}
        prompt = item["question"] if key is None else str(metadata[key])
        items.append([prompt, None if item["answer"] is None else str(item["answer"])])
    source = inspect.getsource(inspect.getmodule(type(dataset)) or type(dataset))
    return {"items": items, "evaluates": bool(EVALUATES.search(source))}


def score_gym(request: dict[str, Any]) -> dict[str, Any]:
    """The score that a reasoning-gym data set gives to ``text`` for its item ``index``."""
    options = json.dumps(request["options"])
    item = _item(request["dataset"], options, request["index"])
    return {"score": float(_dataset(request["dataset"], options).score_answer(request["text"], item))}


@lru_cache(maxsize=8)
def _dataset(name: str, options: str) -> Any:
    import reasoning_gym

    return reasoning_gym.create_dataset(name, **json.loads(options))


@lru_cache(maxsize=65536)
def _item(name: str, options: str, index: int) -> Any:
    return _dataset(name, options)[index]


def _limit(seconds: float) -> None:
    """CPU time, so that a busy machine changes no score; ten times as much wall time, for what only waits."""
    signal.setitimer(signal.ITIMER_PROF, seconds)
    signal.setitimer(signal.ITIMER_REAL, 10 * seconds)


KINDS = {"math": score_math, "math_load": load_math, "gym": score_gym, "gym_load": load_gym, "gym_items": make_gym}


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """The answer to one request, with the CPU seconds that it took."""
    began = time.process_time()
    _limit(request["limit"])
    try:
        found = KINDS[request["kind"]](request)
    except BaseException as error:
        found = {"error": type(error).__name__}
    _limit(0)
    return {**found, "cpu": time.process_time() - began}


class Fork:
    """A copy of this process that answers requests until one of them ends it."""

    def __init__(self) -> None:
        (ask, self._ask), (self._hear, tell) = os.pipe(), os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(self._ask)
            os.close(self._hear)
            _serve(os.fdopen(ask), os.fdopen(tell, "w"))
            os._exit(0)
        os.close(ask)
        os.close(tell)
        self.requests, self.answers = os.fdopen(self._ask, "w"), os.fdopen(self._hear)

    def __call__(self, line: str) -> str:
        """The answer to one request; empty where the request ended the process."""
        try:
            self.requests.write(line)
            self.requests.flush()
            return self.answers.readline()
        except OSError:
            return ""

    def close(self) -> None:
        """Ends the copy."""
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        self.answers.close()
        with suppress(OSError):  # unsent bytes
            self.requests.close()


def _serve(requests: IO[str], answers: IO[str]) -> None:
    for line in requests:
        answers.write(json.dumps(answer(json.loads(line))) + "\n")
        answers.flush()


def main() -> None:
    """Answers requests until the input ends: those marked ``keep`` here, all others in a fork."""
    gigabytes = float(sys.argv[1])
    resource.setrlimit(resource.RLIMIT_AS, (int(gigabytes * 2**30),) * 2)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    fork: Fork | None = None
    for line in sys.stdin:
        request = json.loads(line)
        if request.pop("keep", False):
            reply = json.dumps(answer(request)) + "\n"
        else:
            fork = fork or Fork()
            reply = fork(line)
        if fork is not None and not reply:
            fork.close()
            fork, reply = None, '{"error": "the process ended", "died": true}\n'
        answers.write(reply)
        answers.flush()
    if fork is not None:
        fork.close()
    os._exit(0)  # at once: nothing here is worth tidying up


if __name__ == "__main__":
    main()
