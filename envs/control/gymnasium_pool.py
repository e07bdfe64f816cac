"""Copies of a Gymnasium environment: stepped in this process one by one, or shared out among processes."""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
import weakref
from collections.abc import Sequence
from mmap import mmap
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from unified_rl import errors
from unified_rl.envs.control.gymnasium_copy import Copy, Source
from unified_rl.errors import ConfigError, EnvError
from unified_rl.interop.line_process import LineProcess

Array: TypeAlias = NDArray[Any]
WORKER = Path(__file__).with_name("gymnasium_worker.py")
START_SECONDS = 120.0
"""Wall time in which a worker makes its copies."""
GRACE = 2.0
"""Seconds in which a worker closes its copies before it is ended."""


class Board(NamedTuple):
    """What a step reads and writes, a row a copy; in shared memory where processes share it.

    Attributes:
        action: ``[K, *shape]`` in the action space's dtype.
        row: of the observation, ``[K, w]``.
        reward: ``[K]`` float64.
        ends: ``[2, K]`` bool: terminated, truncated.
    """

    action: Array
    row: Array
    reward: Array
    ends: Array

    @classmethod
    def on(cls, buffer: Any, num: int, shapes: dict[str, Any]) -> Board:
        """Laid out in a buffer of :func:`board_bytes`, widest entries first."""
        at, parts = 0, {}
        for name, (shape, dtype) in _fields(num, shapes).items():
            count, size = int(np.prod(shape)), np.dtype(dtype).itemsize
            parts[name] = np.frombuffer(buffer, dtype, count, at).reshape(shape)
            at += -(-count * size // ALIGNED) * ALIGNED
        return cls(**parts)


ALIGNED = 64
"""Bytes: parts of a board begin at multiples of it."""


def _fields(num: int, shapes: dict[str, Any]) -> dict[str, tuple[tuple[int, ...], str]]:
    return {
        "action": ((num, *shapes["action"]), shapes["action_dtype"]),
        "row": ((num, shapes["width"]), shapes["row_dtype"]),
        "reward": ((num,), "float64"),
        "ends": ((2, num), "bool"),
    }


def board_bytes(num: int, shapes: dict[str, Any]) -> int:
    """Size of a board of ``num`` copies."""
    sizes = (int(np.prod(shape)) * np.dtype(dtype).itemsize for shape, dtype in _fields(num, shapes).values())
    return max(1, sum(-(-size // ALIGNED) * ALIGNED for size in sizes))


def shapes_of(copy: Copy) -> dict[str, Any]:
    """What a board is made of, as JSON holds it."""
    action, layout = copy.space.action, copy.layout
    kinds = {"action_dtype": action.dtype, "row_dtype": "uint8" if layout.images else "float32"}
    return {"action": list(action.shape), "width": layout.width, **kinds}


class Pool(Protocol):
    """Copies that are stepped together.

    Attributes:
        board: what a step reads and writes.
    """

    board: Board

    def step(self, lanes: list[int], numbers: list[int]) -> dict[int, dict[str, float]]:
        """Steps the copies ``lanes``, each in its ``numbers``-th step; what those whose episodes ended told."""
        ...

    def reset(self, lanes: list[int], seeds: list[int]) -> None:
        """Starts episodes in the copies ``lanes``; their observations are on the board."""
        ...

    def replay(self, lane: int, seed: int, actions: Array) -> Array:
        """Plays an episode again in a copy; the row of its last observation, ``[w]``."""
        ...

    def picture(self, lane: int) -> NDArray[np.uint8]:
        """What a copy draws, ``[H, W, 3]``."""
        ...

    def close(self) -> None:
        """Closes every copy."""
        ...


def step_here(copies: dict[int, Copy], board: Board, lanes: list[int], numbers: list[int]) -> dict[int, Any]:
    """Steps copies of this process; see :meth:`Pool.step`."""
    told: dict[int, dict[str, float]] = {}
    for lane, number in zip(lanes, numbers, strict=True):
        step = copies[lane].step(board.action[lane], number)
        board.row[lane], board.reward[lane], board.ends[0, lane], board.ends[1, lane] = step.values
        if step.told:
            told[lane] = step.told
    return told


class Copies:
    """All copies in this process.

    Args:
        source: of further copies.
        num: K.
        first: copies that are there already.
    """

    def __init__(self, source: Source, num: int, first: Sequence[Copy] = ()) -> None:
        made = [*first, *(source.copy(lane) for lane in range(len(first), num))]
        self.copies = dict(enumerate(made))
        shapes = shapes_of(made[0])
        self.board = Board.on(bytearray(board_bytes(num, shapes)), num, shapes)

    def step(self, lanes: list[int], numbers: list[int]) -> dict[int, dict[str, float]]:
        """See :class:`Pool`."""
        return step_here(self.copies, self.board, lanes, numbers)

    def reset(self, lanes: list[int], seeds: list[int]) -> None:
        """See :class:`Pool`."""
        for lane, seed in zip(lanes, seeds, strict=True):
            self.board.row[lane] = self.copies[lane].reset(seed)

    def replay(self, lane: int, seed: int, actions: Array) -> Array:
        """See :class:`Pool`."""
        return self.copies[lane].replay(seed, actions)

    def picture(self, lane: int) -> NDArray[np.uint8]:
        """See :class:`Pool`."""
        return self.copies[lane].picture()

    def close(self) -> None:
        """See :class:`Pool`."""
        for copy in self.copies.values():
            copy.close()


class Worker:
    """A process with some of the copies.

    Args:
        name: of the environment, for errors.
        number: of the worker.
        lanes: its copies.
        start: its first message.
        file: of the board.
    """

    def __init__(self, name: str, number: int, lanes: Sequence[int], start: dict[str, Any], file: int) -> None:
        self.name, self.number, self.lanes = name, number, list(lanes)
        self.process = LineProcess(WORKER, [file])
        self.process.tell({**start, "lanes": self.lanes, "file": file, "parent": os.getpid()})

    def answer(self, seconds: float | None = None) -> dict[str, Any]:
        """The answer to a message.

        Raises:
            UnifiedRLError: what the copies raised; EnvError where the process ended, ConfigError where it did not
                answer in ``seconds``.
        """
        try:
            found = self.process.answer(seconds)
        except EOFError:
            raise EnvError(
                f"process {self.number} of env.workers ended ({self.process.end(GRACE)}) with the simulations "
                f"{self.lanes} of {self.name}: what ended it is in its output, or it ran out of memory"
            ) from None
        if found is None:
            raise ConfigError(f"env.workers: process {self.number} made no copies of {self.name} in {seconds:g} s")
        if "error" in found:
            kind = getattr(errors, found["error"][0], EnvError)
            raise kind(found["error"][1])
        return found


class Workers:
    """Copies shared out evenly among processes, with actions and observations in memory that they share.

    Each copy is made, seeded and stepped as it would be here, so that results are the same. A process ends when it is
    told to, when its input ends, and when this process has gone.

    Args:
        source: of the copies; by name, since names alone arrive.
        num: K.
        workers: processes, at most K.
        shapes: see :func:`shapes_of`.

    Raises:
        ConfigError: a factory that has no name, or copies that cannot be made there.
    """

    def __init__(self, source: Source, num: int, workers: int, shapes: dict[str, Any]) -> None:
        if source.id is None and not isinstance(source.make, str):
            raise ConfigError(
                "env.workers makes copies in other processes, by name: give env.id, or env.make=module:function"
            )
        start = {"source": source.plain(), "path": sys.path, "num": num, "shapes": shapes}
        try:
            json.dumps(start)
        except TypeError as error:
            raise ConfigError(
                f"env.workers sends env.make_kwargs to other processes, as plain data: {error}"
            ) from error
        size = board_bytes(num, shapes)
        file = _shared_file(size)
        try:
            memory = mmap(file, size)
            self.board = Board.on(memory, num, shapes)
            blocks = [block.tolist() for block in np.array_split(np.arange(num), min(workers, num))]
            self.workers = [Worker(source.name, at, block, start, file) for at, block in enumerate(blocks)]
        finally:
            os.close(file)
        self._home = {lane: worker for worker in self.workers for lane in worker.lanes}
        self._finalizer = weakref.finalize(self, _close, self.workers)
        try:
            for worker in self.workers:
                worker.answer(START_SECONDS)
        except BaseException:
            self.close()
            raise

    def step(self, lanes: list[int], numbers: list[int]) -> dict[int, dict[str, float]]:
        """See :class:`Pool`."""
        answers = self._all("step", lanes, numbers)
        return {int(lane): told for answer in answers for lane, told in answer["told"].items()}

    def reset(self, lanes: list[int], seeds: list[int]) -> None:
        """See :class:`Pool`."""
        self._all("reset", lanes, seeds)

    def replay(self, lane: int, seed: int, actions: Array) -> Array:
        """See :class:`Pool`."""
        for number in range(-1, len(actions)):
            if number < 0:
                self._all("reset", [lane], [seed])
            else:
                self.board.action[lane] = actions[number]
                self._all("step", [lane], [number + 1])
        row: Array = self.board.row[lane].copy()
        return row

    def picture(self, lane: int) -> NDArray[np.uint8]:
        """See :class:`Pool`."""
        worker = self._home[lane]
        worker.process.tell({"do": "draw", "lanes": [lane], "numbers": [0]})
        answer = worker.answer()
        height, width, colors = map(int, answer["shape"])
        flat: NDArray[np.uint8] = np.frombuffer(bytes.fromhex(answer["picture"]), dtype=np.uint8)
        return flat.reshape(height, width, colors)

    def _all(self, do: str, lanes: list[int], numbers: list[int]) -> list[dict[str, Any]]:
        """The answers of all workers that have some of the lanes; the first error, once all have answered."""
        given = dict(zip(lanes, numbers, strict=True))
        asked = []
        for worker in self.workers:
            own = [lane for lane in worker.lanes if lane in given]
            if own:
                worker.process.tell({"do": do, "lanes": own, "numbers": [given[lane] for lane in own]})
                asked.append(worker)
        answers, fault = [], None
        try:
            for worker in asked:
                try:
                    answers.append(worker.answer())
                except errors.UnifiedRLError as error:
                    fault = fault or error
        except BaseException:  # a time limit or Ctrl-C: what is still to come would answer the next message
            self.close()
            raise
        if fault is not None:
            raise fault
        return answers

    def close(self) -> None:
        """Ends the processes."""
        self._finalizer()


def _shared_file(size: int) -> int:
    """A file of memory, or one without a name."""
    if hasattr(os, "memfd_create"):
        file = os.memfd_create("unified-rl")
    else:
        with tempfile.TemporaryFile() as named:
            file = os.dup(named.fileno())
    os.ftruncate(file, size)
    return file


def _close(workers: Sequence[Worker]) -> None:
    """Ends processes: they are asked first, all at once, then made to."""
    for worker in workers:
        worker.process.hang_up()
    end = time.monotonic() + GRACE
    for worker in workers:
        worker.process.end(end - time.monotonic())
