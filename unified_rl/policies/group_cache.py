"""Decoding on a CPU with one copy of each prompt's keys and values for all of its samples.

A decoding step reads the whole cache once, so its time is that of the bytes read. Here a prompt is read once for its
group instead of once a row, grouped heads are not repeated, and what was sampled lies without gaps, which a CPU fetches
twice as fast as a cache with spare columns. The model's own layers run as they are: their attention comes here through
the attention interface of transformers.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from unified_rl.policies.kv_cache import SlabCache

RECENT = 16
"""Columns written one by one, before they join the others in one piece."""


class GroupLayer(DynamicLayer):
    """One layer's keys and values: those of the prompts, of all sampled columns but the newest, and of the newest.

    Attributes:
        prompt: ``[P, heads, L, width]`` each.
        older: ``[B, heads, n, width]`` each, without gaps; empty at first.
        recent: ``[RECENT, B, heads, width]`` each, of which ``written`` columns are filled (time first: no gaps).
        attended: whether attention asked for what the last :meth:`update` returned, and so comes here.
    """

    def __init__(self, groups: Groups, **kwargs: Any) -> None:
        super().__init__(**kwargs)  # type: ignore[no-untyped-call]
        self.groups = groups
        self.prompt: tuple[Tensor, ...] = ()
        self.older: tuple[Tensor, ...] = ()
        self.recent: tuple[Tensor, ...] = ()
        self.written = 0
        self.newest: Tensor | None = None
        self.attended = False

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Takes in the prompts, then one column a row; returns what it was given, and keeps the rest for attention."""
        self.newest, self.attended = key_states, False
        if not self.prompt:
            self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
            self.prompt = (key_states.contiguous(), value_states.contiguous())
            self.keys, self.values = self.prompt
            return key_states, value_states
        new = (key_states, value_states)
        if not self.recent:
            self.recent = tuple(x.new_empty(RECENT, *x.shape[:2], x.shape[3]) for x in new)
        elif self.written == RECENT:
            blocks = zip(self.older, self._newest(), strict=True) if self.older else ((x,) for x in self._newest())
            self.older = tuple(torch.cat(tuple(parts), 2).contiguous() for parts in blocks)
            self.written = 0
        for block, column in zip(self.recent, new, strict=True):
            block[self.written] = column[:, :, 0]
        self.written += 1
        return key_states, value_states

    def _newest(self) -> tuple[Tensor, ...]:
        """``[B, heads, written, width]`` views of the newest columns."""
        return tuple(block[: self.written].permute(1, 2, 0, 3) for block in self.recent)

    def get_seq_length(self) -> int:
        """Columns so far."""
        return sum(int(x.shape[2]) for x in (*self.prompt[:1], *self.older[:1])) + self.written

    def keep(self, prompts: Tensor, rows: Tensor) -> None:
        """Keeps some prompts and some rows."""
        self.prompt = tuple(x.index_select(0, prompts) for x in self.prompt)
        self.older = tuple(x.index_select(0, rows) for x in self.older)
        self.recent = tuple(x.index_select(1, rows) for x in self.recent)

    def attend(self, query: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
        """Attention of one query a row ``[B, heads, 1, width]`` to every column so far; ``[B, 1, heads, width]``.

        Args:
            query: in the model's own heads, which may be several to one of the cache's.
            mask: ``[B or 1, 1 or heads, 1, columns]``, bool or additive.
            scaling: of the scores.
        """
        rows, heads = query.shape[0], self.prompt[0].shape[1]
        q = (query * scaling).view(rows, heads, -1, query.shape[-1])
        newest = self._newest()
        own = [(self.older[0], self.older[1])] if self.older else []
        own.append((newest[0], newest[1]))
        asked = self.groups.gather(q) @ self.prompt[0].transpose(-1, -2)
        parts = [self.groups.scatter(asked, q.shape[2])] + [q @ keys.transpose(-1, -2) for keys, _ in own]
        scores = torch.cat(parts, -1)
        if mask is not None:
            shown = mask if mask.shape[1] == 1 else mask.view(mask.shape[0], heads, -1, mask.shape[-1])
            scores = scores.masked_fill(~shown, float("-inf")) if mask.dtype == torch.bool else scores + shown
        weights = scores.softmax(-1).split([part.shape[-1] for part in parts], -1)
        out = self.groups.scatter(self.groups.gather(weights[0]) @ self.prompt[1], q.shape[2])
        for weight, (_, values) in zip(weights[1:], own, strict=True):
            out = out + weight @ values
        return out.reshape(rows, 1, -1, out.shape[-1])


class Groups:
    """Which rows belong to which prompt: ``repeats`` each at first, fewer once some have ended."""

    def __init__(self, repeats: int) -> None:
        self.repeats = repeats
        self.prompt_of: Tensor | None = None
        self.row_of: Tensor | None = None  # [P * repeats], the row in each slot; some stand in two
        self.slot_of: Tensor | None = None

    def gather(self, x: Tensor) -> Tensor:
        """``x [B, heads, n, width]`` by prompt, ``[P, heads, repeats * n, width]``."""
        if self.row_of is not None:
            x = x.index_select(0, self.row_of)
        by_prompt: Tensor = x.unflatten(0, (-1, self.repeats)).transpose(1, 2)
        return by_prompt.reshape(*by_prompt.shape[:2], -1, x.shape[-1])

    def scatter(self, x: Tensor, count: int) -> Tensor:
        """The other way, ``count`` entries a row."""
        by_row: Tensor = x.unflatten(2, (self.repeats, count)).transpose(1, 2).flatten(0, 1)
        return by_row if self.slot_of is None else by_row.index_select(0, self.slot_of)

    def keep(self, rows: Tensor, prompts: int) -> Tensor:
        """Keeps some rows of ``prompts`` prompts, in order; returns which prompts still have any."""
        if self.prompt_of is None:
            self.prompt_of = torch.arange(prompts, device=rows.device).repeat_interleave(self.repeats)
        kept: Tensor
        kept, self.prompt_of = torch.unique(self.prompt_of[rows], return_inverse=True)
        count = torch.bincount(self.prompt_of)
        self.repeats = int(count.max())
        place = torch.arange(len(rows), device=rows.device) - (count.cumsum(0) - count)[self.prompt_of]
        self.slot_of = self.prompt_of * self.repeats + place
        self.row_of = torch.zeros(len(kept) * self.repeats, dtype=torch.int64, device=rows.device)
        self.row_of[self.slot_of] = torch.arange(len(rows), device=rows.device)
        return kept


class GroupCache(Cache):
    """A :class:`GroupLayer` for each of ``layers`` layers."""

    def __init__(self, layers: int, repeats: int) -> None:
        self.groups = Groups(repeats)
        self.group_layers = [GroupLayer(self.groups) for _ in range(layers)]
        super().__init__(layers=list(self.group_layers))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps only some rows, in order."""
        prompts = self.groups.keep(indices, len(self.group_layers[0].prompt[0]))
        for layer in self.group_layers:
            layer.keep(prompts, indices)

    @property
    def usable(self) -> bool:
        """After the prompts: whether every layer's attention comes here, in float32 (others would round the scores)."""
        return not torch.is_autocast_enabled("cpu") and all(
            layer.attended and all(x.dtype == torch.float32 for x in layer.prompt) for layer in self.group_layers
        )

    def slabs(self) -> SlabCache:
        """The same prompts in the cache that any attention can read."""
        cache = SlabCache(len(self.group_layers), self.groups.repeats)
        for index, layer in enumerate(self.group_layers):
            keys, values = layer.prompt
            cache.update(keys, values, index)
        return cache


_here = threading.local()
_other: Any = sdpa_attention_forward
"""The attention that ``sdpa`` named before."""


@contextmanager
def group_attention(cache: GroupCache) -> Iterator[None]:
    """Scaled dot-product attention of this thread looks into ``cache`` inside the block; others' is as ever.

    The function behind transformers' ``sdpa`` is exchanged rather than given another name, since architectures branch
    on the name. It stays exchanged, since other threads may be decoding; whatever stood there is called for all else.
    """
    global _other
    if ALL_ATTENTION_FUNCTIONS["sdpa"] is not _attend:
        _other, ALL_ATTENTION_FUNCTIONS["sdpa"] = ALL_ATTENTION_FUNCTIONS["sdpa"], _attend
    _here.cache = cache
    try:
        yield
    finally:
        _here.cache = None


def _attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Transformers' attention, but for the decoding steps of a :class:`GroupLayer`."""
    cache = getattr(_here, "cache", None)
    index = getattr(module, "layer_idx", None)
    layer = None if cache is None or index is None else cache.group_layers[index]
    plain = all(kwargs.get(name) is None for name in ("position_bias", "softcap", "s_aux"))
    if layer is not None and key is layer.newest and plain:
        layer.attended = True
        if layer.written:
            scaling = kwargs.get("scaling")
            return layer.attend(query, attention_mask, query.shape[-1] ** -0.5 if scaling is None else scaling), None
    if layer is not None and layer.written and layer.newest is not None:
        raise RuntimeError(f"{type(module).__name__} does not attend to what its cache returned; use backend='hf'")
    inside, _here.inside = getattr(_here, "inside", False), True
    other = sdpa_attention_forward if inside else _other  # whoever stands there may have been put around this function
    try:
        out: tuple[Tensor, None] = other(module, query, key, value, attention_mask, **kwargs)
        return out
    finally:
        _here.inside = inside
