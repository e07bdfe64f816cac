"""Where metrics and samples go beside the run's own record: TensorBoard, CSV, wandb, trackio, mlflow, or your own.

``metrics.jsonl`` and ``samples.jsonl`` are the record (see :mod:`unified_rl.training.metrics`); a logger is told of
every row behind it. Nothing leaves the machine by itself: wandb runs offline unless ``WANDB_MODE`` says otherwise,
mlflow writes into the run folder unless ``MLFLOW_TRACKING_URI`` is set, trackio unless ``TRACKIO_DIR`` is.
"""

from __future__ import annotations

import contextlib
import csv
import importlib
import importlib.util
import io
import json
import os
import re
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from unified_rl.errors import ConfigError
from unified_rl.files import write_atomically
from unified_rl.instantiate import locate
from unified_rl.stopping import say
from unified_rl.training.failures import foreign
from unified_rl.training.growing import Row
from unified_rl.training.sample_text import COLUMNS, markdown, plain_text

TABLE, BOARD, NOTES = "metrics.csv", "tensorboard", "loggers.json"
FIRST = ("update", "steps", "wall_seconds")
PACKAGES = {"wandb": "wandb", "trackio": "trackio", "mlflow": "mlflow"}
"""The package of a logger, and the extra that installs it."""
_ID = re.compile(r"[A-Za-z0-9_-]{4,64}")


@dataclass
class Kept:
    """What a logger begins with.

    Attributes:
        folder: of the run.
        rows: logged rows that stay; what was logged behind them is made again.
        handed: ``update`` of the last row that loggers were given before, -1 where there was none. A logger that cannot
            take back what it wrote leaves out rows up to this one: they are made again as they were.
        config: the run's configuration.
        ids: names of runs elsewhere by logger; what is put there is found there when the run goes on.
    """

    folder: Path
    rows: Sequence[Row] = ()
    handed: int = -1
    config: dict[str, Any] = field(default_factory=dict)
    ids: dict[str, str] = field(default_factory=dict)


class Logger(Protocol):
    """Takes the rows of a run; a class of the user's own needs these methods and no arguments."""

    def begin(self, kept: Kept) -> None:
        """Once, before the first row."""
        ...

    def log(self, row: Row) -> None:
        """A row: ``update``, ``steps``, ``wall_seconds`` and metrics by name."""
        ...

    def samples(self, rows: Sequence[Row]) -> None:
        """Conversations of one update and split, see :mod:`unified_rl.training.samples`."""
        ...

    def end(self) -> None:
        """Once, however the run ends."""
        ...


class CsvLogger:
    """``metrics.csv``, written anew from the record when a run goes on."""

    def begin(self, kept: Kept) -> None:
        """Writes the rows that stay."""
        self.path = kept.folder / TABLE
        self.columns, self.rows = list(FIRST), list(kept.rows)
        for row in self.rows:
            self.columns += [key for key in row if key not in self.columns]
        self._write()

    def log(self, row: Row) -> None:
        """Appends a row; new columns extend the header."""
        self.rows.append(row)
        fresh = [key for key in row if key not in self.columns]
        if fresh:
            self.columns += fresh
            self._write()
            return
        with open(self.path, "a", newline="") as handle:
            csv.DictWriter(handle, self.columns).writerow(row)

    def samples(self, rows: Sequence[Row]) -> None:
        """A table of numbers has no place for them."""

    def end(self) -> None:
        """Nothing is open."""

    def _write(self) -> None:
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, self.columns)
        writer.writeheader()
        writer.writerows(self.rows)
        write_atomically(self.path, text.getvalue())


class TensorBoardLogger:
    """Curves over ``steps``, and samples as text."""

    def begin(self, kept: Kept) -> None:
        """Readers drop what an interrupted run wrote behind the rows that are kept: it is made again."""
        from torch.utils.tensorboard import SummaryWriter

        first = kept.rows[-1]["steps"] + 1 if kept.rows else 0
        board = kept.folder / BOARD
        self.board = SummaryWriter(str(board), purge_step=first if board.exists() else None)

    def log(self, row: Row) -> None:
        """Adds a value to every curve."""
        for key, value in row.items():
            if key not in FIRST:
                self.board.add_scalar(key, value, row["steps"])

    def samples(self, rows: Sequence[Row]) -> None:
        """Adds a Markdown table under ``samples/train`` or ``samples/eval``."""
        self.board.add_text(f"samples/{rows[0]['split']}", markdown(rows), rows[0]["steps"])

    def end(self) -> None:
        """Flushes."""
        self.board.close()


