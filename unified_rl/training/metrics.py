"""Metrics of a run: JSONL is the record; CSV, TensorBoard and others are told of every row."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unified_rl.errors import CheckpointError
from unified_rl.files import Manifest, check_listed, entry, flush, write_atomically
from unified_rl.training.checkpoint import FOLDER, NEWEST, NONE, checkpoint_name, checkpoints, step_of
from unified_rl.training.growing import GrowingFile, Row, parse
from unified_rl.training.loggers import BOARD, TABLE, Guarded, Kept, Logger, make_loggers, read_notes, write_notes

RECORD, SAMPLES = "metrics.jsonl", "samples.jsonl"
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
    """Appends rows to ``metrics.jsonl`` and conversations to ``samples.jsonl``, and hands them to loggers.

    The two files are the record. The run's manifest lists the part of them that belongs to a checkpoint (see
    :meth:`record`); what lies behind that part is made again by a resumed run.

    Args:
        folder: the run folder; None keeps the rows in memory alone.
        keep_until: on resume, drop rows with a larger ``update``, and those that the manifest does not list (both will
            be made again).
        loggers: what is told of every row; by default TensorBoard and CSV.
        config: the run's configuration, for loggers that show it.

    Attributes:
        rows: the logged rows.
        samples: conversations; of a run with a folder those before it was opened.

    Raises:
        CheckpointError: the folder is not writable.
    """

    def __init__(
        self,
        folder: Path | None,
        keep_until: int | None = None,
        loggers: Sequence[Logger] | None = None,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        self.in_memory = folder is None
        if folder is None:
            self.rows: list[Row] = []
            self.samples: list[Row] = []
            return
        self.folder = folder
        self.files = [GrowingFile(folder / RECORD), GrowingFile(folder / SAMPLES, keep=False)]
        self.loggers = make_loggers(("tensorboard", "csv")) if loggers is None else list(loggers)
        handed, ids = read_notes(folder)
        handed = self._take_over(keep_until, handed, ids)
        self.rows, self.samples = self.files[0].rows, self.files[1].rows
        known = dict(ids)
        kept = Kept(folder, self.rows, handed, dict(config or {}), ids)
        for logger in self.loggers:
            logger.begin(kept)
        if ids != known:
            self._note(handed, ids)

    def write(self, update: int, steps: int, wall_seconds: float, metrics: dict[str, float]) -> None:
        """Appends one row.

        Raises:
            CheckpointError: the disk is full or the folder is gone.
        """
        row: Row = {"update": update, "steps": steps, "wall_seconds": round(wall_seconds, 3), **metrics}
        if self.in_memory:
            self.rows.append(row)
            return
        with self._writing():
            self.files[0].append(row)
            for logger in self.loggers:
                logger.log(row)

    def write_samples(self, rows: Sequence[Row]) -> None:
        """Appends conversations, each with its ``update``, ``steps`` and ``split``.

        Raises:
            CheckpointError: the disk is full or the folder is gone.
        """
        if self.in_memory:
            self.samples += rows
            return
        with self._writing():
            self.files[1].append(*rows)
            for split in dict.fromkeys(row["split"] for row in rows):
                for logger in self.loggers:
                    logger.samples([row for row in rows if row["split"] == split])

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise CheckpointError(f"{self.folder} cannot take a row of metrics: {error}") from error

    def record(self, checkpoint: str) -> None:
        """Lists the rows so far in the run's manifest; called before the checkpoint of that name is written.

        Raises:
            CheckpointError: the disk is full or the folder is gone.
        """
        if self.in_memory:
            return
        there = [file for file in self.files if file.name == RECORD or file.path.is_file()]
        for file in there:
            try:
                file.flush()
            except OSError as error:
                raise CheckpointError(f"{file.path} cannot be written: {error}") from error
        manifest = Manifest.find(self.folder) or Manifest(self.folder)
        manifest.files.update({file.name: [file.entry()] for file in there})
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
        """Ends the loggers."""
        for logger in () if self.in_memory else self.loggers:
            logger.end()

    def _note(self, handed: int, ids: dict[str, str]) -> None:
        """Remembers what loggers of others were given: they cannot take it back when the run goes on before it."""
        if any(isinstance(logger, Guarded) for logger in self.loggers):
            write_notes(self.folder, handed, ids)

    def _take_over(self, keep_until: int | None, handed: int, ids: dict[str, str]) -> int:
        """Takes over the rows of the record that stay, and cuts the others off; the last update that loggers know."""
        metrics, samples = self.files
        if not metrics.path.is_file():
            write_atomically(metrics.path, b"")  # before the manifest lists it: a listed file that is missing is damage
        manifest = Manifest.find(self.folder)

        def listed(file: GrowingFile) -> int | None:
            return None if manifest is None else int(manifest.files.get(file.name, [{"size": 0}])[-1]["size"])

        data = {file.name: file.read(listed(file), keep_until) for file in self.files}
        whole = parse(data[RECORD])[0]
        handed = max([handed, *(int(row["update"]) for row in whole[-1:])])
        self._note(handed, ids)
        if manifest is not None:
            self._reopen(manifest)
        metrics.cut(data[RECORD])
        samples.cut(data[SAMPLES])
        return handed

    def _reopen(self, manifest: Manifest) -> None:
        """Lists the kept rows alone, before the others are cut off: a longer file agrees with that too."""
        files = {name: entries for name, entries in manifest.files.items() if not _is_derived(name)}
        files |= {file.name: [file.entry()] for file in self.files if file.path.is_file()}
        newest = [checkpoint_name(step_of(path)) for path in checkpoints(self.folder / FOLDER)[-1:]]
        notes = {**manifest.notes, NEWEST: newest}
        if (files, notes) != (manifest.files, manifest.notes):
            Manifest(self.folder, files, notes).write()


def _is_derived(name: str) -> bool:
    """Whether a file of a run is made from its record, and so changes from the first row of a resumed run on."""
    return name == TABLE or name.startswith(f"{BOARD}/")


def list_finished(manifest: Manifest) -> None:
    """Lists every metrics file of a run that has ended as it is now."""
    folder = manifest.folder
    boards = [path.relative_to(folder).as_posix() for path in (folder / BOARD).rglob("*") if path.is_file()]
    for name in (RECORD, SAMPLES, TABLE, *sorted(boards)):
        if (folder / name).is_file():
            flush(folder / name)
            manifest.files[name] = [entry(folder / name)]
    manifest.notes[NEWEST] = [path.name for path in checkpoints(folder / FOLDER)[-1:]]


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Logged rows of a JSONL file; a last line cut by a crash is dropped.

    Raises:
        DamageError: the run's manifest lists the file, and it is missing or altered.
    """
    check_listed(path)
    return parse(path.read_bytes() if path.is_file() else b"")[0]
