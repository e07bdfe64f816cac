"""Which part of a text is its answer: the last box, answer tag or ``####`` line, else what the text ends with."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Iterator
from typing import NamedTuple

from unified_rl.envs.language.numbers import (
    ANSWER,
    CURRENCIES,
    NOT_BEFORE,
    Number,
    find_numbers,
    plain_text,
    read_number,
)

MAX_BOXES = 64
"""Boxes at the end of a text that are looked at: each is read to the brace that closes it."""

MAX_NESTING = 4
"""Marks inside marks that are opened."""

_BOX = re.compile(r"\\f?box(?:ed)?(?![A-Za-z])\s*(\{?)")
_TAG_OPENS, _TAG_CLOSES = re.compile(r"<answer>", re.IGNORECASE), re.compile(r"</answer>", re.IGNORECASE)
_MARK = re.compile(r"####(?!#)[ \t]*([^\n]*)")
_PROSE = re.compile(rf"[\s*_`]*(?!{ANSWER}\b|{CURRENCIES})[A-Za-z]{{2,}}", re.IGNORECASE)
_THOUGHT = re.compile(r".*</think(?:ing)?>", re.DOTALL | re.IGNORECASE)
_JOINT = re.compile(r"[\s$]*(?:,?\s*(?:and|or)|,)[\s$]*")
_PHRASE = re.compile(r"\banswer\s*(?:is|was|equals|=|:)\s*:?[\s$*`(]*(?:\\\(\s*)?(?:[A-Za-z]\s*=\s*)?", re.IGNORECASE)
_FORMULA = re.compile(
    r"\$\$(.+?)\$\$|\\\[((?:(?!\\\[).)+?)\\\]|\\\(((?:(?!\\\().)+?)\\\)|(?<![\\$])\$([^$\n]+?)(?<!\\)\$(?![0-9])",
    re.DOTALL,
)


class Mark(NamedTuple):
    """An answer that its text marks as such: where the mark ends, and what it holds."""

    end: int
    content: str


def marked_answer(text: str) -> str | None:
    """What the last mark of ``text`` holds: a balanced box, an answer tag, or the rest of a ``####`` line.

    Boxes joined by nothing but commas, *and* or *or* are one answer of several parts. An empty box is a place to fill
    in, and a ``####`` line that begins with a word is a heading: neither is a mark. None without a mark.
    """
    thought = _THOUGHT.match(text)
    if thought is not None and (after := marked_answer(text[thought.end() :])) is not None:
        return after
    found = _last_mark(text)
    for _ in range(MAX_NESTING):  # a box in a tag on a marked line
        inner = None if found is None else _last_mark(found)
        if inner is None:
            break
        found = inner
    return found


def spoken_number(text: str) -> Number | None:
    """The number that an unmarked text gives as its answer: after *answer is*, else its last one; None without one.

    Behind a closed ``<think>`` block only what follows counts, where that holds a number.
    """
    thought = _THOUGHT.match(text)
    if thought is not None and (after := spoken_number(text[thought.end() :])) is not None:
        return after
    plain = plain_text(text)
    numbers = list(find_numbers(plain))
    starts = [number.start for number in numbers]
    for phrase in reversed(list(_PHRASE.finditer(plain))):
        place = bisect_left(starts, phrase.start())
        said = numbers[place] if place < len(numbers) else None
        if said is not None and said.start <= phrase.end() <= said.end and said.value is not None:
            return said
    return numbers[-1] if numbers else None


def spoken_formula(text: str) -> str | None:
    """The last formula of an unmarked text where no digit follows it: between dollars, ``\\(\\)`` or ``\\[\\]``.

    Empty where the text says that it is not this one.
    """
    found = list(_FORMULA.finditer(text))
    if not found or re.search(r"[0-9]", text[found[-1].end() :]):
        return None
    if NOT_BEFORE.search(text[max(0, found[-1].start() - 60) : found[-1].start()]):
        return ""
    return next(group for group in found[-1].groups() if group is not None)


def marked_number(text: str) -> Number | None:
    """The one number of the marked answer; None without a mark, or where it is not one number."""
    content = marked_answer(text)
    return None if content is None else read_number(content)


def _last_mark(text: str) -> str | None:
    lines = [Mark(m.end(), m[1]) for m in _MARK.finditer(text) if not _PROSE.match(m[1])]
    marks = [*_boxes(text), *_last_tag(text), *lines[-1:]]
    return max(marks).content.strip() if marks else None


def _last_tag(text: str) -> list[Mark]:
    closes = list(_TAG_CLOSES.finditer(text))
    opens = list(_TAG_OPENS.finditer(text, 0, closes[-1].start())) if closes else []
    return [Mark(closes[-1].end(), text[opens[-1].end() : closes[-1].start()])] if opens else []


def _boxes(text: str) -> Iterator[Mark]:
    """The last balanced boxes that hold something; joined ones as one."""
    before: Mark | None = None
    for match in list(_BOX.finditer(text))[-MAX_BOXES:]:
        mark = _braced(text, match.end()) if match[1] else _bare(text, match.end())
        if mark is None or not mark.content.strip():
            continue
        if before is not None and match.start() >= before.end and _JOINT.fullmatch(text[before.end : match.start()]):
            mark = Mark(mark.end, f"{before.content}, {mark.content}")
        before = mark
        yield mark


def _braced(text: str, start: int) -> Mark | None:
    """What stands between an opening brace before ``start`` and the brace that closes it."""
    depth = 1
    for match in re.compile(r"\\.|[{}]", re.DOTALL).finditer(text, start):
        depth += {"{": 1, "}": -1}.get(match[0], 0)
        if depth == 0:
            return Mark(match.end(), text[start : match.start()])
    return None


def _bare(text: str, start: int) -> Mark | None:
    """What follows a box without braces, up to a blank or a dollar sign."""
    match = re.compile(r"[^\s$]+").match(text, start)
    return None if match is None else Mark(match.end(), match[0])
