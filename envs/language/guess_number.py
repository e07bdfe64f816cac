"""Guess the number: the environment says whether the secret is higher or lower. Binary search is optimal."""

from __future__ import annotations

import re
from typing import Any

import torch

from unified_rl.configurable import configurable
from unified_rl.envs.language.base import LanguageTask
from unified_rl.envs.language.codec import Segment
from unified_rl.envs.language.judging import Truncated
from unified_rl.envs.language.tokenizer import choose_tokenizer
from unified_rl.envs.language.verdict import Verdict
from unified_rl.errors import ConfigError
from unified_rl.ranges import Count, HeldOut, Seed, Share, Texts, TwoOrMore, Whole, ranged

ALPHABET = "0123456789-;HL?"
_GUESS = re.compile(r"[0-9]{1,9}")


@configurable
@ranged("env")
class GuessNumber(LanguageTask):
    """Prompt ``17-32;``, guesses ``24;`` answered by ``H;`` (secret is higher), ``L;`` (lower) or ``?;`` (no guess).

    The range is part of the prompt and the secret is not, so held-out prompts are ranges that training never sees.

    Args:
        size: most numbers in a range; a range holds at least half as many.
        limit: largest number of any range.
        spare_turns: guesses beyond those that binary search needs at worst.
        turn_cost: what each guess after the first takes off the reward of 1 for a hit.
        tokenizer: a local folder; by default characters.
        held_out: share of prompts kept for evaluation.
        truncated: of cut answers, see :class:`~unified_rl.envs.language.base.LanguageTask`.
        stop: texts that end a turn too, of any length.
        shuffle_rewards: the negative control of :class:`~unified_rl.envs.language.base.LanguageTask`.
        seed: of that control.

    Raises:
        ConfigError: sizes out of range, or a cost that could make a hit worth nothing.
    """

    def __init__(
        self,
        size: TwoOrMore = 16,
        limit: Count = 99,
        spare_turns: Whole = 2,
        turn_cost: Share = 0.05,
        tokenizer: str | None = None,
        held_out: HeldOut = 0.1,
        truncated: Truncated | None = None,
        stop: Texts | None = None,
        shuffle_rewards: bool = False,
        seed: Seed = 0,
    ) -> None:
        if size > limit + 1:
            raise ConfigError(f"env.size={size} must not lie above env.limit + 1 = {limit + 1}: the numbers there are")
        turns = size.bit_length() + spare_turns
        if turn_cost * (turns - 1) >= 1:
            raise ConfigError(f"env.turn_cost={turn_cost} must be in [0, 1/{turns - 1}), so that a late hit still pays")
        self.size, self.limit, self.turn_cost = size, limit, turn_cost
        digits = len(str(limit))
        super().__init__(
            choose_tokenizer(tokenizer, ALPHABET),
            max_prompt_length=2 * digits + 2,
            max_turn_tokens=digits + 2,
            max_turns=turns,
            max_reply_length=2,
            stop_text=";",
            held_out=held_out,
            truncated=truncated,
            stop=stop,
            shuffle_rewards=shuffle_rewards,
            seed=seed,
        )

    def _candidates(self, count: int, generator: torch.Generator) -> list[dict[str, Any]]:
        sizes = torch.randint(max(2, self.size // 2), self.size + 1, (count,), generator=generator)
        place, secret = torch.rand(2, count, generator=generator, dtype=torch.float64)
        low = (place * (self.limit - sizes + 2)).long()
        secrets = low + (secret * sizes).long()
        rows = zip(low.tolist(), (low + sizes - 1).tolist(), secrets.tolist(), strict=True)
        return [{"text": f"{a}-{b};", "low": a, "high": b, "secret": s, "key": s} for a, b, s in rows]

    def _judge(self, problem: dict[str, Any], text: str, turn: int) -> Verdict:
        guess = text.strip()
        if not _GUESS.fullmatch(guess) or not problem["low"] <= int(guess) <= problem["high"]:
            return Verdict(done=False, reply="?;")
        if int(guess) == problem["secret"]:
            return Verdict(reward=1.0 - self.turn_cost * (turn - 1), correct=True)
        return Verdict(done=False, reply="H;" if problem["secret"] > int(guess) else "L;")

    def _demonstrate(self, problem: dict[str, Any], style: str | None) -> list[Segment]:
        low, high, secret = problem["low"], problem["high"], problem["secret"]
        out = []
        while True:
            middle = (low + high) // 2
            out.append(Segment(f"{middle};", trained=True))
            if middle == secret:
                return out
            out.append(Segment("H;" if secret > middle else "L;"))
            low, high = (middle + 1, high) if secret > middle else (low, middle - 1)
