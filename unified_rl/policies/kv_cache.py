"""A key-value cache that is written in place.

The dynamic cache of transformers concatenates at every token, which copies the whole cache each time. Here every layer
owns tensors with some spare columns, a token writes one column, and attention reads a view.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

GROW = 32
"""Columns added when the tensors are full: little enough that attention reads few gaps, enough that copies are rare."""


class SlabLayer(DynamicLayer):
    """One layer's keys and values ``[rows, heads, filled, width]``, views into tensors with room for more columns.

    Args:
        repeats: each row of the first write (the prompts) becomes this many rows.
    """

    def __init__(self, repeats: int = 1, **kwargs: Any) -> None:
        super().__init__(**kwargs)  # type: ignore[no-untyped-call]
        self.repeats = repeats
        self.filled = 0
        self.slabs: tuple[Tensor, ...] = ()

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Appends new columns; returns all keys and values so far."""
        if not self.slabs:
            self._start(key_states, value_states)
            return key_states, value_states
        end = self.filled + key_states.shape[-2]
        if end > self.slabs[0].shape[-2]:
            self.slabs = tuple(_copy(slab[:, :, : self.filled], end + GROW - 1) for slab in self.slabs)
        for slab, new in zip(self.slabs, (key_states, value_states), strict=True):
            slab[:, :, self.filled : end] = new
        return self._show(end)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps only some rows."""
        if not self.slabs:
            return
        room = self.slabs[0].shape[-2]
        self.slabs = tuple(_copy(slab[:, :, : self.filled].index_select(0, indices), room) for slab in self.slabs)
        self._show(self.filled)

    def _start(self, keys: Tensor, values: Tensor, room: int = GROW) -> None:
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True
        length = keys.shape[-2]
        self.slabs = tuple(_copy(x, length + room, self.repeats) for x in (keys, values))
        self._show(length)

    def _show(self, end: int) -> tuple[Tensor, Tensor]:
        self.filled = end
        self.keys, self.values = (slab[:, :, :end] for slab in self.slabs)
        return self.keys, self.values


class FixedLayer(SlabLayer):
    """One layer's keys and values in tensors of a fixed size, so that a step does the same work on the same memory.

    Attention gets all columns, and a mask must hide those that are not yet written.

    Args:
        repeats: as in :class:`SlabLayer`.
        room: columns behind the prompt.
        column: ``[1]`` int64 on the device, the column that the next token writes.
    """

    def __init__(self, repeats: int, room: int, column: Tensor) -> None:
        super().__init__(repeats)
        self.room, self.column = room, column

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Writes one column; returns all of them."""
        if not self.slabs:
            self._start(key_states, value_states, self.room)
            for slab in self.slabs:
                slab[:, :, self.filled :].zero_()  # a NaN would get through a mask
            return key_states, value_states
        keys, values = self.slabs
        return keys.index_copy_(2, self.column, key_states), values.index_copy_(2, self.column, value_states)


def _copy(states: Tensor, room: int, repeats: int = 1) -> Tensor:
    """``states [rows, heads, n, width]`` with each row repeated and with ``room`` columns, the later ones unset."""
    rows, heads, filled, width = states.shape
    out = states.new_empty(rows * repeats, heads, room, width)
    out.view(rows, repeats, heads, room, width)[..., :filled, :] = states[:, None]
    return out


class SlabCache(Cache):
    """A :class:`SlabLayer` for each of ``layers`` layers."""

    def __init__(self, layers: int, repeats: int = 1) -> None:
        super().__init__(layers=[SlabLayer(repeats) for _ in range(layers)])


class FixedCache(Cache):
    """A :class:`FixedLayer` for each of ``layers`` layers."""

    def __init__(self, layers: int, repeats: int, room: int, column: Tensor) -> None:
        super().__init__(layers=[FixedLayer(repeats, room, column) for _ in range(layers)])


def count_layers(config: Any) -> int:
    """Layers of the text decoder of a transformers configuration."""
    return int(config.get_text_config(decoder=True).num_hidden_layers)


def visible_columns(lengths: Tensor, width: int, capacity: int) -> Tensor:
    """``[B, 1, 1, capacity]`` bool: a prompt's real tokens, and everything from column ``width`` on."""
    columns = torch.arange(capacity, device=lengths.device)
    return ((columns < lengths[:, None]) | (columns >= width))[:, None, None]
