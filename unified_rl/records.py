"""Data files of others, read record by record and again on demand. Every error names the file and the line or row.

A file is gone through once; what stays in memory are int64 arrays of where its records begin and end. JSON (a record a
line, or one array), CSV and Parquet (by row groups) are read from the disk again whenever a record is wanted, and a
folder that ``datasets`` wrote is memory-mapped.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import math
import os
import re
import shutil
import tempfile
import zlib
from array import array
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from decimal import Decimal
from pathlib import Path
from typing import IO, Any, TypeAlias

from unified_rl.errors import ConfigError, DataError

MAX_EXPONENT = 300
"""Digits before or behind the point of a number in a file, about the range of a double."""
PIECE = 2**20
"""Bytes of a JSON array that are looked at together, more where a record is longer."""
IN_MEMORY = 2**26
"""Bytes of an unpacked archive that stay in memory; more lie in a temporary file."""
GROUPS_KEPT = 2**27
"""Bytes of row groups that a Parquet file keeps decoded, and at least one of them."""
BATCH = 1024
"""Rows of a Parquet file or a data set that are decoded together while it is gone through."""
DECODED = ("Image", "Audio", "Video", "Pdf")
"""Features of ``datasets`` that no language model reads; their columns are left out."""

Record: TypeAlias = dict[str, Any]
Placed: TypeAlias = tuple[str, Record]
"""A record, and before it its place for error messages. Numbers are Decimals, exact."""


class Records:
    """The records of a file. Going through them builds the index that :meth:`read` needs.

    Args:
        path: the file.
    """

    unit = "line"

    def __init__(self, path: Path) -> None:
        self.path = path

    def __iter__(self) -> Iterator[Placed]:
        """Every record in order.

        Raises:
            DataError: one that cannot be read, or none at all.
        """
        found = False
        for where, value in self._scan():
            if not isinstance(value, dict):
                raise DataError(f"{where}: expected a JSON object, found {type(value).__name__}")
            found = True
            yield where, value
        if not found:
            raise DataError(f"{self.path} holds no record")

    def __len__(self) -> int:
        """Records; known once they were gone through."""
        raise NotImplementedError

    def read(self, numbers: Sequence[int]) -> list[Placed]:
        """The records of some numbers (from 0), in the order of these.

        Raises:
            DataError: the file is not what it was.
        """
        raise NotImplementedError

    def _scan(self) -> Iterator[tuple[str, Any]]:
        raise NotImplementedError

    def _where(self, number: int) -> str:
        return f"{self.path}, {self.unit} {number}"


def open_records(path: str | Path) -> Records:
    """The records of a file, or of a folder that ``datasets`` wrote.

    Parquet is known by its first bytes, CSV by the suffix ``.csv`` (``.tsv`` with tabs), a JSON array by its bracket;
    everything else is JSON lines. A file named ``.gz`` is unpacked.

    Raises:
        DataError: a file that is missing, no regular file, or a damaged archive.
        ConfigError: a package that reads it is not installed.
    """
    file = Path(path)
    try:
        if file.is_dir() and _is_dataset(file):
            return _Dataset(file)
        if file.exists() and not file.is_file():  # a pipe or a device would be waited for, or read without an end
            raise DataError(f"cannot read {file}: it is no regular file" + _hint(file))
        source = _Source(file)
        with source.open() as stream:
            start = stream.read(4)
            if start == b"PAR1":
                return _Parquet(file, source)
            suffix = file.with_suffix("").suffix if file.suffix == ".gz" else file.suffix
            if suffix.lower() in (".csv", ".tsv"):
                return _Csv(file, source, "\t" if suffix.lower() == ".tsv" else ",")
            stream.seek(0)
            return _Array(file, source) if _first_byte(stream) == b"[" else _Lines(file, source)
    except (DataError, ConfigError):
        raise
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"cannot unpack {file}: {error}") from error
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read {file}: {getattr(error, 'strerror', None) or error}") from error


def read_records(path: str | Path) -> Iterator[Placed]:
    """Each record of a file with its place for error messages, see :func:`open_records`.

    Raises:
        DataError: a missing or empty file, bytes that are not UTF-8, a line that is not JSON, a record that is no
            object or holds a key twice.
    """
    return iter(open_records(path))


def plain(value: Any) -> Any:
    """A value of a record as JSON has it: exact numbers become int and float, what is no number becomes None.

    Bytes have no such form and become None too.
    """
    if isinstance(value, Decimal):
        if not value.is_finite() or abs(value.adjusted()) > MAX_EXPONENT:
            return None
        return int(value) if int(value.as_tuple().exponent) >= 0 else float(value)
    if isinstance(value, dict):
        return {str(key): plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [plain(one) for one in value]
    if value is None or isinstance(value, str | bool):
        return value
    return value.isoformat() if hasattr(value, "isoformat") else None


# ---------------------------------------------------------------------------------------------------------- bytes


class _Source:
    """The bytes of a file, unpacked where it is an archive."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self._unpacked: IO[bytes] | None = None
        with file.open("rb") as stream:
            self._stamp = self._stamp_of(stream)
            if file.suffix == ".gz":
                self._unpacked = tempfile.SpooledTemporaryFile(max_size=IN_MEMORY)  # noqa: SIM115
                with gzip.open(stream) as archive:
                    shutil.copyfileobj(archive, self._unpacked, 2**20)

    @staticmethod
    def _stamp_of(stream: IO[bytes]) -> tuple[int, int]:
        status = os.fstat(stream.fileno())
        return status.st_size, status.st_mtime_ns

    def open(self) -> IO[bytes]:
        """The bytes from the beginning.

        Raises:
            DataError: the file was written to, or is gone.
        """
        if self._unpacked is not None:
            self._unpacked.seek(0)
            return _Unclosed(self._unpacked)  # type: ignore[return-value]
        try:
            stream = self.file.open("rb")
        except OSError as error:
            raise DataError(f"cannot read {self.file}: {error.strerror}") from error
        if self._stamp_of(stream) != self._stamp:
            stream.close()
            raise DataError(f"{self.file} was written to since its records were counted; start again")
        return stream


