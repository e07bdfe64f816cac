"""The state of a replay: rows, columns, random stream and sampler, and how they are saved and restored."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from unified_rl.errors import CheckpointError, ConfigError, RecordError
from unified_rl.replay.persist import Saved, lanes_and_rows, readable, save
from unified_rl.replay.ring import Ring
from unified_rl.replay.samplers.base import Sampler
from unified_rl.replay.schema import Schema
from unified_rl.replay.store import Leaves, MemmapStore, MemoryStore, write_rows

_CHUNK = 65_536


class ReplayState:
    """What a replay holds; the base of :class:`~unified_rl.replay.buffer.Replay`, which writes and samples it."""

    def __init__(self, capacity: int, lanes: int, sampler: Sampler, store: MemoryStore, seed: int) -> None:
        if lanes < 1 or capacity < lanes:
            raise ConfigError(f"capacity {capacity} must hold at least one slot of {lanes} lane(s)")
        self.lanes, self.sampler, self._store = lanes, sampler, store
        self.schema: Schema | None = None
        self._rng = np.random.Generator(np.random.PCG64(seed))
        size = capacity // lanes * lanes
        physical, self._room = store.layout(size, lanes)  # a memory-mapped write must touch no live row
        self.ring = Ring(capacity=size, physical=physical, lanes=lanes)
        self._leaves: Leaves = {}
        self._watched: list[str] = []
        self._rng_text = self._sampler_text = ""
        self._sampler_state: dict[str, Any] | None = None
        committed = store.open(self.ring)
        self._columns: dict[str, NDArray[Any]] = store.columns({"use_count": np.int32, **sampler.column_types()})
        sampler.bind(self.ring, self._columns)
        if committed is not None and store.schema is not None:
            self._allocate(store.schema)
            self._reopen(store, committed)

    def _reopen(self, store: MemoryStore, committed: Mapping[str, Any]) -> None:
        """Goes on from the commit of a memory-mapped replay, after all of it was compared with its checksums."""
        assert isinstance(store, MemmapStore)
        self.ring.written = int(committed["written"])
        store.restore(committed)
        if not self._restore(
            committed
        ):  # another sampler set the columns of live rows anew, which nothing may cut short
            store.commit(self._small_text(), columns=False)
            store.rewrite()
            self._commit()

    def __len__(self) -> int:
        return self.ring.live

    @property
    def capacity(self) -> int:
        """Rows held at most."""
        return self.ring.capacity

    @property
    def write_count(self) -> int:
        """Rows ever written."""
        return self.ring.written

    def _allocate(self, schema: Schema) -> Schema:
        absent = [key for key in self.sampler.keys if key not in schema.fields]
        if absent:
            name = type(self.sampler).__name__
            raise RecordError(f"the sampler {name} needs {', '.join(absent)}; rows hold {', '.join(schema.fields)}")
        self._leaves = self._store.allocate(schema, self.ring)
        self._watched = [key for key in (*self.sampler.keys, *self.sampler.optional_keys) if key in schema.fields]
        self.schema = schema
        return schema

    def _commit(self) -> None:
        if isinstance(self._store, MemmapStore):
            self._store.commit(self._small_text())

    def _small_text(self) -> str:
        """The members of :meth:`_small_state` as JSON; parts that have not changed are not written out again."""
        state = self.sampler.state_dict()
        if state != self._sampler_state or not self._sampler_text:
            self._sampler_state, self._sampler_text = state, json.dumps([type(self.sampler).__name__, state])
        if not self._rng_text:
            self._rng_text = json.dumps(self._rng.bit_generator.state)
        return f'"written": {self.ring.written}, "rng": {self._rng_text}, "sampler": {self._sampler_text}'

    def _small_state(self) -> dict[str, Any]:
        """Everything but rows and columns, JSON-able."""
        return {
            "written": self.ring.written,
            "rng": self._rng.bit_generator.state,
            "sampler": [type(self.sampler).__name__, self.sampler.state_dict()],
        }

    def _meta(self) -> dict[str, Any]:
        schema = None if self.schema is None else self.schema.to_plain()
        return {**self._small_state(), "capacity": self.capacity, "lanes": self.lanes, "schema": schema}

    def _pieces(self) -> dict[str, list[Tensor]]:
        """The live rows and columns, oldest first, each as views of at most two stretches of the ring."""
        leaves = {f"row.{key}": leaf.data for key, leaf in self._leaves.items()}
        columns = {f"column.{key}": torch.from_numpy(values) for key, values in self._columns.items()}
        runs = self.ring.pieces(self.ring.oldest, self.ring.written)
        return {name: [data[a:b] for _, a, b in runs] for name, data in {**leaves, **columns}.items()}

    def _check_meta(self, meta: Mapping[str, Any]) -> None:
        for name, value in (("capacity", self.capacity), ("lanes", self.lanes)):
            if meta[name] != value:
                raise CheckpointError(f"the saved replay has {name}={meta[name]}, this one {name}={value}")
        if meta["schema"] is None or self.schema is None:
            return
        if self.schema.to_plain() != meta["schema"]:
            raise CheckpointError(f"the saved rows are {meta['schema']}, this replay holds {self.schema.to_plain()}")

    def _load(self, meta: Mapping[str, Any], names: set[str], read: Callable[[str, int, int], Tensor]) -> None:
        """Takes over a saved replay; ``read(name, first, last)`` returns saved rows, oldest first."""
        self._check_meta(meta)
        if meta["schema"] is not None and self.schema is None:
            self._allocate(Schema.from_plain(meta["schema"]))
        self.empty()
        written = int(meta["written"])
        low = max(0, written - self.capacity)
        mapped = self._store if isinstance(self._store, MemmapStore) else None
        if mapped is not None:
            mapped.start(low)
        for first in range(low, written, _CHUNK):
            last = min(first + _CHUNK, written)
            at, end = first - low, last - low
            runs = self.ring.pieces(first, last)
            write_rows(self._leaves, {key: read(f"row.{key}", at, end) for key in self._leaves}, runs)
            for key, values in self._columns.items():
                saved = f"column.{key}" in names
                self.ring.write(values, first, last, read(f"column.{key}", at, end).numpy() if saved else 0)
            if mapped is not None:
                mapped.sums.add(last)
        self._restore(meta)
        if mapped is not None:
            mapped.rewrite()
        self._commit()

    def _restore(self, state: Mapping[str, Any]) -> bool:
        """Takes over the small state and rebuilds what the sampler derives from rows and columns.

        Returns:
            Whether the columns stay as they were, since the sampler is the one that made them.
        """
        self.ring.written = int(state["written"])
        if "rng" not in state:
            return True  # a store that was made and never written to
        self._rng.bit_generator.state = state["rng"]
        self._rng_text = ""
        name, sampler_state = state["sampler"]
        same = bool(name == type(self.sampler).__name__)
        self.sampler.reset()
        tell = self.sampler.restore if same else self.sampler.wrote
        for low in range(self.ring.oldest, self.ring.written, _CHUNK):
            high = min(low + _CHUNK, self.ring.written)
            pieces = self.ring.pieces(low, high)
            tell(
                low,
                high,
                {k: to_numpy(torch.cat([self._leaves[k].data[a:b] for _, a, b in pieces])) for k in self._watched},
            )
        if same:
            self.sampler.load_state_dict(sampler_state)
        return same

    def empty(self, seed: int | None = None) -> None:
        """Forgets every row; the schema stays, and the random stream goes on, or begins again from ``seed``."""
        self.ring.written = 0
        if seed is not None:
            self._rng, self._rng_text = np.random.Generator(np.random.PCG64(seed)), ""
        self.sampler.reset()
        if isinstance(self._store, MemmapStore):
            self._store.start(0)
        self._commit()

    def verify(self) -> None:
        """Compares every live row of a memory-mapped replay, and its columns, with the checksums written with them.

        The same happens when the replay is opened. A replay in memory has nothing to compare.

        Raises:
            DamageError: a file is not as it was written; the message names it.
        """
        self._store.verify()

    def dumps(self, path: str | Path) -> None:
        """Saves the replay to the folder ``path``; only live rows are written, and an old save is replaced in one step.

        Raises:
            CheckpointError: the folder cannot be written; an older save there is intact.
        """
        save(path, self._meta(), self._pieces() if self.schema is not None else {})

    def loads(self, path: str | Path) -> None:
        """Restores :meth:`dumps`: the same rows, and bit for bit the same next draw.

        A sampler of another class than the saved one starts afresh from the saved rows.

        Raises:
            CheckpointError: the folder is missing, damaged or of another version, or its capacity, lanes or schema
                differ from this replay's; nothing has changed then.
        """
        with readable(path):
            saved = Saved(path)
            lanes_and_rows(saved.meta, path)
            self._load(saved.meta, saved.names(), saved.read)

    def state_dict(self) -> dict[str, Any]:
        """The replay as tensors and one string (``meta``, JSON); live rows are copied."""
        pieces = self._pieces() if self.schema is not None else {}
        tensors = {name: torch.cat(parts) for name, parts in pieces.items()}
        return {"meta": json.dumps(self._meta()), **tensors}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores :meth:`state_dict`.

        Raises:
            CheckpointError: its capacity, lanes or schema differ from this replay's.
        """
        self._load(json.loads(state["meta"]), set(state), lambda name, first, last: state[name][first:last])

    def close(self) -> None:
        """Gives a memory-mapped replay's folder free for another process."""
        self._store.close()


def to_numpy(value: Tensor) -> NDArray[Any]:
    return value.detach().cpu().numpy()
