"""Signals that ask a command to stop (Ctrl-C, SIGTERM, SIGHUP), and what is still done then. Imports nothing heavy."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
SHIELDED = 2
"""Further signals that are only noted while the last state is written; the next one cuts that short too."""


class Interrupted(KeyboardInterrupt):
    """A signal ended the command.

    Attributes:
        number: the signal's.
        saved: what is saved and how to go on, if a run was under way.
    """

    def __init__(self, number: int) -> None:
        super().__init__("interrupted")
        self.number, self.saved = number, ""


class StopSignal:
    """Counts signals, and raises :class:`Interrupted` for one more than ``tolerance``.

    Attributes:
        number: of the first signal; 0 before there is one.
        count: signals so far.
        tolerance: how many are only noted, see :meth:`tolerating`.
        shielded: likewise, see :meth:`shield`.
        leaves: end the process at once instead of raising, while nothing has begun: an exception in the middle of a
            library's import may come out as anything.
    """

    def __init__(self) -> None:
        self.number, self.count, self.leaves = 0, 0, False
        self.tolerance = self.shielded = 0

    @property
    def requested(self) -> bool:
        """Whether a signal came."""
        return self.count > 0

    def handle(self, number: int, frame: Any) -> None:
        """The handler of every signal."""
        self.count += 1
        self.number = self.number or number
        if self.count <= self.limit:
            return
        if self.leaves:
            say("interrupted")
            os._exit(128 + number)
        raise self.error()

    def error(self) -> Interrupted:
        """What is raised."""
        return Interrupted(self.number)

    @contextmanager
    def tolerating(self, signals: int) -> Iterator[None]:
        """Notes that many signals, counted from the first one on; 0 inside it raises for one that was noted before."""
        before, self.tolerance = self.tolerance, signals
        try:
            if self.count > self.limit:
                raise self.error()
            yield
        finally:
            self.tolerance = before

    def shield(self) -> None:
        """From here on the command writes down how it ended, which a few impatient signals must not cut."""
        self.shielded = self.count + SHIELDED

    @property
    def limit(self) -> int:
        """Signals that are only noted now."""
        return max(self.tolerance, self.shielded)


_active: StopSignal | None = None


@contextmanager
def stopping(leaves: bool = False) -> Iterator[StopSignal]:
    """Installs the handlers, in the main thread only; inside another ``stopping`` it is that one.

    Args:
        leaves: as of :class:`StopSignal`, until :func:`raising`.
    """
    global _active
    if _active is not None:
        yield _active
        return
    stop, old = StopSignal(), {}
    if threading.current_thread() is threading.main_thread():
        _active, stop.leaves = stop, leaves
        for number in SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:  # nohup asks to ignore it
                old[number] = signal.signal(number, stop.handle)
    try:
        yield stop
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
        if _active is stop:
            _active = None


@contextmanager
def raising() -> Iterator[StopSignal]:
    """As :func:`stopping`, and signals raise from here on, since there is something to save.

    What is shielded in it is written when it ends, so signals behind it raise again.
    """
    with stopping() as stop:
        before = stop.leaves, stop.shielded
        stop.leaves = False
        try:
            yield stop
        finally:
            stop.leaves, stop.shielded = before


_quiet = False


def quieten() -> None:
    """From here on this process says nothing: another one speaks for it."""
    global _quiet
    _quiet = True


def say(text: str) -> None:
    """One line to standard error; a terminal that is gone is no reason to fail."""
    if _quiet:
        return
    with suppress(OSError, ValueError):
        print(f"unified-rl: {text}", file=sys.stderr, flush=True)
