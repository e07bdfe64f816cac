"""Countdown: reach a target with every given number used once. The target comes from a random expression, so a solution
always exists."""

from __future__ import annotations

from fractions import Fraction
from typing import Annotated, Any

import torch
from annotated_types import Interval

from unified_rl.configurable import configurable
from unified_rl.envs.language.arithmetic import evaluate
from unified_rl.envs.language.base import LanguageTask
from unified_rl.envs.language.codec import Segment
from unified_rl.envs.language.judging import Truncated
from unified_rl.envs.language.tokenizer import choose_tokenizer
from unified_rl.envs.language.verdict import Verdict
from unified_rl.errors import ConfigError
from unified_rl.ranges import Count, HeldOut, Seed, Share, Texts, TwoOrMore, ranged

ALPHABET = "0123456789+-*/(),="
OPERATORS = "+-*/"


@configurable
@ranged("env")
class Countdown(LanguageTask):
    """A prompt ``3,5,8=37=`` asks for an expression of 3, 5 and 8, each used once, with the value 37: ``5*8-3``.

    Args:
        numbers: how many numbers, 2 to 6.
        max_number: largest number, at least 2.
        max_target: largest target; targets are not negative.
        operators: those that may be used, of ``+-*/`` (division is exact).
        partial_credit: reward of a well-formed expression of the right numbers with the wrong value.
        max_turn_tokens: budget of an answer; by default the longest expression and four to spare.
        tokenizer: a local folder; by default characters.
        held_out: share of prompts kept for evaluation.
        truncated: of cut answers, see :class:`~unified_rl.envs.language.base.LanguageTask`.
        stop: texts that end a turn too, of any length.
        shuffle_rewards: the negative control of :class:`~unified_rl.envs.language.base.LanguageTask`.
        seed: of that control.

    Raises:
        ConfigError: a size out of range, an unknown operator, or a partial credit outside [0, 1).
    """

    def __init__(
        self,
        numbers: Annotated[int, Interval(ge=2, le=6)] = 3,
        max_number: TwoOrMore = 9,
        max_target: Count = 99,
        operators: str = "+-*",
        partial_credit: Share = 0.0,
        max_turn_tokens: Count | None = None,
        tokenizer: str | None = None,
        held_out: HeldOut = 0.1,
        truncated: Truncated | None = None,
        stop: Texts | None = None,
        shuffle_rewards: bool = False,
        seed: Seed = 0,
    ) -> None:
        if not operators or set(operators) - set(OPERATORS):
            raise ConfigError(f"env.operators={operators!r} must be some of {OPERATORS}")
        self.numbers, self.max_number, self.max_target = numbers, max_number, max_target
        self.operators, self.partial_credit = operators, partial_credit
        digits = len(str(max_number))
        longest = numbers * digits + (numbers - 1) + 2 * (numbers - 1)
        super().__init__(
            choose_tokenizer(tokenizer, ALPHABET),
            max_prompt_length=numbers * (digits + 1) + len(str(max_target)) + 1,
            max_turn_tokens=longest + 1 + 4 if max_turn_tokens is None else max_turn_tokens,
            held_out=held_out,
            truncated=truncated,
            stop=stop,
            shuffle_rewards=shuffle_rewards,
            seed=seed,
        )

    def _candidates(self, count: int, generator: torch.Generator) -> list[dict[str, Any]]:
        shape = (2 * count, self.numbers)  # about half of all random expressions have a target in range
        numbers = torch.randint(1, self.max_number + 1, shape, generator=generator).tolist()
        choices = torch.randint(len(self.operators), (shape[0], shape[1] - 1), generator=generator).tolist()
        out = []
        for row, chosen in zip(numbers, choices, strict=True):
            target, expression = fold(row, [self.operators[c] for c in chosen])
            if target.denominator == 1 and 0 <= target <= self.max_target:
                given = sorted(row)
                text = f"{','.join(map(str, given))}={int(target)}="
                out.append({"text": text, "numbers": given, "target": int(target), "solution": expression})
        return out

    def _judge(self, problem: dict[str, Any], text: str, turn: int) -> Verdict:
        try:
            value, used = evaluate(text, operators=self.operators)
        except ValueError:
            return Verdict()
        if sorted(used) != problem["numbers"]:
            return Verdict()
        right = value == problem["target"]
        return Verdict(reward=1.0 if right else self.partial_credit, correct=right)

    def _demonstrate(self, problem: dict[str, Any], style: str | None) -> list[Segment]:
        return [Segment(problem["solution"], trained=True, end=True)]


def fold(numbers: list[int], operators: list[str]) -> tuple[Fraction, str]:
    """``((n0 o0 n1) o1 n2) ...``: its exact value, and its spelling with no needless parentheses."""
    value, text, loose = Fraction(numbers[0]), str(numbers[0]), False
    for number, operator in zip(numbers[1:], operators, strict=True):
        if operator in "*/" and loose:
            text = f"({text})"
        text += f"{operator}{number}"
        loose = operator in "+-"
        if operator in "+-":
            value += number if operator == "+" else -number
        else:
            value = value * number if operator == "*" else value / number
    return value, text
