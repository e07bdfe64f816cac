"""Files that are old or new and never in between, and folders that know when one of their files was damaged."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import Any

from safetensors import SafetensorError

from unified_rl.errors import CheckpointError, DamageError, UnifiedRLError

MANIFEST = "MANIFEST.json"
SEAL = "sha256"
_BLOCK = 1 << 22
_MISFITS = (
    LookupError, TypeError, ValueError, AttributeError, RuntimeError, ArithmeticError, AssertionError, SafetensorError,
)  # fmt: skip
"""What content of another shape than ours raises, here and in the libraries."""


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a file beside ``path`` to write to; leaving the block flushes it and puts it in the place of ``path``.

    Whatever happens inside, and wherever the process or the machine stops, ``path`` is the old file or the new one.

    Raises:
        CheckpointError: the disk is full or the folder not writable; the old file is intact.
    """
    aside = path.with_name(f".writing-{path.name}")  # ends as the file does, for writers that look at the suffix
    try:
        try:
            yield aside
            flush(aside)
            os.replace(aside, path)
            flush(path.parent)
        except BaseException:
            with suppress(OSError):
                aside.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise CheckpointError(f"{path} could not be written: {error}") from error


def write_atomically(path: Path, data: bytes | str) -> None:
    """Writes a whole file by way of :func:`replacing`; text is UTF-8."""
    with replacing(path) as aside:
        aside.write_bytes(data.encode() if isinstance(data, str) else data)


def clear_aside(folder: Path) -> None:
    """Removes what a process that was killed left of files of ``folder`` that it was about to replace."""
    for aside in folder.glob(".writing-*"):
        with suppress(OSError):
            aside.unlink()


