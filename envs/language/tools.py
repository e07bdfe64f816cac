"""Tools: Python functions that a model calls in its answers, as TRL and transformers take them.

A function has a docstring with an ``Args:`` section and type hints; its schema goes into the chat template. Calls are
read by :mod:`~unified_rl.envs.language.tool_formats`. Whatever goes wrong in one is text for the model.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from unified_rl.envs.language.reward_calls import TimeUp, ended_within
from unified_rl.envs.language.tool_formats import FORMS, Form, Written, arguments_of
from unified_rl.errors import ConfigError
from unified_rl.instantiate import allowed, locate, nearest


class Asked(NamedTuple):
    """One call of a turn: the name, and the arguments; a ``fault`` says what is wrong with it instead.

    ``id`` is the model's own number of the call, where it gave one.
    """

    name: str
    arguments: dict[str, Any]
    fault: str = ""
    id: str = ""


class Tools:
    """Functions by name.

    Args:
        functions: dotted paths (``my_tools:add``), which the run must allow, or functions themselves.
        seconds: wall time of one call.

    Attributes:
        form: how calls are written; settable.

    Raises:
        ConfigError: a function that cannot be had, or without docstring or type hints; two of one name.
    """

    def __init__(self, functions: Sequence[Any], seconds: float) -> None:
        from transformers.utils import get_json_schema

        if not functions:
            raise ConfigError("env.tools is an empty list; name at least one function, or leave it out")
        self.seconds = seconds
        self.form: Form = FORMS["hermes"]
        self.functions: dict[str, Callable[..., Any]] = {}
        self.schemas: list[dict[str, Any]] = []
        for number, given in enumerate(functions):
            where = f"env.tools[{number}]"
            function = given if callable(given) else locate(_dotted(given, where), allowed(), where, "")
            try:
                schema = get_json_schema(function)
            except Exception as error:  # of several kinds, told apart by their words
                raise ConfigError(f"{where} ({given}) needs a docstring and type hints ({_line(error)})") from error
            name = schema["function"]["name"]
            if name in self.functions:
                raise ConfigError(f"{where} is the second tool called {name!r}; rename it")
            self.functions[name] = function
            self.schemas.append(schema)

    def calls(self, text: str) -> list[Asked]:
        """The calls in what a model said, special tokens and all, in order."""
        return [self._checked(call) for call in self.form.read(text)]

    def _checked(self, call: Written) -> Asked:
        if isinstance(call, str):
            return Asked("", {}, f"{call}; write {self.form.shape}")
        arguments, number = arguments_of(call), str(call.get("id") or "")
        if not isinstance(arguments, dict) or not isinstance(call.get("name"), str):
            return Asked("", {}, f"the call has no name or no arguments; write {self.form.shape}", number)
        if call["name"] not in self.functions:
            fault = f"there is no tool {call['name']!r}; {nearest(call['name'], self.functions)}"
            return Asked(call["name"], {}, fault, number)
        return Asked(call["name"], arguments, "", number)

    def run(self, call: Asked) -> str:
        """What the function returns, as text (JSON where it is no text); what went wrong as ``error: ...``."""
        if call.fault:
            return f"error: {call.fault}"
        try:
            result = ended_within(lambda: self.functions[call.name](**call.arguments), self.seconds)
            return result if isinstance(result, str) else json.dumps(result, ensure_ascii=False, default=str)
        except TimeUp:
            return f"error: {call.name} has not returned after {self.seconds:g} s"
        except (Exception, SystemExit) as error:
            return f"error: {type(error).__name__}: {_line(error)}"


def _dotted(given: Any, where: str) -> str:
    if not isinstance(given, str) or not given:
        raise ConfigError(f"{where} is {given!r:.60}; it must be module:function")
    return given.replace(":", ".")


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]
