"""A policy's state as one flat array a dtype: few large buffers travel faster than many tensors, and copy nothing."""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from unified_rl.errors import ConfigError


class Flat(NamedTuple):
    """Parameters and persistent buffers of a module.

    Attributes:
        layout: of every entry of its ``state_dict``: name, dtype, first value in the array of that dtype, and shape.
            Entries that show the same memory, such as tied weights, have the same place.
        arrays: the values, by dtype, as bytes ``[n]`` uint8: NumPy has no bfloat16.
    """

    layout: list[tuple[str, str, int, tuple[int, ...]]]
    arrays: dict[str, NDArray[np.uint8]]


def pack(module: nn.Module) -> Flat:
    """A copy of a module's state, with one copy from its device a dtype.

    Raises:
        ConfigError: it keeps state that is no tensor, which nobody else would have.
    """
    layout: list[tuple[str, str, int, tuple[int, ...]]] = []
    pieces: dict[str, list[Tensor]] = {}
    sizes: dict[str, int] = {}
    places: dict[tuple[Any, ...], int] = {}
    for name, value in module.state_dict().items():
        if not isinstance(value, Tensor):
            raise ConfigError(
                f"engine=ray sends the policy's weights to its workers, and {type(module).__name__} keeps {name} as a "
                f"{type(value).__name__}: make it a buffer, or use engine=local"
            )
        dtype = str(value.dtype).removeprefix("torch.")
        memory = (value.device, value.data_ptr(), dtype, value.shape, value.stride())
        place = places.get(memory) if value.numel() else None
        if place is None:
            place = places[memory] = sizes.get(dtype, 0)
            pieces.setdefault(dtype, []).append(value.detach().reshape(-1))
            sizes[dtype] = place + value.numel()
        layout.append((name, dtype, place, tuple(value.shape)))
    return Flat(layout, {dtype: torch.cat(found).cpu().view(torch.uint8).numpy() for dtype, found in pieces.items()})


def unpack_into(module: nn.Module, flat: Flat) -> None:
    """Loads :func:`pack`'s copy, as a checkpoint would be: entries may have grown since the module was built."""
    held = {dtype: _tensor(array).view(getattr(torch, dtype)) for dtype, array in flat.arrays.items()}
    state = {}
    for name, dtype, place, shape in flat.layout:
        count = int(np.prod(shape, dtype=np.int64))
        state[name] = held[dtype][place : place + count].view(shape)
    module.load_state_dict(state)


def _tensor(array: NDArray[Any]) -> Tensor:
    """A view; arrays that come out of shared memory are read-only, and are only read here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.from_numpy(array)
