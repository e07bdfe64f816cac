"""Calling reward functions: what is passed to them, how long they may take, what they may return. Imports no torch.

The same code runs in the run's own process and in the workers of :mod:`~unified_rl.envs.language.reward_pool`.
"""

from __future__ import annotations

import asyncio
import inspect
import math
import signal
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

from unified_rl.envs.language.reward_functions import SHIPPED
from unified_rl.errors import ConfigError, UnifiedRLError
from unified_rl.instantiate import check_type, locate, nearest, parameters

RESERVED = ("name", "weight", "label", "skip_special_tokens")
"""Keys of a reward's node that are not settings of its function."""
TASK = "task"
"""The name of the task's own verifier."""
Values: TypeAlias = list[float | None]


class Spec(NamedTuple):
    """One entry of ``reward=[...]``.

    Attributes:
        label: its name in metrics, ``rewards/LABEL``.
        path: the name of a shipped reward, a dotted path ``module:function``, or ``task``.
        weight: in the sum.
        skip_special_tokens: whether completions come without them.
        options: keyword arguments of the function, or of the class that is called.
        where: the entry's full name in the configuration.
        target: the function itself, where Python code gave one.
    """

    label: str
    path: str
    weight: float
    skip_special_tokens: bool
    options: dict[str, Any]
    where: str
    target: Callable[..., Any] | None = None


class Failure(NamedTuple):
    """A call that gave no values.

    Attributes:
        reason: why.
        hung: it took too long.
    """

    reason: str
    hung: bool = False


class Function:
    """A reward function ready to be called.

    Args:
        spec: what the configuration says.
        allow: packages that dotted paths may name.

    Attributes:
        takes: the keywords of its signature.
        open: it takes any further keywords.
        required: keywords without a default.
        is_async: it is a coroutine function.

    Raises:
        ConfigError: it cannot be found or is not allowed, an unknown setting, or one of a wrong type or range.
    """

    def __init__(self, spec: Spec, allow: Sequence[str] = ()) -> None:
        self.spec = spec
        target = spec.target or self._find(allow)
        options = self._checked(target, spec.options)
        self.object: Any = target(**options) if isinstance(target, type) else target
        self.options = {} if isinstance(target, type) else options
        call = self.object if inspect.isroutine(self.object) else getattr(self.object, "__call__", self.object)  # noqa: B004
        found = inspect.signature(call).parameters.values()
        named = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        self.open = any(p.kind is p.VAR_KEYWORD for p in found)
        self.takes = [p.name for p in found if p.kind in named and p.name not in self.options]
        self.required = [p.name for p in found if p.name in self.takes and p.default is p.empty]
        self.is_async = inspect.iscoroutinefunction(call)

    def _find(self, allow: Sequence[str]) -> Callable[..., Any]:
        spec = self.spec
        if "." not in spec.path and ":" not in spec.path:
            if spec.path not in SHIPPED:
                raise ConfigError(
                    f"{spec.where} {spec.path!r} is no reward; {nearest(spec.path, [*SHIPPED, TASK])} (a function of "
                    "your own is module:function)"
                )
            return SHIPPED[spec.path]
        return locate(spec.path.replace(":", "."), allow, spec.where, "name" if spec.options else "")

    def _checked(self, target: Callable[..., Any], options: Mapping[str, Any]) -> dict[str, Any]:
        known, is_open = parameters(target)
        unknown = [key for key in options if key not in known and not is_open]
        if unknown:
            raise ConfigError(
                f"{self.spec.where} ({self.spec.path}) has no setting {unknown[0]!r}; {nearest(unknown[0], known)}"
            )
        hints = {key: known[key].hint for key in options if key in known}
        where = self.spec.where
        typed = {key: check_type(options[key], hint, f"{where}.{key}") for key, hint in hints.items()}
        missing = [key for key, p in known.items() if p.default is inspect.Parameter.empty and key not in options]
        if missing and isinstance(target, type):
            raise ConfigError(f"{where} ({self.spec.path}) needs {missing[0]}: {{name: {self.spec.path}, "
                              f"{missing[0]}: ...}}")  # fmt: skip
        return {**options, **typed}

    def arguments(self, offered: Mapping[str, Any]) -> dict[str, Any]:
        """What its signature takes of what is offered."""
        if self.open:
            return {key: value for key, value in offered.items() if key not in self.options}
        return {key: offered[key] for key in self.takes if key in offered}

    def close(self) -> None:
        """Closes what the function keeps open."""
        close = getattr(self.object, "close", None)
        if callable(close):
            close()


class Task(NamedTuple):
    """One call: number of the function, what it is given, and how many values must come back."""

    function: int
    arguments: dict[str, Any]
    rows: int


