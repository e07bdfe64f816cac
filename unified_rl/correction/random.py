"""Random selections that depend on nothing but a seed and the data: the same rows give the same draw in any order."""

from __future__ import annotations

import torch
from tensordict import TensorDictBase
from torch import Tensor

from unified_rl.correction.levels import Layout

PRIME = 2_147_483_647


def row_noise(batch: TensorDictBase, layout: Layout, seed: int) -> Tensor:
    """A number in [0, 1) for each row, ``[B, 1]`` float64: a hash of the seed and the row's id or content."""
    return _mixed(_row_key(batch, layout, seed)).double() / PRIME


def unit_noise(batch: TensorDictBase, layout: Layout, seed: int) -> Tensor:
    """A number in [0, 1) for each unit, ``[B, N]`` float64: a hash of the seed, the row and its position."""
    position = layout.mask.cumsum(-1)
    return _mixed(_row_key(batch, layout, seed) + 7919 * position).double() / PRIME


def _row_key(batch: TensorDictBase, layout: Layout, seed: int) -> Tensor:
    row = batch.get("row_id", None)
    if row is None:  # the log-probs' own bits tell rows apart, wherever they stand in the batch
        bits = batch["behavior_log_prob"].float().contiguous().view(torch.int32).long() & 0x7FFFFFFF
        weight = layout.mask.cumsum(-1) * 31 + 17
        row = torch.where(layout.mask, (bits * weight) % PRIME, 0).sum(-1)
    return ((row.unsqueeze(-1) + 1_000_003 * (seed + 1)) % PRIME).long()


def _mixed(key: Tensor) -> Tensor:
    """Multiplicative mixing in 31 bits."""
    for factor, shift in ((48_271, 13), (69_621, 17), (39_373, 11)):
        key = ((key % PRIME) * factor) % PRIME
        key = key ^ (key >> shift)
    return key % PRIME
