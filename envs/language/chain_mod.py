"""Chain arithmetic modulo m: the smallest task on which reasoning aloud pays.

A prompt ``4-0+1+0=`` asks for the value modulo ``m``. The answer is the number after the last ``>``; before it a model
may write running totals (``4,5,5>5``), which makes each step easy. A model warm-started on both styles that mostly
answers directly has to discover from the reward alone that the long way is worth it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import torch

from unified_rl.configurable import configurable
from unified_rl.envs.language.base import LanguageTask
from unified_rl.envs.language.codec import Segment
from unified_rl.envs.language.judging import Truncated
from unified_rl.envs.language.tokenizer import choose_tokenizer
from unified_rl.envs.language.verdict import Verdict
from unified_rl.errors import ConfigError
from unified_rl.ranges import Count, HeldOut, Seed, Texts, TwoOrMore, UnitInterval, ranged

ALPHABET = "0123456789+-=,>"
_NUMBER = re.compile(r"[0-9]{1,9}")
_SURE = re.compile(r"@(0\.[0-9]{2}|1\.00)$")
CONFIDENCES = tuple(f"{percent / 100:.2f}" for percent in range(101))
"""What may be stated, from 0.00 to 1.00."""


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
        confidence: an answer may end with how sure it is (``>5@0.75``); demonstrations end with ``@1.00``. It decides
            nothing: ``stated`` is 1 where there is one, and there ``confidence``, ``overconfidence`` (less 1 where the
            answer is right) and ``brier`` (its square) are numbers; they are NaN elsewhere.

    Raises:
        ConfigError: ``modulus`` or ``terms`` below 2, ``direct_share`` outside [0, 1], or a tokenizer that has not as
            many tokens for every confidence.
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
        confidence: bool = False,
    ) -> None:
        self.modulus, self.terms, self.direct_share = modulus, terms, direct_share
        self.states_confidence = confidence
        self.digits = len(str(modulus - 1))
        self._spelled = [str(number).zfill(self.digits) for number in range(modulus)]
        longest = terms * (self.digits + 1)  # of the prompt, and of totals, answer and end of text
        super().__init__(
            choose_tokenizer(tokenizer, ALPHABET + "@." if confidence else ALPHABET),
            max_prompt_length=longest,
            max_turn_tokens=longest + (9 if confidence else 4) if max_turn_tokens is None else max_turn_tokens,
            held_out=held_out,
            truncated=truncated,
            stop=stop,
            shuffle_rewards=shuffle_rewards,
            seed=seed,
        )
        if confidence:
            self.info_names = ("stated", "confidence", "overconfidence", "brier")
            self._sure = dict(zip(CONFIDENCES, self.codec.encode([f"@{text}" for text in CONFIDENCES]), strict=True))
            self._check_sure(tokenizer)

    def _check_sure(self, tokenizer: str | None) -> None:
        texts = self.codec.decode_all(list(self._sure.values()))
        if len({len(ids) for ids in self._sure.values()}) > 1 or texts != [f"@{text}" for text in CONFIDENCES]:
            raise ConfigError(
                f"env.confidence=true needs as many tokens for every confidence from 0.00 to 1.00, and the tokenizer "
                f"of {tokenizer} has not: set env.tokenizer=null, or one that splits numbers into digits"
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
        bare, sure = self._parted(text)
        _, arrow, answer = bare.rpartition(">")
        right = bool(arrow) and bool(_NUMBER.fullmatch(answer)) and int(answer) == problem["totals"][-1]
        return Verdict(reward=float(right), correct=right, info=self._calibration(sure, right))

    def _verdict(self, problem: dict[str, Any], said: list[list[int]], complete: bool, row: int) -> Verdict:
        verdict = super()._verdict(problem, said, complete, row)  # a cut answer may be judged by nobody
        return verdict._replace(info=self._calibration(math.nan, False)) if verdict.info is None else verdict

    def _parted(self, text: str) -> tuple[str, float]:
        """An answer without its confidence, and that; NaN where it states none."""
        found = _SURE.search(text) if self.states_confidence else None
        return (text, math.nan) if found is None else (text[: found.start()], float(found[1]))

    def _calibration(self, sure: float, right: bool) -> dict[str, float] | None:
        if not self.states_confidence:
            return None
        over = sure - right
        return {"stated": float(over == over), "confidence": sure, "overconfidence": over, "brier": over * over}

    def restate(self, turn: Sequence[int], confidence: float) -> list[int] | None:
        """As of :class:`~unified_rl.protocols.StatesConfidence`, in hundredths."""
        found = _SURE.search(self._turn_text(turn)) if self.states_confidence else None
        if found is None:
            return None
        old, new = self._sure[found[1]], self._sure[f"{confidence:.2f}"]
        end = len(turn) - (turn[-1] in self.codec.end_ids)
        if list(turn[end - len(old) : end]) != old:
            return None
        return [*turn[: end - len(old)], *new, *turn[end:]]

    def vote(self, problem: dict[str, Any], turns: list[list[int]]) -> str | None:
        """The number behind the last arrow."""
        _, arrow, answer = self._parted(self._turn_text(turns[-1]))[0].rpartition(">")
        return str(int(answer)) if arrow and _NUMBER.fullmatch(answer) else None

    def marks(self, problem: dict[str, Any], turns: list[list[int]]) -> list[list[int]]:
        """A running total, and the number behind the arrow, with what follows it: 1 where it is right, else -1."""
        return [self._marked(problem["totals"], turn) for turn in turns]

    def _marked(self, totals: Sequence[int], turn: list[int]) -> list[int]:
        pieces = self.codec.decode_all([[token] for token in turn])
        text = "".join(pieces)
        arrow = text.rfind(">")
        marks, end = [0] * len(text), 0
        said = text.rpartition("@")[0] if self.states_confidence and "@" in text else text
        for number, found in enumerate(_NUMBER.finditer(said)):
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
        sure = f"@{CONFIDENCES[-1]}" if self.states_confidence else ""
        return [Segment(f"{reasoning}>{totals[-1]}{sure}", trained=True, end=True)]
