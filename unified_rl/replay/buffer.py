"""The one replay: a ring of rows behind a fixed schema, written and read leaf by leaf."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from unified_rl.configurable import configurable
from unified_rl.devices import device_of
from unified_rl.errors import ConfigError, RecordError
from unified_rl.instantiate import nearest
from unified_rl.ranges import Count, Seed, UnitInterval, ranged
from unified_rl.replay.ingest import from_collector
from unified_rl.replay.ring import IntArray
from unified_rl.replay.samplers.base import Sampler
from unified_rl.replay.schema import Schema
from unified_rl.replay.state import ReplayState, to_numpy
from unified_rl.replay.store import Leaves, MemmapStore, MemoryStore, write_rows
from unified_rl.units import STEP_KEYS

Rows: TypeAlias = TensorDictBase | Mapping[str, Tensor]
_ONE = np.int32(1)


@configurable
@ranged("replay")
class Replay(ReplayState):
    """Experience of either domain: transitions in lanes, or responses as rows.

    Rows of one write are consecutive. With ``lanes > 1`` a write is ``[T, lanes]``, row ``index = slot * lanes +
    lane``, and windows follow one lane through time. The key set, trailing shapes and dtypes of the first write (or
    of :meth:`set_schema`) bind all later ones. It has TorchRL's buffer interface, so that a TorchRL collector can
    write into it. One writer a process, and no lock: a reader in another thread sees committed rows only, but may
    find one overwritten while it reads if the ring is full.

    Args:
        capacity: rows held at most (rounded down to whole slots).
        lanes: rows of one slot, one a simulation; 1 for language rows.
        sampler: how rows are drawn.
        storage: ``memory``, or ``memmap``: files under ``path`` that survive the process. A kill at any instruction
            loses no committed row; a replay made again with the same ``path`` continues, with the same next draw.
        path: the folder of a memory-mapped replay.
        durable: of a memory-mapped replay: also survive the machine's failure, at the cost of a sync a write or draw.
        device: where rows are stored and sampled batches live, as torch names it.
        seed: of the replay's own random stream.
        cut: whether a window's ``step_mask`` ends with its first episode, as :func:`nstep_transitions` needs it; what
            lies behind is then lost to whoever minds the mask.
        trim_key: a ``[*, N]`` bool key; unit keys of a batch are cut to its longest row.
        count_uses: whether ``use_count`` is kept.
        discount: written to rows that come from a TorchRL collector.

    Raises:
        ConfigError: an argument that does not fit the others.
        CheckpointError: ``path`` holds a damaged replay, or one of another version or size, or is in use.
    """

    def __init__(
        self,
        capacity: Count,
        *,
        lanes: Count = 1,
        sampler: Sampler,
        storage: Literal["memory", "memmap"] = "memory",
        path: str | None = None,
        durable: bool = False,
        device: str = "cpu",
        seed: Seed = 0,
        cut: bool = False,
        trim_key: str | None = None,
        count_uses: bool = True,
        discount: UnitInterval = 0.99,
    ) -> None:
        self.device = device_of(device, "replay.device")
        self.cut, self.trim_key, self.count_uses, self.discount = cut, trim_key, count_uses, discount
        self._remote = self.device.type != "cpu"
        super().__init__(capacity, lanes, sampler, _make_store(storage, path, durable, self.device), seed)

    # -- what it holds ---------------------------------------------------------------------------------------------

    @property
    def pending(self) -> int:
        """Rows that the sampler may still return: for :class:`Fresh` the unconsumed ones, else all."""
        return self.sampler.pending()

    @property
    def use_count(self) -> Tensor:
        """``[positions]`` int32 on the CPU: how often the row at each ``index`` was drawn since it was written."""
        return torch.from_numpy(self._columns["use_count"])

    @property
    def storage(self) -> Any:
        """TorchRL's storage object that holds the rows; None before the schema is fixed."""
        storage = self._store.storage
        if storage is not None:
            storage._len = min(self.ring.written, self.ring.physical)
        return storage

    # -- writing ---------------------------------------------------------------------------------------------------

    def set_schema(self, example: Rows) -> None:
        """Fixes the schema before the first write.

        Args:
            example: a batch as a write would bring it; its values are ignored.

        Raises:
            RecordError: if a schema is fixed already and this one differs.
        """
        items, lead = self._normalise(example)
        if self.schema is not None:
            self.schema.check(items, lead)
        else:
            self._allocate(Schema.of(items, len(lead)))

    def _allocate(self, schema: Schema) -> Schema:
        if self.trim_key is not None and self.trim_key not in schema.fields:
            raise ConfigError(
                f"replay.trim_key={self.trim_key!r} is no key of the rows; {nearest(self.trim_key, schema.fields)}"
            )
        return super()._allocate(schema)

    def _normalise(self, rows: Rows) -> tuple[dict[str, Tensor], torch.Size]:
        """The leaves of a write and its batch size: ``[B]``, or ``[T, lanes]``."""
        items = dict(rows.items())
        lead = rows.batch_size if isinstance(rows, TensorDictBase) else self._guess_lead(items)
        if "next" in items and isinstance(rows, TensorDictBase):
            items, lead = self._ingest(rows)
        if len(lead) == 2 and lead[1] == self.lanes:
            return items, lead
        if len(lead) == 1 and self.lanes == 1:
            return items, lead
        wanted = "[B] or [T, 1]" if self.lanes == 1 else f"[T, {self.lanes}]"
        raise RecordError(f"rows of batch size {list(lead)} were written to a replay of {self.lanes} lane(s): {wanted}")

    def _guess_lead(self, items: Mapping[str, Tensor]) -> torch.Size:
        if not items:
            raise RecordError("a row without a single key cannot be stored")
        return next(iter(items.values())).shape[: 1 if self.lanes == 1 else 2]

    def _ingest(self, rows: TensorDictBase) -> tuple[dict[str, Tensor], torch.Size]:
        items = from_collector(rows, discount=self.discount)
        lead = rows.batch_size
        if len(lead) == 2:  # TorchRL is batch-major, slots are time-major
            items = {key: value.transpose(0, 1) for key, value in items.items()}
            lead = torch.Size((lead[1], lead[0]))
        return items, lead

    def extend(self, rows: Rows) -> Tensor:
        """Writes a batch of rows, oldest first.

        Args:
            rows: batch size ``[B]`` (one lane) or ``[T, lanes]``; or a TorchRL collector's batch, ``[T]`` or
                ``[lanes, T]``, which goes through :func:`from_collector`.

        Returns:
            ``[B]`` or ``[T, lanes]`` int64: the ``index`` of every row.

        Raises:
            RecordError: a key too few or too many, another shape or dtype, more rows than fit; nothing is written.
        """
        items, lead = self._normalise(rows)
        schema = self.schema or self._allocate(Schema.of(items, len(lead)))
        schema.check(items, lead)
        ring, count = self.ring, lead.numel()
        if count > ring.capacity:
            raise RecordError(f"{count} rows do not fit a replay of capacity {ring.capacity}; raise it")
        if len(lead) == 2:
            items = {key: value.flatten(0, 1) for key, value in items.items()}
        self.sampler.before_write(count, self._values(items))
        low = ring.written
        if count <= self._room:
            self._write(items, low, low + count)
        else:
            for at in range(0, count, self._room):
                part = {key: value[at : at + self._room] for key, value in items.items()}
                self._write(part, low + at, low + min(at + self._room, count))
        first = low % ring.physical
        index = np.arange(first, first + count)
        if first + count > ring.physical:
            index %= ring.physical
        return torch.from_numpy(index if len(lead) == 1 else index.reshape(lead))

    def _values(self, items: Mapping[str, Tensor]) -> dict[str, NDArray[Any]]:
        """What the sampler asked to see of a write."""
        return {key: to_numpy(items[key]) for key in self._watched} if self._watched else {}

    def _write(self, items: Mapping[str, Tensor], low: int, high: int) -> None:
        """Rows first, the commit last."""
        runs = self.ring.pieces(low, high)
        write_rows(self._leaves, items, runs)
        for _, first, last in runs:
            self._columns["use_count"][first:last] = 0
        self.ring.written = high
        self.sampler.wrote(low, high, self._values(items))
        if isinstance(self._store, MemmapStore):
            self._store.wrote(low, high)
            self._commit()

    def add(self, row: Rows) -> Tensor:
        """Writes one slot: a row ``[]``, or one row a lane ``[lanes]``; returns its index."""
        if isinstance(row, TensorDictBase):
            slot = row.unsqueeze(-1 if "next" in row.keys() and row.ndim else 0)
            return self.extend(slot).squeeze(0)
        return self.extend({key: value.unsqueeze(0) for key, value in row.items()}).squeeze(0)

    # -- sampling --------------------------------------------------------------------------------------------------

    def sample(
        self,
        batch_size: int | None,
        *,
        length: int | None = None,
        keys: Sequence[str] | None = None,
        version: int | None = None,
    ) -> TensorDict:
        """Draws rows, or windows of ``length`` consecutive slots of one lane.

        Args:
            batch_size: rows or windows; None draws what is left of the oldest write, from a sampler that is a queue
                (:class:`~unified_rl.replay.samplers.order.Fresh`).
            length: slots in a window; windows never cross the newest row, nor change lanes.
            keys: the leaves to read; all by default.
            version: the consumer's policy version, for samplers that bound staleness.

        Returns:
            ``[batch_size]``, or ``[batch_size, length]`` with ``step_mask`` (all True, or with ``cut`` True up to and
            including the first end of an episode); ``index`` int64 holds where each row is stored.

        Raises:
            RecordError: if the replay cannot serve the draw, or a key is unknown.
        """
        length = length or self.sampler.length
        if batch_size is None:
            batch_size = self.sampler.oldest_write(length or 1)
        draw = self.sampler.draw(batch_size, self._rng, length or 1, version)
        serials = draw.serials
        if length is not None:
            serials = (serials[:, None] + np.arange(0, length * self.lanes, self.lanes)).reshape(-1)
        position = self.ring.position(serials)
        if self.count_uses:
            np.add.at(self._columns["use_count"], position, _ONE)
        if isinstance(self._store, MemmapStore):
            self._rng_text = ""
            if self.count_uses:
                self._store.change("use_count", position, len(position), self._small_text())
            else:
                self._commit()
        index = torch.from_numpy(position)
        if self._remote:
            index = index.to(self.device)
        items = self._gather(position, index, keys)
        for key, value in draw.extras.items():
            items[key] = torch.from_numpy(value).to(self.device)
        items["index"] = index
        if length is None:
            return _tensordict(items, (batch_size,), self.device)
        return self._windows(items, batch_size, length, index)

    def _gather(self, position: IntArray, index: Tensor, keys: Sequence[str] | None) -> dict[str, Tensor]:
        leaves = self._leaves
        if keys is not None:
            self._require(keys)
            leaves = {key: leaves[key] for key in keys}
        if self.trim_key is not None:
            return self._gather_trimmed(index, leaves)
        return {key: leaf.read(position, index) for key, leaf in leaves.items()}

    def _gather_trimmed(self, index: Tensor, leaves: Leaves) -> dict[str, Tensor]:
        assert self.trim_key is not None
        mask = self._leaves[self.trim_key].data
        kept = max(1, int(mask.index_select(0, index).any(0).count_nonzero()))
        return {k: _narrow(k, leaf.data, mask.shape[1], kept).index_select(0, index) for k, leaf in leaves.items()}

    def _require(self, keys: Sequence[str]) -> None:
        unknown = [key for key in keys if key not in self._leaves]
        if unknown:
            raise RecordError(f"rows hold no {', '.join(unknown)}; they hold {', '.join(self._leaves)}")

    def _windows(self, items: dict[str, Tensor], batch_size: int, length: int, index: Tensor) -> TensorDict:
        shape = (batch_size, length)
        extras = {key: value for key, value in items.items() if value.shape[0] == batch_size != len(index)}
        out = {key: value.unflatten(0, shape) for key, value in items.items() if key not in extras}
        out.update({key: value.unsqueeze(1).expand(*shape, *value.shape[1:]) for key, value in extras.items()})
        out["step_mask"] = self._step_mask(index, shape)
        return _tensordict(out, shape, self.device)

    def _step_mask(self, index: Tensor, shape: tuple[int, int]) -> Tensor:
        """``[B, T]`` bool: True up to and including the first step that ends an episode."""
        mask = torch.ones(shape, dtype=torch.bool, device=self.device)
        if not self.cut or shape[1] == 1:
            return mask
        ended = torch.zeros(shape, dtype=torch.bool, device=self.device)
        for key in ("terminated", "truncated", "done"):
            if key in self._leaves:
                ended |= self._leaves[key].data.index_select(0, index).view(shape)
        mask[:, 1:] = ended[:, :-1].cumsum(1) == 0
        if "episode" in self._leaves:
            episode = self._leaves["episode"].data.index_select(0, index).view(shape)
            mask &= (episode == episode[:, :1]).cumprod(1).bool()
        return mask

    def update_priority(self, index: Tensor, priority: Tensor) -> None:
        """New priorities ``[...]`` of the rows ``index [...]``; samplers without priorities ignore them.

        Raises:
            RecordError: shapes that differ, or a priority that is negative or not finite.
        """
        if index.shape != priority.shape:
            raise RecordError(f"index {tuple(index.shape)} and priority {tuple(priority.shape)} differ in shape")
        positions = to_numpy(index).reshape(-1)
        self.sampler.update(positions, to_numpy(priority).reshape(-1).astype(np.float64))
        if isinstance(self._store, MemmapStore):
            self._store.changed(positions, self._small_text())


