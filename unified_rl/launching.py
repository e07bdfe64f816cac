"""``unified-rl launch``: several processes of one command on this machine, ended together; imports nothing heavy.

They find one another by the environment variables that ``torchrun`` sets, so on several machines it may take this
module's place.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from unified_rl.errors import ConfigError
from unified_rl.stopping import SIGNALS, quieten, say

RANK, WORLD = "RANK", "WORLD_SIZE"
PARENT = "UNIFIED_RL_LAUNCHER"
"""The number of the process that launched this one, which must not outlive it."""
GRACE = (10.0, 30.0, 120.0)
"""Seconds from the failure of one process to a signal for the others, from that to a second, and to their kill."""
POLL = 0.02
COMMAND = (sys.executable, "-P", "-m", "unified_rl.cli")


def launched() -> tuple[int, int] | None:
    """Rank and number of the processes that this one was launched with; None where it was not.

    Raises:
        ConfigError: environment variables that say so are no such numbers.
    """
    rank, world = os.environ.get(RANK), os.environ.get(WORLD)
    if rank is None or world is None:
        return None
    if not (rank.isdigit() and world.isdigit() and int(rank) < int(world)):
        raise ConfigError(f"the environment says {RANK}={rank} and {WORLD}={world}, which no launch does: unset them")
    return int(rank), int(world)


def speaks_first() -> None:
    """Leaves the words to process 0: the others print nothing, but for the traceback of an unexpected error."""
    found = launched()
    if found is not None and found[0] > 0:
        quieten()
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115


def launch(processes: int, words: Sequence[str]) -> int:
    """Runs ``unified-rl WORDS`` in so many processes.

    A signal is handed on to all of them. When one fails, the others are given time to notice and to save what there
    is, then signals, and no process is left behind.

    Args:
        processes: at least 1.
        words: the verb and its arguments.

    Returns:
        The exit code of process 0; where a signal killed it, 128 plus that.

    Raises:
        ConfigError: a verb that trains nothing, or a launch inside another.
    """
    _check(processes, words)
    children: list[subprocess.Popen[bytes]] = []
    sent: list[int] = []

    def forward(number: int, frame: Any) -> None:
        sent.append(number)
        _signal(children, number)

    handled = SIGNALS if threading.current_thread() is threading.main_thread() else ()
    before = {number: signal.signal(number, forward) for number in handled}
    try:
        shared = _shared(processes)
        for rank in range(processes):
            own = {**shared, RANK: str(rank), "LOCAL_RANK": str(rank)}
            environ = {**os.environ, **own}
            children.append(subprocess.Popen([*COMMAND, *words], env=environ, start_new_session=True))
        for number in sent:  # that came while some were not there yet
            _signal(children, number)
        _wait(children)
    finally:
        for child in children:
            if child.poll() is None:
                child.kill()
                child.wait()
        for number, handler in before.items():
            signal.signal(number, handler)
    return _told([child.returncode for child in children], bool(sent))


def _check(processes: int, words: Sequence[str]) -> None:
    if processes < 1:
        raise ConfigError(f"--processes {processes} must be at least 1")
    if not words or words[0] != "train":
        verb = repr(words[0]) if words else "nothing"
        raise ConfigError(
            f"launch trains a run, and was given {verb}: call unified-rl launch --processes N train ..., with "
            "learner=data_parallel"
        )
    alone = [word for word in words if word in ("-h", "--help", "--cfg", "--plan", "-m", "--multirun")]
    if alone:
        raise ConfigError(f"{alone[0]} is of one process: unified-rl {' '.join(words)}")
    if launched() is not None:
        raise ConfigError("this process was launched with others already: call unified-rl train without launch")


def _shared(processes: int) -> dict[str, str]:
    """The environment variables that all processes have alike."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    variables = {
        WORLD: str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        PARENT: str(os.getpid()),
    }
    if "TORCH_CPP_LOG_LEVEL" not in os.environ:
        variables["TORCH_CPP_LOG_LEVEL"] = "ERROR"  # a lost process is told in one line, and not by stack traces of C++
    if Path("/sys/class/net/lo").exists() and "GLOO_SOCKET_IFNAME" not in os.environ:
        variables["GLOO_SOCKET_IFNAME"] = "lo"  # a host's own name may lead nowhere
    return variables


def _signal(children: Sequence[subprocess.Popen[bytes]], number: int) -> None:
    for child in children:
        if child.poll() is None:
            with suppress(OSError):
                child.send_signal(number)


def _wait(children: Sequence[subprocess.Popen[bytes]], clock: Callable[[], float] = time.monotonic) -> None:
    """Until all have ended; helps those along that wait for one that has failed."""
    failed, steps = None, 0
    while None in (codes := [child.poll() for child in children]):
        if failed is None and any(codes):
            failed = clock()
        if failed is not None and steps < len(GRACE) and clock() - failed > sum(GRACE[: steps + 1]):
            steps += 1
            _signal(children, signal.SIGTERM if steps < len(GRACE) else signal.SIGKILL)
        time.sleep(POLL)


def _told(codes: Sequence[int], stopped: bool) -> int:
    """The exit code, and a line where no process that lives could say why."""
    for rank, code in enumerate(codes):
        if code < 0 and (rank == 0 or codes[0] not in (0, 1, 2)) and not stopped:
            say(
                f"process {rank} was ended by {signal.Signals(-code).name}; go on with 'unified-rl launch --processes "
                f"{len(codes)} train resume=RUN'"
            )
            break
    return codes[0] if codes[0] >= 0 else 128 - codes[0]


def local(environ: Mapping[str, str] = os.environ) -> tuple[int, int]:
    """Number of this process among those of its machine, and how many these are."""
    return int(environ.get("LOCAL_RANK", 0)), int(environ.get("LOCAL_WORLD_SIZE", 1))
