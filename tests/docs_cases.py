"""Code blocks of a page: their language, the title after it, and their text."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import NamedTuple

FENCE = re.compile(r"^```(\w+)([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
HEADING = re.compile(r"^##+ (.+)$", re.MULTILINE)
TITLE = re.compile(r'title="([^"]+)"')


class Block(NamedTuple):
    language: str
    title: str | None
    text: str
    section: str


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page, each with the heading that it stands under."""
    text = page.read_text()
    found = []
    for match in FENCE.finditer(text):
        title = TITLE.search(match[2])
        headings = HEADING.findall(text[: match.start()])
        found.append(Block(match[1], title[1] if title else None, match[3], headings[-1] if headings else ""))
    return found


def commands(text: str, program: str = "unified-rl") -> list[list[str]]:
    """The calls of a program in a shell block, as argument lists; comments and line continuations are undone."""
    lines = text.replace("\\\n", " ").splitlines()
    parsed = [shlex.split(line, comments=True) for line in lines]
    return [words[1:] for words in parsed if words and words[0] == program]
