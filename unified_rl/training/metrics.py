"""Metrics of a run: JSONL (the record), CSV (for tables) and TensorBoard (for curves), always all three."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

FIRST = ("update", "steps", "wall_seconds")


def to_floats(metrics: dict[str, Any]) -> dict[str, float]:
    """Scalar tensors to floats with one copy from the device."""
    tensors = {k: v for k, v in metrics.items() if isinstance(v, Tensor)}
    out = {k: float(v) for k, v in metrics.items() if not isinstance(v, Tensor)}
    if tensors:
        values = torch.stack([v.detach().reshape(()).to(torch.float64) for v in tensors.values()]).tolist()
        out.update(zip(tensors, values, strict=True))
    return out


class Means:
    """Running means of metrics between two logged rows; no device synchronisation until :meth:`pop`."""

    def __init__(self) -> None:
        self._sums: dict[str, Any] = {}
        self._counts: dict[str, int] = {}

    def add(self, metrics: dict[str, Any]) -> None:
        """Adds one observation of every metric."""
        for key, value in metrics.items():
            value = value.detach() if isinstance(value, Tensor) else value
            self._sums[key] = self._sums[key] + value if key in self._sums else value
            self._counts[key] = self._counts.get(key, 0) + 1

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

    Args:
        folder: the run folder; None keeps the rows in memory alone.
        keep_until: on resume, drop rows with a larger ``update`` (they will be made again).
    """

    def __init__(self, folder: Path | None, keep_until: int | None = None) -> None:
        self.in_memory = folder is None
        if folder is None:
            self.rows: list[dict[str, Any]] = []
            return
        from torch.utils.tensorboard import SummaryWriter

        self.jsonl, self.csv = folder / "metrics.jsonl", folder / "metrics.csv"
        self.rows = read_metrics(self.jsonl)
        if keep_until is not None:
            self.rows = [row for row in self.rows if row["update"] <= keep_until]
        self.columns = list(FIRST)
        for row in self.rows:
            self.columns += [key for key in row if key not in self.columns]
        self._rewrite()
        self.board = SummaryWriter(str(folder / "tensorboard"))

    def write(self, update: int, steps: int, wall_seconds: float, metrics: dict[str, float]) -> None:
        """Appends one row; new columns extend the CSV's header."""
        row: dict[str, Any] = {"update": update, "steps": steps, "wall_seconds": round(wall_seconds, 3), **metrics}
        self.rows.append(row)
        if self.in_memory:
            return
        with open(self.jsonl, "a") as handle:
            handle.write(json.dumps({k: _plain(v) for k, v in row.items()}) + "\n")
        fresh = [key for key in row if key not in self.columns]
        if fresh:
            self.columns += fresh
            self._write_csv()
        else:
            with open(self.csv, "a", newline="") as handle:
                csv.DictWriter(handle, self.columns).writerow(row)
        for key, value in metrics.items():
            self.board.add_scalar(key, value, steps)

    def close(self) -> None:
        """Flushes TensorBoard."""
        if not self.in_memory:
            self.board.close()

    def _rewrite(self) -> None:
        self.jsonl.write_text("".join(json.dumps({k: _plain(v) for k, v in row.items()}) + "\n" for row in self.rows))
        self._write_csv()

    def _write_csv(self) -> None:
        with open(self.csv, "w", newline="") as handle:
            writer = csv.DictWriter(handle, self.columns)
            writer.writeheader()
            writer.writerows(self.rows)


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Logged rows of a JSONL file; a last line cut by a crash is dropped."""
    rows: list[dict[str, Any]] = []
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows
