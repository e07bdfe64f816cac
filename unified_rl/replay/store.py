"""Where the leaves and columns of a replay live: in memory, or in memory-mapped files with a commit journal."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from tensordict import TensorDict
from tensordict.memmap import MemoryMappedTensor
from torch import Tensor
from torchrl.data import LazyMemmapStorage, LazyTensorStorage

from unified_rl.errors import CheckpointError, ConfigError, DamageError, RecordError
from unified_rl.files import Manifest, entry, flush
from unified_rl.replay.checksums import Changes, RowSums, Words
from unified_rl.replay.files import lock, read_meta, write_meta
from unified_rl.replay.journal import Journal
from unified_rl.replay.ring import IntArray, Ring
from unified_rl.replay.schema import Schema

SPARE_SHARE = 8
"""One position more in so many, for rows of a write that is not committed yet."""
BLOCK, BLOCK_SHARE = 4096, 16
"""Slots under one checksum, at most and as a share of the capacity."""
ROWS_INDEX = "rows/meta.json"
UNSET_WHEN_NEW = "use_count"
"""The column that is zero in a new row."""
NUMPY_LACKS = (torch.bfloat16,)
Result = TypeVar("Result")


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
Columns = dict[str, NDArray[Any]]
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

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.storage: Any = None
        self.schema: Schema | None = None

    def layout(self, capacity: int, lanes: int) -> tuple[int, int]:
        """Positions for a capacity, and rows that one write may bring."""
        return capacity, capacity

    def open(self, ring: Ring) -> dict[str, Any] | None:
        """What was committed earlier, if this store exists already."""
        self.ring = ring
        return None

    def columns(self, types: Mapping[str, Any]) -> Columns:
        """The per-row columns outside the schema, as last committed or zeroed."""
        return {name: np.zeros(self.ring.physical, dtype=dtype) for name, dtype in types.items()}

    def allocate(self, schema: Schema, ring: Ring) -> Leaves:
        """Creates the leaves, zeroed."""
        self.storage = LazyTensorStorage(ring.physical, device=self.device)
        fields = schema.fields.items()
        zeros = {
            key: torch.zeros(ring.physical, *shape, dtype=dtype, device=self.device) for key, (shape, dtype) in fields
        }
        return self._attach(TensorDict(zeros, batch_size=[ring.physical], device=self.device), schema)

    def _attach(self, rows: TensorDict, schema: Schema) -> Leaves:
        self.storage._storage, self.storage.initialized = rows, True
        return {key: Leaf(rows.get(key).as_subclass(Tensor)) for key in schema.fields}

    def verify(self) -> None:
        """Checks what lies in files; nothing does here."""

    def close(self) -> None:
        """Gives the files back."""


def _on_disk(method: Callable[..., Result]) -> Callable[..., Result]:
    """Of a method of :class:`MemmapStore`: what the system says of a disk becomes one error that names the replay."""

    @wraps(method)
    def checked(self: MemmapStore, *args: Any, **options: Any) -> Result:
        try:
            return method(self, *args, **options)
        except OSError as error:
            raise CheckpointError(f"the replay at {self.path} could not be opened or written: {error}") from error

    return checked


class MemmapStore(MemoryStore):
    """Rows in memory-mapped files (a :class:`LazyMemmapStorage`), with a commit journal and checksums.

    The process may be killed at any instruction: a reopened store holds what the last commit named. ``replay.json``
    holds what never changes and is written last when the store is made; ``journal.bin`` holds what every commit
    changes. Rows go to positions that hold no live row, hence the spare ones. Columns, which change in place, live in
    memory and are copied to their files: first into ``changes.bin``, then the commit, then the file, so a change that a
    kill cut short is made again.

    Checksums: of rows a sum for each leaf and block of rows (``checksums.bin``, and of the last block in the journal),
    of columns a sum over the live rows in the journal, of the rest in each file itself. All are compared when the store
    is opened and by :meth:`verify`. Bytes that no live row owns are not covered.

    Args:
        path: folder of the store.
        durable: also survive the machine's failure: the files are synchronised before and after each commit.

    Raises:
        CheckpointError: the folder is in use, damaged, or of another version or size.
    """

    def __init__(self, path: str | Path, durable: bool = False) -> None:
        super().__init__(torch.device("cpu"))
        self.path, self.durable = Path(path), durable
        _refuse_others_rows(self.path)
        self.journal: Journal | None = None
        try:
            (self.path / "columns").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CheckpointError(f"replay.path={self.path} cannot hold a replay: {error}") from error
        self._lock = lock(self.path / "lock")
        self._files: list[Path] = []

    def layout(self, capacity: int, lanes: int) -> tuple[int, int]:
        slots = capacity // lanes
        spare = -(-slots // SPARE_SHARE)
        self.block = max(1, min(BLOCK, slots // BLOCK_SHARE)) * lanes
        # a block's checksum needs all its rows: those of the oldest live row's block are kept beside the spare ones
        return capacity + spare * lanes + self.block, spare * lanes

    @_on_disk
    def open(self, ring: Ring) -> dict[str, Any] | None:
        self.ring = ring
        if not (self.path / "replay.json").exists():
            if Journal.committed_rows(self.path / "journal.bin"):
                raise DamageError(f"{self.path} has a journal of committed rows, but replay.json is missing")
            return None
        meta = read_meta(self.path / "replay.json")
        expected = {"capacity": ring.capacity, "physical": ring.physical, "lanes": ring.lanes, "block": self.block}
        for name, value in expected.items():
            if meta.get(name) != value:
                raise CheckpointError(f"the replay at {self.path} was made with {name}={meta.get(name)}, not {value}")
        self.schema = Schema.from_plain(meta["schema"])
        Manifest(self.path, {ROWS_INDEX: [meta["rows_index"]]}).check()
        self.journal = Journal.open(self.path / "journal.bin")
        return self.journal.payload

    # -- columns ---------------------------------------------------------------------------------------------------

    @_on_disk
    def columns(self, types: Mapping[str, Any]) -> Columns:
        """The columns in memory; those of a sampler that the last commit did not know begin at zero."""
        self._columns = {name: np.zeros(self.ring.physical, dtype=dtype) for name, dtype in types.items()}
        self._column_words = {name: Words(values) for name, values in self._columns.items()}
        payload = {} if self.journal is None else self.journal.payload
        self._column_sums = {name: int(payload.get("columns", {}).get(name, 0)) for name in types}
        self._quoted = {name: json.dumps(name) for name in types}
        self._order = {name: number for number, name in enumerate(types)}
        self._column_files: Columns = {}
        for name, dtype in types.items():
            held = name in payload.get("columns", {})
            self._column_files[name] = self._map_column(name, dtype, held)
            if held:
                self._columns[name][:] = self._column_files[name]
        self.changes = Changes(self.path / "changes.bin", made=self.journal is not None)
        self._files.append(self.changes.path)
        if self.journal is not None:
            self._catch_up(self.journal, list(payload.get("columns", {})))
        return self._columns

    def unsigned(self, name: str) -> str:
        """An unsigned type of the width that the file of a column has; four bytes where it has none."""
        file = self.path / "columns" / f"{_file_name(name)}.bin"
        width = file.stat().st_size // self.ring.physical if file.is_file() else 0
        return f"u{width}" if width in (1, 2, 4, 8) else "u4"

    def _map_column(self, name: str, dtype: Any, held: bool) -> NDArray[Any]:
        file = self.path / "columns" / f"{_file_name(name)}.bin"
        size = self.ring.physical * np.dtype(dtype).itemsize
        found = file.stat().st_size if file.exists() else None
        if held and found != size:
            raise DamageError(f"{file} is damaged: it holds {found or 0} bytes of {size}")
        self._files.append(file)
        mapped = np.memmap(file, dtype=dtype, mode="r+" if found == size else "w+", shape=(self.ring.physical,))
        return np.asarray(mapped)

    def _catch_up(self, journal: Journal, names: list[str]) -> None:
        """Makes the change of the last commit again, which a kill may have cut short."""
        types = [self._columns[name].dtype if name in self._columns else np.dtype(np.uint64) for name in names]
        change = self.changes.read(journal.sequence, types)
        if change is not None and names[change[0]] in self._columns:
            for columns in (self._columns, self._column_files):
                columns[names[change[0]]][change[1]] = change[2]

    # -- rows ------------------------------------------------------------------------------------------------------

    @_on_disk
    def allocate(self, schema: Schema, ring: Ring) -> Leaves:
        self.storage = LazyMemmapStorage(ring.physical, scratch_dir=self.path / "rows")
        sizes = {key: ring.physical * shape.numel() * dtype.itemsize for key, (shape, dtype) in schema.fields.items()}
        files = {key: self.path / "rows" / f"{_file_name(key)}.memmap" for key in sizes}
        self._files += files.values()
        fresh = self.schema is None
        if fresh:
            self._create(schema, ring.physical, sum(sizes.values()))
        for key, file in files.items():
            held = file.stat().st_size if file.is_file() else 0
            if held != sizes[key]:
                raise DamageError(f"{file} holds {held} bytes of {sizes[key]}: the replay is damaged")
        try:
            leaves = self._attach(_mapped(files, schema, ring.physical), schema)
        except (OSError, RuntimeError, ValueError) as error:
            raise CheckpointError(f"the rows of the replay at {self.path} cannot be mapped: {error}") from error
        self.sums = RowSums(self.path / "checksums.bin", _bytes(leaves), ring, self.block, made=not fresh)
        self._files.append(self.sums.path)
        if fresh:
            self.journal = Journal.create(self.path / "journal.bin")
            meta = {"capacity": ring.capacity, "physical": ring.physical, "lanes": ring.lanes, "block": self.block}
            index = entry(self.path / ROWS_INDEX)
            write_meta(self.path / "replay.json", {**meta, "schema": schema.to_plain(), "rows_index": index})
            self.schema = schema
        return leaves

    def _create(self, schema: Schema, physical: int, size: int) -> None:
        """Makes the files, all zeros; what a process left that ended before it committed anything goes.

        Beside them lies the index by which tensordict finds them; nothing here reads it.
        """
        free = shutil.disk_usage(self.path).free
        if size > free:
            raise ConfigError(f"the replay needs {size >> 20} MiB under {self.path}, but {free >> 20} MiB are free")
        shutil.rmtree(self.path / "rows", ignore_errors=True)
        (self.path / "checksums.bin").unlink(missing_ok=True)
        row = {key: torch.zeros(shape, dtype=dtype) for key, (shape, dtype) in schema.fields.items()}
        TensorDict(row, batch_size=[]).expand(physical).memmap_like(prefix=str(self.path / "rows"))

    # -- commits ---------------------------------------------------------------------------------------------------

    @_on_disk
    def restore(self, payload: Mapping[str, Any]) -> None:
        """Takes over the checksums of a commit, and compares everything with them.

        Raises:
            DamageError: a file is not as it was written; the message names it.
        """
        if "rows" in payload:
            self.sums.load(payload["rows"], self.ring.written)
            self.verify()

    def wrote(self, low: int, high: int) -> None:
        """The rows ``[low, high)`` lie in the leaves and columns; the ring does not count them yet."""
        ring = self.ring
        self.sums.add(high)
        pieces = ring.pieces(low, high)
        left = max(0, low - ring.capacity), max(0, high - ring.capacity)
        for name, words in self._column_words.items():
            new = words.over(ring, low, high) if name != UNSET_WHEN_NEW else 0
            gone = words.over(ring, *left) if left[1] else 0
            self._column_sums[name] = (self._column_sums[name] + new - gone) & words.mask
            file, values = self._column_files[name], self._columns[name]
            for _, first, last in pieces:
                file[first:last] = values[first:last]

    def start(self, serial: int) -> None:
        """Forgets every row; the next one is ``serial``."""
        if self.journal is not None:
            self.sums.start(serial)
            self._column_sums = dict.fromkeys(self._column_sums, 0)

    def rewrite(self) -> None:
        """Adds up and writes out the columns of every live row, after they were set anew; no commit counts them."""
        ring = self.ring
        for name, words in self._column_words.items():
            self._column_sums[name] = words.over(ring, ring.oldest, ring.written)
            self._column_files[name][:] = self._columns[name]

    @_on_disk
    def commit(self, small: str, columns: bool = True) -> None:
        """Makes everything written so far part of what a reopened store holds.

        Args:
            small: the members of a JSON object, without its braces.
            columns: whether the columns belong to it.
        """
        if self.journal is None:
            return
        if self.durable:
            self._synchronise()
        sums = (
            ", ".join(f"{self._quoted[name]}: {value}" for name, value in self._column_sums.items()) if columns else ""
        )
        payload = f'{{{small}, "rows": {self.sums.state()}, "columns": {{{sums}}}}}'
        self.journal.commit(payload.encode(), durable=self.durable)

    @_on_disk
    def change(self, name: str, positions: IntArray, added: int, small: str) -> None:
        """Commits a change in place of a column in memory, which adds ``added`` to the column's sum."""
        if self.journal is None:
            return
        if self.durable:
            self._synchronise()  # the change before, whose notes are about to be overwritten
        values, words = self._columns[name].take(positions), self._column_words[name]
        self.changes.write(self.journal.sequence + 1, self._order[name], positions, values)
        self._column_sums[name] = (self._column_sums[name] + added) & words.mask
        self.commit(small)
        self._column_files[name][positions] = values

    @_on_disk
    def changed(self, positions: IntArray, small: str) -> None:
        """Commits whatever has changed in the columns at these positions."""
        positions = np.sort(positions)
        positions = positions[np.diff(positions, prepend=-1) != 0]  # a third of the time of np.unique
        committed = False
        for name, values in self._columns.items():
            new, old = values.take(positions), self._column_files[name].take(positions)
            after, before = new.view(_unsigned(new)), old.view(_unsigned(old))
            moved = after != before
            if moved.any():
                added = sum(after[moved].tolist()) - sum(before[moved].tolist())
                self.change(name, positions[moved], added, small)
                committed = True
        if not committed:
            self.commit(small)

    def _synchronise(self) -> None:
        for file in self._files:
            flush(file)

    @_on_disk
    def verify(self) -> None:
        """Compares every live row, and the columns, with their checksums, and reads the small files again.

        Raises:
            DamageError: a file is not as it was written; the message names it.
        """
        if self.journal is None:
            return
        meta = read_meta(self.path / "replay.json")
        Manifest(self.path, {ROWS_INDEX: [meta["rows_index"]]}).check()
        Journal.open(self.path / "journal.bin")
        self.sums.check(self.path / "rows")
        ring = self.ring
        for name, values in self._column_files.items():
            if Words(values).over(ring, ring.oldest, ring.written) != self._column_sums[name]:
                file = self.path / "columns" / f"{name}.bin"
                raise DamageError(f"{file} is damaged: it does not add up to the checksum that was written with it")

    def close(self) -> None:
        self._lock.close()


