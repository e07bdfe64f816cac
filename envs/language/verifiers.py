"""Verifiers of word problems: is the answer in a text equal to the reference?"""

from __future__ import annotations

import re
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction

from unified_rl.envs.language.scoring import GuardedScorer, Score

MAX_TAIL = 1000
"""Characters at the end of an answer that math-verify gets to see; its patterns are quadratic in the worst case."""

_NUMBER = r"-?\$?(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]{1,30})(?:\.[0-9]{1,30})?|-?\$?\.[0-9]{1,30}"
_WHOLE = re.compile(rf"\s*({_NUMBER})\s*[%.]?\s*")
_ANYWHERE = re.compile(rf"(?<![0-9.])(?:{_NUMBER})(?![0-9])")
_CALCULATION = re.compile(r"<<[^<>\n]*>>")

Verifier = Callable[[str, str], Score]
"""``(reference, text) -> Score``."""


def strip_calculations(text: str) -> str:
    """``text`` without GSM8K's ``<<48/2=24>>`` marks."""
    return _CALCULATION.sub("", text)


def parse_number(text: str) -> Fraction | None:
    """The exact value of ``text`` where it is one number (``1,234.50``, ``$7``, ``12%``), else None."""
    match = _WHOLE.fullmatch(text)
    return Fraction(Decimal(match[1].replace(",", "").replace("$", ""))) if match else None


def marked_number(text: str) -> Fraction | None:
    """The number after the last ``####``, to the end of that line; None without one."""
    _, mark, rest = text.rpartition("####")
    return parse_number(rest.strip().split("\n", 1)[0]) if mark else None


def last_number(text: str) -> Fraction | None:
    """The last number anywhere in ``text``; None without one."""
    found = _ANYWHERE.findall(text)
    return parse_number(found[-1]) if found else None


def numeric(reference: str, text: str) -> Score:
    """1 where the number after the last ``####`` of ``text`` equals the reference number."""
    return Score(float(marked_number(text) == parse_number(reference)), False)


def last(reference: str, text: str) -> Score:
    """1 where the last number of ``text`` equals the reference number. Lenient: any closing number counts."""
    return Score(float(last_number(text) == parse_number(reference)), False)


class MathVerifier:
    """Free-form mathematics by math-verify, whose parser is kept in a process of its own.

    math-verify's own time limits use signals and so fail outside the main thread, and cannot interrupt one long
    computation (``9**9**9**9``). What it hands to SymPy's evaluating parser is digits, operators and parentheses only;
    names reach nothing but a LaTeX grammar. The worker adds time and memory limits.

    Args:
        limit: CPU seconds of one comparison.
    """

    def __init__(self, limit: float = 5.0) -> None:
        self.scorer = GuardedScorer({"kind": "math", "reference": "1", "text": "$1$"}, limit)

    def __call__(self, reference: str, text: str) -> Score:
        """1 where math-verify finds ``text`` equal to ``reference``; ``failed`` where it gave up."""
        if not text.strip():
            return Score(0.0, False)
        return self.scorer.score(kind="math", reference=reference, text=text[-MAX_TAIL:])

    def close(self) -> None:
        """Ends the worker process."""
        self.scorer.close()
