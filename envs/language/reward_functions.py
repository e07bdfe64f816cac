"""Rewards by name: functions of completions, in TRL's signature. Imports no torch.

Each takes lists of equal length, one entry a conversation, and returns a list of numbers, None where it has no opinion.
Settings are keyword-only.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, Literal

from unified_rl.envs.language.answers import marked_answer
from unified_rl.envs.language.numbers import read_number
from unified_rl.envs.language.verifiers import MathVerifier, last, numeric
from unified_rl.errors import ConfigError
from unified_rl.ranges import Count, Float32, NonNegative, Positive, TwoOrMore, Whole, ranged

Texts = Sequence[Any]
"""Completions: texts, or lists of messages with ``role`` and ``content``."""

THINK = r"<think>.*?</think>\s*<answer>.*?</answer>"
"""The form that DeepSeek-R1-Zero was rewarded for (arXiv 2501.12948)."""


def text_of(completion: Any) -> str:
    """The text of a completion; of messages, what the assistant said in them."""
    if isinstance(completion, str):
        return completion
    said = [message["content"] for message in completion if message["role"] == "assistant"]
    return "\n".join(text for text in said if isinstance(text, str))


@ranged("reward")
class ExactMatch:
    """1 where the answer is the reference, letter by letter once blanks at its ends are taken off; else 0.

    Args:
        whole: compare the whole completion; else what its last mark holds (a box, an answer tag, a ``####`` line),
            where it has one.
        ignore_case: capital and small letters are the same.
    """

    def __init__(self, *, whole: bool = False, ignore_case: bool = False) -> None:
        self.whole, self.ignore_case = whole, ignore_case

    def __call__(self, completions: Texts, reference: Sequence[str | None]) -> list[float | None]:
        """One number a row; None without a reference."""
        return [
            None if r is None else self._one(text_of(c), str(r)) for c, r in zip(completions, reference, strict=True)
        ]

    def _one(self, text: str, reference: str) -> float:
        marked = None if self.whole else marked_answer(text)
        pair = [" ".join(part.split()) for part in (text if marked is None else marked, reference)]
        if self.ignore_case:
            pair = [part.casefold() for part in pair]
        return float(pair[0] == pair[1])


@ranged("reward")
class Numeric:
    """1 where the number of the answer equals the reference's, exactly, as rationals; else 0.

    Args:
        unmarked: where no box, answer tag or ``####`` line marks the answer, take the number after *answer is*, or the
            last one (the verifier ``last``); else such a completion is wrong.
    """

    def __init__(self, *, unmarked: bool = True) -> None:
        self._verify = last if unmarked else numeric

    def __call__(self, completions: Texts, reference: Sequence[str | None]) -> list[float | None]:
        """One number a row; None where the reference is no number."""
        return [self._one(text_of(c), r) for c, r in zip(completions, reference, strict=True)]

    def _one(self, text: str, reference: str | None) -> float | None:
        if reference is None or read_number(str(reference)) is None:
            return None
        return self._verify(str(reference), text).value


@ranged("reward")
class Math:
    """1 where math-verify (or the number reader) finds the answer equal to the reference; else 0.

    Args:
        seconds: CPU time of one comparison, after which it is given up: the row has no score.
        batch_seconds: CPU time that the slow comparisons of one call may take together.
    """

    def __init__(self, *, seconds: Positive = 5.0, batch_seconds: Positive = 10.0) -> None:
        self._verify = MathVerifier(seconds, batch_seconds)

    def __call__(self, completions: Texts, reference: Sequence[str | None]) -> list[float | None]:
        """One number a row; None without a reference, or where the comparison was given up."""
        self._verify.renew()
        return [
            None if r is None else self._one(text_of(c), str(r)) for c, r in zip(completions, reference, strict=True)
        ]

    def _one(self, text: str, reference: str) -> float | None:
        score = self._verify(reference, text)
        return None if score.failed else score.value

    def close(self) -> None:
        """Ends the process that compares."""
        self._verify.close()


@ranged("reward")
class Format:
    """1 where the completion has the form of a regular expression (dots match line ends too); else 0.

    Args:
        pattern: the expression; by default :data:`THINK`.
        match: ``full`` (the whole completion but blanks around it), ``start`` or ``search`` (anywhere).

    Raises:
        ConfigError: the pattern does not compile.
    """

    def __init__(self, *, pattern: str = THINK, match: Literal["full", "start", "search"] = "full") -> None:
        try:
            compiled = re.compile(pattern, re.DOTALL)
        except re.error as error:
            raise ConfigError(f"reward format: pattern {pattern!r} does not compile ({error})") from error
        self._match: Callable[[str], Any] = {
            "full": compiled.fullmatch, "start": compiled.match, "search": compiled.search
        }[match]  # fmt: skip

    def __call__(self, completions: Texts) -> list[float]:
        """One number a row."""
        return [float(self._match(text_of(c).strip()) is not None) for c in completions]


@ranged("reward")
class Length:
    """``-min(most, cost * max(0, tokens - free))``: each token beyond the free ones costs.

    Args:
        cost: of a token.
        free: tokens that cost nothing.
        most: that a completion can cost.
    """

    def __init__(self, *, cost: NonNegative = 0.001, free: Whole = 0, most: NonNegative = 1.0) -> None:
        self.cost, self.free, self.most = cost, free, most

    def __call__(self, completion_ids: Sequence[Sequence[int]]) -> list[float]:
        """One number a row."""
        return [-min(self.most, self.cost * max(0, len(ids) - self.free)) for ids in completion_ids]


@ranged("reward")
class Overlong:
    """The soft punishment of overlong answers of DAPO (arXiv 2503.14476, equation 13).

    With ``L`` tokens at most, of which ``cache`` punish: 0 up to ``L - cache`` tokens, then falling linearly to -1 at
    ``L``, and -1 beyond. Use ``env.truncated=score``, so that cut answers are punished too.

    Args:
        cache: tokens at the end of the budget in which the punishment grows.
        max_length: ``L``; by default the budget of sampled tokens that the conversation had.

    Raises:
        ConfigError: ``cache`` is larger than ``max_length``.
    """

    def __init__(self, *, cache: Count, max_length: Count | None = None) -> None:
        self.cache, self.most = cache, max_length
        if max_length is not None:
            self.check_budget(max_length)

    def check_budget(self, budget: int) -> None:
        """Raises ConfigError where the ramp is longer than ``budget`` and nobody has said ``max_length``."""
        most = budget if self.most is None else self.most
        if self.cache > most:
            raise ConfigError(f"reward overlong: cache={self.cache} must be at most max_length={most}")

    def __call__(
        self, completion_ids: Sequence[Sequence[int]], max_completion_length: Sequence[int] | None = None
    ) -> list[float]:
        """One number a row.

        Raises:
            ConfigError: nobody has said ``max_length``, and the budgets are not given.
        """
        most = max_completion_length if self.most is None else [self.most] * len(completion_ids)
        if most is None:
            raise ConfigError("reward overlong: no max_length, and no budget of the conversations to take it from")
        beyond = [len(ids) - (one - self.cache) for ids, one in zip(completion_ids, most, strict=True)]
        return [max(-1.0, min(0.0, -tokens / self.cache)) for tokens in beyond]


@ranged("reward")
class Repetition:
    """``max_penalty`` times the share of word n-grams that repeat an earlier one.

    The repetition penalty of "Demystifying Long Chain-of-Thought Reasoning in LLMs" (arXiv 2502.03373) as Open-R1
    released it: ``(1 - distinct / all) * max_penalty`` over n-grams of lower-case words between blanks; 0 for a text
    shorter than one n-gram.

    Args:
        ngram: words of an n-gram.
        max_penalty: not above 0.

    Raises:
        ConfigError: a positive ``max_penalty``, which would reward repetition.
    """

    def __init__(self, *, ngram: TwoOrMore = 3, max_penalty: Float32 = -1.0) -> None:
        if max_penalty > 0:
            raise ConfigError(f"reward repetition: max_penalty={max_penalty} must be at most 0")
        self.ngram, self.max_penalty = ngram, max_penalty

    def __call__(self, completions: Texts) -> list[float]:
        """One number a row."""
        return [self._one(text_of(c)) for c in completions]

    def _one(self, text: str) -> float:
        words = text.lower().split()
        grams = [tuple(words[at : at + self.ngram]) for at in range(len(words) - self.ngram + 1)]
        return (1.0 - len(set(grams)) / len(grams)) * self.max_penalty + 0.0 if grams else 0.0


SHIPPED: dict[str, Callable[..., Any]] = {
    "exact": ExactMatch,
    "numeric": Numeric,
    "math": Math,
    "format": Format,
    "length": Length,
    "overlong": Overlong,
    "repetition": Repetition,
}
"""Names that ``reward=`` knows beside ``task``."""

__all__ = ["SHIPPED", "THINK", "text_of"]
