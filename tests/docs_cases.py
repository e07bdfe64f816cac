"""Code blocks of a page: their language, the title after it, and their text."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import NamedTuple

INDENTED = re.compile(r"(?:^|\n)\n((?: {4}[^\n]*(?:\n|$))+)")
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


def page_commands(page: Path, program: str = "unified-rl") -> list[list[str]]:
    """The calls of a program in every fenced shell block and every indented block of a page, in their order."""
    text = page.read_text()
    fenced = [(match.start(), match[3]) for match in FENCE.finditer(text) if match[1] in ("bash", "sh", "console")]
    bare = FENCE.sub(lambda match: "x" * len(match[0]), text)
    indented = [(match.start(), match[1]) for match in INDENTED.finditer(bare)]
    found = [block for _, block in sorted(fenced + indented)]
    lines = [re.sub(r"^ {4}", "", block, flags=re.MULTILINE) for block in found]
    return [command for block in lines for command in _calls(block, program)]


def _calls(block: str, program: str) -> list[list[str]]:
    """As :func:`commands`, of a block that need not be of a shell; what stands in square brackets may be left out."""
    kept = [line for line in block.replace("\\\n", " ").splitlines() if line.startswith(f"{program} ")]
    return [call for line in kept for call in commands(re.sub(r" \[[^\]=]*=[^\]]*\]$", "", line), program)]
