"""Which rows a term reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor

from unified_rl.correction.lookup import check_keys
from unified_rl.errors import ConfigError, RecordError
from unified_rl.instantiate import nearest
from unified_rl.ranges import shown
from unified_rl.units import Source

OWN = (Source.ONLINE, Source.OFFLINE)
SOURCES: dict[str, tuple[Source, ...]] = {"own": OWN, **{s.name.lower(): (s,) for s in Source}}
"""Names of ``source``; ``own`` are the rows that this policy or an older version of it sampled."""


class Rows:
    """A choice of rows by where they come from and by gates: ``{source: own, unless: failed}``.

    Args:
        source: a name of :data:`SOURCES` or a list of them; None takes every row.
        when: bool columns ``[B]`` of the record that must hold.
        unless: bool columns that must not.
        where: the full name of the setting, for errors.

    Raises:
        ConfigError: an unknown source.
    """

    def __init__(
        self,
        source: str | Sequence[str] | None = None,
        when: str | Sequence[str] = (),
        unless: str | Sequence[str] = (),
        where: str = "rows",
    ) -> None:
        names = _names(source, f"{where}.source")
        for name in names:
            if name not in SOURCES:
                raise ConfigError(f"{where}.source {shown(name)} is unknown; {nearest(name, SOURCES)}")
        self.sources = [int(s) for name in names for s in SOURCES[name]]
        self.when, self.unless = _names(when, f"{where}.when"), _names(unless, f"{where}.unless")

    @classmethod
    def of(cls, node: str | Sequence[str] | Mapping[str, Any] | Rows | None, where: str = "rows") -> Rows:
        """From a configuration: a source's name, a list of them, or a mapping; ``where`` is the setting's full name."""
        if isinstance(node, Rows):
            return node
        if not isinstance(node, Mapping):
            return cls(node, where=where)
        check_keys(node, ("source", "when", "unless"), where)
        return cls(**node, where=where)

    @property
    def gates(self) -> list[str]:
        """The columns that it reads beside ``source``."""
        return [*self.when, *self.unless]

    @property
    def ungated(self) -> Rows:
        """The same choice by source alone, for a record whose gates are not computed yet."""
        out = Rows()
        out.sources = self.sources
        return out

    @property
    def every(self) -> bool:
        """Whether nothing is left out, whatever the record holds."""
        return not (self.sources or self.when or self.unless)

    def of_record(self, record: TensorDictBase) -> Tensor:
        """The chosen rows, ``[B]`` bool."""
        chosen = torch.ones(record.batch_size, dtype=torch.bool, device=record["mask"].device)
        if self.sources:
            chosen &= torch.isin(record["source"], record["source"].new_tensor(self.sources))
        for name, wanted in [*((n, True) for n in self.when), *((n, False) for n in self.unless)]:
            gate = record.get(name, None)
            if gate is None:
                raise RecordError(f"rows are chosen by {name!r}, which the record lacks; define it in agent.gates")
            chosen &= gate == wanted
        return chosen

    def numbers(self, record: TensorDictBase) -> Tensor:
        """Numbers ``[n]`` of the chosen rows, ascending."""
        return self.of_record(record).nonzero().squeeze(-1)

    def chosen(self, record: TensorDictBase) -> TensorDictBase:
        """The chosen rows alone."""
        return record[self.of_record(record)]

    def within(self, record: TensorDictBase) -> TensorDictBase:
        """The record with the mask of every other row empty; the record itself where nothing is left out."""
        if self.every:
            return record
        out = record.copy()
        out["mask"] = record["mask"] & self.of_record(record).unsqueeze(-1)
        return out


def _names(given: Any, where: str) -> list[str]:
    """A name or a list of them as a list.

    Raises:
        ConfigError: it is neither.
    """
    names = [given] if isinstance(given, str) else [] if given is None else given
    if not isinstance(names, Sequence) or not all(isinstance(name, str) for name in names):
        raise ConfigError(f"{where} is {given!r}; it must be a name, or a list of names")
    return list(names)
