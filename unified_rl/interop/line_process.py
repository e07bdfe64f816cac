"""A Python script in a process of its own, to which lines of JSON go and from which they come back."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any


class LineProcess(subprocess.Popen[bytes]):
    """Such a process; it leads a group, so that Ctrl-C does not reach it, and what it started ends with it.

    Args:
        script: run by path.
        files: open files that it inherits.
    """

    def __init__(self, script: Path, files: Sequence[int] = ()) -> None:
        self._said = b""
        super().__init__(
            [sys.executable, "-P", str(script)],  # -P keeps the script's folder off the module path
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            process_group=0,
            pass_fds=files,
        )

    def tell(self, message: dict[str, Any]) -> None:
        """Sends a message; to a process that ended nothing arrives, as its answer says."""
        assert self.stdin is not None
        with suppress(OSError, ValueError):  # it ended, or was ended here
            self.stdin.write(json.dumps(message).encode() + b"\n")
            self.stdin.flush()

    def answer(self, seconds: float | None = None) -> dict[str, Any] | None:
        """The next line; None where there is none within ``seconds`` (without them it waits for ever).

        Raises:
            EOFError: the process ended.
        """
        stream = self.stdout
        if stream is None or stream.closed:
            raise EOFError
        end = None if seconds is None else time.monotonic() + seconds
        while b"\n" not in self._said:
            if end is not None and not select.select([stream], [], [], max(0.0, end - time.monotonic()))[0]:
                return None
            more = os.read(stream.fileno(), 1 << 16)
            if not more:
                raise EOFError
            self._said += more
        line, _, self._said = self._said.partition(b"\n")
        found: dict[str, Any] = json.loads(line)
        return found

    def hang_up(self) -> None:
        """Closes its input, which asks it to end."""
        with suppress(OSError):
            self.stdin.close()  # type: ignore[union-attr]

    def kill_group(self) -> None:
        """Ends it, and what it started, at once; whoever waits for an answer is told that it ended."""
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)

    def end(self, grace: float) -> str:
        """Ends it, after ``grace`` seconds by force; how it ended, in words."""
        self.hang_up()
        with suppress(subprocess.TimeoutExpired):
            self.wait(max(0.0, grace))
        if self.poll() is None:
            self.kill_group()
        code = self.wait()
        with suppress(OSError):
            self.stdout.close()  # type: ignore[union-attr]
        if code < 0:
            with suppress(ValueError):
                return f"signal {signal.Signals(-code).name}"
        return f"exit code {code}"
