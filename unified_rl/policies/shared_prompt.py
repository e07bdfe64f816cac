"""One encoding of a prompt for all of its rows, also where gradients are needed.

Rows of a group begin with the same tokens. Their hidden states are the same, so a scoring pass encodes each distinct
prompt once and lets every row's own tokens attend to its keys and values; gradients of the rows add up in the prompt.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

WORTH = 0.9
"""Sharing is used where it leaves at most this share of the token positions."""


@dataclass(frozen=True)
class SharedPrompts:
    """A batch cut into distinct prompts and the rows' own tokens.

    Attributes:
        prompts: ``[U, P]`` int64, distinct prompts, right-padded.
        prompt_of: ``[B]`` int64, each row's prompt.
        length: ``[B]`` int64, the prompt length of each row.
        rest: ``[B, C]`` int64, each row's tokens after its prompt.
        position: ``[B, C]`` int64, their columns in the row.
    """

    prompts: Tensor
    prompt_of: Tensor
    length: Tensor
    rest: Tensor
    position: Tensor

    def locate(self, row: Tensor, column: Tensor) -> Tensor:
        """Where :func:`shared_states` put the state of ``(row, column)``; ``[n]`` indices."""
        width, own = self.prompts.shape[1], self.rest.shape[1]
        after = column - self.length[row]
        in_prompt = self.prompt_of[row] * width + column
        return torch.where(after < 0, in_prompt, self.prompts.numel() + row * own + after)


def find_shared(tokens: Tensor, mask: Tensor, used: int) -> SharedPrompts | None:
    """Cuts ``tokens [B, N]`` at each row's first masked-in column; None where sharing would not pay.

    Args:
        tokens: right-padded rows.
        mask: ``[B, N]`` bool, the rows' sampled tokens.
        used: columns that a scoring pass needs.
    """
    columns = torch.arange(used, device=tokens.device)
    first = torch.where(mask.any(-1), mask.int().argmax(-1), used)
    shortest = int(first.min())
    length = torch.where(mask.any(-1), first, shortest)  # the states of a row without units are never read
    longest = int(length.max())
    prefix = torch.where(columns[:longest] < length[:, None], tokens[:, :longest], -1)
    prompts, prompt_of = torch.unique(prefix, dim=0, return_inverse=True)
    own = used - shortest
    if own < 1 or prompts.numel() + len(tokens) * own > WORTH * len(tokens) * used:
        return None
    position = (length[:, None] + torch.arange(own, device=tokens.device)).clamp(max=used - 1)
    return SharedPrompts(prompts.clamp(min=0), prompt_of, length, tokens.gather(1, position), position)


def shared_states(model: PreTrainedModel, batch: SharedPrompts) -> Tensor:
    """Last hidden states ``[U * P + B * C, d]``: those of the prompts, then those of the rows' own tokens."""
    trunk: Any = model.base_model
    width, own = batch.prompts.shape[1], batch.rest.shape[1]
    columns = torch.arange(width, device=batch.rest.device)
    cache = DynamicCache(config=model.config)
    first = trunk(input_ids=batch.prompts, position_ids=columns[None], past_key_values=cache, use_cache=True)
    layers: list[Any] = cache.layers
    for layer in layers:
        layer.keys = layer.keys.index_select(0, batch.prompt_of)
        layer.values = layer.values.index_select(0, batch.prompt_of)
    steps = torch.arange(own, device=batch.rest.device)
    seen = (columns < batch.length[:, None])[:, None, :].expand(-1, own, -1)
    causal = (steps[:, None] >= steps)[None].expand(len(batch.rest), -1, -1)
    second = trunk(
        input_ids=batch.rest,
        attention_mask=torch.cat([seen, causal], -1)[:, None],
        position_ids=batch.position,
        past_key_values=cache,
        use_cache=True,
    )
    return torch.cat([first.last_hidden_state.flatten(0, 1), second.last_hidden_state.flatten(0, 1)])
