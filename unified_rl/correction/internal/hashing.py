"""Random selections that depend on nothing but a seed and the data: the same rows give the same draw in any order."""

from __future__ import annotations

import torch
from tensordict import TensorDictBase
from torch import Tensor

from unified_rl.correction.levels import Layout
from unified_rl.correction.view import anchor_log_prob

FIRST, SECOND = -7_046_029_254_386_353_131, 6_364_136_223_846_793_005


def row_noise(batch: TensorDictBase, layout: Layout, seed: int) -> Tensor:
    """A number in [0, 1) for each row, ``[B, 1]`` float32: a hash of the seed and the row's id or content."""
    return _mixed(_row_key(batch, layout, seed))


def unit_noise(batch: TensorDictBase, layout: Layout, seed: int, at: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """A number in [0, 1) for each unit, ``[B, N]`` float32: a hash of the seed, the row and its position.

    With ``at``, rows ``[n]`` and columns ``[n]``, only for those units, ``[n]``.
    """
    row, position = _row_key(batch, layout, seed), layout.mask.cumsum(-1)
    return _mixed(row + position if at is None else row.squeeze(-1)[at[0]] + position[at])


def place_noise(batch: TensorDictBase, layout: Layout, seed: int, places: int) -> Tensor:
    """A number in [0, 1) for each of so many places of every row, ``[B, places]`` float32, whatever stands there."""
    return _mixed(_row_key(batch, layout, seed) + torch.arange(1, places + 1, device=layout.mask.device))


def _row_key(batch: TensorDictBase, layout: Layout, seed: int) -> Tensor:
    row: Tensor | None = batch.get("row_id", None)
    if row is None:  # the log-probs' own bits tell rows apart, wherever they stand in the batch
        bits = anchor_log_prob(batch, "behavior").float().contiguous().view(torch.int32)
        row = bits.masked_fill(~layout.mask, 0).sum(-1)
    return (row.unsqueeze(-1) * FIRST) ^ ((seed + 1) * SECOND % 2**63)


def _mixed(key: Tensor) -> Tensor:
    """Two rounds of multiply and shift on wrapping 64-bit integers; the top 24 bits as a fraction."""
    key = key * FIRST
    key ^= key >> 31
    key *= SECOND
    key ^= key >> 29
    key *= FIRST
    return ((key >> 39) & 0xFFFFFF).float() / 2**24
