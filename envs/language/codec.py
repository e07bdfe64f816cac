"""Text to token ids and back for whole batches, and supervised rows made of text."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import NamedTuple

import numpy as np
import torch
from tensordict import TensorDict
from transformers import PreTrainedTokenizerBase

from unified_rl.errors import ConfigError
from unified_rl.policies.pretrained import end_ids_of_folder


class Segment(NamedTuple):
    """A piece of a supervised row.

    Attributes:
        text: what it says.
        trained: the policy is to learn it (else it is a prompt or the environment's own text).
        end: an end-of-text token follows, trained as the text is.
    """

    text: str
    trained: bool = False
    end: bool = False


class Codec:
    """Encodes and decodes with a tokenizer; a character tokenizer becomes one table look-up for a whole batch.

    Args:
        tokenizer: with end-of-text and pad tokens.

    Attributes:
        eos_id: the tokenizer's end-of-text id.
        end_ids: every id that ends an answer: the tokenizer's, and those of ``generation_config.json`` and
            ``config.json`` in the folder that it was read from.
        end_id: what a supervised answer ends with.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.eos_id = self.end_id = int(tokenizer.eos_token_id)
        folder = end_ids_of_folder(getattr(tokenizer, "name_or_path", "") or "")
        self.end_ids = {self.eos_id, *(i for i in folder if i < len(tokenizer))}
        self.pad_id = int(tokenizer.pad_token_id)
        self.prefix: list[int] = list(tokenizer("", add_special_tokens=True)["input_ids"])
        """What the tokenizer puts before every text (a begin-of-text token, or nothing)."""
        if self.prefix and self.prefix[-1] == self.eos_id:
            self.prefix.pop()
        self._table = self._character_table()
        self._characters = None if self._table is None else self._decoding_table()

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text, without special tokens."""
        if not texts:
            return []
        if self._table is None:
            backend = getattr(self.tokenizer, "backend_tokenizer", None)
            if backend is None:
                out: list[list[int]] = self.tokenizer(list(texts), add_special_tokens=False)["input_ids"]
                return out
            return [one.ids for one in backend.encode_batch_fast(list(texts), add_special_tokens=False)]
        ids = self._look_up("".join(texts)).tolist()
        ends = np.cumsum([len(text) for text in texts]).tolist()
        return [ids[start:end] for start, end in zip([0, *ends], ends, strict=False)]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of some ids, special tokens left out."""
        if self._characters is None:
            return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))
        return "".join([self._characters[i] for i in ids])

    def decode_all(self, ids: Sequence[Sequence[int]], skip_special_tokens: bool = True) -> list[str]:
        """The text of each row of ids."""
        if not ids:  # of which transformers makes one empty text
            return []
        if self._characters is None:
            return list(
                self.tokenizer.batch_decode([list(own) for own in ids], skip_special_tokens=skip_special_tokens)
            )
        if skip_special_tokens:
            return [self.decode(own) for own in ids]
        return ["".join(self.tokenizer.convert_ids_to_tokens(list(own))) for own in ids]

    def stop_ids(self, stop_text: str = "") -> list[int]:
        """The ids that end an answer, and every token that ends with ``stop_text`` where that is given."""
        stops = set(self.end_ids)
        if stop_text:
            every = range(len(self.tokenizer))
            stops |= {i for i in every if self.decode([i]).rstrip().endswith(stop_text)}
            if stops == self.end_ids:
                raise ConfigError(f"no token of the tokenizer ends with {stop_text!r}, which ends a turn of this task")
        return sorted(stops)

    def rows(self, parts: Sequence[Sequence[Segment]], width: int) -> TensorDict:
        """Supervised rows.

        Args:
            parts: the segments of each of ``B`` rows, prompt first.
            width: ``N``.

        Returns:
            Batch size ``[B]``: ``tokens [B, N]`` int64 right-padded, ``token_mask [B, N]`` bool, ``mask [B, N]`` bool
            (trained tokens).

        Raises:
            ConfigError: a row longer than ``width``.
        """
        segments = list(chain.from_iterable(parts))
        ids = self.encode([segment.text for segment in segments])
        for segment, own in zip(segments, ids, strict=True):
            if segment.end:
                own.append(self.end_id)
        counts = np.array([len(own) for own in ids])
        trained = np.repeat([segment.trained for segment in segments], counts)
        owner = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
        lengths = np.bincount(owner, weights=counts, minlength=len(parts)).astype(np.int64) + len(self.prefix)
        if lengths.max(initial=0) > width:
            row = int(lengths.argmax())
            raise ConfigError(
                f"row {row} has {lengths[row]} tokens, more than the {width} of a record; raise the budgets"
            )
        tokens = np.full((len(parts), width), self.pad_id, dtype=np.int64)
        mask = np.zeros((len(parts), width), dtype=bool)
        columns = np.arange(width)
        body = (columns < lengths[:, None]) & (columns >= len(self.prefix))
        tokens[:, : len(self.prefix)] = self.prefix
        tokens[body] = np.fromiter(chain.from_iterable(ids), dtype=np.int64, count=int(counts.sum()))
        mask[body] = trained
        token_mask = torch.from_numpy(columns < lengths[:, None])
        return TensorDict(
            {"tokens": torch.from_numpy(tokens), "token_mask": token_mask, "mask": torch.from_numpy(mask)},
            batch_size=[len(parts)],
        )

    def _look_up(self, text: str) -> np.ndarray:
        assert self._table is not None
        codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
        return self._table[np.minimum(codes, len(self._table) - 1)]

    def _character_table(self) -> np.ndarray | None:
        """Code point to id with unk at the end, or None where the tokenizer is not one of characters.

        A chat template writes special tokens as text, which a table of characters would spell out.
        """
        if getattr(self.tokenizer, "chat_template", None):
            return None
        special = set(self.tokenizer.all_special_ids)
        plain = {token: i for token, i in self.tokenizer.get_vocab().items() if i not in special}
        if not plain or self.tokenizer.unk_token_id is None or any(len(token) != 1 for token in plain):
            return None
        probe = "".join(plain)
        if self.tokenizer(probe, add_special_tokens=False)["input_ids"] != list(plain.values()):
            return None
        table = np.full(max(map(ord, plain)) + 2, self.tokenizer.unk_token_id, dtype=np.int64)
        for token, index in plain.items():
            table[ord(token)] = index
        return table

    def _decoding_table(self) -> list[str]:
        special = set(self.tokenizer.all_special_ids)
        tokens = self.tokenizer.convert_ids_to_tokens(list(range(len(self.tokenizer))))
        return ["" if i in special else token for i, token in enumerate(tokens)]