def flush(path: Path) -> None:
    """Makes a file's content, or a folder's list of names, outlast a failure of the machine."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def fitting(otherwise: str) -> Iterator[None]:
    """Within it, content that lacks something, or holds something else there, is an error that begins as given.

    Raises:
        CheckpointError: ``otherwise``, and what was wrong.
    """
    try:
        yield
    except UnifiedRLError:
        raise
    except _MISFITS as error:
        first = (str(error).strip() or "no message").splitlines()[0]
        raise CheckpointError(f"{otherwise} ({type(error).__name__}: {first})") from error


# ------------------------------------------------------------------------------------------------------ sealed JSON


def sealed(body: Mapping[str, Any]) -> str:
    """``body`` as JSON whose last key is the SHA-256 of the rest."""
    return json.dumps({**body, SEAL: hashlib.sha256(json.dumps(body).encode()).hexdigest()}, indent=1)


def write_sealed(path: Path, body: Mapping[str, Any]) -> None:
    """Writes :func:`sealed` JSON atomically."""
    write_atomically(path, sealed(body))


def read_sealed(path: Path) -> dict[str, Any]:
    """The body of a sealed file, which must be byte for byte what :func:`sealed` wrote.

    Raises:
        DamageError: missing, or changed in any byte.
    """
    data = _read(path)
    try:
        body = json.loads(data)
        body.pop(SEAL)
        whole = sealed(body).encode() == data
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        whole = False
    if not whole:
        raise DamageError(f"{path} is damaged: it is not what was written")
    return dict(body)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise DamageError(f"{path} cannot be read: it is missing") from None
    except OSError as error:
        raise DamageError(f"{path} cannot be read: {error}") from error


# --------------------------------------------------------------------------------------------------------- manifest


def digest(path: Path, size: int | None = None) -> str:
    """SHA-256 of a file, or of its first ``size`` bytes."""
    found = hashlib.sha256()
    left = sys.maxsize if size is None else size
    with open(path, "rb") as file:
        while left and (block := file.read(min(left, _BLOCK))):
            found.update(block)
            left -= len(block)
    return found.hexdigest()


Entry = dict[str, Any]
"""``size`` in bytes and ``sha256``; ``grows`` where more may follow."""


def entry(path: Path) -> Entry:
    """The entry of a file as it is now."""
    return {"size": path.stat().st_size, "sha256": digest(path)}


class Manifest:
    """Sizes and digests of the files of a folder, kept in its ``MANIFEST.json``, which checks itself.

    A name has one entry; it has two while its file is replaced, and then either content is whole. So a process that is
    killed at any moment leaves a folder that agrees with its manifest.

    Args:
        folder: the folder.
        files: name, relative to the folder, to entries.
        notes: plain values that are kept along.
    """

    def __init__(
        self, folder: Path, files: Mapping[str, list[Entry]] | None = None, notes: Mapping[str, Any] | None = None
    ) -> None:
        self.folder, self.files, self.notes = folder, dict(files or {}), dict(notes or {})

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """The manifest of a folder.

        Raises:
            DamageError: missing or damaged, or it lists what is not in the folder.
        """
        body = read_sealed(folder / MANIFEST)
        files, notes = body.get("files") or {}, body.get("notes") or {}
        if not isinstance(files, dict) or not isinstance(notes, dict):
            raise DamageError(f"{folder / MANIFEST} is damaged: it lists no files")
        for name, entries in files.items():
            if not _is_inside(name) or not _are_entries(entries):
                raise DamageError(f"{folder / MANIFEST} lists {name!r}, which is no file of its folder")
        return cls(folder, files, notes)

    @classmethod
    def find(cls, folder: Path) -> Manifest | None:
        """The manifest of a folder, or None where there is none.

        Raises:
            DamageError: it is damaged.
        """
        return cls.read(folder) if (folder / MANIFEST).exists() else None

    @classmethod
    def of(cls, folder: Path, names: Iterable[str], notes: Mapping[str, Any] | None = None) -> Manifest:
        """A manifest of the files as they are now, not yet written."""
        return cls(folder, {name: [entry(folder / name)] for name in sorted(names)}, notes)

    def write(self) -> None:
        """Writes it."""
        write_sealed(self.folder / MANIFEST, {"files": self.files, "notes": self.notes})

    def check(self, names: Iterable[str] | None = None) -> None:
        """Compares files with their entries: all, or those of ``names`` that are listed.

        Raises:
            DamageError: a file is missing, shorter, longer or altered; the message names it.
        """
        for name in self.files if names is None else names:
            if name in self.files:
                self._check(self.folder / name, self.files[name])

    def _check(self, path: Path, entries: list[Entry]) -> None:
        if not path.is_file():
            raise DamageError(f"{path} cannot be read: it is missing")
        try:
            held = path.stat().st_size
            fitting = [e for e in entries if held == e["size"] or (e.get("grows") and held > e["size"])]
            if not fitting:
                raise DamageError(f"{path} is damaged: it holds {held} bytes of {entries[-1]['size']}")
            if not any(digest(path, e["size"]) == e["sha256"] for e in fitting):
                raise DamageError(f"{path} is damaged: its content is not what was written (SHA-256)")
        except OSError as error:
            raise DamageError(f"{path} cannot be read: {error}") from error

    def replace(self, contents: Mapping[str, bytes | str]) -> None:
        """Replaces files by way of :func:`replacing`; the manifest lists the new content before, and alone after."""
        data = {name: text.encode() if isinstance(text, str) else text for name, text in contents.items()}
        new = {name: {"size": len(x), "sha256": hashlib.sha256(x).hexdigest()} for name, x in data.items()}
        there = {name for name in new if (self.folder / name).is_file()}
        changed = {name: e for name, e in new.items() if self.files.get(name) != [e] or name not in there}
        if not changed:
            return
        for name, fresh in changed.items():
            self.files[name] = [*self._current(name), fresh]
        self.write()
        for name in changed:
            write_atomically(self.folder / name, data[name])
        if any(len(self.files[name]) > 1 for name in changed):
            self.files.update({name: [fresh] for name, fresh in changed.items()})
            self.write()

    def _current(self, name: str) -> list[Entry]:
        """The entries that the file agrees with now; all of them where it agrees with none, which stays damage."""
        entries = self.files.get(name, [])
        path = self.folder / name
        held = entry(path) if len(entries) > 1 and path.is_file() else None
        return [e for e in entries if e == held] or entries


def _is_inside(name: str) -> bool:
    path = PurePosixPath(name)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts and "\0" not in name


def _are_entries(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(e, dict) and {"size", "sha256"} <= {*e} for e in value)
    )


def check_listed(path: Path) -> None:
    """Checks one file against the manifest of its folder, where there is one that lists it.

    Raises:
        DamageError: the file or the manifest is missing or altered.
    """
    manifest = Manifest.find(path.parent)
    if manifest is not None:
        manifest.check([path.name])
