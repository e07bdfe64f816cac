"""Where the leaves and columns of a replay live: in memory, or in memory-mapped files with a commit journal."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tensordict import TensorDict
from torch import Tensor
from torchrl.data import LazyMemmapStorage, LazyTensorStorage

from unified_rl.errors import CheckpointError, ConfigError
from unified_rl.replay.files import lock, read_meta, write_meta
from unified_rl.replay.journal import Journal
from unified_rl.replay.schema import Schema

NUMPY_LACKS = (torch.bfloat16,)


class Leaf:
    """One named column of rows: ``data [positions, *]``."""

    def __init__(self, data: Tensor) -> None:
        self.data = data
        self.array: NDArray[Any] | None = None
        if data.device.type == "cpu" and data.dtype not in NUMPY_LACKS:
            self.array = data.numpy()  # numpy's slice assignment costs half of torch's

    def read(self, position: NDArray[np.int64], index: Tensor) -> Tensor:
        """The rows at these positions; ``index`` is the same on the leaf's device."""
        if self.array is not None:
            return torch.from_numpy(self.array.take(position, axis=0))  # a third of index_select's fixed cost
        return self.data.index_select(0, index)


Leaves = dict[str, Leaf]
Runs = list[tuple[int, int, int]]
"""Stretches of positions: ``(offset in the values, first, last + 1)``."""


def write_rows(leaves: Leaves, items: Mapping[str, Tensor], runs: Runs) -> None:
    """Assigns the values ``[n, *]`` of every leaf to the positions of ``runs``."""
    _, start, stop = runs[0]
    whole = len(runs) == 1
    for key, leaf in leaves.items():
        value, array = items[key], leaf.array
        if array is not None and value.is_cpu and not value.requires_grad:
            source = value.numpy()
            if whole:
                array[start:stop] = source
                continue
            for offset, first, last in runs:
                array[first:last] = source[offset : offset + last - first]
        else:
            for offset, first, last in runs:
                leaf.data[first:last].copy_(value.detach()[offset : offset + last - first])


class MemoryStore:
    """Rows in RAM or on a GPU, in a :class:`LazyTensorStorage`."""

    spare_share = 0
    journal: Journal | None = None

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.storage: Any = None
        self.schema: Schema | None = None

    def open(self, capacity: int, physical: int, lanes: int) -> dict[str, Any] | None:
        """What was committed earlier, if this store exists already."""
        return None

    def column(self, name: str, dtype: Any, positions: int) -> NDArray[Any]:
        """A per-row column outside the schema, zeroed."""
        return np.zeros(positions, dtype=dtype)

    def allocate(self, schema: Schema, capacity: int, physical: int, lanes: int) -> Leaves:
        """Creates the leaves, zeroed."""
        self.storage = LazyTensorStorage(physical, device=self.device)
        fields = schema.fields.items()
        zeros = {key: torch.zeros(physical, *shape, dtype=dtype, device=self.device) for key, (shape, dtype) in fields}
        return self._attach(TensorDict(zeros, batch_size=[physical], device=self.device), schema)

    def _attach(self, rows: TensorDict, schema: Schema) -> Leaves:
        self.storage._storage, self.storage.initialized = rows, True
        return {key: Leaf(rows.get(key).as_subclass(Tensor)) for key in schema.fields}

    def commit(self, payload: dict[str, Any]) -> None:
        """Makes everything written so far part of what a reopened store holds."""

    def close(self) -> None:
        """Gives the files back."""


