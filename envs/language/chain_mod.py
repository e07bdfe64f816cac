"""Chain arithmetic modulo m: the smallest task on which reasoning aloud pays.

A prompt ``4-0+1+0=`` asks for the value modulo ``m``. The answer is the number after the last ``>``; before it a model
may write running totals (``4,5,5>5``), which makes each step easy. A model warm-started on both styles that mostly
answers directly has to discover from the reward alone that the long way is worth it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch

from unified_rl.configurable import configurable
from unified_rl.envs.language.base import LanguageTask, Verdict
from unified_rl.envs.language.codec import Segment
from unified_rl.envs.language.judging import Truncated
from unified_rl.envs.language.tokenizer import choose_tokenizer
from unified_rl.ranges import Count, HeldOut, Seed, Texts, TwoOrMore, UnitInterval, ranged

ALPHABET = "0123456789+-=,>"
_NUMBER = re.compile(r"[0-9]{1,9}")


@configurable
@ranged("env")
class ChainMod(LanguageTask):
    """Sums and differences modulo ``modulus``, numbers written with as many digits as ``modulus - 1`` has.

    Args:
        modulus: m, at least 2.
        terms: numbers in a prompt, at least 2.
        direct_share: share of direct answers (``>5``) in demonstrations of style ``mixture``.
        max_turn_tokens: budget of an answer; by default the running totals, the answer and four to spare.
        tokenizer: a local folder; by default characters.
        held_out: share of prompts kept for evaluation.
        truncated: of cut answers, see :class:`~unified_rl.envs.language.base.LanguageTask`.
        stop: texts that end a turn too, of any length.
        shuffle_rewards: the negative control of :class:`~unified_rl.envs.language.base.LanguageTask`.
        seed: of that control.

    Raises:
        ConfigError: ``modulus`` or ``terms`` below 2, or ``direct_share`` outside [0, 1].
    """

    styles = ("chain", "direct", "mixture")
    answer_mark = ">"

    def __init__(
        self,
        modulus: TwoOrMore = 10,
        terms: TwoOrMore = 5,
        direct_share: UnitInterval = 0.8,
        max_turn_tokens: Count | None = None,
        tokenizer: str | None = None,
        held_out: HeldOut = 0.1,
        truncated: Truncated | None = None,
        stop: Texts | None = None,
        shuffle_rewards: bool = False,
        seed: Seed = 0,
    ) -> None:
        self.modulus, self.terms, self.direct_share = modulus, terms, direct_share
        self.digits = len(str(modulus - 1))
        self._spelled = [str(number).zfill(self.digits) for number in range(modulus)]
        longest = terms * (self.digits + 1)  # of the prompt, and of totals, answer and end of text
        super().__init__(
            choose_tokenizer(tokenizer, ALPHABET),
            max_prompt_length=longest,
            max_turn_tokens=longest + 4 if max_turn_tokens is None else max_turn_tokens,
            held_out=held_out,
            truncated=truncated,
            stop=stop,
            shuffle_rewards=shuffle_rewards,
            seed=seed,
        )

    def _candidates(self, count: int, generator: torch.Generator) -> list[dict[str, Any]]:
        numbers = torch.randint(self.modulus, (count, self.terms), generator=generator)
        signs = torch.randint(2, (count, self.terms - 1), generator=generator) * 2 - 1
        signed = torch.cat([numbers[:, :1], numbers[:, 1:] * signs], 1)
        totals = signed.cumsum(1).remainder(self.modulus)
        return [
            {"text": self._prompt(row, sign), "totals": total[1:], "reference": self._spelled[total[-1]]}
            for row, sign, total in zip(numbers.tolist(), signs.tolist(), totals.tolist(), strict=True)
        ]

    def _prompt(self, numbers: Sequence[int], signs: Sequence[int]) -> str:
        spelled = self._spelled
        rest = [("+" if sign > 0 else "-") + spelled[n] for n, sign in zip(numbers[1:], signs, strict=True)]
        return spelled[numbers[0]] + "".join(rest) + "="

    def _judge(self, problem: dict[str, Any], text: str, turn: int) -> Verdict:
        _, arrow, answer = text.rpartition(">")
        right = bool(arrow) and bool(_NUMBER.fullmatch(answer)) and int(answer) == problem["totals"][-1]
        return Verdict(reward=float(right), correct=right)

    def vote(self, problem: dict[str, Any], turns: list[list[int]]) -> str | None:
        """The number behind the last arrow."""
        _, arrow, answer = self._turn_text(turns[-1]).rpartition(">")
        return str(int(answer)) if arrow and _NUMBER.fullmatch(answer) else None

    def marks(self, problem: dict[str, Any], turns: list[list[int]]) -> list[list[int]]:
        """A running total, and the number behind the arrow, with what follows it: 1 where it is right, else -1."""
        return [self._marked(problem["totals"], turn) for turn in turns]

    def _marked(self, totals: Sequence[int], turn: list[int]) -> list[int]:
        pieces = self.codec.decode_all([[token] for token in turn])
        text = "".join(pieces)
        arrow = text.rfind(">")
        marks, end = [0] * len(text), 0
        for number, found in enumerate(_NUMBER.finditer(text)):
            wanted = totals[-1] if 0 <= arrow < found.start() else totals[number] if number < len(totals) else None
            right = wanted is not None and int(found[0]) == wanted
            end = min(found.end() + 1, len(text))
            marks[found.start() : end] = [1 if right else -1] * (end - found.start())
        at = [sum(map(len, pieces[:place])) for place in range(len(pieces))]
        return [marks[start] if piece else 0 for start, piece in zip(at, pieces, strict=True)]

    def _styles_of(self, count: int, style: str | None, generator: torch.Generator) -> Sequence[str | None]:
        if style != "mixture":
            return super()._styles_of(count, style, generator)
        direct = torch.rand(count, generator=generator) < self.direct_share
        return ["direct" if one else "chain" for one in direct.tolist()]

    def _hint(self, problem: dict[str, Any], column: str) -> str:
        """The running total before the last step, all that this step needs; nothing where there is one step."""
        if column != "hint":
            return super()._hint(problem, column)
        return "".join(f"{self._spelled[total]}," for total in problem["totals"][-2:-1])

    def _demonstrate(self, problem: dict[str, Any], style: str | None) -> list[Segment]:
        totals = [self._spelled[total] for total in problem["totals"]]
        reasoning = ",".join(totals) if style == "chain" else ""
        return [Segment(f"{reasoning}>{totals[-1]}", trained=True, end=True)]
