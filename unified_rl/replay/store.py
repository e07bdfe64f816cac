"""The leaves of a replay inside TorchRL's storages."""

from __future__ import annotations

from typing import Any

import torch
from numpy.typing import NDArray
from tensordict import TensorDict
from torch import Tensor
from torchrl.data import LazyTensorStorage

from unified_rl.replay.schema import Schema


class Leaf:
    """One named column of rows: ``data [positions, *]``."""

    def __init__(self, data: Tensor) -> None:
        self.data = data
        self.array: NDArray[Any] | None = None
        if data.device.type == "cpu" and data.dtype is not torch.bfloat16:
            self.array = data.numpy()  # numpy's slice assignment costs half of torch's

    def write(self, first: int, last: int, value: Tensor) -> None:
        """Assigns the positions ``[first, last)``."""
        if self.array is not None and value.device.type == "cpu":
            self.array[first:last] = value.detach().numpy()
        else:
            self.data[first:last].copy_(value)


Leaves = dict[str, Leaf]


class MemoryStore:
    """Rows in RAM or on a GPU, in a :class:`LazyTensorStorage`."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.storage: Any = None

    def allocate(self, schema: Schema, positions: int) -> Leaves:
        """Creates ``positions`` zeroed rows."""
        self.storage = LazyTensorStorage(positions, device=self.device)
        return self._open(schema)

    def _open(self, schema: Schema) -> Leaves:
        row = {key: torch.zeros(shape, dtype=dtype) for key, (shape, dtype) in schema.fields.items()}
        self.storage._init(TensorDict(row, batch_size=[]))
        return {key: Leaf(self.storage._storage.get(key).as_subclass(Tensor)) for key in schema.fields}
