"""Answers of experts from JSON lines. Every error names the file and the line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from unified_rl.errors import DataError

EXPECTED = "expected fields 'prompt' and 'answer', or 'messages' that end with roles user and assistant"


class Answer(NamedTuple):
    """One line: what was asked, what was answered, and where it stands."""

    prompt: str
    answer: str
    where: str


def read_answers(path: str | Path) -> list[Answer]:
    """The answers of a JSON-lines file; blank lines are passed over.

    Raises:
        DataError: a missing or empty file, or a line that is no answer.
    """
    if Path(path).exists() and not Path(path).is_file():
        raise DataError(f"cannot read {path}: it is no regular file")
    try:
        lines = Path(path).read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {path}: {error}") from error
    found = [_answer(line, f"{path}, line {at}") for at, line in enumerate(lines, start=1) if line.strip()]
    if not found:
        raise DataError(f"{path} holds no answer")
    return found


def _answer(line: str, where: str) -> Answer:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: not JSON ({error.msg} at column {error.colno})") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not usable JSON") from error
    try:
        prompt, answer = _pair(record)
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise DataError(f"{where}: {EXPECTED}") from error
    return Answer(prompt, answer, where)


def _pair(record: Any) -> tuple[str, str]:
    if "messages" in record:
        asked, said = record["messages"][-2:]
        if (asked["role"], said["role"]) != ("user", "assistant"):
            raise ValueError
        pair = asked["content"], said["content"]
    else:
        pair = record["prompt"], record["answer"]
    if not all(isinstance(text, str) and text for text in pair):
        raise ValueError
    return pair
