"""A time limit for calls into somebody else's Python code, which has none of its own."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

STEP_SECONDS = 600.0
"""Of one call of an environment that does not say how long it may take (``step_seconds``)."""


def seconds_of(env: object) -> float | None:
    """How long a step or a reset of an environment may take: its ``step_seconds``; None is without a limit."""
    given = getattr(env, "step_seconds", STEP_SECONDS)
    return float(given) if isinstance(given, int | float) else None


@contextmanager
def deadline(seconds: float | None) -> Iterator[None]:
    """Raises inside the block, wherever its Python code is, once ``seconds`` of wall time are over.

    It rests on the timer of the main thread: in another thread, where there is none (Windows), and where something
    else has set it, there is no limit. A call that stays in compiled code is interrupted when it comes back.

    Raises:
        TimeoutError: the time is over.
    """
    timer = getattr(signal, "setitimer", None)
    busy = timer is None or threading.current_thread() is not threading.main_thread()
    if seconds is None or busy or signal.getitimer(signal.ITIMER_REAL)[0]:
        yield
        return

    def over(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"it has not returned after {seconds:g} s, which is all that its step_seconds allow")

    before = signal.signal(signal.SIGALRM, over)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
