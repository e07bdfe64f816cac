"""From a record to its prompt, its completion and its further columns, by the names that TRL's data sets have.

A prompt is text, or a conversation: a list of messages with ``role`` and ``content``. The columns are looked for in the
order of :data:`PROMPTS` and :data:`ANSWERS`; a column that holds nothing (null) is passed over.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from decimal import Decimal
from typing import Any, NamedTuple, TypeAlias

from unified_rl.errors import DataError
from unified_rl.records import MAX_EXPONENT, Record, plain

PROMPTS = ("prompt", "messages", "question", "problem")
"""Columns that hold a prompt; ``messages`` may end with what the assistant said."""
ANSWERS = ("answer", "solution", "completion")
"""Columns that hold what an answer is compared with."""
RESERVED = ("prompt", "prompts", "completion", "completions", "completion_ids", "messages")
"""Columns that are not passed on, since a reward function is given prompts and completions under these names."""

Message: TypeAlias = dict[str, Any]


class Prompt(NamedTuple):
    """What is asked.

    Attributes:
        column: where it stands.
        text: of a prompt that is text, else of its last message.
        messages: of a conversation, else empty.
        said: what ``messages`` end with where the assistant spoke last, else empty.
    """

    column: str
    text: str
    messages: tuple[Message, ...] = ()
    said: tuple[Message, ...] = ()

    @property
    def asked(self) -> str:
        """The question, system text aside: as it stands where it is one text, else as JSON."""
        asked = [message for message in self.messages if message["role"] != "system"]
        if not asked:
            return self.text
        if len(asked) == 1 and asked[0]["role"] == "user":
            return str(asked[0]["content"])
        return json.dumps(asked, sort_keys=True, ensure_ascii=False)

    @property
    def identity(self) -> str:
        """What makes it the same prompt in every file and under every template."""
        return self.asked.strip()


def find_prompt(record: Record, key: str | None, where: str) -> Prompt:
    """The prompt of a record.

    Args:
        record: the record.
        key: its column; None looks for the first of :data:`PROMPTS`, several names (``Body,Question``) are joined.
        where: its place, for errors.

    Raises:
        DataError: no prompt, or one that is neither text nor messages.
    """
    column = key or first_of(record, PROMPTS)
    if column is None:
        raise DataError(_missing(where, PROMPTS, record))
    value = record.get(column)
    if _talks(value):
        messages = messages_of(value, f"{where}: field {column!r}")
        last = messages[-1]["role"]
        split = len(messages) - 1 if column == "messages" and last == "assistant" else len(messages)
        if split == 0:
            raise DataError(f"{where}: field {column!r} holds what the assistant said and nothing that was asked")
        return Prompt(column, str(messages[split - 1]["content"]), tuple(messages[:split]), tuple(messages[split:]))
    text = field(record, column, where, strip=column != "prompt")
    if not text.strip():
        raise DataError(f"{where}: field {column!r} is empty")
    return Prompt(column, text)


def find_completion(record: Record, key: str | None, where: str) -> str | list[Message] | None:
    """What is to be said, word for word or as messages; None where the record does not say.

    Args:
        record: the record.
        key: its column; by default ``completion``.
        where: its place, for errors.

    Raises:
        DataError: neither text nor messages, or nothing in it.
    """
    column = key or ("completion" if record.get("completion") is not None else None)
    if column is None:
        return None
    value = record.get(column)
    if _talks(value):
        return messages_of(value, f"{where}: field {column!r}")
    text = field(record, column, where, strip=False)
    if not text:
        raise DataError(f"{where}: field {column!r} is empty")
    return text


def first_of(record: Record, names: Sequence[str]) -> str | None:
    """The first of some columns that holds anything."""
    return next((name for name in names if record.get(name) is not None), None)


def other_columns(record: Record, without: Sequence[str] = ()) -> dict[str, Any]:
    """Every column but :data:`RESERVED` ones and ``without``, as JSON has it."""
    return {name: plain(value) for name, value in record.items() if name not in RESERVED and name not in without}


def _talks(value: Any) -> bool:
    return isinstance(value, list) and (not value or isinstance(value[0], dict))


def messages_of(value: Any, where: str) -> list[Message]:
    """The messages of a conversation; a content in parts of text is joined.

    Raises:
        DataError: it is none.
    """
    if not isinstance(value, list) or not value:
        raise DataError(f"{where} is {'empty' if value == [] else type(value).__name__}, expected messages")
    out = []
    for number, message in enumerate(value):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise DataError(f"{where}: message {number} is no mapping with role and content")
        content = message.get("content")
        if isinstance(content, list):
            content = _joined_parts(content, f"{where}: message {number}")
        if not isinstance(content, str) and not (content is None and message.get("tool_calls")):
            raise DataError(f"{where}: message {number} has content {type(content).__name__}, expected text")
        whole(content or "", f"{where}: message {number}")
        rest = {k: plain(v) for k, v in message.items() if k not in ("role", "content") and v is not None}
        out.append({"role": message["role"], "content": content or "", **rest})
    return out


def _joined_parts(parts: list[Any], where: str) -> str:
    found = [part.get("text") if isinstance(part, dict) else part for part in parts]
    texts = [text for text in found if isinstance(text, str)]
    if len(texts) < len(found):
        raise DataError(f"{where} has parts that are no text, and only text can be read")
    return "".join(texts)


def whole(text: str, where: str) -> str:
    """``text``.

    Raises:
        DataError: it holds half a character.
    """
    if not text.isascii() and any(0xD800 <= ord(c) <= 0xDFFF for c in text):
        raise DataError(f"{where} holds half a character (a lone surrogate such as \\ud800)")
    return text


def field(record: Record, keys: str, where: str, strip: bool = True) -> str:
    """The text of one field, or of several (``Body,Question``) joined by blanks.

    Args:
        record: of :func:`~unified_rl.records.read_records`.
        keys: names, separated by commas; a dotted one (``reward_model.ground_truth``) leads into a mapping.
        where: its place, for errors.
        strip: take blanks off both ends.

    Raises:
        DataError: a field that is missing, or neither text nor a finite number.
    """
    parts = []
    for key in keys.split(","):
        value = _inside(record, key)
        if value is _NOTHING:
            raise DataError(_missing(where, (key,), record))
        if not isinstance(value, str | Decimal):
            raise DataError(f"{where}: field {key!r} is {type(value).__name__}, expected text or a number")
        if isinstance(value, Decimal) and not (value.is_finite() and abs(value.adjusted()) <= MAX_EXPONENT):
            raise DataError(f"{where}: field {key!r} is {value!s:.40}, expected a number in range")
        text = value if isinstance(value, str) else _spell(value)
        whole(text, f"{where}: field {key!r}")
        parts.append(text.strip() if strip else text)
    return " ".join(parts)


_NOTHING = object()


def _inside(record: Record, key: str) -> Any:
    if key in record or "." not in key:
        return record.get(key, _NOTHING)
    name, _, rest = key.partition(".")
    value = record.get(name)
    return _inside(value, rest) if isinstance(value, dict) else _NOTHING


def _missing(where: str, wanted: Sequence[str], record: Record) -> str:
    return (
        f"{where}: no field {' or '.join(map(repr, wanted))}; the record has {', '.join(map(repr, record)) or 'none'} "
        "(env.question_key, env.answer_key and env.solution_key name the fields)"
    )


def _spell(number: Decimal) -> str:
    """A number as a person writes it: 51.0 is 51, 1e-05 is 0.00001."""
    return str(int(number)) if number == number.to_integral_value() else f"{number:f}"
