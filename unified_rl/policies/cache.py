"""A key-value cache that is written in place.

The dynamic cache of transformers concatenates at every token, which copies the whole cache each time. Here every layer
owns one tensor of full width, a token writes one column, and attention reads a view.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer


class SlabLayer(DynamicLayer):
    """One layer's keys and values ``[rows, heads, filled, width]``, views into tensors of ``capacity`` columns.

    Args:
        capacity: the most columns it will hold.
        repeats: each row of the first write (the prompts) becomes this many rows.
    """

    def __init__(self, capacity: int, repeats: int = 1, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.capacity, self.repeats = capacity, repeats
        self.filled = 0
        self.slabs: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Appends new columns; returns all keys and values so far."""
        if self.slabs is None:
            self._start(key_states, value_states)
            return key_states, value_states
        end = self.filled + key_states.shape[-2]
        for slab, new in zip(self.slabs, (key_states, value_states), strict=True):
            slab[:, :, self.filled : end] = new
        return self._show(end)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps only some rows."""
        if self.slabs is None:
            return
        end = self.filled
        kept = []
        for slab in self.slabs:
            fresh = slab.new_empty(len(indices), *slab.shape[1:])
            fresh[:, :, :end] = slab[:, :, :end].index_select(0, indices)
            kept.append(fresh)
        self.slabs = (kept[0], kept[1])
        self._show(end)

    def _start(self, keys: Tensor, values: Tensor) -> None:
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True
        slabs = []
        for first in (keys, values):
            rows, heads, length, width = first.shape
            slab = first.new_empty(rows * self.repeats, heads, self.capacity, width)
            slab.view(rows, self.repeats, heads, self.capacity, width)[..., :length, :] = first[:, None]
            slabs.append(slab)
        self.slabs = (slabs[0], slabs[1])
        self._show(keys.shape[-2])

    def _show(self, end: int) -> tuple[Tensor, Tensor]:
        assert self.slabs is not None
        self.filled = end
        self.keys, self.values = (slab[:, :, :end] for slab in self.slabs)
        return self.keys, self.values


class SlabCache(Cache):
    """A :class:`SlabLayer` for each of ``layers`` layers; see there for the other arguments."""

    def __init__(self, layers: int, capacity: int, repeats: int = 1) -> None:
        super().__init__(layers=[SlabLayer(capacity, repeats) for _ in range(layers)])


def count_layers(config: Any) -> int:
    """Layers of the text decoder of a transformers configuration."""
    return int(config.get_text_config(decoder=True).num_hidden_layers)


def visible_columns(lengths: Tensor, width: int, capacity: int) -> Tensor:
    """``[B, 1, 1, capacity]`` bool: a prompt's real tokens, and everything from column ``width`` on."""
    columns = torch.arange(capacity, device=lengths.device)
    return ((columns < lengths[:, None]) | (columns >= width))[:, None, None]
