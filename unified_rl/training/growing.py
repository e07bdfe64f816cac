"""Files of a run that grow by lines of JSON, and of which a checkpoint owns the lines so far."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

from unified_rl.files import Entry, flush, write_atomically

Row = dict[str, Any]


class GrowingFile:
    """Lines of JSON with an ``update`` each.

    Args:
        path: the file.
        keep: hold the rows in memory too.

    Attributes:
        rows: what it holds; without ``keep`` only what it held when it was read.
    """

    def __init__(self, path: Path, keep: bool = True) -> None:
        self.path, self.keep, self.rows = path, keep, list[Row]()
        self._digest, self._size = hashlib.sha256(), 0

    @property
    def name(self) -> str:
        """In the run's manifest."""
        return self.path.name

    def read(self, listed: int | None, keep_until: int | None) -> bytes:
        """Takes over the lines that stay; nothing is written yet.

        Args:
            listed: bytes that the manifest lists; None takes all.
            keep_until: drops rows of a larger update.

        Returns:
            All that the file holds.
        """
        data = self.path.read_bytes() if self.path.is_file() else b""
        self.rows, kept = parse(data if listed is None else data[:listed], keep_until)
        self._digest, self._size = hashlib.sha256(kept), len(kept)
        return data

    def cut(self, data: bytes) -> None:
        """Cuts off what does not stay of ``data``, which :meth:`read` returned."""
        if self._size != len(data):
            write_atomically(self.path, data[: self._size])

    def append(self, *rows: Row) -> None:
        """Adds lines; they reach the disk with :meth:`flush`."""
        lines = b"".join(map(line_of, rows))
        with open(self.path, "ab") as handle:
            handle.write(lines)
        self.rows += rows if self.keep else ()
        self._digest.update(lines)
        self._size += len(lines)

    def flush(self) -> None:
        """Makes the lines outlast a failure of the machine."""
        flush(self.path)

    def entry(self) -> Entry:
        """What the manifest says of the file."""
        return {"size": self._size, "sha256": self._digest.hexdigest(), "grows": True}


def line_of(row: Row) -> bytes:
    """A row as its line; what JSON has no number for is null."""
    return json.dumps(plain(row), allow_nan=False).encode() + b"\n"


def plain(value: Any) -> Any:
    """A value with None for every number that JSON does not have."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def parse(data: bytes, keep_until: int | None = None) -> tuple[list[Row], bytes]:
    """The rows up to an update and their bytes; a last line cut by a crash ends them."""
    rows: list[Row] = []
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
