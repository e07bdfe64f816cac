"""Drawing positions in proportion to weights that keep changing."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from unified_rl.errors import RecordError
from unified_rl.replay.ring import IntArray

FloatArray = NDArray[np.float64]


class SumTree:
    """A two-level sum tree: weights in blocks, and one total a block.

    Two wide levels beat the twenty of a binary tree here, because each level costs a fixed number of array operations
    and none of Python's; the width balances a scan over all totals with a scan inside one block a query. Totals are
    always summed from their block, so the tree is a function of its weights alone, bit for bit.

    Args:
        size: number of positions; all weights start at 0.
    """

    def __init__(self, size: int) -> None:
        self.width = 1 << max(3, round(np.log2(max(1, size) / 250) / 2))
        blocks = -(-size // self.width)
        self._blocks = np.zeros((blocks, self.width))
        self._totals = np.zeros(blocks)
        self.weights: FloatArray = self._blocks.reshape(-1)
        """``[at least size]``; read it, but write through :meth:`set` and :meth:`fill`."""

    @property
    def total(self) -> float:
        """Sum of all weights."""
        return float(self._totals.sum())

    def set(self, positions: IntArray, weights: FloatArray) -> None:
        """Assigns ``weights [n]`` to ``positions [n]`` (of a repeated position the last counts)."""
        self.weights[positions] = weights
        block = positions // self.width
        self._totals[block] = self._blocks.take(block, axis=0).sum(1)

    def fill(self, first: int, last: int, weights: FloatArray | float) -> None:
        """Assigns the positions ``[first, last)``."""
        self.weights[first:last] = weights
        a, b = first // self.width, -(-last // self.width)
        self._totals[a:b] = self._blocks[a:b].sum(1)

    def draw(self, quantiles: FloatArray) -> IntArray:
        """The positions ``[n]`` at ``quantiles [n]`` in [0, 1) of the cumulated weights; never one of weight 0.

        Raises:
            RecordError: if every weight is 0.
        """
        cumulated = torch.from_numpy(self._totals).cumsum(0).numpy()  # torch's is five times faster than numpy's
        if not cumulated[-1] > 0:
            raise RecordError("every row that could be drawn has weight 0; give some a positive priority")
        at = np.minimum(quantiles * cumulated[-1], _below(cumulated[-1]))
        block = cumulated.searchsorted(at, side="right")
        inside = torch.from_numpy(self._blocks.take(block, axis=0)).cumsum(1).numpy()
        rest = at - (cumulated.take(block) - self._totals.take(block))
        # rounding must not leave the block: 0 <= rest < the block's own sum
        rest = np.maximum(np.minimum(rest, _below(inside[:, -1])), 0.0)
        column = (inside > rest[:, None]).argmax(1)  # no branch to mispredict, unlike bisection
        return np.asarray(block * self.width + column)


def _below(x: FloatArray) -> FloatArray:
    """Somewhat less than ``x``, by more than rounding can undo."""
    return x * (1.0 - 2.0**-50)
