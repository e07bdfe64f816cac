"""Reading data files of problems. Every error names the file and the line."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

from unified_rl.errors import DataError

MAX_EXPONENT = 300
"""Digits before or behind the point of a number in a file, about the range of a double."""


def read_records(path: str | Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each record of a JSON-lines file, or of a file that holds one JSON array, with its place for error messages.

    Blank lines and a byte-order mark are passed over; a file named ``.gz`` is unpacked.

    Raises:
        DataError: a missing or empty file, bytes that are not UTF-8, a line that is not JSON, a record that is no
            object or holds a key twice.
    """
    file = Path(path)
    data = _read(file).removeprefix(b"\xef\xbb\xbf")
    found = False
    for where, value in _array(file, data) if data.lstrip().startswith(b"[") else _lines(file, data):
        if not isinstance(value, dict):
            raise DataError(f"{where}: expected a JSON object, found {type(value).__name__}")
        found = True
        yield where, value
    if not found:
        raise DataError(f"{file} holds no record")


def field(record: dict[str, Any], keys: str, where: str, strip: bool = True) -> str:
    """The text of one field, or of several (``Body,Question``) joined by blanks.

    Args:
        record: of :func:`read_records`.
        keys: names, separated by commas.
        where: its place, for errors.
        strip: take blanks off both ends.

    Raises:
        DataError: a field that is missing, or neither text nor a finite number.
    """
    parts = []
    for key in keys.split(","):
        if key not in record:
            names = ", ".join(map(repr, record)) or "none"
            raise DataError(
                f"{where}: no field {key!r}; the record has {names} (env.question_key, env.answer_key and "
                "env.solution_key name the fields)"
            )
        value = record[key]
        if not isinstance(value, str | Decimal):
            raise DataError(f"{where}: field {key!r} is {type(value).__name__}, expected text or a number")
        if isinstance(value, Decimal) and not (value.is_finite() and abs(value.adjusted()) <= MAX_EXPONENT):
            raise DataError(f"{where}: field {key!r} is {value!s:.40}, expected a number in range")
        text = value if isinstance(value, str) else _spell(value)
        if not text.isascii() and any(0xD800 <= ord(c) <= 0xDFFF for c in text):
            raise DataError(f"{where}: field {key!r} holds half a character (a lone surrogate such as \\ud800)")
        parts.append(text.strip() if strip else text)
    return " ".join(parts)


def _spell(number: Decimal) -> str:
    """A number as a person writes it: 51.0 is 51, 1e-05 is 0.00001."""
    return str(int(number)) if number == number.to_integral_value() else f"{number:f}"


def _read(file: Path) -> bytes:
    try:
        if file.exists() and not file.is_file():  # a pipe or a device would be waited for, or read without an end
            raise DataError(f"cannot read {file}: it is no regular file")
        if file.suffix == ".gz":
            with gzip.open(file) as stream:
                return stream.read()
        return file.read_bytes()
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"cannot unpack {file}: {error}") from error
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read {file}: {getattr(error, 'strerror', None) or error}") from error


def _lines(file: Path, data: bytes) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(data.split(b"\n"), start=1):
        if line.strip():
            where = f"{file}, line {number}"
            yield where, _parse(where, line)


def _array(file: Path, data: bytes) -> Iterator[tuple[str, Any]]:
    for number, value in enumerate(_parse(str(file), data), start=1):
        yield f"{file}, item {number}", value


def _parse(where: str, data: bytes) -> Any:
    """The value of a JSON text.

    Raises:
        DataError: it is not JSON, or not UTF-8.
    """
    try:
        return json.loads(
            data.decode(),
            object_pairs_hook=_object,
            parse_constant=_number,
            parse_float=_number,
            parse_int=_number,
        )
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8 ({error.reason} at byte {error.start})") from error
    except json.JSONDecodeError as error:
        line = f", line {error.lineno}" if error.lineno > 1 else ""
        raise DataError(f"{where}{line}: not JSON ({error.msg} at column {error.colno})") from error
    except (ValueError, RecursionError, MemoryError) as error:
        reason = str(error) if isinstance(error, ValueError) else "nested too deeply"
        raise DataError(f"{where}: not usable JSON ({reason})") from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r} is given twice")
    return out


def _number(text: str) -> Decimal:
    """Any number of JSON, exact, also where no field that is read holds it."""
    try:
        return Decimal(text)
    except ArithmeticError as error:
        raise ValueError(f"the number {text:.40} is out of range") from error
