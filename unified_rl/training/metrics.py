"""Metrics of a run: JSONL (the record), CSV (for tables) and TensorBoard (for curves), always all three."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unified_rl.errors import CheckpointError
from unified_rl.files import Entry, Manifest, check_listed, entry, flush, write_atomically
from unified_rl.training.checkpoint import FOLDER, NEWEST, NONE, checkpoint_name, checkpoints, step_of

RECORD, TABLE, BOARD = "metrics.jsonl", "metrics.csv", "tensorboard"
FIRST = ("update", "steps", "wall_seconds")
EPISODES = "rollout/episodes"
"""Episodes that ended in a collection, or between two logged rows."""
STANDS = ("rollout/epoch",)
"""Metrics that say where a run is: a row has their last value, not a mean."""


def to_floats(metrics: dict[str, Any]) -> dict[str, float]:
    """Scalar tensors to floats with one copy from the device."""
    tensors = {k: v for k, v in metrics.items() if isinstance(v, Tensor)}
    out = {k: float(v) for k, v in metrics.items() if not isinstance(v, Tensor)}
    if tensors:
        values = torch.stack([v.detach().reshape(()).to(torch.float64) for v in tensors.values()]).tolist()
        out.update(zip(tensors, values, strict=True))
    return out


class Means:
    """Running means of metrics between two logged rows; no device synchronisation until :meth:`pop`.

    A collection that says how many episodes ended in it (:data:`EPISODES`) brings means over those, so its ``rollout/``
    metrics count by that number; the number itself is summed.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Any] = {}
        self._counts: dict[str, float] = {}

    def add(self, metrics: dict[str, Any]) -> None:
        """Adds one observation of every metric."""
        episodes = metrics.get(EPISODES)
        for key, value in metrics.items():
            weight = 1 if episodes is None or not key.startswith("rollout/") else episodes
            if key in STANDS:
                self._sums[key], self._counts[key] = value, 1
                continue
            if key == EPISODES:
                self._sums[key], self._counts[key] = self._sums.get(key, 0.0) + value, 1
                continue
            value = value.detach() if isinstance(value, Tensor) else value
            value = value if weight == 1 else value * weight
            self._sums[key] = self._sums[key] + value if key in self._sums else value
            self._counts[key] = self._counts.get(key, 0) + weight

    def pop(self) -> dict[str, float]:
        """The means since the last call."""
        floats = to_floats(self._sums)
        means = {key: value / self._counts[key] for key, value in floats.items()}
        self._sums, self._counts = {}, {}
        return means

    def pop_tensors(self) -> dict[str, Any]:
        """The means since the last call, without a copy from the device."""
        means = {key: value / self._counts[key] for key, value in self._sums.items()}
        self._sums, self._counts = {}, {}
        return means

    def state_dict(self) -> dict[str, Any]:
        """Sums and counts."""
        return {"sums": to_floats(self._sums), "counts": dict(self._counts)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores :meth:`state_dict`."""
        self._sums, self._counts = dict(state["sums"]), dict(state["counts"])


class MetricLog:
    """Appends rows to ``metrics.jsonl``, ``metrics.csv`` and TensorBoard.

    ``metrics.jsonl`` is the record. The run's manifest lists the part of it that belongs to a checkpoint (see
    :meth:`record`); what lies behind that part is made again by a resumed run. The CSV is written anew from the record.

    Args:
        folder: the run folder; None keeps the rows in memory alone.
        keep_until: on resume, drop rows with a larger ``update``, and those that the manifest does not list (both will
            be made again).

    Raises:
        CheckpointError: the folder is not writable.
    """

    def __init__(self, folder: Path | None, keep_until: int | None = None) -> None:
        self.in_memory = folder is None
        if folder is None:
            self.rows: list[dict[str, Any]] = []
            return
        from torch.utils.tensorboard import SummaryWriter

        self.folder, self.jsonl, self.csv = folder, folder / RECORD, folder / TABLE
        kept = self._take_over(keep_until)
        self._digest, self._size = hashlib.sha256(kept), len(kept)
        self.columns = list(FIRST)
        for row in self.rows:
            self.columns += [key for key in row if key not in self.columns]
        self._write_csv()
        # readers of TensorBoard drop what an interrupted run wrote behind the rows that are kept: it is made again
        first = self.rows[-1]["steps"] + 1 if self.rows else 0
        board = folder / BOARD
        self.board = SummaryWriter(str(board), purge_step=first if board.exists() else None)

    def write(self, update: int, steps: int, wall_seconds: float, metrics: dict[str, float]) -> None:
        """Appends one row; new columns extend the CSV's header.

        Raises:
            CheckpointError: the disk is full or the folder is gone.
        """
        row: dict[str, Any] = {"update": update, "steps": steps, "wall_seconds": round(wall_seconds, 3), **metrics}
        self.rows.append(row)
        if self.in_memory:
            return
        line = _line(row)
        try:
            with open(self.jsonl, "ab") as handle:
                handle.write(line)
            self._digest.update(line)
            self._size += len(line)
            self._extend_csv(row)
            for key, value in metrics.items():
                self.board.add_scalar(key, value, steps)
        except OSError as error:
            raise CheckpointError(f"{self.folder} cannot take a row of metrics: {error}") from error

    def record(self, checkpoint: str) -> None:
        """Lists the rows so far in the run's manifest; called before the checkpoint of that name is written.

        Raises:
            CheckpointError: the disk is full or the folder is gone.
        """
        if self.in_memory:
            return
        try:
            flush(self.jsonl)
        except OSError as error:
            raise CheckpointError(f"{self.jsonl} cannot be written: {error}") from error
        manifest = Manifest.find(self.folder) or Manifest(self.folder)
        manifest.files[RECORD] = [self._entry()]
        # either name may be the newest when a process is killed before the new checkpoint is complete
        manifest.notes[NEWEST] = [*(manifest.notes.get(NEWEST, [])[-1:] or [NONE]), checkpoint]
        manifest.write()

    def complete(self, checkpoint: str) -> None:
        """Notes in the run's manifest that this checkpoint is there now.

        Raises:
            CheckpointError: the disk is full or the folder is gone.
        """
        manifest = None if self.in_memory else Manifest.find(self.folder)
        if manifest is not None:
            manifest.notes[NEWEST] = [checkpoint]
            manifest.write()

    def close(self) -> None:
        """Flushes TensorBoard."""
        if not self.in_memory:
            self.board.close()

    def _entry(self) -> Entry:
        return {"size": self._size, "sha256": self._digest.hexdigest(), "grows": True}

    def _take_over(self, keep_until: int | None) -> bytes:
        """Takes over the rows of the record that stay, and cuts the others off; returns the record."""
        if not self.jsonl.is_file():
            write_atomically(self.jsonl, b"")  # before the manifest lists it: a listed file that is missing is damage
        data = self.jsonl.read_bytes()
        manifest = Manifest.find(self.folder)
        listed = data if manifest is None else data[: manifest.files.get(RECORD, [{"size": 0}])[-1]["size"]]
        self.rows, kept = _parse(listed, keep_until)
        if manifest is not None:
            self._reopen(manifest, kept, keep_until)
        if kept != data:
            write_atomically(self.jsonl, kept)
        return kept

    def _reopen(self, manifest: Manifest, kept: bytes, keep_until: int | None) -> None:
        """Lists the kept rows alone, before the others are cut off: a longer file agrees with that too."""
        files = {name: entries for name, entries in manifest.files.items() if not _is_derived(name)}
        files[RECORD] = [{"size": len(kept), "sha256": hashlib.sha256(kept).hexdigest(), "grows": True}]
        newest = [checkpoint_name(step_of(path)) for path in checkpoints(self.folder / FOLDER)[-1:]]
        notes = {**manifest.notes, NEWEST: newest}
        if (files, notes) != (manifest.files, manifest.notes):
            Manifest(self.folder, files, notes).write()

    def _extend_csv(self, row: dict[str, Any]) -> None:
        fresh = [key for key in row if key not in self.columns]
        if fresh:
            self.columns += fresh
            self._write_csv()
            return
        with open(self.csv, "a", newline="") as handle:
            csv.DictWriter(handle, self.columns).writerow(row)

    def _write_csv(self) -> None:
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, self.columns)
        writer.writeheader()
        writer.writerows(self.rows)
        write_atomically(self.csv, text.getvalue())


def _is_derived(name: str) -> bool:
    """Whether a file of a run is made from its record, and so changes from the first row of a resumed run on."""
    return name == TABLE or name.startswith(f"{BOARD}/")


def list_finished(manifest: Manifest) -> None:
    """Lists every metrics file of a run that has ended as it is now."""
    folder = manifest.folder
    boards = [path.relative_to(folder).as_posix() for path in (folder / BOARD).rglob("*") if path.is_file()]
    for name in (RECORD, TABLE, *sorted(boards)):
        if (folder / name).is_file():
            flush(folder / name)
            manifest.files[name] = [entry(folder / name)]
    manifest.notes[NEWEST] = [path.name for path in checkpoints(folder / FOLDER)[-1:]]


def _line(row: dict[str, Any]) -> bytes:
    return json.dumps({k: _plain(v) for k, v in row.items()}).encode() + b"\n"


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _parse(data: bytes, keep_until: int | None = None) -> tuple[list[dict[str, Any]], bytes]:
    """The rows up to an update and their bytes; a last line cut by a crash ends them."""
    rows: list[dict[str, Any]] = []
    size = 0
    for line in data.splitlines(keepends=True):
        try:
            row = json.loads(line)
            if not line.endswith(b"\n") or (keep_until is not None and row["update"] > keep_until):
                break
        except (ValueError, TypeError, KeyError):
            break
        rows.append(row)
        size += len(line)
    return rows, data[:size]


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Logged rows of a JSONL file; a last line cut by a crash is dropped.

    Raises:
        DamageError: the run's manifest lists the file, and it is missing or altered.
    """
    check_listed(path)
    return _parse(path.read_bytes() if path.is_file() else b"")[0]
