"""What a task says of a turn: the verdict, what can be wrong with it, and how long it may take."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from unified_rl.envs.language.reward_calls import TimeUp, in_thread
from unified_rl.errors import RolloutError


class Verdict(NamedTuple):
    """The environment's opinion of one finished turn.

    Attributes:
        reward: of this turn.
        done: the conversation is over.
        correct: the task is solved.
        reply: what the environment says next.
        info: further numbers, under the names of :attr:`LanguageTask.info_names`.
        shown: what reward functions see of the reply, where that is not its text.
    """

    reward: float = 0.0
    done: bool = True
    correct: bool = False
    reply: str = ""
    info: dict[str, float] | None = None
    shown: str | None = None


def fault_of(verdict: Any, info_names: Sequence[str] = ()) -> str:
    """What is wrong with what a task returned; empty where nothing is."""
    if not isinstance(verdict, Verdict):
        return f"{verdict!r:.60} ({type(verdict).__name__})"
    told = {} if verdict.info is None else verdict.info
    if not isinstance(told, dict):
        return f"info={told!r:.60} ({type(told).__name__})"
    numbers: dict[str, Any] = {name: getattr(verdict, name) for name in ("reward", "done", "correct")}
    numbers |= {f"info[{name!r}]": told[name] for name in info_names if name in told}
    for name, value in numbers.items():
        if isinstance(value, Tensor) and value.numel() == 1:
            value = value.item()
        shape = getattr(value, "shape", ())
        if isinstance(value, str | bytes) or not hasattr(value, "__float__") or len(shape):
            return f"{name}={value!r:.60} ({type(value).__name__})"
        if name.startswith("info"):  # NaN is what a task does not know
            continue
        if not math.isfinite(value):
            return f"{name}={value!r:.60}"
    return "" if isinstance(verdict.reply, str) else f"reply={verdict.reply!r:.60} ({type(verdict.reply).__name__})"


def within(seconds: float, act: Callable[[], None], where: Callable[[], str]) -> None:
    """Runs ``act`` in a thread of its own and passes on what it raises.

    Raises:
        RolloutError: it has not returned after ``seconds``; ``where()`` begins the message. The thread is left behind.
    """
    try:
        in_thread(act, seconds)
    except TimeUp:
        raise RolloutError(
            f"{where()} after {seconds:g} s; raise judge_seconds of the task if it may take so long"
        ) from None
