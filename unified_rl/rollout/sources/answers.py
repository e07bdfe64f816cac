"""Answers of experts from a file, with their log-probs and rewards where it has them. Errors name file and line."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any, NamedTuple

from unified_rl.errors import DataError
from unified_rl.prompts import field, find_completion, find_prompt, first_of
from unified_rl.records import Record, Records, open_records

SAID = ("completion", "answer", "solution")
"""Columns that hold what was said."""
LOG_PROBS = ("log_probs", "logprobs", "completion_log_probs")
"""Columns that hold the log-prob of each of its tokens."""
IDS = ("completion_ids", "token_ids")
"""Columns that hold its tokens."""
EXPECTED = (
    "expected a prompt ('prompt', 'question' or 'messages') and what was said ('completion', 'answer' or the last "
    "message, an assistant's)"
)


class Answer(NamedTuple):
    """One record.

    Attributes:
        prompt: what was asked, as it is known in every file.
        answer: what was said.
        where: its place.
        verbatim: nothing may be put before it.
        log_probs: of its tokens, None where the file does not tell.
        ids: its tokens, likewise.
        reward: likewise.
    """

    prompt: str
    answer: str
    where: str
    verbatim: bool = False
    log_probs: tuple[float, ...] | None = None
    ids: tuple[int, ...] | None = None
    reward: float | None = None


class Answers:
    """The answers of a file, read again when they are wanted.

    Args:
        path: of JSON lines, CSV, Parquet, or a folder that ``datasets`` wrote.
        reward_key: the column of the reward; None leaves judging to the environment.

    Raises:
        DataError: a file that cannot be read.
    """

    def __init__(self, path: str | Path, reward_key: str | None = None) -> None:
        self.records: Records = open_records(path)
        self.reward_key = reward_key

    def __iter__(self) -> Iterator[Answer]:
        for where, record in self.records:
            yield self._answer(record, where)

    def read(self, numbers: Sequence[int]) -> list[Answer]:
        """Some of them, in the order of ``numbers``."""
        return [self._answer(record, where) for where, record in self.records.read(numbers)]

    def _answer(self, record: Record, where: str) -> Answer:
        try:
            prompt = find_prompt(record, None, where)
            said, verbatim = _said(record, prompt.said, where)
        except DataError as error:
            raise DataError(f"{str(error).partition(' (env.')[0]}; {EXPECTED}") from error
        return Answer(
            prompt.asked,
            said,
            where,
            verbatim,
            _numbers(record, LOG_PROBS, where),
            _token_ids(record, where),
            None if self.reward_key is None else _reward(record, self.reward_key, where),
        )


def read_answers(path: str | Path) -> list[Answer]:
    """The answers of a file; blank lines are passed over.

    Raises:
        DataError: a missing or empty file, or a line that is no answer.
    """
    return list(Answers(path))


def _said(record: Record, by_assistant: Sequence[dict[str, Any]], where: str) -> tuple[str, bool]:
    """What was said, and whether it stands there word for word."""
    column = first_of(record, SAID)
    if column == "completion" or (column is None and by_assistant):
        found = find_completion(record, None, where) if column else list(by_assistant)
        return (str(found[-1]["content"]) if isinstance(found, list) else str(found)), True
    text = field(record, column or SAID[0], where)
    if not text:
        raise DataError(f"{where}: field {column!r} is empty")
    return text, False


def _numbers(record: Record, names: Sequence[str], where: str) -> tuple[float, ...] | None:
    column = first_of(record, names)
    if column is None:
        return None
    value = record[column]
    if not isinstance(value, list) or not all(isinstance(one, Decimal) for one in value):
        raise DataError(f"{where}: field {column!r} is no list of numbers, one for each token")
    numbers = tuple(float(one) for one in value)
    bad = next((n for n in numbers if not math.isfinite(n) or n > 0), None)
    if bad is not None:
        raise DataError(f"{where}: field {column!r} holds {bad:g}, and a log-prob is a number of at most 0")
    return numbers


def _token_ids(record: Record, where: str) -> tuple[int, ...] | None:
    column = first_of(record, IDS)
    if column is None:
        return None
    value = record[column]
    if not isinstance(value, list) or not value or not all(_is_id(one) for one in value):
        raise DataError(f"{where}: field {column!r} is no list of token ids")
    return tuple(int(one) for one in value)


def _is_id(value: Any) -> bool:
    return (
        isinstance(value, Decimal) and value.is_finite() and 0 <= value < 2**31 and value == value.to_integral_value()
    )


def _reward(record: Record, key: str, where: str) -> float:
    try:
        reward = float(field(record, key, where))
    except ValueError as error:
        raise DataError(
            f"{where}: field {key!r} is no reward: expected a number, got {record.get(key)!r:.40}"
        ) from error
    if not math.isfinite(reward):
        raise DataError(f"{where}: field {key!r} is no reward: expected a number, got {reward}")
    return reward
