"""What can go wrong beside the training: code of others raises, the disk is full, the run folder is gone."""

from __future__ import annotations

import sysconfig
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from unified_rl.errors import CheckpointError, EnvError, RolloutError, UnifiedRLError
from unified_rl.files import write_atomically

OURS = str(Path(__file__).parents[1])
LIBRARIES = tuple({sysconfig.get_paths()[name] for name in ("stdlib", "platstdlib", "purelib", "platlib")})
REPORT = "error.txt"


class RunFolder:
    """The folder of a run that is going on, which may be removed or fill up under it.

    Args:
        path: the folder, or None where there is none.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.identity = _identity(path)

    @contextmanager
    def writes(self) -> Iterator[None]:
        """Around everything that is written into it.

        Raises:
            CheckpointError: it was removed or replaced, or cannot be written.
        """
        if self.path is None:
            yield
            return
        if self.identity is not None:
            self._require()
        try:
            yield
        except OSError as error:
            self._require()
            raise CheckpointError(f"{self.path} cannot be written: {reason(error)}") from error

    def _require(self) -> None:
        if self.identity is not None and _identity(self.path) != self.identity:
            raise CheckpointError(f"the run folder {self.path} was removed or replaced while the run was going on")


def _identity(path: Path | None) -> tuple[int, int] | None:
    if path is None:
        return None
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def reason(error: OSError) -> str:
    """What the system says, and about which file."""
    text = error.strerror or str(error) or type(error).__name__
    return f"{text} ({error.filename})" if error.filename else text


@contextmanager
def foreign(doing: str) -> Iterator[None]:
    """Around code of others: environments, rewards, sources of rows.

    Raises:
        RolloutError: anything but our own errors, as one line with its type and place.
    """
    try:
        yield
    except (EnvError, RolloutError) as error:  # told well already, but for the place
        raised = error.__cause__ or error.__context__
        if raised is not None and raised.__traceback__ is not None:
            error.args = (f"{error} ({place(raised)})",)
        raise
    except (UnifiedRLError, MemoryError):
        raise
    except Exception as error:
        told = " ".join(str(error).split())
        raise RolloutError(f"{doing} failed: {type(error).__name__}: {told} ({place(error)})") from error


def place(error: BaseException) -> str:
    """File, line and function that raised: the innermost that is neither ours nor a library's, else the innermost."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if not f.filename.startswith((OURS, *LIBRARIES, "<frozen"))]
    frame = (own or frames)[-1]
    return f"{frame.filename}:{frame.lineno}, in {frame.name}"


def write_report(folder: Path, error: BaseException) -> None:
    """Writes the traceback into the run folder; failing to is no error of its own."""
    with suppress(CheckpointError):
        write_atomically(folder / REPORT, "".join(traceback.format_exception(error)))


def forget_report(folder: Path) -> None:
    """Removes the traceback of an earlier end."""
    with suppress(OSError):
        (folder / REPORT).unlink(missing_ok=True)
