"""Tools: Python functions that a model calls in its answers, as TRL and transformers take them.

A function has a docstring with an ``Args:`` section and type hints; its schema goes into the chat template. Calls are
read in the form of Hermes and Qwen, ``<tool_call>{"name": "add", "arguments": {"a": 1, "b": 2}}</tool_call>``, several
in a turn. Whatever goes wrong in one is text for the model.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from unified_rl.envs.language.reward_calls import TimeUp, ended_within
from unified_rl.errors import ConfigError
from unified_rl.instantiate import allowed, locate, nearest

_CALL = re.compile(r"<tool_call>\s*(.*?)\s*</tool_call>", re.DOTALL)
FORM = '<tool_call>{"name": ..., "arguments": {...}}</tool_call>'


class Asked(NamedTuple):
    """One call of a turn: the name, and the arguments; a ``fault`` says what is wrong with it instead."""

    name: str
    arguments: dict[str, Any]
    fault: str = ""


class Tools:
    """Functions by name.

    Args:
        functions: dotted paths (``my_tools:add``), which the run must allow, or functions themselves.
        seconds: wall time of one call.

    Raises:
        ConfigError: a function that cannot be had, or without docstring or type hints; two of one name.
    """

    def __init__(self, functions: Sequence[Any], seconds: float) -> None:
        from transformers.utils import get_json_schema

        if not functions:
            raise ConfigError("env.tools is an empty list; name at least one function, or leave it out")
        self.seconds = seconds
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
        """The calls in what a model said, in order."""
        return [self._read(found[1]) for found in _CALL.finditer(text)]

    def _read(self, text: str) -> Asked:
        try:
            call = json.loads(text)
        except (ValueError, RecursionError) as error:
            return Asked("", {}, f"the call is not JSON ({_line(error)}); write {FORM}")
        arguments = call.get("arguments", call.get("parameters", {})) if isinstance(call, dict) else None
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments)
            except (ValueError, RecursionError):
                arguments = None
        if not isinstance(arguments, dict) or not isinstance(call.get("name"), str):
            return Asked("", {}, f"the call has no name or no arguments; write {FORM}")
        if call["name"] not in self.functions:
            return Asked("", {}, f"there is no tool {call['name']!r}; {nearest(call['name'], self.functions)}")
        return Asked(call["name"], arguments)

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
