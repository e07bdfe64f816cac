"""Verifiers of word problems: is the answer in a text equal to the reference?

All three pick the answer from the whole text and read numbers with one reader; they differ in what they accept where
nothing is marked as the answer: ``numeric`` nothing, ``last`` the last number, ``math`` free form.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable

from unified_rl.envs.language.answers import marked_answer, marked_number, spoken_formula, spoken_number
from unified_rl.envs.language.numbers import (
    NEGATIONS,
    ORDINALS,
    SCALES,
    Number,
    name_unit,
    parse_number,
    plain_text,
    read_number,
    same_number,
)
from unified_rl.envs.language.scoring import GuardedScorer, Score

MAX_TAIL = 1000
"""Characters that math-verify gets to see; its patterns are quadratic in the worst case."""

_CALCULATION = re.compile(r"<<[^<>\n]*>>")
_ARITHMETIC = re.compile(r"[0-9)]\s*[-+*/^×÷]{1,2}\s*[0-9(]|\\")
_TRAILING_UNIT = re.compile(r"(?<=\S)\s*\\(?:text|textrm|mbox|mathrm) ?\{([^{}]*)\}\s*(\^ ?\{?[0-9]\}?)?[\s.$]*$")

_TURNED = re.compile(
    rf"\\(?:neg|lnot)\b|\b(?:{NEGATIONS}|at least|at most|or (?:more|less|fewer|greater|higher|lower|so))\b",
    re.IGNORECASE,
)
_ORDINAL = re.compile(rf"\b[0-9]+{ORDINALS}\b", re.IGNORECASE)
_SCALED = re.compile(rf"\b(?:{'|'.join(SCALES)}|dozen)s?\b")
_PRIME = re.compile(r"(?<![0-9])(?:'|\\prime)")
_BASE = re.compile(r"(?<=[0-9])\}?_ ?\{?([0-9]+)")

_DATE = re.compile(
    r"(?<![\w.,/-])(?:([0-9]{4})([-/])(0?[1-9]|1[0-2])\2(0?[1-9]|[12][0-9]|3[01])"
    r"|(0?[1-9]|[12][0-9]|3[01])/(0?[1-9]|[12][0-9]|3[01])/([0-9]{4}))(?![\w/-]|[.,][0-9])"
)
"""``2024-01-02``, ``2024/1/2`` or ``1/2/2024``: neither a difference nor a quotient."""

Verifier = Callable[[str, str], Score]
"""``(reference, text) -> Score``."""


def strip_calculations(text: str) -> str:
    """``text`` without GSM8K's ``<<48/2=24>>`` marks."""
    return _CALCULATION.sub("", text)


def numeric(reference: str, text: str) -> Score:
    """1 where the marked answer of ``text`` (``#### 72``, a box, an answer tag) is the reference number."""
    return _compare(reference, marked_number(text))


def last(reference: str, text: str) -> Score:
    """As :func:`numeric`; without a mark, the number after *answer is*, else the last one. Lenient."""
    if marked_answer(text) is not None:
        return numeric(reference, text)
    return _compare(reference, spoken_number(text))


def _compare(reference: str, answer: Number | None) -> Score:
    wanted = read_number(reference)
    return Score(float(wanted is not None and answer is not None and same_number(wanted, answer)), False)


