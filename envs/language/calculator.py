"""A calculator tool: the model calls it as often as it needs, then answers. The tool's text is not the model's own."""

from __future__ import annotations

import operator
import re
from typing import Any

import torch

from unified_rl.configurable import configurable
from unified_rl.envs.language.arithmetic import evaluate
from unified_rl.envs.language.base import LanguageTask
from unified_rl.envs.language.codec import Segment
from unified_rl.envs.language.judging import Truncated
from unified_rl.envs.language.tokenizer import choose_tokenizer
from unified_rl.envs.language.verdict import Verdict
from unified_rl.errors import ConfigError
from unified_rl.ranges import Count, HeldOut, Seed, Texts, TwoOrMore, Whole, ranged

ALPHABET = "0123456789+-*QCRA:;?"
OPERATORS = "+-*"
_APPLY = {"+": operator.add, "-": operator.sub, "*": operator.mul}
_INTEGER = re.compile(r"-?[0-9]{1,12}")


@configurable
@ranged("env")
class Calculator(LanguageTask):
    """Prompt ``Q:37+8-5;``, turns ``C:37+8;`` (answered by ``R:45;``) and finally ``A:40;``, which ends it.

    A call holds one operator and two whole numbers; any other turn is answered by ``R:?;``. The reward is 1 for
    the right answer and 0 otherwise, on the turn that answers.

    Args:
        terms: numbers in a problem, at least 2; ``terms - 1`` calls solve it.
        max_number: largest number of a problem.
        operators: those of problems, of ``+-*``, with the usual precedence.
        spare_turns: turns beyond those that a solution needs.
        tokenizer: a local folder; by default characters.
        held_out: share of prompts kept for evaluation.
        truncated: of cut answers, see :class:`~unified_rl.envs.language.base.LanguageTask`.
        stop: texts that end a turn too, of any length.
        shuffle_rewards: the negative control of :class:`~unified_rl.envs.language.base.LanguageTask`.
        seed: of that control.

    Raises:
        ConfigError: sizes out of range or an unknown operator.
    """

    def __init__(
        self,
        terms: TwoOrMore = 3,
        max_number: Count = 99,
        operators: str = "+-",
        spare_turns: Whole = 1,
        tokenizer: str | None = None,
        held_out: HeldOut = 0.1,
        truncated: Truncated | None = None,
        stop: Texts | None = None,
        shuffle_rewards: bool = False,
        seed: Seed = 0,
    ) -> None:
        if not operators or set(operators) - set(OPERATORS):
            raise ConfigError(f"env.operators={operators!r} must be some of {OPERATORS}")
        largest = max_number**terms if "*" in operators else max_number * terms
        self.digits = len(str(largest))
        if self.digits > 12:
            raise ConfigError(
                f"values of up to {self.digits} digits are possible; lower env.max_number or env.terms to 12"
            )
        self.terms, self.max_number, self.operators = terms, max_number, operators
        super().__init__(
            choose_tokenizer(tokenizer, ALPHABET),
            max_prompt_length=2 + terms * (len(str(max_number)) + 1),
            max_turn_tokens=2 * (self.digits + 1) + 4,
            max_turns=terms + spare_turns,
            max_reply_length=2 + 1 + 2 * self.digits + 1,
            stop_text=";",
            held_out=held_out,
            truncated=truncated,
            stop=stop,
            shuffle_rewards=shuffle_rewards,
            seed=seed,
        )

    def _candidates(self, count: int, generator: torch.Generator) -> list[dict[str, Any]]:
        numbers = torch.randint(self.max_number + 1, (count, self.terms), generator=generator).tolist()
        choices = torch.randint(len(self.operators), (count, self.terms - 1), generator=generator).tolist()
        out = []
        for row, chosen in zip(numbers, choices, strict=True):
            rest = [self.operators[c] + str(number) for c, number in zip(chosen, row[1:], strict=True)]
            expression = str(row[0]) + "".join(rest)
            out.append({"text": f"Q:{expression};", "expression": expression, "value": reductions(expression)[-1][1]})
        return out

    def _judge(self, problem: dict[str, Any], text: str, turn: int) -> Verdict:
        if text.startswith("A:"):
            answer = text[2:].strip()
            right = bool(_INTEGER.fullmatch(answer)) and int(answer) == problem["value"]
            return Verdict(reward=float(right), correct=right)
        return Verdict(done=False, reply=f"R:{self._call(text)};")

    def _call(self, text: str) -> str:
        """The tool's result, or ``?``."""
        if not text.startswith("C:"):
            return "?"
        try:
            value, numbers = evaluate(text[2:], operators=OPERATORS, negative=True)
        except ValueError:
            return "?"
        fits = len(numbers) == 2 and max(map(abs, numbers)) < 10**self.digits
        return str(int(value)) if fits else "?"

    def _demonstrate(self, problem: dict[str, Any], style: str | None) -> list[Segment]:
        out = []
        for call, result in reductions(problem["expression"]):
            out += [Segment(f"C:{call};", trained=True), Segment(f"R:{result};")]
        return [*out, Segment(f"A:{problem['value']};", trained=True)]


def reductions(expression: str) -> list[tuple[str, int]]:
    """The binary calls that compute ``expression``, each with its result: products first, then from the left."""
    parts: list[Any] = [int(p) if p.isdigit() else p for p in re.findall(r"[0-9]+|[-+*]", expression)]
    out = []
    while len(parts) > 1:
        at = parts.index("*") if "*" in parts else 1
        call = "".join(map(str, parts[at - 1 : at + 2]))
        value = _APPLY[parts[at]](parts[at - 1], parts[at + 1])
        out.append((call, value))
        parts[at - 1 : at + 2] = [value]
    return out