class WandbLogger:
    """A run of Weights & Biases, offline in the run folder unless ``WANDB_MODE`` says otherwise.

    ``wandb sync RUN/wandb/offline-run-*`` sends it; a resumed run adds a part with the same id.
    """

    def begin(self, kept: Kept) -> None:
        """Begins the run, or goes on with the one whose id the run folder holds."""
        import wandb

        self.wandb = wandb
        mode: Any = os.environ.get("WANDB_MODE", "offline")
        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "unified-rl"),
            name=os.environ.get("WANDB_NAME", kept.folder.resolve().name),
            id=kept.ids.setdefault("wandb", uuid.uuid4().hex[:12]),
            dir=str(kept.folder),
            mode=mode,
            resume="allow",
            reinit="create_new",
            config=kept.config,
            settings=wandb.Settings(silent=True, console="off"),
        )

    def log(self, row: Row) -> None:
        """Logs a row; wandb's step is the update."""
        self.run.log({key: value for key, value in row.items() if key != "update"}, step=row["update"])

    def samples(self, rows: Sequence[Row]) -> None:
        """Logs a table."""
        columns = [key for key in COLUMNS if key != "rewards"]
        data = [[plain_text(row.get(key)) for key in columns] for row in rows]
        table = self.wandb.Table(columns=list[str | int](columns), data=data)
        self.run.log({f"samples/{rows[0]['split']}": table}, step=rows[0]["update"])

    def end(self) -> None:
        """Closes the run."""
        self.run.finish()


class TrackioLogger:
    """A run of trackio, in ``trackio/`` of the run folder unless ``TRACKIO_DIR`` is set. It takes numbers alone."""

    def begin(self, kept: Kept) -> None:
        """Begins the run, or goes on with the one of the same name."""
        os.environ.setdefault("TRACKIO_DIR", str((kept.folder / "trackio").resolve()))  # read when it is imported
        import trackio

        self.trackio: Any = trackio
        with contextlib.redirect_stdout(io.StringIO()):
            self.run = trackio.init(
                project=os.environ.get("TRACKIO_PROJECT", "unified-rl"),
                name=kept.ids.setdefault("trackio", kept.folder.resolve().name),
                config=kept.config,
                resume="allow",
                embed=False,
                auto_log_cpu=False,
                auto_log_gpu=False,
            )

    def log(self, row: Row) -> None:
        """Logs a row; trackio's step is the update."""
        self.run.log({key: value for key, value in row.items() if key != "update"}, step=row["update"])

    def samples(self, rows: Sequence[Row]) -> None:
        """Left out."""

    def end(self) -> None:
        """Closes the run."""
        with contextlib.redirect_stdout(io.StringIO()):
            self.trackio.finish()  # of the run that init made the present one


