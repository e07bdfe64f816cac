"""Texts that end an answer: found in what tokens decode to, whatever tokens make them up."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from unified_rl.errors import ConfigError

BROKEN = "\ufffd"
"""What a part of a character decodes to."""
MARGIN = 3
"""Tokens that are decoded beyond those that a text can be made of: a decoder may drop a blank at the very start."""

CLOSES = re.compile(r"\s*(?:</[^<>]+>|[\])}]+)\s*")
"""A stop text that closes what an answer opened, a tag or a bracket, belongs to the answer."""


class StopStrings:
    """Finds the token with which an answer first holds one of several texts.

    Only a token in whose own text a stop text can end is followed by a look at what the answer's last tokens decode to,
    so a step costs one look-up in a table for the whole batch. Tokens and their log-probs are left as they were
    sampled: a token may go on behind the stop text.

    Args:
        tokenizer: of the answers.
        texts: one or more, none empty.

    Raises:
        ConfigError: no text, or an empty one.
    """

    def __init__(self, tokenizer: Any, texts: Sequence[str]) -> None:
        if not texts or not all(isinstance(text, str) and text for text in texts):
            raise ConfigError(f"env.stop is {list(texts)!r}; it must be one text or a list of them, none empty")
        self.tokenizer, self.texts = tokenizer, tuple(dict.fromkeys(texts))
        self.reach = max(len(text.encode("utf-8", "surrogatepass")) for text in self.texts) + MARGIN
        alone = self._decoded([[index] for index in range(len(tokenizer))])
        lasts = {text[-1] for text in self.texts}
        blank = any(last.isspace() for last in lasts)  # decoders of single tokens drop blanks
        self.ends = torch.tensor([blank or BROKEN in text or not lasts.isdisjoint(text) for text in alone])

    def _decoded(self, ids: list[list[int]]) -> list[str]:
        texts: list[str] = self.tokenizer.batch_decode(
            ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        return texts

    def find(self, tokens: Tensor, since: int = 0) -> Tensor:
        """How many tokens of each answer it takes to hold a stop text.

        Args:
            tokens: ``[B, m]`` int64, sampled so far.
            since: columns before it are known to end no stop text.

        Returns:
            ``[B]`` int64 on the tokens' device, the stop text's last token included; ``m + 1`` where there is none.
        """
        width = tokens.shape[1]
        out = torch.full((len(tokens),), width + 1, dtype=torch.int64, device=tokens.device)
        if self.ends.device != tokens.device:
            self.ends = self.ends.to(tokens.device)
        recent = tokens[:, since:]
        may = self.ends[recent.clamp(max=len(self.ends) - 1)] & (recent < len(self.ends))
        places = may.nonzero().tolist()
        if not places:
            return out
        rows = tokens.tolist()
        tails = [rows[row][max(0, since + column + 1 - self.reach) : since + column + 1] for row, column in places]
        for (row, column), text in zip(reversed(places), reversed(self._decoded(tails)), strict=True):
            if any(stop in text for stop in self.texts):  # the first one is met last
                out[row] = since + column + 1
        return out

    def before(self, text: str, unended: str) -> str:
        """An answer up to the stop text that its last token completed; one that :data:`CLOSES` something stays.

        Args:
            text: of the whole answer.
            unended: of the answer without its last token; a stop text that ends in it ended nothing.
        """
        known = len(unended.rstrip(BROKEN))
        found = [(text.find(stop, max(0, known - len(stop) + 1)), stop) for stop in self.texts]
        ends = [(at, stop) for at, stop in found if at >= 0]
        if not ends:
            return text
        at, stop = min(ends)
        return text[: at + len(stop)] if CLOSES.fullmatch(stop) else text[:at]
