"""Batches with fixed shares of several kinds of rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unified_rl.configurable import configurable
from unified_rl.errors import ConfigError, RecordError
from unified_rl.ranges import NonNegative, ranged
from unified_rl.replay.ring import IntArray, Ring
from unified_rl.replay.samplers.base import Draw, Sampler, uniform
from unified_rl.replay.samplers.grouped import SerialLists
from unified_rl.units import Source

_FILL: dict[str, float] = {"priority_weight": 1.0}


@configurable
class BySource(Sampler):
    """Uniform over the rows of one source, with replacement.

    Args:
        source: a name of :class:`~unified_rl.units.Source` in lower case, such as ``demonstration``.
    """

    keys = ("source",)

    def __init__(self, source: str) -> None:
        names = [member.name.lower() for member in Source]
        if source not in names:
            raise ConfigError(f"there is no source {source!r}; sources are {', '.join(names)}")
        self.source = source

    def reset(self) -> None:
        self.lists = SerialLists()

    def wrote(self, low: int, high: int, values: Mapping[str, NDArray[Any]]) -> None:
        self.lists.append(low, values["source"].reshape(high - low, -1)[:, 0], self.ring.oldest)

    def _serials(self, low: int, high: int) -> IntArray:
        return self.lists.between(Source[self.source.upper()], low, high)

    def pending(self) -> int:
        return len(self._serials(self.ring.oldest, self.ring.written))

    def draw(self, count: int, rng: np.random.Generator, length: int, version: int | None) -> Draw:
        serials = self._serials(*self.starts(length))
        if not len(serials):
            raise RecordError(f"none of the {self.ring.live} rows comes from source {self.source}")
        return Draw(serials[uniform(rng, 0, len(serials), count)], {})


@configurable
@ranged()
class Mixture(Sampler):
    """Fixed shares of a batch from several samplers; by default one for each named source.

    Parts stand one after the other in the batch. Shares are rounded to rows by largest remainder.

    Args:
        quotas: share of each part; they are normalised. A name is a key of ``samplers``, or else a source.
        samplers: parts that are more than "uniform over a source".
        share_missing: whether a part without rows gives its share to the others, instead of being an error.
    """

    def __init__(
        self, quotas: dict[str, NonNegative], samplers: dict[str, Sampler] | None = None, share_missing: bool = False
    ) -> None:
        samplers = samplers or {}
        unused = [name for name in samplers if name not in quotas]
        if unused or not quotas or min(quotas.values()) < 0 or sum(quotas.values()) <= 0:
            raise ConfigError(f"quotas {dict(quotas)} must be positive and name every sampler ({', '.join(samplers)})")
        self.quotas = {name: float(share) for name, share in quotas.items()}
        self.parts = {name: samplers[name] if name in samplers else BySource(name) for name in quotas}
        self.share_missing = share_missing
        self.takes_priority = any(part.takes_priority for part in self.parts.values())
        self.weighs = any(part.weighs for part in self.parts.values())
        self.keys = tuple(dict.fromkeys(key for part in self.parts.values() for key in part.keys))
        self.optional_keys = tuple(
            key
            for key in dict.fromkeys(k for p in self.parts.values() for k in p.optional_keys)
            if key not in self.keys
        )

    def column_types(self) -> dict[str, Any]:
        parts = self.parts.items()
        return {f"{name}.{column}": dtype for name, part in parts for column, dtype in part.column_types().items()}

    def bind(self, ring: Ring, columns: dict[str, NDArray[Any]]) -> None:
        for name, part in self.parts.items():
            part.bind(ring, {column: columns[f"{name}.{column}"] for column in part.column_types()})
        super().bind(ring, columns)

    def reset(self) -> None:
        for part in self.parts.values():
            part.reset()

    def before_write(self, count: int, values: Mapping[str, NDArray[Any]]) -> None:
        for part in self.parts.values():
            part.before_write(count, values)

    def wrote(self, low: int, high: int, values: Mapping[str, NDArray[Any]]) -> None:
        for part in self.parts.values():
            part.wrote(low, high, values)

    def restore(self, low: int, high: int, values: Mapping[str, NDArray[Any]]) -> None:
        for part in self.parts.values():
            part.restore(low, high, values)

    def update(self, positions: IntArray, priorities: NDArray[np.float64]) -> None:
        for part in self.parts.values():
            part.update(positions, priorities)

    def _counts(self, count: int) -> dict[str, int]:
        """Rows of each part."""
        quotas = self.quotas
        if self.share_missing:
            quotas = {name: share for name, share in quotas.items() if self.parts[name].pending()} or quotas
        exact = np.array(list(quotas.values())) * count / sum(quotas.values())
        whole = np.floor(exact).astype(int)
        whole[np.argsort(whole - exact, kind="stable")[: count - whole.sum()]] += 1
        return {name: n for name, n in zip(quotas, whole.tolist(), strict=True) if n}

    def draw(self, count: int, rng: np.random.Generator, length: int, version: int | None) -> Draw:
        before = self.state_dict(), rng.bit_generator.state
        try:
            draws = [self.parts[name].draw(n, rng, length, version) for name, n in self._counts(count).items()]
        except RecordError:
            self.load_state_dict(before[0])
            rng.bit_generator.state = before[1]
            raise
        serials = np.concatenate([draw.serials for draw in draws])
        self.handed_out(serials)
        extras = {}
        for key in dict.fromkeys(key for draw in draws for key in draw.extras):
            fill = _FILL.get(key, 0.0)
            parts = [d.extras[key] if key in d.extras else np.full(len(d.serials), fill, np.float32) for d in draws]
            extras[key] = np.concatenate(parts)
        return Draw(serials, extras)

    def handed_out(self, serials: IntArray) -> None:
        for part in self.parts.values():
            part.handed_out(serials)

    def state_dict(self) -> dict[str, Any]:
        return {name: part.state_dict() for name, part in self.parts.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name, part in self.parts.items():
            part.load_state_dict(state[name])
