"""The fixed schema of a replay: every write has the same keys, trailing shapes and dtypes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from unified_rl.errors import CheckpointError, RecordError


class Schema:
    """Names, trailing shapes and dtypes of the leaves of a row.

    Args:
        fields: for each key the shape of one row and its dtype.
    """

    def __init__(self, fields: Mapping[str, tuple[torch.Size, torch.dtype]]) -> None:
        self.fields = {key: fields[key] for key in sorted(fields)}
        self._lead: torch.Size | None = None
        self._expected: list[tuple[str, torch.Size, torch.dtype]] = []

    @classmethod
    def of(cls, items: Mapping[str, Any], lead: int) -> Schema:
        """The schema of ``items``, whose first ``lead`` dimensions are batch dimensions.

        Raises:
            RecordError: a value that is not a tensor, or has fewer dimensions than the batch.
        """
        fields = {}
        for key, value in items.items():
            if not isinstance(key, str) or not isinstance(value, Tensor):
                raise RecordError(f"{key!r} is a {type(value).__name__}; a row holds flat, named tensors only")
            if value.ndim < lead:
                raise RecordError(f"{key} has shape {tuple(value.shape)}, fewer dimensions than the batch's {lead}")
            fields[key] = (value.shape[lead:], value.dtype)
        if not fields:
            raise RecordError("a row without a single key cannot be stored")
        return cls(fields)

    def check(self, items: Mapping[str, Any], lead: torch.Size) -> None:
        """Compares a batch ``items`` of batch size ``lead`` with the schema.

        Raises:
            RecordError: a missing or unknown key, another trailing shape or another dtype; nothing is cast.
        """
        if items.keys() != self.fields.keys():
            self._report_keys(items)
        if lead != self._lead:
            self._lead = lead
            self._expected = [(key, lead + shape, dtype) for key, (shape, dtype) in self.fields.items()]
        for key, expected, dtype in self._expected:
            value = items[key]
            if value.dtype is not dtype:
                raise RecordError(f"{key} is {value.dtype}, but this replay holds {dtype}; cast it before writing")
            if value.shape != expected:
                raise RecordError(f"{key} has shape {tuple(value.shape)}, expected {tuple(expected)}")

    def _report_keys(self, items: Mapping[str, Any]) -> None:
        missing = sorted(self.fields.keys() - items.keys())
        unknown = sorted(map(str, items.keys() - self.fields.keys()))
        parts = [f"lack {', '.join(missing)}"] * bool(missing) + [f"bring unknown {', '.join(unknown)}"] * bool(unknown)
        raise RecordError(f"these rows {' and '.join(parts)}; this replay holds {', '.join(self.fields)}")

    def to_plain(self) -> dict[str, Any]:
        """The schema as JSON-able values."""
        return {key: [list(shape), str(dtype).removeprefix("torch.")] for key, (shape, dtype) in self.fields.items()}

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> Schema:
        """The inverse of :meth:`to_plain`.

        Raises:
            CheckpointError: ``plain`` is not what that returned.
        """
        try:
            fields = {key: (torch.Size(shape), getattr(torch, dtype)) for key, (shape, dtype) in plain.items()}
            if not all(isinstance(dtype, torch.dtype) for _, dtype in fields.values()):
                raise ValueError("not a dtype")
        except (AttributeError, TypeError, ValueError) as error:
            raise CheckpointError(f"a saved replay's schema cannot be read: {error}") from error
        return cls(fields)
