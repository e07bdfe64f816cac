"""How language models write the calls of tools: one reader for each form, and which of them a chat template writes.

Names are those that vLLM gives its parsers. A reader finds the calls in a turn, special tokens and all, in their order;
one that cannot be read is a text that says why.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

from unified_rl.errors import ConfigError

Written: TypeAlias = dict[str, Any] | str
"""A call as a model wrote it, or what is wrong with it."""
ToolFormat: TypeAlias = Literal["hermes", "llama3_json", "mistral", "response_template"]
"""Names of forms; ``response_template`` is what the tokenizer's folder says itself."""

PROBE: dict[str, Any] = {"name": "zqz", "arguments": {"q": "qzq"}}
"""A call that a template is asked to write."""
_CALL = re.compile(r"<tool_call>\s*(.*?)\s*</tool_call>", re.DOTALL)
_BEGUN = re.compile(r"\s*([\w.\-]+)\s*(?:\[CALL_ID\]\s*(\w+))?\s*(?:\[ARGS\])?\s*(?=\{)")
_DECODER = json.JSONDecoder()
PYTHON_TAG, TOOL_CALLS = "<|python_tag|>", "[TOOL_CALLS]"


class Form(NamedTuple):
    """How calls are written.

    Attributes:
        name: of the form.
        shape: what a model is told to write, where it wrote something else.
        read: the calls in a turn.
    """

    name: str
    shape: str
    read: Callable[[str], list[Written]]


def hermes(text: str) -> list[Written]:
    """``<tool_call>{"name": ..., "arguments": {...}}</tool_call>``, as Hermes and Qwen write, several in a turn."""
    return [_value(found[1]) for found in _CALL.finditer(text)]


def llama3_json(text: str) -> list[Written]:
    """``{"name": ..., "parameters": {...}}``, as Llama 3.1 to 3.3 write, alone or behind ``<|python_tag|>``.

    Several are parted by semicolons. A turn that is JSON of another kind is an answer.
    """
    _, tagged, body = text.partition(PYTHON_TAG)
    body = (body if tagged else text).strip()
    out: list[Written] = []
    while body.startswith("{") or (tagged and not out):
        try:
            value, end = _DECODER.raw_decode(body)
        except (ValueError, RecursionError) as error:
            return [*out, _not_json(error)] if tagged or out or body.startswith('{"name"') else []
        if not _is_call(value):
            return [*out, "the call has no name or no parameters"] if tagged else out
        out.append(value)
        body = body[end:].lstrip(" \n;,")
    return out


def mistral(text: str) -> list[Written]:
    """``[TOOL_CALLS] [{"name": ..., "arguments": {...}, "id": ...}]``; newer models ``[TOOL_CALLS]NAME[ARGS]{...}``."""
    out: list[Written] = []
    for part in text.split(TOOL_CALLS)[1:]:
        begun = _BEGUN.match(part)
        try:
            value, _ = _DECODER.raw_decode(part[begun.end() :] if begun else part.lstrip())
        except (ValueError, RecursionError) as error:
            out.append(_not_json(error))
            continue
        if begun:
            value = {"name": begun[1], "arguments": value, "id": begun[2]}
        calls = value if isinstance(value, list) else [value]
        out += [call if isinstance(call, dict) else "the call has no name or no arguments" for call in calls]
    return out


FORMS = {
    "hermes": Form("hermes", '<tool_call>{"name": ..., "arguments": {...}}</tool_call>', hermes),
    "llama3_json": Form("llama3_json", '{"name": ..., "parameters": {...}}', llama3_json),
    "mistral": Form("mistral", '[TOOL_CALLS] [{"name": ..., "arguments": {...}}]', mistral),
}
"""The forms by name."""


def own_form(tokenizer: Any, schemas: Sequence[dict[str, Any]], prompt: str) -> Form:
    """The form that the tokenizer's ``response_template`` describes, read by transformers.

    Args:
        tokenizer: of the folder.
        schemas: of the tools, by which values get their types.
        prompt: any that a turn follows, since its end may begin the turn.

    Raises:
        ConfigError: it has none.
    """
    if getattr(tokenizer, "response_template", None) is None:
        raise ConfigError(
            "env.tool_format=response_template, but this folder's tokenizer has none; choose one of " + ", ".join(FORMS)
        )

    def read(text: str) -> list[Written]:
        try:
            message = tokenizer.parse_response(text, prefix=prompt, tools=list(schemas))
        except Exception as error:  # of several kinds, told apart by their words
            return [_not_json(error)]
        calls = message.get("tool_calls") if isinstance(message, Mapping) else None
        return [call.get("function", call) if isinstance(call, dict) else str(call) for call in calls or []]

    return Form("response_template", "it as the chat template does", read)


def form_of(written: str | None) -> Form:
    """The form of what a chat template wrote of :data:`PROBE`, and of Hermes where it wrote nothing of it.

    Args:
        written: the assistant's turn; None where the template refuses calls.

    Raises:
        ConfigError: it is written in another form.
    """
    if written is not None and PROBE["name"] not in written:
        return FORMS["hermes"]
    for form in FORMS.values():
        found = [] if written is None else form.read(written)
        if len(found) == 1 and isinstance(found[0], dict) and _same(found[0]):
            return form
    how = "cannot be asked how calls are written" if written is None else f"writes calls as {written.strip()!r:.120}"
    raise ConfigError(
        f"env.tools: this folder's chat template {how}, and what is read is {', '.join(FORMS)}; name one of these with "
        "env.tool_format, or give the tokenizer a response_template"
    )


def _same(call: dict[str, Any]) -> bool:
    return bool(call.get("name") == PROBE["name"] and arguments_of(call) == PROBE["arguments"])


def arguments_of(call: Mapping[str, Any]) -> Any:
    """What a call gives its tool, by either of the usual names; text is read as JSON."""
    given = call.get("arguments", call.get("parameters", {}))
    if isinstance(given, str):
        try:
            return json.loads(given)
        except (ValueError, RecursionError):
            return None
    return given


def _is_call(value: Any) -> bool:
    return isinstance(value, dict) and "name" in value and ("parameters" in value or "arguments" in value)


def _value(text: str) -> Written:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        return _not_json(error)
    return value if isinstance(value, dict) else "the call has no name or no arguments"


def _not_json(error: BaseException) -> str:
    return f"the call is not JSON ({' '.join(str(error).split())[:200]})"
