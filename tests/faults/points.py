"""Fault points: every change of a file, before it, after it, and (for writes) in its middle.

Installed in a child process by patching ``open`` and the functions of ``os`` that change files. Each point has a
number, so that a second run of the same program meets the same point under the same number.
"""

from __future__ import annotations

import builtins
import io
import mmap
import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

CHANGES = ("replace", "rename", "unlink", "remove", "mkdir", "rmdir", "fsync", "truncate", "ftruncate", "link")
QUIET = ("tensorboard",)
"""Parts of paths whose files are written by a thread, at times that no program repeats."""
LABEL = 200


class Shared:
    """What a child tells its parent even when it is killed: how many points it met, and the last one."""

    def __init__(self) -> None:
        self.memory = mmap.mmap(-1, 16 + LABEL)

    def note(self, count: int, label: str) -> None:
        text = label.encode()[:LABEL]
        self.memory[:8] = count.to_bytes(8, "little")
        self.memory[8:16] = len(text).to_bytes(8, "little")
        self.memory[16 : 16 + len(text)] = text

    @property
    def count(self) -> int:
        return int.from_bytes(self.memory[:8], "little")

    @property
    def label(self) -> str:
        return self.memory[16 : 16 + int.from_bytes(self.memory[8:16], "little")].decode(errors="replace")


def failing(code: int) -> Callable[[], None]:
    """A disk's refusal, such as ``errno.ENOSPC``."""

    def act() -> None:
        raise OSError(code, os.strerror(code))

    return act


def kill() -> None:
    """Ends this process as ``kill -9`` does."""
    os.kill(os.getpid(), signal.SIGKILL)


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


class Points:
    """Counts fault points below a folder, and acts at one of them.

    Args:
        root: files elsewhere are not looked at.
        at: number of the point, or a test of its label (``write metrics.jsonl torn``); None only counts.
        act: what is done there: :func:`kill`, or a function that raises OSError.
        shared: where points are noted.
        stays: act at every point from then on, as a disk that stays full does.
    """

    def __init__(
        self,
        root: Path,
        at: int | Callable[[str], bool] | None = None,
        act: Callable[[], None] = kill,
        shared: Shared | None = None,
        stays: bool = False,
    ) -> None:
        self.root, self.at, self.act, self.shared = str(root.resolve()), at, act, shared
        self.count, self.stays = 0, stays
        self._undo: list[tuple[Any, str, Any]] = []

    def met(self, label: str) -> bool:
        """Notes a point; whether it is the one."""
        self.count += 1
        if self.shared is not None:
            self.shared.note(self.count, label)
        if callable(self.at) or self.at is None:
            return self.at is not None and self.at(label)
        return self.count - 1 >= self.at if self.stays else self.count - 1 == self.at

    def point(self, label: str) -> None:
        if self.met(label):
            self.act()

    def inside(self, path: Any) -> bool:
        if not _in_main_thread():
            return False
        try:
            text = os.path.abspath(os.fspath(path))
        except TypeError:
            return False
        return isinstance(text, str) and text.startswith(self.root) and not any(part in text for part in QUIET)

    # ------------------------------------------------------------------ patching

    def __enter__(self) -> Points:
        for name in CHANGES:
            self._patch(os, name, self._changing(name, getattr(os, name)))
        faulty = self._opening(builtins.open)
        self._patch(builtins, "open", faulty)
        self._patch(io, "open", faulty)
        self._patch_saves()
        return self

    def __exit__(self, *error: Any) -> None:
        for owner, name, value in reversed(self._undo):
            setattr(owner, name, value)

    def _patch(self, owner: Any, name: str, value: Any) -> None:
        self._undo.append((owner, name, getattr(owner, name)))
        setattr(owner, name, value)

    def _changing(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def changed(*args: Any, **kwargs: Any) -> Any:
            target = args[-1] if name in ("replace", "rename", "link") and len(args) > 1 else args[0]
            # a descriptor may be one of shared memory, which is no file of the program's
            file = os.path.realpath(f"/proc/self/fd/{target}") if isinstance(target, int) else target
            if not (self.inside(file) or kwargs.get("dir_fd") is not None) or not _in_main_thread():
                return real(*args, **kwargs)
            label = f"{name} {'' if isinstance(target, int) else os.path.basename(os.fspath(target))}"
            self.point(f"{label} before")
            out = real(*args, **kwargs)
            self.point(f"{label} after")
            return out

        return changed

    def _opening(self, real: Callable[..., Any]) -> Callable[..., Any]:
        points = self

        class File(io.FileIO):
            """Its writes are points."""

            full = False

            def write(self, data: Any) -> int:
                label = f"write {os.path.basename(str(self.name))}"
                points.point(f"{label} before")
                view = memoryview(data).cast("B")
                if self.full:
                    points.act()
                if len(view) > 1 and points.met(f"{label} torn"):
                    half = super().write(view[: len(view) // 2])
                    if points.act is kill:
                        kill()
                    self.full = True  # as a disk does: a short write first, then the error
                    return half
                written = super().write(view)
                points.point(f"{label} after")
                return written

        def opened(
            file: Any, mode: str = "r", buffering: int = -1, encoding: Any = None, errors: Any = None,
            newline: Any = None, *rest: Any, **kwargs: Any,
        ) -> Any:  # fmt: skip
            if isinstance(file, int) or rest or kwargs or not set(mode) & set("wax+") or not points.inside(file):
                return real(file, mode, buffering, encoding, errors, newline, *rest, **kwargs)
            name = os.path.basename(os.fspath(file))
            points.point(f"open {name} before")
            raw = File(os.fspath(file), mode.replace("b", "").replace("t", ""))
            points.point(f"open {name} after")
            if "b" in mode and buffering == 0:
                return raw
            buffered: Any = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
            return buffered if "b" in mode else io.TextIOWrapper(buffered, encoding, errors, newline)

        return opened

    def _patch_saves(self) -> None:
        """``safetensors`` writes without Python's files."""
        from safetensors.torch import save_file as real

        def saved(tensors: Any, path: Any, *args: Any, **kwargs: Any) -> None:
            if not self.inside(path):
                return real(tensors, path, *args, **kwargs)
            name = os.path.basename(os.fspath(path))
            self.point(f"save {name} before")
            real(tensors, path, *args, **kwargs)
            if self.met(f"save {name} torn"):
                with builtins.open(path, "rb") as handle:
                    os.truncate(path, len(handle.read()) // 2)
                self.act()
            self.point(f"save {name} after")
            return None

        for module in [m for name, m in list(sys.modules.items()) if name.startswith(("unified_rl", "safetensors"))]:
            if getattr(module, "save_file", None) is real:
                self._patch(module, "save_file", saved)
