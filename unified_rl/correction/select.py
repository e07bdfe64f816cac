"""Selections: which units a penalty is for, chosen on the whole batch and carried in its statistics."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from unified_rl.correction.view import View


def negative(view: View) -> Tensor:
    """Units of negative advantage, ``[B, N]`` bool."""
    return view.mask & (view.advantage < 0)


def positive(view: View) -> Tensor:
    """Units of positive advantage, ``[B, N]`` bool."""
    return view.mask & (view.advantage > 0)


SELECTIONS: dict[str, Callable[..., Tensor]] = {"negative": negative, "positive": positive}