def _mapped(files: Mapping[str, Path], schema: Schema, physical: int) -> TensorDict:
    """The files as tensors of the schema's own shapes and dtypes; nothing in the folder says what they are."""
    rows = {
        key: MemoryMappedTensor.from_filename(files[key], dtype=dtype, shape=torch.Size((physical, *shape)))
        for key, (shape, dtype) in schema.fields.items()
    }
    return TensorDict(rows, batch_size=[physical])


def _bytes(leaves: Leaves) -> dict[str, NDArray[Any]]:
    """The leaves as arrays of whole words."""
    out = {}
    for key, leaf in leaves.items():
        flat = leaf.data.reshape(len(leaf.data), -1)
        out[key] = flat.view(torch.uint8).numpy() if flat.numel() else np.zeros((len(flat), 0), np.uint8)
    return out


def _unsigned(values: NDArray[Any]) -> str:
    return f"u{values.dtype.itemsize}"


def _file_name(name: str) -> str:
    """The name itself, which must stay within its folder.

    Raises:
        RecordError: it would not.
    """
    if not name or name != Path(name).name or name.startswith(".") or "\0" in name:
        raise RecordError(f"{name!r} cannot be the name of a file, which a memory-mapped replay keeps for each key")
    return name


def verify_memmap(path: str | Path) -> None:
    """Checks the folder of a memory-mapped replay that nothing has open.

    Raises:
        CheckpointError: it is in use, or of another version.
        DamageError: a file is not as it was written; the message names it.
    """
    store = MemmapStore(path)
    try:
        meta = read_meta(store.path / "replay.json")
        ring = Ring(meta["capacity"], meta["physical"], meta["lanes"])
        store.layout(ring.capacity, ring.lanes)
        payload = store.open(ring) or {}
        store.columns({name: store.unsigned(name) for name in payload.get("columns", {})})
        assert store.schema is not None
        store.allocate(store.schema, ring)
        ring.written = int(payload["written"])
        store.restore(payload)
    finally:
        store.close()


def _refuse_others_rows(path: Path) -> None:
    """Refuses a folder whose ``rows`` are none of a replay: those that an unfinished replay left are removed.

    Raises:
        ConfigError: names what is in the way.
    """
    if (path / "replay.json").exists() or not (path / "rows").is_dir():
        return
    others = [file for file in (path / "rows").iterdir() if file.suffix != ".memmap" and file.name != "meta.json"]
    if others:
        raise ConfigError(
            f"replay.path={path} holds {min(others)}, which is no file of a replay; choose another folder"
        )
