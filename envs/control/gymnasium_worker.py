"""Steps copies of a Gymnasium environment in a process of its own: JSON lines in and out, arrays in shared memory.

Run by path. The first line says where modules lie and which copies to make; each further one is a step, a reset or a
picture. What environments print goes to the error stream. See :mod:`unified_rl.envs.control.gymnasium_pool`.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from mmap import mmap
from typing import IO, Any

PARENT_SECONDS = 1.0
"""How often a worker looks whether the run is still there."""


def main() -> None:
    """Answers until the input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the whole terminal; the run decides
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    start = json.loads(sys.stdin.readline())
    threading.Thread(target=_watch, args=(start["parent"],), daemon=True).start()
    sys.path[:] = start["path"]
    from unified_rl.envs.control.gymnasium_copy import Source
    from unified_rl.envs.control.gymnasium_pool import Board, board_bytes, step_here
    from unified_rl.errors import EnvError, UnifiedRLError
    from unified_rl.interop.words import one_line

    source = Source(**{**start["source"], "allow": tuple(start["source"]["allow"])})
    try:
        copies = {lane: source.copy(lane) for lane in start["lanes"]}
    except UnifiedRLError as error:
        _say(replies, {"error": [type(error).__name__, str(error)]})
        return
    num, shapes = start["num"], start["shapes"]
    board = Board.on(mmap(start["file"], board_bytes(num, shapes)), num, shapes)
    _say(replies, {})
    for line in sys.stdin:
        asked = json.loads(line)
        lanes, numbers = asked["lanes"], asked["numbers"]
        answer: dict[str, Any] = {}
        try:
            if asked["do"] == "step":
                answer = {"told": step_here(copies, board, lanes, numbers)}
            elif asked["do"] == "reset":
                for lane, seed in zip(lanes, numbers, strict=True):
                    board.row[lane] = copies[lane].reset(seed)
            else:
                drawn = copies[lanes[0]].picture()
                answer = {"picture": drawn.tobytes().hex(), "shape": list(drawn.shape)}
        except UnifiedRLError as error:
            answer = {"error": [type(error).__name__, str(error)]}
        except Exception as error:
            answer = {"error": [EnvError.__name__, f"{source.name} raised {one_line(error)}"]}
        _say(replies, answer)
    for copy in copies.values():
        copy.close()


def _watch(parent: int) -> None:
    """Ends this process where the run has gone without a word, whatever a copy is doing."""
    while os.getppid() == parent:
        time.sleep(PARENT_SECONDS)
    os._exit(1)


def _say(replies: IO[str], value: dict[str, Any]) -> None:
    replies.write(json.dumps(value) + "\n")
    replies.flush()


if __name__ == "__main__":
    main()
    os._exit(0)  # at once: a thread that an environment left behind must not hold the process