class MathVerifier:
    """Free-form mathematics: numbers are compared here, everything else by math-verify in a process of its own.

    math-verify's own time limits use signals and so fail outside the main thread, and cannot interrupt one long
    computation (``9**9**9**9``). What it hands to SymPy's evaluating parser is digits, operators and parentheses only;
    names reach nothing but a LaTeX grammar. The worker adds time and memory limits, and leaves out what it would throw
    away: two different units are not equal.

    Args:
        limit: CPU seconds of one comparison.
        budget: CPU seconds of the slow comparisons of one batch, see
            :class:`~unified_rl.envs.language.scoring.GuardedScorer`.
    """

    def __init__(self, limit: float = 5.0, budget: float = math.inf) -> None:
        self.scorer = GuardedScorer({"kind": "math_load"}, limit, budget=budget)

    def __call__(self, reference: str, text: str) -> Score:
        """1 where the answer of ``text`` equals ``reference``; ``failed`` where the comparison was given up."""
        said = marked_answer(text)
        if said is None:
            return self._unmarked(reference, text)
        return self._equal(reference, said)

    def renew(self) -> None:
        """Begins a batch: its budget is whole again."""
        self.scorer.renew()

    def close(self) -> None:
        """Ends the worker process."""
        self.scorer.close()

    def _unmarked(self, reference: str, text: str) -> Score:
        if not text.strip():
            return Score(0.0, False)
        formula = spoken_formula(text)
        if formula is not None:
            return self._equal(reference, formula)
        wanted, dates = _date(_bare(reference)), list(_DATE.finditer(text))
        if wanted is not None:
            return Score(float(bool(dates) and _date(dates[-1][0]) == wanted), False)
        if dates and not re.search(r"\w", text[dates[-1].end() :]):
            return Score(0.0, False)
        if read_number(reference) is None:
            return self.scorer.score(kind="math", reference=reference, text=end_of(text))
        said = spoken_number(text)
        if said is not None and (said.value is not None or not _ARITHMETIC.search(end_of(text))):
            return _compare(reference, said)
        return self.scorer.score(kind="math", reference=reference, text=_ORDINAL.sub("", end_of(text)))

    def _equal(self, reference: str, answer: str) -> Score:
        """Compares two contents of a box."""
        one, other = _bare(reference), _bare(answer)
        if not one or not other:
            return Score(0.0, False)
        if one == other:
            return Score(1.0, False)
        if _false_equation(other):
            return Score(0.0, False)
        if _date(one) is not None or _date(other) is not None:
            return Score(float(_date(one) == _date(other)), False)
        a, b = read_number(one), read_number(other)
        if a is not None and b is not None:
            return Score(float(same_number(a, b)), False)
        if (
            _units_differ(one, other)
            or _meanings_differ(one, other)
            or (one.isalpha() and other.isalpha() and one.isupper() and len(one) > 1)
        ):
            return Score(0.0, False)
        if len(other) > MAX_TAIL:
            return Score(0.0, False)
        return self.scorer.score(kind="math", reference=one, text=f"${other}$")


def end_of(text: str, size: int = MAX_TAIL) -> str:
    """The end of ``text``, cut between words."""
    if len(text) <= size:
        return text
    tail = text[-size - 1 :]
    _, gap, rest = tail.partition(tail[m.start()] if (m := re.search(r"\s", tail)) else "\0")
    return rest if gap else ""


def _bare(text: str) -> str:
    text = re.sub(r"\s+", " ", plain_text(text)).strip().rstrip(".").strip()
    return text[1:-1].strip() if re.fullmatch(r"\$[^$]*\$", text) else text


def _units_differ(one: str, other: str) -> bool:
    """Whether both end in units, and in different ones, or one of them in a number word."""
    units = [name_unit(m[1] + (m[2] or "")) if (m := _TRAILING_UNIT.search(text)) else "" for text in (one, other)]
    scaled = any(map(_SCALED.search, units))
    return units[0] != units[1] and (all(units) or scaled)


def _false_equation(text: str) -> bool:
    """Whether two sides of an equation are numbers, and different ones."""
    sides = re.split(r"(?<![<>!:=])=(?!=)", text)
    numbers = [read_number(side) for side in sides if parse_number(side) is not None]
    return any(a and b and not same_number(a, b) for a, b in itertools.pairwise(numbers))


def _date(text: str) -> tuple[int, ...] | None:
    """The parts of a date in the order in which it gives them; None where ``text`` is no date."""
    match = _DATE.fullmatch(text)
    return None if match is None else tuple(int(part) for part in match.groups() if part and part.isdigit())


def _meanings_differ(one: str, other: str) -> bool:
    """Whether a negation, *or more*, a derivative's prime or a number's base is in one and not in the other.

    A base that the answer leaves out is not held against it, as a unit is not.
    """
    for pattern in (_TURNED, _PRIME):
        if len(pattern.findall(one)) != len(pattern.findall(other)):
            return True
    bases, theirs = ([base for base in _BASE.findall(text) if base != "10"] for text in (one, other))
    return bool(theirs) and theirs != bases


__all__ = ["MathVerifier", "Verifier", "last", "marked_number", "numeric", "parse_number", "strip_calculations"]
