"""Calls reward functions in a process of its own: JSON lines in, JSON lines out. Run by path.

The first line says where modules lie, which packages may be named, and which functions there are; each further one is
a call. What functions print goes to the error stream. See :mod:`unified_rl.envs.language.reward_pool`.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from typing import IO, Any


def main() -> None:
    """Answers calls until the input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the whole terminal; the run decides
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    start = json.loads(sys.stdin.readline())
    sys.path[:] = start["path"]
    from unified_rl.envs.language.reward_calls import Failure, Function, Spec, Task, run_here
    from unified_rl.errors import UnifiedRLError

    try:
        functions = [Function(Spec(**spec), start["allow"]) for spec in start["specs"]]
    except UnifiedRLError as error:
        _say(replies, {"refused": str(error)})
        return
    _say(replies, {"ready": True})
    for line in sys.stdin:
        call = json.loads(line)
        outcome = run_here(functions, [Task(**call["task"])], call["seconds"])[0]
        _say(replies, {"failed": list(outcome)} if isinstance(outcome, Failure) else {"values": outcome})
    for function in functions:
        function.close()


def _say(replies: IO[str], value: dict[str, Any]) -> None:
    replies.write(json.dumps(value) + "\n")
    replies.flush()


if __name__ == "__main__":
    main()
    os._exit(0)  # at once: a thread that a function left behind must not hold the process
