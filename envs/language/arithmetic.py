"""A small parser for arithmetic that a model wrote: exact, bounded, and blind to everything that is not arithmetic."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import NamedTuple

MAX_CHARACTERS = 256
MAX_DEPTH = 16
MAX_DIGITS = 12

_TOKEN = re.compile(r"[ ]*(?:([0-9]+)|([-+*/()]))")


class Evaluated(NamedTuple):
    """The exact value of an expression, and the numbers that it used, in order of appearance."""

    value: Fraction
    numbers: list[int]


def evaluate(text: str, *, operators: str = "+-*/", negative: bool = False) -> Evaluated:
    """Evaluates ``text`` with the usual precedence; nothing is ever run as code.

    Args:
        text: ASCII digits, operators, parentheses and blanks, at most 256 characters.
        operators: those allowed, of ``+-*/``.
        negative: a minus sign may stand before a number, at the start or after ``(`` or an operator.

    Raises:
        ValueError: anything else; also a division by zero, a number of more than 12 digits, or deep nesting.
    """
    if len(text) > MAX_CHARACTERS:
        raise ValueError(f"expression longer than {MAX_CHARACTERS} characters")
    return _Parser(_tokens(text), operators, negative).run()


def _tokens(text: str) -> list[str]:
    text = text.rstrip(" ")
    out, position = [], 0
    while position < len(text):
        match = _TOKEN.match(text, position)
        if match is None:
            raise ValueError(f"unexpected {text[position]!r}")
        out.append(match[1] or match[2])
        position = match.end()
    return out


class _Parser:
    """Recursive descent: sum := product (+- product)*; product := atom (*/ atom)*; atom := number | ( sum )."""

    def __init__(self, tokens: list[str], operators: str, negative: bool) -> None:
        self.tokens, self.operators, self.negative = tokens, operators, negative
        self.position = 0
        self.numbers: list[int] = []

    def run(self) -> Evaluated:
        value = self._sum(0)
        if self.position < len(self.tokens):
            raise ValueError(f"unexpected {self.tokens[self.position]!r}")
        return Evaluated(value, self.numbers)

    def _next(self) -> str:
        if self.position >= len(self.tokens):
            raise ValueError("unexpected end")
        self.position += 1
        return self.tokens[self.position - 1]

    def _operator(self, wanted: str) -> str | None:
        """Takes the next token where it is one of the operators ``wanted``."""
        if self.position >= len(self.tokens) or self.tokens[self.position] not in wanted:
            return None
        operator = self._next()
        if operator not in self.operators:
            raise ValueError(f"operator {operator!r} is not allowed")
        return operator

    def _sum(self, depth: int) -> Fraction:
        value = self._product(depth)
        while operator := self._operator("+-"):
            right = self._product(depth)
            value = value + right if operator == "+" else value - right
        return value

    def _product(self, depth: int) -> Fraction:
        value = self._atom(depth)
        while operator := self._operator("*/"):
            right = self._atom(depth)
            if operator == "/" and right == 0:
                raise ValueError("division by zero")
            value = value * right if operator == "*" else value / right
        return value

    def _atom(self, depth: int) -> Fraction:
        if depth > MAX_DEPTH:
            raise ValueError("too deeply nested")
        token = self._next()
        if token == "(":
            value = self._sum(depth + 1)
            if self._next() != ")":
                raise ValueError("unbalanced parenthesis")
            return value
        sign = 1
        if token == "-" and self.negative:
            sign, token = -1, self._next()
        if not token.isdigit() or len(token) > MAX_DIGITS:
            raise ValueError(f"expected a number, got {token!r}")
        self.numbers.append(sign * int(token))
        return Fraction(self.numbers[-1])