def run_here(functions: Sequence[Function], tasks: Sequence[Task], seconds: float) -> list[Values | Failure]:
    """The outcome of each call, made in this process: asynchronous functions together, the others one by one."""
    out: list[Values | Failure | None] = [None] * len(tasks)
    together = [at for at, task in enumerate(tasks) if functions[task.function].is_async]
    if together:
        found = _run_together(
            [functions[tasks[at].function] for at in together], [tasks[at] for at in together], seconds
        )
        for at, outcome in zip(together, found, strict=True):
            out[at] = outcome
    for at, task in enumerate(tasks):
        if out[at] is None:
            function = functions[task.function]
            out[at] = _guarded(lambda f=function, t=task: f.object(**t.arguments, **f.options), task.rows, seconds)  # type: ignore[misc]
    return [outcome if outcome is not None else Failure("was not called") for outcome in out]


def _guarded(call: Callable[[], Any], rows: int, seconds: float) -> Values | Failure:
    try:
        return checked(_ALARM.run(call, seconds), rows)
    except TimeUp:
        return Failure(f"has not returned after {seconds:g} s", hung=True)
    except UnifiedRLError:
        raise
    except (Exception, SystemExit) as error:
        return Failure(_told(error))


def _run_together(functions: Sequence[Function], tasks: Sequence[Task], seconds: float) -> list[Values | Failure]:
    """Coroutines of one event loop, in a thread of their own, since this one may run a loop already."""
    out: list[Values | Failure] = [Failure(f"has not returned after {seconds:g} s", hung=True) for _ in tasks]

    async def one(at: int) -> None:
        function, task = functions[at], tasks[at]
        try:
            value = await asyncio.wait_for(function.object(**task.arguments, **function.options), seconds)
            out[at] = checked(value, task.rows)
        except TimeoutError as error:
            if str(error):  # the function's own
                out[at] = Failure(_told(error))
        except (Exception, SystemExit) as error:
            out[at] = Failure(_told(error))

    async def every() -> None:
        await asyncio.gather(*map(one, range(len(tasks))))

    thread = threading.Thread(target=lambda: asyncio.run(every()), daemon=True)
    thread.start()
    thread.join(seconds + 1.0)
    return list(out)


def _told(error: BaseException) -> str:
    return f"raised {type(error).__name__}: {' '.join(str(error).split())[:300]}"


def checked(returned: Any, rows: int) -> Values | Failure:
    """What a function returned as a list of numbers and None; a :class:`Failure` where it is none."""
    values = returned.tolist() if hasattr(returned, "tolist") else returned
    if not isinstance(values, list | tuple):
        return Failure(f"returned {type(returned).__name__}, not a list of one number (or None) a completion")
    if len(values) != rows:
        return Failure(f"returned {len(values)} values for {rows} completions")
    out: Values = []
    for value in values:
        if value is None:
            out.append(None)
            continue
        if isinstance(value, str | bytes) or not hasattr(value, "__float__"):
            return Failure(f"returned {value!r:.60} ({type(value).__name__}), not a number or None")
        number = float(value)
        if not math.isfinite(number):
            return Failure(f"returned {number}; return None where there is no score")
        out.append(number)
    return out


class TimeUp(BaseException):
    """Raised inside a call that takes too long; no ``except Exception`` of the function's catches it."""


class _Alarm:
    """Ends a call in the main thread by a signal, so that functions with alarms of their own (SIGALRM) still work.

    In another thread, and without such signals, the call is given up and its thread left behind.
    """

    def __init__(self) -> None:
        self._armed = self._installed = False

    def run(self, call: Callable[[], Any], seconds: float) -> Any:
        """What ``call`` returns.

        Raises:
            TimeUp: after ``seconds``.
        """
        if threading.current_thread() is threading.main_thread() and hasattr(signal, "pthread_kill"):
            return self._in_main(call, seconds)
        return in_thread(call, seconds)

    def _in_main(self, call: Callable[[], Any], seconds: float) -> Any:
        if not self._installed:  # and never taken out again: a late signal finds it disarmed
            signal.signal(signal.SIGVTALRM, self._ring)
            self._installed = True
        main = threading.get_ident()
        timer = threading.Timer(seconds, lambda: signal.pthread_kill(main, signal.SIGVTALRM))
        timer.daemon = True
        try:
            self._armed = True
            timer.start()
            return call()
        finally:
            self._armed = False
            timer.cancel()

    def _ring(self, number: int, frame: Any) -> None:
        if self._armed:
            self._armed = False
            raise TimeUp


def in_thread(call: Callable[[], Any], seconds: float) -> Any:
    """What ``call`` returns in a thread of its own, which is left behind where it does not return in time.

    Raises:
        TimeUp: it has not returned after ``seconds``.
    """
    found: list[Any] = []
    raised: list[BaseException] = []

    def run() -> None:
        try:
            found.append(call())
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        raise TimeUp
    if raised:
        raise raised[0]
    return found[0]


_ALARM = _Alarm()


def ended_within(call: Callable[[], Any], seconds: float) -> Any:
    """What ``call`` returns.

    Raises:
        TimeUp: it has not returned after ``seconds``. In the main thread a signal ends it; in another one it is left
            behind in a thread of its own.
    """
    return _ALARM.run(call, seconds)
