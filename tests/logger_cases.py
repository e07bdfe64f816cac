"""Loggers of the tests: a module of its own, since paths name it."""

from __future__ import annotations

from typing import Any

SEEN: list[tuple[str, Any]] = []


class Notes:
    """Notes what it is given."""

    def begin(self, kept: Any) -> None:
        SEEN.append(("begin", [row["update"] for row in kept.rows]))

    def log(self, row: Any) -> None:
        SEEN.append(("log", row["update"]))

    def samples(self, rows: Any) -> None:
        SEEN.append(("samples", (rows[0]["split"], rows[0]["update"], len(rows))))

    def end(self) -> None:
        SEEN.append(("end", None))


class Breaks(Notes):
    """Fails from update 2 on."""

    def log(self, row: Any) -> None:
        super().log(row)
        if row["update"] == 2:
            raise ConnectionError("the server\nis gone")