class _Unclosed:
    """A temporary file that outlives whoever reads it."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream

    def __enter__(self) -> IO[bytes]:
        return self._stream

    def __exit__(self, *unused: object) -> None:
        pass


def _first_byte(stream: IO[bytes]) -> bytes:
    """The first one that is neither blank nor of a byte-order mark."""
    start = stream.read(3)
    if start != b"\xef\xbb\xbf":
        stream.seek(0)
    while piece := stream.read(2**16):
        if piece.strip():
            return piece.lstrip()[:1]
    return b""


def _hint(folder: Path) -> str:
    if not folder.is_dir():
        return ""
    found = next((f.name for f in sorted(folder.iterdir()) if f.suffix in (".jsonl", ".json", ".parquet", ".csv")), "")
    return f"; name a file of it, such as {folder / found}" if found else ""


# ------------------------------------------------------------------------------------------------ lines of a file


class _Lined(Records):
    """Records that are runs of lines: each begins at an offset that is kept."""

    def __init__(self, path: Path, source: _Source) -> None:
        super().__init__(path)
        self.source = source
        self._starts, self._ends = array("q"), array("q")
        self._jumps: list[tuple[int, int]] = []
        """Where line numbers run ahead of the records: record, and how far its line is ahead."""

    def __len__(self) -> int:
        return len(self._starts)

    def _begin(self) -> None:
        self._starts, self._ends, self._jumps = array("q"), array("q"), []

    def _add(self, start: int, end: int, line: int) -> None:
        ahead = line - len(self._starts)
        if ahead != (self._jumps[-1][1] if self._jumps else 0):
            self._jumps.append((len(self._starts), ahead))
        self._starts.append(start)
        self._ends.append(end)

    def _line_of(self, number: int) -> int:
        at = bisect_right(self._jumps, number, key=lambda jump: jump[0])
        return number + (self._jumps[at - 1][1] if at else 0)

    def read(self, numbers: Sequence[int]) -> list[Placed]:
        """As of every file; one pass over the disk in the order of the offsets."""
        found: dict[int, Placed] = {}
        with self.source.open() as stream:
            for number in sorted(set(numbers)):
                stream.seek(self._starts[number])
                data = stream.read(self._ends[number] - self._starts[number])
                where = self._where(self._line_of(number))
                found[number] = where, self._parse(where, data)
        return [found[number] for number in numbers]

    def _parse(self, where: str, data: bytes) -> Any:
        raise NotImplementedError


class _Lines(_Lined):
    """JSON lines; blank ones and a byte-order mark are passed over."""

    def _scan(self) -> Iterator[tuple[str, Any]]:
        self._begin()
        at = 0
        with self.source.open() as stream:
            for number, line in enumerate(stream, start=1):
                start, at = at, at + len(line)
                if number == 1 and line.startswith(b"\xef\xbb\xbf"):
                    line, start = line[3:], start + 3
                if line.strip():
                    where = self._where(number)
                    value = parse_json(where, line.rstrip(b"\r\n"))
                    self._add(start, at, number)
                    yield where, value

    def _parse(self, where: str, data: bytes) -> Any:
        return parse_json(where, data.rstrip(b"\r\n"))


class _Csv(_Lined):
    """Comma-separated values under a header; every value is text."""

    def __init__(self, path: Path, source: _Source, delimiter: str) -> None:
        super().__init__(path, source)
        self.delimiter = delimiter
        self.names: list[str] = []

    def _scan(self) -> Iterator[tuple[str, Any]]:
        self._begin()
        self.names = []
        with self.source.open() as stream:
            lines = _Counted(stream, self)
            rows = self._reader(lines)
            while True:
                start, line = lines.at, lines.number + 1
                row = self._next(rows, line)
                if row is None:
                    return
                if not any(row):  # a blank line
                    continue
                if not self.names:
                    self.names = self._header(row, line)
                    continue
                where = self._where(line)
                value = self._named(where, row)
                self._add(start, lines.at, line)
                yield where, value

    def _reader(self, lines: Any) -> Iterator[list[str]]:
        csv.field_size_limit(2**24)  # a long answer in one field
        return csv.reader(lines, delimiter=self.delimiter, strict=True)

    def _next(self, rows: Iterator[list[str]], line: int) -> list[str] | None:
        try:
            return next(rows, None)
        except csv.Error as error:
            raise DataError(f"{self._where(line)}: not CSV ({error})") from error

    def _header(self, row: list[str], line: int) -> list[str]:
        names = [name.strip() for name in row]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise DataError(f"{self._where(line)}: the column {twice!r} is named twice")
        return names

    def _named(self, where: str, row: list[str]) -> Record:
        if len(row) != len(self.names):
            raise DataError(f"{where}: {len(row)} values under a header of {len(self.names)}")
        return dict(zip(self.names, row, strict=True))

    def _parse(self, where: str, data: bytes) -> Any:
        line = int(where.rpartition(" ")[2])
        row = self._next(self._reader(io.StringIO(data.decode(), newline="")), line)
        return self._named(where, row or [])


class _Counted:
    """The text of lines, with the bytes and lines that were handed out."""

    def __init__(self, stream: IO[bytes], records: _Csv) -> None:
        self.stream, self.records = stream, records
        self.at = self.number = 0

    def __iter__(self) -> _Counted:
        return self

    def __next__(self) -> str:
        line = next(self.stream)
        self.at += len(line)
        self.number += 1
        try:
            return line.decode("utf-8-sig" if self.number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            where = self.records._where(self.number)
            raise DataError(f"{where}: not UTF-8 ({error.reason} at byte {error.start})") from error


class _Array(_Lined):
    """One JSON array, whose items are found one by one as it is gone through."""

    unit = "item"

    def _scan(self) -> Iterator[tuple[str, Any]]:
        self._begin()
        with self.source.open() as stream:
            window = _Window(stream, self.path)
            window.take("[")
            if window.peek() != "]":
                yield from self._items(window)
            window.take("]", "Expecting ',' delimiter")
            if window.peek():
                raise window.wrong(str(self.path), "Extra data")

    def _items(self, window: _Window) -> Iterator[tuple[str, Any]]:
        while True:
            number = len(self) + 1
            where = self._where(number)
            start, data = window.value(where)
            value = parse_json(where, data)
            self._add(start, start + len(data), number)
            yield where, value
            if window.peek() != ",":
                return
            window.take(",")

    def _parse(self, where: str, data: bytes) -> Any:
        return parse_json(where, data)


class _Window:
    """A piece of a JSON text that moves on through the file. One character stands for one byte, so places are exact.

    Args:
        stream: the bytes.
        path: of the file, for errors.
    """

    _decoder = json.JSONDecoder(parse_int=str, parse_float=str)  # finds ends; values are read again, as UTF-8

    def __init__(self, stream: IO[bytes], path: Path) -> None:
        self.stream, self.path = stream, path
        self.text, self.at, self.whole = "", 0, False
        """What is seen, and the place in it; ``whole``: nothing follows what is seen."""
        self.before, self.line, self.line_start = 0, 1, 0
        """Bytes before what is seen; the line that it begins in, and where that begins."""
        if stream.read(3) == b"\xef\xbb\xbf":
            self.before = self.line_start = 3
        else:
            stream.seek(0)
        self._more()

    def _more(self) -> None:
        """Lets go of what was read, and sees as much again as is left, at least a piece."""
        self.line, self.line_start = self._line_of(self.at)
        self.before += self.at
        self.text, self.at = self.text[self.at :], 0
        data = self.stream.read(max(PIECE, len(self.text)))
        self.text += data.decode("latin-1")
        self.whole = not data

    def peek(self) -> str:
        """The next character but blanks; empty at the end of the file."""
        while True:
            found = _SOLID.search(self.text, self.at)
            self.at = len(self.text) if found is None else found.start()
            if found is not None or self.whole:
                return "" if found is None else found[0]
            self._more()

    def take(self, wanted: str, reason: str = "") -> None:
        """Goes on behind ``wanted``, which must come next."""
        if self.peek() != wanted:
            raise self.wrong(str(self.path), reason or f"Expecting {wanted!r}")
        self.at += 1

    def value(self, where: str) -> tuple[int, bytes]:
        """The place of the next value and its bytes.

        Raises:
            DataError: there is none.
        """
        self.peek()
        while True:
            try:
                _, end = self._decoder.raw_decode(self.text, self.at)
            except json.JSONDecodeError as error:
                cut = error.msg.startswith("Unterminated string") or error.pos > len(self.text) - CUT_SHORT
                if self.whole or not cut:
                    raise self.wrong(where, error.msg, error.pos) from error
            except (RecursionError, MemoryError) as error:
                raise DataError(f"{where}: not usable JSON (nested too deeply)") from error
            else:
                if self.whole or end < len(self.text):  # a number may go on
                    start, data = self.before + self.at, self.text[self.at : end].encode("latin-1")
                    self.at = end
                    return start, data
            self._more()

    def wrong(self, where: str, reason: str, at: int | None = None) -> DataError:
        """What is wrong with the next character, or the one at a place of what is seen."""
        at = self.at if at is None else at
        line, start = self._line_of(at)
        return DataError(f"{where}, line {line}: not JSON ({reason} at column {self.before + at - start + 1})")

    def _line_of(self, at: int) -> tuple[int, int]:
        """The line of a place in what is seen, and where in the file it begins."""
        last = self.text.rfind("\n", 0, at)
        start = self.line_start if last < 0 else self.before + last + 1
        return self.line + self.text.count("\n", 0, at), start


_SOLID = re.compile(r"[^ \t\n\r]")
CUT_SHORT = 16
"""Characters at the end of a piece in which an error may be that the rest is not seen yet (an escape, a word)."""


# ------------------------------------------------------------------------------------------------ files of columns


class _Parquet(Records):
    """Row groups, decoded when a row of theirs is wanted."""

    unit = "row"

    def __init__(self, path: Path, source: _Source) -> None:
        super().__init__(path)
        try:
            import pyarrow.parquet as parquet
        except ImportError as error:
            raise ConfigError(f"reading {path} needs pyarrow: pip install 'unified-rl[datasets]'") from error
        if path.suffix == ".gz":
            raise DataError(f"{path} is packed Parquet, which is packed inside already: unpack the file")
        self.source = source
        try:
            self._file = parquet.ParquetFile(path)
        except Exception as error:  # pyarrow raises kinds of its own
            raise self._unreadable(error) from error
        counts = [self._file.metadata.row_group(i).num_rows for i in range(self._file.num_row_groups)]
        self._starts = array("q", [0])
        for count in counts:
            self._starts.append(self._starts[-1] + count)
        self._kept: OrderedDict[int, Any] = OrderedDict()

    def _unreadable(self, error: Exception) -> DataError:
        return DataError(f"{self.path}: not Parquet that can be read ({' '.join(str(error).split())[:200]})")

    def __len__(self) -> int:
        return self._starts[-1]

    def _scan(self) -> Iterator[tuple[str, Any]]:
        number = 0
        batches = self._file.iter_batches(batch_size=BATCH, use_threads=False)
        while True:
            try:
                batch = next(batches, None)
                rows = [] if batch is None else batch.to_pylist()
            except Exception as error:
                raise self._unreadable(error) from error
            if batch is None:
                return
            for row in rows:
                number += 1
                yield self._where(number), exact(row)

    def read(self, numbers: Sequence[int]) -> list[Placed]:
        """As of every file; each row group is decoded once."""
        self.source.open().close()
        found: dict[int, Record] = {}
        groups: dict[int, list[int]] = {}
        for number in dict.fromkeys(numbers):
            groups.setdefault(bisect_right(self._starts, number) - 1, []).append(number)
        for group, wanted in sorted(groups.items()):
            rows = self._group(group).take([number - self._starts[group] for number in wanted]).to_pylist()
            found |= zip(wanted, rows, strict=True)
        return [(self._where(number + 1), exact(found[number])) for number in numbers]

    def _group(self, number: int) -> Any:
        if number in self._kept:
            self._kept.move_to_end(number)
        else:
            try:
                self._kept[number] = self._file.read_row_group(number, use_threads=False)
            except Exception as error:
                raise self._unreadable(error) from error
        while len(self._kept) > 1 and sum(table.nbytes for table in self._kept.values()) > GROUPS_KEPT:
            self._kept.popitem(last=False)
        return self._kept[number]


def _is_dataset(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("state.json", "dataset_dict.json"))


class _Dataset(Records):
    """A folder of ``Dataset.save_to_disk``; of several splits the one named ``train``."""

    unit = "row"

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        if (path / "dataset_dict.json").is_file():
            splits = sorted(f.parent.name for f in path.glob("*/state.json"))
            if "train" not in splits:
                raise DataError(f"{path} has no split 'train'; name one of {', '.join(map(str, splits)) or 'none'} "
                                f"as its own folder, such as {path / (splits[0] if splits else 'train')}")  # fmt: skip
            path = path / "train"
        try:
            from datasets import load_from_disk
        except ImportError as error:
            raise ConfigError(f"reading {path} needs datasets: pip install 'unified-rl[datasets]'") from error
        try:
            data: Any = load_from_disk(str(path), keep_in_memory=False).with_format(None)
            odd = [name for name, kind in data.features.items() if type(kind).__name__ in DECODED]
            self._data = data.remove_columns(odd)
        except Exception as error:
            reason = " ".join(str(error).split())[:200]
            raise DataError(f"{path} is no data set that can be read ({reason})") from error

    def __len__(self) -> int:
        return len(self._data)

    def _scan(self) -> Iterator[tuple[str, Any]]:
        for start in range(0, len(self._data), BATCH):
            yield from self.read(range(start, min(start + BATCH, len(self._data))))

    def read(self, numbers: Sequence[int]) -> list[Placed]:
        """As of every file."""
        columns = self._data[list(numbers)]
        rows = [{name: values[at] for name, values in columns.items()} for at in range(len(numbers))]
        return [(self._where(number + 1), exact(row)) for number, row in zip(numbers, rows, strict=True)]


def exact(value: Any) -> Any:
    """A value with its numbers as Decimals, as a JSON file's are."""
    if isinstance(value, bool) or value is None or isinstance(value, str):
        return value
    if isinstance(value, int | float):
        return Decimal(value) if isinstance(value, int) else _decimal(value)
    if isinstance(value, dict):
        return {key: exact(one) for key, one in value.items()}
    return [exact(one) for one in value] if isinstance(value, list | tuple) else value


def _decimal(value: float) -> Decimal:
    if not math.isfinite(value):
        return Decimal(str(value))
    return Decimal(int(value)) if value.is_integer() and abs(value) < 2**53 else Decimal(repr(value))


# ------------------------------------------------------------------------------------------------------- JSON texts


def parse_json(where: str, data: bytes) -> Any:
    """The value of a JSON text; its numbers are Decimals.

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
