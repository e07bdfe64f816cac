"""Scores answers in a process of its own: run by path, JSON lines in, JSON lines out. Imports nothing of the package.

A request that takes more CPU time than its limit ends the process (the timer's default action, which also interrupts
one long computation in C); memory is limited and files cannot be written. See :mod:`unified_rl.envs.language.scoring`.
"""

from __future__ import annotations

import inspect
import json
import os
import re
import resource
import signal
import sys
from functools import lru_cache
from typing import Any

EVALUATES = re.compile(r"\b(?:eval|exec|parse_expr|sympify)\(")


def score_math(request: dict[str, Any]) -> dict[str, Any]:
    """Score 1 where math-verify finds the answer in ``text`` equal to ``reference``."""
    from math_verify import parse, verify

    answer = parse(request["text"], parsing_timeout=None)
    return {"score": float(verify(_reference(request["reference"]), answer, timeout_seconds=None))}


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


def main() -> None:
    """Answers requests until the input ends."""
    gigabytes = float(sys.argv[1])
    resource.setrlimit(resource.RLIMIT_AS, (int(gigabytes * 2**30),) * 2)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    kinds = {"math": score_math, "gym": score_gym, "gym_load": load_gym, "gym_items": make_gym}
    for line in sys.stdin:
        request = json.loads(line)
        _limit(request["limit"])
        try:
            answer = kinds[request["kind"]](request)
        except BaseException as error:
            answer = {"error": type(error).__name__}
        _limit(0)
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
