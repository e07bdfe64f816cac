"""Samples as text for terminals and tables. What a model says is data: it moves no cursor and marks up no page."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from typing import Any

from unified_rl.training.growing import Row

HIDDEN = ("Cc", "Cf", "Cs", "Co", "Cn")
"""Categories of characters that are shown as escapes: they move a terminal's cursor, or turn a line around."""

_MARKS = {ord(character): f"&#{ord(character)};" for character in "&<>\\|`*_[]~#"}
"""Characters that mean something in Markdown or HTML, as references."""
COLUMNS = ("prompt", "answer", "reference", "reward", "rewards", "advantage", "truncated", "policy_version")


def plain_text(value: Any) -> Any:
    """A text whose control characters are written out (``\\x1b``), line ends and tabs not; other values as they are."""
    if not isinstance(value, str):
        return value
    return "".join(c if c in "\n\t" or unicodedata.category(c) not in HIDDEN else _escaped(c) for c in value)


def _escaped(character: str) -> str:
    return character.encode("unicode_escape", "surrogatepass").decode("ascii")


def markdown(rows: Sequence[Row]) -> str:
    """A Markdown table of samples."""
    lines = [" | ".join(COLUMNS), " | ".join("---" for _ in COLUMNS)]
    lines += [" | ".join(_cell(row.get(key)) for key in COLUMNS) for row in rows]
    return "\n".join(f"| {line} |" for line in lines)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, dict):
        return ", ".join(f"{_cell(str(key))} {_cell(item) or 'none'}" for key, item in value.items())
    if isinstance(value, float):
        return f"{value:.4g}"
    text = str(plain_text(str(value))).translate(_MARKS)
    return text.replace("\n", "<br>")