class MemmapStore(MemoryStore):
    """Rows in memory-mapped files (a :class:`LazyMemmapStorage`), with a commit journal.

    The process may be killed at any instruction: a reopened store holds what the last commit named. ``replay.json``
    holds what never changes and is written last when the store is made; ``journal.bin`` holds what every commit
    changes. Writes go to positions that hold no live row, hence the spare ones.

    Args:
        path: folder of the store.
        durable: also survive the machine's failure: the files are synchronised before and after each commit.

    Raises:
        CheckpointError: the folder is in use, damaged, or of another version or size.
    """

    spare_share = 8
    journal: Journal | None

    def __init__(self, path: str | Path, durable: bool = False) -> None:
        super().__init__(torch.device("cpu"))
        self.path, self.durable = Path(path), durable
        self.journal = None
        try:
            (self.path / "columns").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CheckpointError(f"replay.path={self.path} cannot hold a replay: {error}") from error
        self._lock = lock(self.path / "lock")
        self._files: list[Path] = []

    def open(self, capacity: int, physical: int, lanes: int) -> dict[str, Any] | None:
        if not (self.path / "replay.json").exists():
            if Journal.committed_rows(self.path / "journal.bin"):
                raise CheckpointError(f"{self.path} has a journal of committed rows, but replay.json is missing")
            return None
        meta = read_meta(self.path / "replay.json")
        expected = {"capacity": capacity, "physical": physical, "lanes": lanes}
        for name, value in expected.items():
            if meta[name] != value:
                raise CheckpointError(f"the replay at {self.path} was made with {name}={meta[name]}, not {value}")
        self.schema = Schema.from_plain(meta["schema"])
        self.journal = Journal.open(self.path / "journal.bin")
        return self.journal.payload

    def column(self, name: str, dtype: Any, positions: int) -> NDArray[Any]:
        file = self.path / "columns" / f"{name}.bin"
        size = positions * np.dtype(dtype).itemsize
        mode = "r+" if file.exists() and file.stat().st_size == size else "w+"
        self._files.append(file)
        return np.asarray(np.memmap(file, dtype=dtype, mode=mode, shape=(positions,)))  # type: ignore[call-overload]

    def allocate(self, schema: Schema, capacity: int, physical: int, lanes: int) -> Leaves:
        folder = self.path / "rows"
        self.storage = LazyMemmapStorage(physical, scratch_dir=folder)
        if self.schema is None:
            self._create(schema, physical, folder)
            self.journal = Journal.create(self.path / "journal.bin")
            meta = {"capacity": capacity, "physical": physical, "lanes": lanes, "schema": schema.to_plain()}
            write_meta(self.path / "replay.json", meta)
            self.schema = schema
        for key, (shape, dtype) in schema.fields.items():
            file = folder / f"{key}.memmap"
            self._files.append(file)
            size = physical * shape.numel() * dtype.itemsize
            if not file.exists() or file.stat().st_size < size:
                held = file.stat().st_size if file.exists() else 0
                raise CheckpointError(f"{file} holds {held} bytes of {size}: the replay is damaged")
        try:
            rows = TensorDict.load_memmap(folder)
        except (OSError, RuntimeError, ValueError, KeyError) as error:
            raise CheckpointError(f"the rows of the replay at {self.path} cannot be mapped: {error}") from error
        return self._attach(rows, schema)

    def _create(self, schema: Schema, physical: int, folder: Path) -> None:
        size = sum(physical * shape.numel() * dtype.itemsize for shape, dtype in schema.fields.values())
        free = shutil.disk_usage(self.path).free
        if size > free:
            raise ConfigError(f"the replay needs {size >> 20} MiB under {self.path}, but {free >> 20} MiB are free")
        shutil.rmtree(folder, ignore_errors=True)  # left by a process that ended before it committed anything
        row = {key: torch.zeros(shape, dtype=dtype) for key, (shape, dtype) in schema.fields.items()}
        TensorDict(row, batch_size=[]).expand(physical).memmap_like(prefix=str(folder))

    def commit(self, payload: dict[str, Any]) -> None:
        if self.journal is None:
            return
        if self.durable:
            self._synchronise()
        self.journal.commit(payload, durable=self.durable)

    def _synchronise(self) -> None:
        for file in self._files:
            descriptor = os.open(file, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)

    def close(self) -> None:
        self._lock.close()
