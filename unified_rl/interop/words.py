"""What errors say of other people's values and exceptions. Imports no torch."""

from __future__ import annotations

from typing import Any

OWN_NAMES = frozenset({"return", "length", "score", "return_std", "episodes"})
"""Metrics that an info of the same name must not replace."""


def one_line(error: BaseException) -> str:
    """Type and text of an exception, on one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def describe(value: Any) -> str:
    """A value as error messages show it: short, with shape and dtype where it has them."""
    shape, dtype = getattr(value, "shape", None), getattr(value, "dtype", None)
    if shape is not None and dtype is not None:
        values = value.tolist()
        shown = str(values)
        kind = str(dtype).removeprefix("torch.")
        size = "x".join(map(str, shape))
        return f"{shown if len(shown) <= 60 else shown[:57] + '...'} ({f'shape {size}, ' if size else ''}{kind})"
    shown = " ".join(repr(value).split())
    return f"{shown if len(shown) <= 60 else shown[:57] + '...'} ({type(value).__name__})"
