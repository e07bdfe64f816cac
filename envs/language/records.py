"""Reading data files of problems. Every error names the file and the line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from unified_rl.errors import DataError


def read_records(path: str | Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each record of a JSON-lines file, or of a file that holds one JSON array, with its place for error messages.

    Blank lines are passed over.

    Raises:
        DataError: a missing or empty file, bytes that are not UTF-8, a line that is not JSON, a record that is no
            object.
    """
    file = Path(path)
    try:
        data = file.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read {file}: {error.strerror}") from error
    found = False
    for where, value in _array(file, data) if data.lstrip().startswith(b"[") else _lines(file, data):
        if not isinstance(value, dict):
            raise DataError(f"{where}: expected a JSON object, found {type(value).__name__}")
        found = True
        yield where, value
    if not found:
        raise DataError(f"{file} holds no record")


def field(record: dict[str, Any], keys: str, where: str) -> str:
    """The text of one field, or of several (``Body,Question``) joined by blanks.

    Raises:
        DataError: a field that is missing, or neither text nor a number.
    """
    parts = []
    for key in keys.split(","):
        if key not in record:
            raise DataError(f"{where}: no field {key!r}; the record has {', '.join(map(repr, record)) or 'none'}")
        value = record[key]
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise DataError(f"{where}: field {key!r} is {type(value).__name__}, expected text or a number")
        parts.append(value.strip() if isinstance(value, str) else _spell(value))
    return " ".join(parts)


def _spell(number: int | float) -> str:
    return str(int(number)) if float(number).is_integer() else str(number)


def _lines(file: Path, data: bytes) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(data.split(b"\n"), start=1):
        where = f"{file}, line {number}"
        if not line.strip():
            continue
        try:
            yield where, json.loads(line.decode())
        except UnicodeDecodeError as error:
            raise DataError(f"{where}: not UTF-8 ({error.reason} at byte {error.start})") from error
        except json.JSONDecodeError as error:
            raise DataError(f"{where}: not JSON ({error.msg} at column {error.colno})") from error


def _array(file: Path, data: bytes) -> Iterator[tuple[str, Any]]:
    try:
        values = json.loads(data.decode())
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: not UTF-8 ({error.reason} at byte {error.start})") from error
    except json.JSONDecodeError as error:
        raise DataError(f"{file}, line {error.lineno}: not JSON ({error.msg} at column {error.colno})") from error
    for number, value in enumerate(values, start=1):
        yield f"{file}, item {number}", value