def _make_store(storage: str, path: str | None, durable: bool, device: torch.device) -> MemoryStore:
    if storage not in ("memory", "memmap"):
        raise ConfigError(f"replay.storage is memory or memmap, not {storage!r}")
    if storage == "memory":
        if path is not None or durable:
            unread = "replay.durable=true" if path is None else f"replay.path={path}"
            raise ConfigError(f"{unread} is about files, and rows are kept in memory: set replay.storage=memmap")
        return MemoryStore(device)
    if path is None:
        raise ConfigError("replay.storage=memmap needs a path; set replay.path=FOLDER")
    if device.type != "cpu":
        raise ConfigError(f"replay.storage=memmap keeps rows in files, so replay.device is cpu, not {device}")
    return MemmapStore(path, durable)


def _narrow(key: str, data: Tensor, width: int, kept: int) -> Tensor:
    """A leaf cut to its first ``kept`` units, if it is one of units."""
    is_unit = data.ndim > 1 and data.shape[1] == width and key not in STEP_KEYS
    return data.narrow(1, 0, kept) if is_unit else data


def _tensordict(items: dict[str, Tensor], shape: tuple[int, ...], device: torch.device) -> TensorDict:
    """A TensorDict whose shapes are right by construction, so that nothing is validated."""
    return TensorDict._new_unsafe(items, torch.Size(shape), device)