class MlflowLogger:
    """A run of mlflow in ``mlruns/`` of the run folder unless ``MLFLOW_TRACKING_URI`` is set."""

    def begin(self, kept: Kept) -> None:
        """Begins the run, or goes on with the one whose id the run folder holds."""
        from mlflow import MlflowClient

        self.client = MlflowClient(tracking_uri=os.environ.get("MLFLOW_TRACKING_URI") or _local_store(kept.folder))
        if "mlflow" not in kept.ids:
            name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "unified-rl")
            found = self.client.get_experiment_by_name(name)
            place = self.client.create_experiment(name) if found is None else found.experiment_id
            run = self.client.create_run(place, run_name=kept.folder.resolve().name)
            kept.ids["mlflow"] = run.info.run_id
            for key, value in (kept.config.get("choices") or {}).items():
                self.client.log_param(run.info.run_id, key, value)
        self.id = kept.ids["mlflow"]
        self.client.update_run(self.id, status="RUNNING")

    def log(self, row: Row) -> None:
        """Logs a row; mlflow's step is the update."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        values = {key: value for key, value in row.items() if key != "update" and value is not None}
        # a store of files makes a folder of what stands before a slash, so no metric may have that name
        named = {key if "/" in key or key in FIRST else f"{key}/value": float(v) for key, v in values.items()}
        self.client.log_batch(self.id, [Metric(key, value, now, row["update"]) for key, value in named.items()])

    def samples(self, rows: Sequence[Row]) -> None:
        """Logs a Markdown table as an artifact."""
        self.client.log_text(self.id, markdown(rows), f"samples/{rows[0]['split']}_{rows[0]['update']:08d}.md")

    def end(self) -> None:
        """Closes the run."""
        self.client.set_terminated(self.id)


def _local_store(folder: Path) -> str:
    os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # which mlflow wants to be asked for
    return (folder.resolve() / "mlruns").as_uri()


class Guarded:
    """A logger of others, which can fail without ending the run: one line says so, and it is asked no more.

    Args:
        logger: the logger.
        name: for that line.
    """

    def __init__(self, logger: Logger, name: str) -> None:
        self.logger, self.name, self.failed = logger, name, False
        self._handed = -1

    def begin(self, kept: Kept) -> None:
        """Notes which rows the logger has already."""
        self._handed = kept.handed
        self._do("begin", kept)

    def log(self, row: Row) -> None:
        """Passes on a row that is new to the logger."""
        if row["update"] > self._handed:
            self._do("log", row)

    def samples(self, rows: Sequence[Row]) -> None:
        """Passes on samples that are new to the logger."""
        if rows[0]["update"] > self._handed:
            self._do("samples", rows)

    def end(self) -> None:
        """Closes it."""
        self._do("end")

    def _do(self, method: str, *given: Any) -> None:
        if self.failed:
            return
        try:
            getattr(self.logger, method)(*given)
        except Exception as error:
            self.failed = True
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            say(f"logger={self.name} failed and takes no more rows; metrics.jsonl holds all of them ({reason})")


OWN: dict[str, type[CsvLogger] | type[TensorBoardLogger]] = {"tensorboard": TensorBoardLogger, "csv": CsvLogger}
OTHERS = {"wandb": WandbLogger, "trackio": TrackioLogger, "mlflow": MlflowLogger}


def make_loggers(names: Sequence[str], allow: Sequence[str] = ()) -> list[Logger]:
    """The loggers of these names or dotted paths.

    Raises:
        ConfigError: a package that is not installed (says what to install), or a path that is not allowed or not found.
    """
    out: list[Logger] = []
    for number, name in enumerate(names):
        if name in OWN:
            out.append(OWN[name]())
            continue
        if name in OTHERS and importlib.util.find_spec(PACKAGES[name]) is None:
            raise ConfigError(
                f"logger={name} needs the package {PACKAGES[name]!r}: pip install 'unified-rl[{name}]', or leave it out"
            )
        made: Any = OTHERS.get(name) or locate(name.replace(":", ".", 1), allow, f"logger[{number}]", "")
        with foreign(f"logger={name}"):
            out.append(Guarded(made(), name))
    return out


def read_notes(folder: Path) -> tuple[int, dict[str, str]]:
    """The last update that loggers were given, and the ids of runs elsewhere; nothing where the file says nothing."""
    try:
        found = json.loads((folder / NOTES).read_text())
        handed = found["handed"]
        ids = {key: one for key, one in found["ids"].items() if isinstance(one, str)}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return -1, {}
    ids = {key: one for key, one in ids.items() if key in OTHERS and (key == "trackio" or _ID.fullmatch(one))}
    return (handed if isinstance(handed, int) else -1), ids


def write_notes(folder: Path, handed: int, ids: dict[str, str]) -> None:
    """Writes what :func:`read_notes` reads.

    Raises:
        CheckpointError: the disk is full.
    """
    write_atomically(folder / NOTES, json.dumps({"handed": handed, "ids": ids}))
