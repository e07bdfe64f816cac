"""What a sampler is: it is told of every write and draws serial numbers of rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from unified_rl.errors import RecordError
from unified_rl.replay.ring import IntArray, Ring


class Draw(NamedTuple):
    """Serials of the drawn rows (of the first row of each window), and further columns for the batch."""

    serials: IntArray
    extras: dict[str, NDArray[Any]]


class Sampler:
    """Base of all samplers.

    A sampler draws serials between ``ring.oldest`` and ``ring.last_start(length)``; it never looks at rows unless it
    names their keys in ``keys`` (required) or ``optional_keys``. Its per-row memory lives in named columns, which the
    replay persists with the rows; everything else that a later draw depends on is in :meth:`state_dict`.
    """

    length: int | None = None
    """Window length of a draw that names none."""
    queue: bool = False
    """Whether every row waits to be drawn once, oldest first, so that a draw may ask for what one write brought."""
    keys: tuple[str, ...] = ()
    optional_keys: tuple[str, ...] = ()
    takes_priority: bool = False
    """Whether draws depend on the priorities of :meth:`update`, so that a consumer should renew them."""
    weighs: bool = False
    """Whether a batch brings ``priority_weight [B]``, by which a consumer should weigh its loss."""
    ring: Ring
    columns: dict[str, NDArray[Any]]

    def column_types(self) -> dict[str, Any]:
        """Names and numpy dtypes of the per-row columns this sampler needs."""
        return {}

    def bind(self, ring: Ring, columns: dict[str, NDArray[Any]]) -> None:
        """Takes the shared bookkeeping and the columns ``[physical]``; called once, then :meth:`reset`."""
        self.ring, self.columns = ring, columns
        self.reset()

    def reset(self) -> None:
        """Forgets what was derived from rows."""

    def before_write(self, count: int, values: Mapping[str, NDArray[Any]]) -> None:
        """May refuse a write of ``count`` rows by raising, before anything changes."""

    def wrote(self, low: int, high: int, values: Mapping[str, NDArray[Any]]) -> None:
        """Rows of serials ``[low, high)`` were committed; ``values`` holds the keys this sampler asked for."""

    def restore(self, low: int, high: int, values: Mapping[str, NDArray[Any]]) -> None:
        """Like :meth:`wrote` for rows that were loaded: columns hold what was saved and must not be reset."""
        self.wrote(low, high, values)

    def draw(self, count: int, rng: np.random.Generator, length: int, version: int | None) -> Draw:
        """Draws ``count`` windows of ``length`` slots.

        Raises:
            RecordError: if the replay cannot serve the draw; nothing has changed then.
        """
        raise NotImplementedError

    def update(self, positions: IntArray, priorities: NDArray[np.float64]) -> None:
        """New priorities of rows; samplers without priorities ignore them."""

    def handed_out(self, serials: IntArray) -> None:
        """Another sampler drew these rows; priorities of them may come in."""

    def pending(self) -> int:
        """Rows that a draw may still return."""
        return self.ring.live

    def state_dict(self) -> dict[str, Any]:
        """JSON-able values that the next draw depends on."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores :meth:`state_dict`."""

    def oldest_write(self, length: int) -> int:
        """Windows of ``length`` slots that the oldest write not yet drawn brought: the count of a draw without one.

        Raises:
            RecordError: if the sampler is no queue, or nothing waits.
        """
        raise RecordError(
            f"{type(self).__name__} keeps no queue of writes, so a draw needs a number of rows; give one, or use Fresh"
        )

    def starts(self, length: int) -> tuple[int, int]:
        """Serials at which a window of ``length`` slots may start, as a non-empty half-open range.

        Raises:
            RecordError: if there is none.
        """
        low, high = self.ring.oldest, self.ring.last_start(length)
        if high <= low:
            held = self.ring.live // self.ring.lanes
            raise RecordError(
                f"the replay holds {held} slots of {self.ring.lanes} lane(s); a draw of length {length} needs {length}"
                if held
                else "the replay is empty; write rows before sampling"
            )
        return low, high


def uniform(rng: np.random.Generator, low: int, high: int, count: int) -> IntArray:
    """``count`` integers in ``[low, high)``; half the time of ``Generator.integers``, biased by at most 2**-53 n."""
    return low + (rng.random(count) * (high - low)).astype(np.int64)
