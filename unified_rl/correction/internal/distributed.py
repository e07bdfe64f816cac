"""Order statistics of values that may be spread over several processes, found from sums alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Total = Callable[[Tensor], Tensor]
"""Sums a tensor, of any shape, over the processes that share an optimiser batch; all must call it in the same order."""

BITS = 11
"""Bits of a value that one pass over the processes settles."""

SAMPLE = 16
"""One value in so many is looked at to bound a small order statistic."""


def identity(x: Tensor) -> Tensor:
    """The sum over one process."""
    return x


def process_total(group: Any = None) -> Total:
    """Sums over the processes of a ``torch.distributed`` group: ``correction.total = process_total()``.

    Every process must hold whole groups of rows and call the correction equally often.

    Args:
        group: a process group; the default one if not given.
    """

    def total(x: Tensor) -> Tensor:
        everywhere = x.clone()
        torch.distributed.all_reduce(everywhere, group=group)
        return everywhere

    return total


def crossing(
    values: Tensor, allowance: Tensor | float, total: Total, weight: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """The smallest of ``values`` such that those up to it weigh more than ``allowance``; infinity where none does.

    With ``allowance = k - 1`` and no weights it is the k-th smallest value. Several processes get the same answer, in a
    fixed number of sums of one small histogram (3 for float32, 6 for float64), whatever their shares are.

    Args:
        values: ``[n]`` float, this process's share; no NaN.
        allowance: scalar, the same on every process.
        total: sums over processes; :func:`identity` where there is one.
        weight: positive weights ``[n]`` float64 as a function of values; each value weighs 1 if not given.

    Returns:
        Scalar of the dtype of ``values``, at least float32.
    """
    values = values if values.dtype in (torch.float32, torch.float64) else values.float()
    if total is identity:
        return _here(values, allowance, weight)
    return _spread(values, allowance, total, weight)


def _here(values: Tensor, allowance: Tensor | float, weight: Callable[[Tensor], Tensor] | None) -> Tensor:
    if weight is None:
        k = int(allowance) + 1
        return _smallest(values, k) if k <= values.numel() else values.new_full((), torch.inf)
    ordered = values.sort().values
    beyond = ordered[weight(ordered).cumsum(0) > allowance]  # weights are positive: a tail of the list
    return beyond[0] if beyond.numel() else values.new_full((), torch.inf)


def _smallest(values: Tensor, k: int) -> Tensor:
    """The k-th smallest; a bound taken from every 16th value leaves few to choose from."""
    sample = values[::SAMPLE]
    bound = sample.kthvalue(min(2 * k // SAMPLE + SAMPLE, sample.numel())).values
    few = values[values <= bound]
    return (few if few.numel() >= k else values).kthvalue(k).values


def _spread(
    values: Tensor, allowance: Tensor | float, total: Total, weight: Callable[[Tensor], Tensor] | None
) -> Tensor:
    """Fixes the answer's bits from the top, by histograms of those values that share the bits found so far."""
    width = 8 * values.element_size()
    key = _ordered_bits(values)
    weights = torch.ones_like(values, dtype=torch.float64) if weight is None else weight(values).double()
    below = weights.new_zeros(())
    found = key.new_zeros(())
    missing = None
    for shift in reversed(range(0, width, BITS)):
        mask = (1 << min(BITS, width - shift)) - 1
        digit = (key >> shift) & mask
        histogram = total(torch.bincount(digit, weights=weights, minlength=1 << BITS))
        reached = below + histogram.cumsum(0)
        over = reached > allowance
        missing = ~over[-1] if missing is None else missing  # later passes may round the other way
        last = (histogram > 0).nonzero()[-1:].sum()
        place = torch.where(over[-1], over.int().argmax(), last)
        below = reached[place] - histogram[place]
        found = (found << min(BITS, width - shift)) | place
        weights = weights * (digit == place)
    assert missing is not None
    return torch.where(missing, torch.inf, _value_of(found, values.dtype)).to(values.dtype)


def _ordered_bits(values: Tensor) -> Tensor:
    """Integers whose unsigned order is that of the values."""
    values = values + 0.0  # -0.0 becomes 0.0
    if values.dtype == torch.float32:
        bits = values.view(torch.int32).long()
        return torch.where(bits < 0, ~bits, bits + 2**31)
    bits = values.view(torch.int64)
    return torch.where(bits < 0, ~bits, bits ^ -(2**63))


def _value_of(key: Tensor, dtype: torch.dtype) -> Tensor:
    """The value that :func:`_ordered_bits` turned into ``key``."""
    if dtype == torch.float32:
        bits = torch.where(key >= 2**31, key - 2**31, ~key)
        return bits.to(torch.int32).view(torch.float32)
    return torch.where(key < 0, key ^ -(2**63), ~key).view(torch.float64)
